package pods

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podd-runtime/podd/kubelet/pods/spec"
)

func TestTerminationMessage(t *testing.T) {
	dir := t.TempDir()
	file := func(name, content string) string {
		p := filepath.Join(dir, name)
		os.WriteFile(p, []byte(content), 0o644)
		return p
	}
	var log strings.Builder
	for i := range 200 {
		fmt.Fprintf(&log, "2026-11-21T04:00:00.0Z stderr F line %d\n", i)
	}
	logPath := file("log", log.String())
	partial := file("partial", "2026 stdout P one \n2026 stdout F two\n")
	os.Symlink("/etc/passwd", filepath.Join(dir, "link"))
	for _, tc := range []struct {
		name, path, log, policy, message string
		code                             int32
		check                            func(string) bool
	}{
		{"the file", file("m", "bye"), logPath, "File", "", 1, func(s string) bool { return s == "bye" }},
		{"after the runtime's", file("m", "bye"), logPath, "File", "oom", 137, func(s string) bool { return s == "oom: bye" }},
		{"the end of a long one", file("long", strings.Repeat("x", 5000)+"end"), logPath, "File", "", 0, func(s string) bool { return len(s) == 4096 && strings.HasSuffix(s, "end") }},
		{"empty, no fallback", file("e", ""), logPath, "File", "", 1, func(s string) bool { return s == "" }},
		{"empty, fallback", file("e", ""), logPath, "FallbackToLogsOnError", "", 1, func(s string) bool {
			return strings.HasSuffix(s, "line 198\nline 199\n") && strings.Count(s, "\n") <= 80 && len(s) <= 2048
		}},
		{"fallback only on error", file("e", ""), logPath, "FallbackToLogsOnError", "", 0, func(s string) bool { return s == "" }},
		{"the file goes before the log", file("m", "bye"), logPath, "FallbackToLogsOnError", "", 1, func(s string) bool { return s == "bye" }},
		{"partial lines", file("e", ""), partial, "FallbackToLogsOnError", "", 1, func(s string) bool { return s == "one two\n" }},
		{"no log", file("e", ""), dir + "/no", "FallbackToLogsOnError", "", 1, func(s string) bool { return strings.HasPrefix(s, "Error on reading termination message from logs") }},
		{"a link instead of the file", filepath.Join(dir, "link"), logPath, "File", "", 1, func(s string) bool { return strings.HasPrefix(s, "Error on reading") && !strings.Contains(s, "root:") }},
		{"a fifo cannot hang us", dir, logPath, "File", "", 1, func(s string) bool { return strings.Contains(s, "not a regular file") }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got := terminationMessage(&runtimeapi.ContainerStatus{
				ExitCode: tc.code, Message: tc.message, LogPath: tc.log, Reason: "Error",
				Annotations: map[string]string{spec.AnnTerminationMessagePath: "/dev/t", spec.AnnTerminationMessagePolicy: tc.policy},
				Mounts:      []*runtimeapi.Mount{{ContainerPath: "/dev/t", HostPath: tc.path}},
			})
			if !tc.check(got) {
				t.Errorf("%q", got)
			}
		})
	}
}

func TestWriteShared(t *testing.T) {
	dir := t.TempDir()
	p := filepath.Join(dir, "sub", "hosts")
	for _, content := range []string{"a long first version\n", "short\n", "short\n", ""} {
		if err := writeShared(p, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
		if got, _ := os.ReadFile(p); string(got) != content {
			t.Fatalf("%q, want %q", got, content)
		}
	}
	before, _ := os.Stat(p)
	writeShared(p, []byte("in place\n"), 0o644)
	if after, _ := os.Stat(p); !os.SameFile(before, after) {
		t.Error("another file: containers that have it mounted see nothing")
	}
	target := filepath.Join(dir, "target")
	os.WriteFile(target, []byte("keep"), 0o644)
	os.Symlink(target, filepath.Join(dir, "link"))
	if err := writeShared(filepath.Join(dir, "link"), []byte("x"), 0o644); err == nil {
		t.Error("wrote through a link")
	}
	if got, _ := os.ReadFile(target); string(got) != "keep" {
		t.Errorf("target is %q", got)
	}
}

func TestParseEnvFiles(t *testing.T) {
	const file = "# comment\n\n  A='1'\nC='multi\nline' # after\nD=''\nE= 'x'\nF='#\\n$x=\"'\n"
	for _, tc := range []struct {
		key, want string
		found     bool
	}{{"A", "1", true}, {"C", "multi\nline", true}, {"D", "", false}, {"E", "", false}, {"F", "#\\n$x=\"", true}, {"Z", "", false}} {
		got, found, err := parseEnv([]byte(file), tc.key)
		if err != nil || got != tc.want || found != tc.found {
			t.Errorf("%s is %q, %v, %v", tc.key, got, found, err)
		}
	}
	for _, bad := range []string{"novalue\n", "A='open\n", "A=1\n", "A ='1'\n", "='1'\n", "A='1'x\n", "A=\"1\"\n"} {
		if _, _, err := parseEnv([]byte(bad), "Z"); err == nil {
			t.Errorf("%q was taken", bad)
		}
	}
}

func TestAttemptByLogs(t *testing.T) {
	dir := t.TempDir()
	if attemptByLogs(filepath.Join(dir, "no")) != 0 {
		t.Error("no directory")
	}
	for _, f := range []string{"0.log", "3.log", "3.log.20261121", "x.log", "99.txt"} {
		os.WriteFile(filepath.Join(dir, f), nil, 0o644)
	}
	if got := attemptByLogs(dir); got != 4 {
		t.Errorf("attempt %d", got)
	}
}

func TestGate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(1, startPatience)
		leave, _ := g.enter(t.Context(), false)
		ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
		defer cancel()
		if _, err := g.enter(ctx, false); err == nil {
			t.Fatal("two at once")
		}
		began := time.Now()
		leave2, err := g.enter(t.Context(), false)
		if err != nil || time.Since(began) != 500*time.Millisecond {
			t.Fatalf("entered after %s: a hanging start must give its place away after a second", time.Since(began))
		}
		leave() // late: its place is gone already
		leave2()
		leave3, _ := g.enter(t.Context(), false)
		leave3()
		if g.free != 1 {
			t.Fatal("a place is lost")
		}
	})
}

func TestUrgentStartsGoFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(1, time.Hour)
		leave, _ := g.enter(t.Context(), false)
		order := make(chan bool, 3)
		for _, urgent := range []bool{false, false, true} {
			go func() {
				leave, _ := g.enter(t.Context(), urgent)
				order <- urgent
				leave()
			}()
			synctest.Wait()
		}
		leave()
		if !<-order {
			t.Error("a usual start went before an urgent one")
		}
		<-order
		<-order
		if g.free != 1 {
			t.Error("a place is lost")
		}
	})
}

func TestUses(t *testing.T) {
	ref := v1.LocalObjectReference{Name: "x"}
	for i, mod := range []func(*v1.Pod){
		func(p *v1.Pod) {
			p.Spec.Volumes = []v1.Volume{{VolumeSource: v1.VolumeSource{ConfigMap: &v1.ConfigMapVolumeSource{LocalObjectReference: ref}}}}
		},
		func(p *v1.Pod) {
			p.Spec.Volumes = []v1.Volume{{VolumeSource: v1.VolumeSource{Secret: &v1.SecretVolumeSource{SecretName: "x"}}}}
		},
		func(p *v1.Pod) {
			p.Spec.Volumes = []v1.Volume{{VolumeSource: v1.VolumeSource{Projected: &v1.ProjectedVolumeSource{Sources: []v1.VolumeProjection{{Secret: &v1.SecretProjection{LocalObjectReference: ref}}}}}}}
		},
		func(p *v1.Pod) {
			p.Spec.Volumes = []v1.Volume{{VolumeSource: v1.VolumeSource{PersistentVolumeClaim: &v1.PersistentVolumeClaimVolumeSource{ClaimName: "x"}}}}
		},
		func(p *v1.Pod) { p.Spec.ImagePullSecrets = []v1.LocalObjectReference{ref} },
		func(p *v1.Pod) {
			p.Spec.Containers[0].EnvFrom = []v1.EnvFromSource{{SecretRef: &v1.SecretEnvSource{LocalObjectReference: ref}}}
		},
		func(p *v1.Pod) {
			p.Spec.Containers[0].Env = []v1.EnvVar{{ValueFrom: &v1.EnvVarSource{ConfigMapKeyRef: &v1.ConfigMapKeySelector{LocalObjectReference: ref}}}}
		},
	} {
		p := mkpod("a", "u", mod)
		if !uses(p, p.Namespace, "x") || uses(p, p.Namespace, "y") || uses(p, "other", "x") {
			t.Errorf("case %d", i)
		}
	}
}

func TestWithTag(t *testing.T) {
	for in, want := range map[string]string{
		"nginx": "nginx:latest", "nginx:1": "nginx:1", "reg:5000/a": "reg:5000/a:latest", "reg:5000/a:2": "reg:5000/a:2",
		"a@sha256:" + strings.Repeat("0", 64): "a@sha256:" + strings.Repeat("0", 64),
	} {
		if got, err := withTag(in); err != nil || got != want {
			t.Errorf("%s: %s %v", in, got, err)
		}
	}
	if _, err := withTag("UPPER CASE"); err == nil {
		t.Error("an invalid name was taken")
	}
}

// TestOnlyRegularFilesOfContainersAreRead: what a container puts in the place of
// a file neither keeps podd waiting nor is a device of the host.
func TestOnlyRegularFilesOfContainersAreRead(t *testing.T) {
	dir, outside := t.TempDir(), t.TempDir()
	for path, content := range map[string]string{dir + "/plain": "A='1'", outside + "/secret": "A='2'"} {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(os.Symlink("plain", dir+"/link"), os.Symlink(outside+"/secret", dir+"/out"), os.Mkdir(dir+"/dir", 0o700),
		unix.Mkfifo(dir+"/fifo", 0o600)); err != nil {
		t.Fatal(err)
	}
	bad := []string{"out", "dir", "fifo", "../" + filepath.Base(outside) + "/secret", "none"}
	if unix.Mknod(dir+"/zero", unix.S_IFCHR|0o666, int(unix.Mkdev(1, 5))) == nil {
		bad = append(bad, "zero")
	}
	for _, name := range bad {
		if data, err := readBelow(dir, name, 100); err == nil {
			t.Errorf("%s: %q", name, data)
		}
	}
	for _, name := range []string{"plain", "link", "dir/../plain"} {
		if data, err := readBelow(dir, name, 100); err != nil || string(data) != "A='1'" {
			t.Errorf("%s: %q, %v", name, data, err)
		}
	}
	if _, err := readBelow(dir, "none", 1); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a file that is not there: %v", err)
	}
}
