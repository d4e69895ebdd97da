package pods

import (
	"context"
	"fmt"
)

// Recovered is closed when the pods of the last run are taken up: what the
// table says from then on is true of them, too.
func (t *Table) Recovered() <-chan struct{} { return t.recovered }

// Alive asks every worker to answer. They never wait for anything but their
// inbox, so that one which does not by the end of ctx never will.
func (t *Table) Alive(ctx context.Context) error {
	asked := make(chan struct{})
	go func() { // a mutex that is never given back must not take the caller with it
		defer close(asked)
		for _, w := range t.all() {
			heard := make(chan struct{})
			w.post(func() { close(heard) })
			select {
			case <-heard:
			case <-w.ended:
			case <-ctx.Done():
				return
			}
		}
	}()
	select {
	case <-asked:
		if ctx.Err() == nil {
			return nil
		}
	case <-ctx.Done():
	}
	return fmt.Errorf("workers of pods do not answer: %w", ctx.Err())
}
