package server_test

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

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

// A pause of which its shim has not taken note ends with the shim: nobody else
// ever would end it.
func TestPauseEndsWithAShimThatTookNoNote(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: pause changes its root directory")
	}
	if os.Getenv("PODD_SHIM") != "" {
		t.Skip("the program is in podd-shim only")
	}
	if _, err := shimBinary(); err != nil { // builds pause
		t.Fatal(err)
	}
	for _, noted := range []bool{false, true} {
		status, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		ours, theirs := os.NewFile(uintptr(status[0]), "status"), os.NewFile(uintptr(status[1]), "status")
		empty, err := os.Open(t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		null, err := os.Open(os.DevNull)
		if err != nil {
			t.Fatal(err)
		}
		pause := exec.Command("../../../cmd/podd-shim/embed/pause")
		pause.ExtraFiles = []*os.File{theirs, null, null, empty}
		if err := pause.Start(); err != nil {
			t.Fatal(err)
		}
		for _, f := range []*os.File{theirs, null, empty} {
			f.Close()
		}
		said := make([]byte, 64)
		if n, err := ours.Read(said); err != nil || string(said[:n]) != "k" {
			t.Fatalf("pause said %q, %v", said[:n], err)
		}
		if noted {
			if _, err := ours.Write([]byte("g")); err != nil {
				t.Fatal(err)
			}
			if n, err := ours.Read(said); err != io.EOF { // it goes on without the socket
				t.Errorf("pause said %q, %v", said[:n], err)
			}
			if err := pause.Process.Signal(unix.Signal(0)); err != nil {
				t.Errorf("a pause that was noted has ended: %v", err)
			}
			_ = pause.Process.Kill()
		}
		ours.Close()
		ended := make(chan error, 1)
		go func() { ended <- pause.Wait() }()
		select {
		case <-ended:
		case <-time.After(10 * time.Second):
			_ = pause.Process.Kill()
			t.Error("pause outlives a shim that took no note of it")
		}
	}
}
