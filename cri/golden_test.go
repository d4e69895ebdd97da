package cri

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Records of every release must load for ever: testdata/records-N holds those
// of format N, as a node had them.
func TestOldRecordsLoad(t *testing.T) {
	dirs, err := filepath.Glob("testdata/records-*")
	if err != nil || len(dirs) == 0 {
		t.Fatalf("no records: %v", err)
	}
	for _, dir := range dirs {
		t.Run(filepath.Base(dir), func(t *testing.T) {
			f := newFixture(t)
			if err := f.Service.Close(); err != nil {
				t.Fatal(err)
			}
			if err := os.CopyFS(filepath.Join(f.cfg.DataDir, "cri"), os.DirFS(dir)); err != nil {
				t.Fatal(err)
			}
			f.start(t)
			if left := names(filepath.Join(f.cfg.DataDir, "cri", "quarantine")); len(left) > 0 {
				t.Errorf("quarantined: %v", left)
			}
			pods, cs := f.listSandboxes(nil), f.listContainers(nil)
			if len(pods) != 1 || len(cs) != 2 || pods[0].Metadata.Name != "web" || pods[0].State != runtimeapi.PodSandboxState_SANDBOX_NOTREADY {
				t.Fatalf("%v, %v", pods, cs)
			}
			for _, c := range cs {
				s := f.status(t, c.Id)
				want := map[string]string{"ended": "Error 7", "runs": "Unknown 255"}[s.Metadata.Name]
				if got := fmt.Sprint(s.Reason, " ", s.ExitCode); got != want || s.ImageId != "sha256:aaaa" || s.User.Linux.Uid != 0 {
					t.Errorf("%s: %v", s.Metadata.Name, s)
				}
			}
		})
	}
}
