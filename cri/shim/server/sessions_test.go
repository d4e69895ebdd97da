package server_test

import (
	"errors"
	"os"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/podd-runtime/podd/cri/shim"
)

// TestAttachEndsWithItsClient: nothing stays of clients that have gone, also
// when the container takes none of their input.
func TestAttachEndsWithItsClient(t *testing.T) {
	n := newNode(t)
	spec := n.containerSpec(n.sandbox(), "exec sleep 1000")
	spec.Stdin = true
	n.run(spec)
	times := 100
	if os.Getenv("PODD_TEST_ALL") != "" {
		times = 5000
	}
	client := func() {
		t.Helper()
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer w.Close()
		s, err := n.Attach(n.ctx(), spec.ID, r, nil, nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Close()
		if _, err := w.Write(make([]byte, 64<<10)); err != nil { // more than stdin has room for
			t.Fatal(err)
		}
		s.Close()
	}
	client()
	before := n.holds()
	for range times {
		client()
	}
	n.holdsNoMoreThan(before)
	if _, err := n.State(n.ctx(), spec.ID); err != nil {
		t.Error(err)
	}
}

// TestSessionsLeaveRoom: whoever opens as many as he may for one container keeps
// neither calls nor other containers from theirs, and has room again later.
func TestSessionsLeaveRoom(t *testing.T) {
	n := newNode(t)
	box := n.sandbox()
	spec, other := n.containerSpec(box, "exec sleep 1000"), n.containerSpec(box, "exec sleep 1000")
	spec.Stdin = true
	n.run(spec)
	n.run(other)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	defer r.Close()
	var open []shim.Session
	begin := time.Now()
	for {
		s, err := n.Attach(n.ctx(), spec.ID, r, nil, nil)
		if errors.Is(err, errdefs.ErrResourceExhausted) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if open = append(open, s); len(open) > 5000 {
			t.Fatal("there is no end to sessions of one container")
		}
	}
	t.Logf("%d sessions in %v", len(open), time.Since(begin))
	echo := &specs.Process{Args: []string{"/bin/true"}, Cwd: "/", Env: []string{"PATH=/bin"}}
	if _, err := n.Exec(n.ctx(), &shim.ExecSpec{ContainerID: spec.ID, Process: echo}); !errors.Is(err, errdefs.ErrResourceExhausted) {
		t.Errorf("one exec more: %v", err)
	}
	if _, exit := n.execOut(other.ID, "/bin/true"); exit.Code != 0 {
		t.Errorf("exec in another container: %+v", exit)
	}
	if _, err := n.State(n.ctx(), spec.ID); err != nil {
		t.Error(err)
	}
	if _, err := n.List(n.ctx()); err != nil {
		t.Error(err)
	}
	n.sandbox()
	begin = time.Now()
	for _, s := range open {
		s.Close()
	}
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		s, err := n.Exec(n.ctx(), &shim.ExecSpec{ContainerID: spec.ID, Process: echo})
		if err == nil {
			s.Close()
			t.Logf("room again after %v", time.Since(begin))
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("when all have gone: %v", err)
		}
	}
}

// TestAttachedClientsAreBounded: each costs memory.
func TestAttachedClientsAreBounded(t *testing.T) {
	n := newNode(t)
	spec := n.containerSpec(n.sandbox(), "exec sleep 1000")
	n.run(spec)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	defer r.Close()
	for i := range 1000 {
		s, err := n.Attach(n.ctx(), spec.ID, nil, w, nil)
		if errors.Is(err, errdefs.ErrResourceExhausted) {
			if i < 10 {
				t.Errorf("only %d clients", i)
			}
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
	}
	t.Error("there is no end to attached clients")
}
