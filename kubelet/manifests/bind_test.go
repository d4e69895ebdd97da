package manifests

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func pvDoc(name, size, extra string) string {
	return fmt.Sprintf("apiVersion: v1\nkind: PersistentVolume\nmetadata: {name: %s}\nspec:\n  capacity: {storage: %s}\n  accessModes: [ReadWriteMany]\n  hostPath: {path: /data/%s}\n%s---\n", name, size, name, extra)
}

func pvcDoc(name, size, extra string) string {
	return fmt.Sprintf("apiVersion: v1\nkind: PersistentVolumeClaim\nmetadata: {name: %s}\nspec:\n  accessModes: [ReadWriteMany]\n  resources: {requests: {storage: %s}}\n%s---\n", name, size, extra)
}

// bindingSource has read a directory with one file.
func bindingSource(t *testing.T, state, text string) *Source {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "volumes.yaml"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	s := New(Config{Dir: dir, NodeName: "node", Bindings: filepath.Join(state, "claims.json")}, nil)
	for _, o := range docsOf(t, s) {
		s.objects.set(o.ref(), &o)
	}
	return s
}

func docsOf(t *testing.T, s *Source) []object {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(s.cfg.Dir, "volumes.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	objects, problems, fatal := s.decoder.decodeFile("volumes.yaml", text)
	if fatal {
		t.Fatal(problems)
	}
	return objects
}

// bound names the volume of a claim, "" when it has none.
func bound(t *testing.T, s *Source, claim string) string {
	t.Helper()
	_, pv, err := s.PersistentVolume(context.Background(), "default", claim)
	if err != nil {
		if !errdefs.IsUnavailable(err) && !errdefs.IsFailedPrecondition(err) && !errdefs.IsNotFound(err) {
			t.Errorf("%s: %v", claim, err)
		}
		return ""
	}
	return pv.Name
}

func TestClaimsFindTheirVolume(t *testing.T) {
	volumes := pvDoc("small", "1Gi", "") + pvDoc("big", "10Gi", "") +
		pvDoc("reserved", "5Gi", "  claimRef: {namespace: default, name: owner}\n") +
		pvDoc("fast", "1Gi", "  storageClassName: fast\n")
	for name, c := range map[string]struct{ doc, want string }{
		"smallest that fits":    {pvcDoc("c", "1Gi", ""), "small"},
		"size":                  {pvcDoc("c", "2Gi", ""), "big"},
		"too large":             {pvcDoc("c", "2Ti", ""), ""},
		"class":                 {pvcDoc("c", "1Gi", "  storageClassName: fast\n"), "fast"},
		"by name":               {pvcDoc("c", "1Gi", "  volumeName: big\n"), "big"},
		"by a name that is not": {pvcDoc("c", "1Gi", "  volumeName: none\n"), ""},
		"reserved for another":  {pvcDoc("c", "1Gi", "  volumeName: reserved\n"), ""},
		"selector":              {pvcDoc("c", "1Gi", "  selector: {matchLabels: {a: b}}\n"), ""},
		"mode":                  {strings.Replace(pvcDoc("c", "1Gi", ""), "ReadWriteMany", "ReadWriteOncePod", 1), ""},
	} {
		if got := bound(t, bindingSource(t, t.TempDir(), volumes+c.doc), "c"); got != c.want {
			t.Errorf("%s: bound to %q, want %q", name, got, c.want)
		}
	}
	s := bindingSource(t, t.TempDir(), volumes+pvcDoc("owner", "1Gi", ""))
	if got := bound(t, s, "owner"); got != "reserved" {
		t.Errorf("the claim that a volume is reserved for is bound to %q", got)
	}
	if got := bound(t, s, "unknown"); got != "" {
		t.Errorf("a claim that is not there is bound to %q", got)
	}
}

func TestBindingLasts(t *testing.T) {
	state := t.TempDir()
	claims := pvcDoc("one", "1Gi", "") + pvcDoc("two", "1Gi", "")
	s := bindingSource(t, state, pvDoc("m", "2Gi", "")+claims)
	if got := bound(t, s, "one"); got != "m" {
		t.Fatalf("bound to %q", got)
	}
	if got := bound(t, s, "two"); got != "" {
		t.Fatalf("a volume was given away twice: %q", got)
	}
	// A better fit after a restart: the one keeps its data, the other gets it.
	s = bindingSource(t, state, pvDoc("m", "2Gi", "")+pvDoc("a", "1Gi", "")+claims)
	if one, two := bound(t, s, "one"), bound(t, s, "two"); one != "m" || two != "a" {
		t.Errorf("after a restart: %q and %q", one, two)
	}
	// The volume's document is away: no other data in its place.
	s = bindingSource(t, state, pvDoc("b", "1Gi", "")+claims)
	if got := bound(t, s, "one"); got != "" {
		t.Errorf("other data under a claim: %q", got)
	}
	// Both have gone: the claim of that name begins anew.
	s = bindingSource(t, state, pvcDoc("three", "1Gi", ""))
	bound(t, s, "three")
	s = bindingSource(t, state, pvDoc("b", "1Gi", "")+claims)
	if got := bound(t, s, "one"); got != "b" {
		t.Errorf("after both had gone: %q", got)
	}
	if err := os.WriteFile(filepath.Join(state, "claims.json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	s = bindingSource(t, state, pvDoc("b", "1Gi", "")+claims)
	if _, _, err := s.PersistentVolume(context.Background(), "default", "one"); !errdefs.IsDataLoss(err) {
		t.Errorf("a broken record: %v", err)
	}
}
