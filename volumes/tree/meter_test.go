package tree

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

// TestMeter: the first question waits, the next get what is known, and a tree
// that takes long keeps no other from being measured.
func TestMeter(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	var group sync.WaitGroup
	defer group.Wait()
	defer cancel()
	slow := make(chan struct{})
	m := NewMeter(slog.New(slog.DiscardHandler), func(ctx context.Context, key string, pace Stepper) (Usage, error) {
		for key == "slow" {
			select {
			case <-slow:
				return Usage{Bytes: 7}, nil
			default:
			}
			if err := pace.Step(ctx); err != nil {
				return Usage{}, err
			}
		}
		switch key {
		case "gone":
			return Usage{}, fs.ErrNotExist
		case "broken":
			return Usage{}, errors.New("input/output error")
		}
		return Usage{Bytes: 1, Inodes: 2}, nil
	})
	group.Go(func() { m.Run(ctx) })
	soon, stop := context.WithTimeout(ctx, 50*time.Millisecond)
	defer stop()
	if _, err := m.Usage(soon, "slow"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("slow: %v", err)
	}
	for range 2 {
		if u, err := m.Usage(ctx, "quick"); err != nil || u.Bytes != 1 || u.Inodes != 2 {
			t.Errorf("quick: %+v, %v", u, err)
		}
		// What could not be asked is not little.
		for _, key := range []string{"gone", "broken"} {
			if u, err := m.Usage(ctx, key); err == nil {
				t.Errorf("%s: %+v", key, u)
			}
		}
	}
	m.mu.Lock()
	if m.keys["gone"] != nil {
		t.Error("what is gone is remembered")
	}
	m.mu.Unlock()
	close(slow)
	if u, err := m.Usage(ctx, "slow"); err != nil || u.Bytes != 7 {
		t.Errorf("slow: %+v, %v", u, err)
	}
	if u := m.Total(); u.Bytes != 8 {
		t.Errorf("all: %+v", u)
	}
	m.Forget("slow")
	if u := m.Total(); u.Bytes != 1 {
		t.Errorf("all that is left: %+v", u)
	}
	cancel()
	group.Wait()
	if _, err := m.Usage(context.Background(), "late"); !errdefs.IsUnavailable(err) {
		t.Errorf("after the end: %v", err)
	}
}
