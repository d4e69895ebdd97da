package kubelet

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"testing"
	"time"
)

func TestUntilExit(t *testing.T) {
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- untilExit(t.Context(), cmd.Process.Pid) }()
	select {
	case err := <-ended:
		t.Fatalf("before the end: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	cmd.Process.Kill()
	select {
	case err := <-ended:
		if err != nil {
			t.Fatal(err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("the end is not noticed")
	}
	cmd.Wait()
	if err := untilExit(t.Context(), cmd.Process.Pid); err != nil {
		t.Errorf("no such process: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := untilExit(ctx, os.Getpid()); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
}
