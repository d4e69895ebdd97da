package shim

import (
	"context"
	"errors"
	"testing"
)

func TestEnsureByAsksOnceAndTellsWhatFailed(t *testing.T) {
	no := errors.New("no such unit")
	asked := 0
	_, err := EnsureBy(t.Context(), t.TempDir(), nil, func(context.Context) error { asked++; return no })
	if !errors.Is(err, no) || asked != 1 {
		t.Errorf("asked %d times, got %v", asked, err)
	}
	// Somebody who says that it was started, and it was not.
	ctx, cancel := context.WithCancel(t.Context())
	_, err = EnsureBy(ctx, t.TempDir(), nil, func(context.Context) error { cancel(); return nil })
	if !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}
