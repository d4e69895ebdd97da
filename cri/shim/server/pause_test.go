package server_test

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/podd-runtime/podd/cri/shim"
)

// A container that shares its pod's PID namespace and may trace processes (a
// debugger, say) reaches what pause has, and nothing of the node's files from
// there: ".." must not lead out of pause's root, as it leads out of a chroot.
func TestPauseIsNoWayOut(t *testing.T) {
	n := newNode(t)
	box := n.sandbox(func(s *shim.SandboxSpec) {
		s.Namespaces = append(s.Namespaces, specs.PIDNamespace)
	})
	mark := n.dir + "/secret"
	if err := os.WriteFile(mark, []byte("the node's\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	spec := n.containerSpec(box, "sleep 1000")
	for i, ns := range spec.Spec.Linux.Namespaces {
		if ns.Type == specs.PIDNamespace {
			spec.Spec.Linux.Namespaces[i].Path = fmt.Sprintf("/proc/%d/ns/pid", box.PID)
		}
	}
	caps := spec.Spec.Process.Capabilities
	all := append(slices.Clone(caps.Bounding), "CAP_SYS_PTRACE")
	caps.Bounding, caps.Effective, caps.Permitted = all, all, all
	n.run(spec)
	if out, exit := n.execOut(spec.ID, "cat", "/proc/1/comm"); exit.Code != 0 || strings.TrimSpace(out) != "pause" {
		t.Fatalf("process 1 is %q (exit %+v), the test shows nothing", out, exit)
	}
	for _, way := range []string{"root", "cwd"} {
		out, exit := n.execOut(spec.ID, "ls", "-a", "/proc/1/"+way+"/")
		t.Logf("%s (exit %d): %q", way, exit.Code, out)
		for _, up := range []string{"", "/..", "/../..", "/../../..", "/../../../.."} {
			if out, exit := n.execOut(spec.ID, "cat", "/proc/1/"+way+up+mark); exit.Code == 0 {
				t.Errorf("a container reads the node's file by /proc/1/%s%s: %q", way, up, out)
			}
		}
	}
}

// What somebody who reached a pod's descriptor store put into it for another
// pod's container is not believed.
func TestStoreSpeaksForItsOwnPodOnly(t *testing.T) {
	n := newNode(t)
	hostile, victim := n.sandbox(), n.sandbox() // taken up in this order
	spec := n.containerSpec(victim, "while read x; do echo got $x; done; sleep 1000")
	spec.Stdin = true
	n.run(spec)
	n.feed(spec.ID, "one\n")
	n.waitLog(spec.LogPath, "got one")

	pidfd, err := unix.PidfdOpen(hostile.PID, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pidfd)
	store, err := unix.PidfdGetfd(pidfd, 4, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(store)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	message := fmt.Sprintf(`{"id":%q,"names":["stdout"]}`, spec.ID)
	if err := unix.Sendmsg(store, []byte(message), unix.UnixRights(int(r.Fd())), nil, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := w.WriteString("forged\n"); err != nil {
		t.Fatal(err)
	}
	n.kill()
	n.restart()
	n.feed(spec.ID, "two\n")
	n.waitLog(spec.LogPath, "got two")
	if out, _ := logged(t, spec.LogPath); strings.Contains(out, "forged") {
		t.Errorf("log %q", out)
	}
}
