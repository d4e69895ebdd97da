package cri

import (
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podd-runtime/podd/cri/shim"
)

// maxQueued bounds what waits for one subscriber. A node that starts a
// thousand containers makes about three thousand events; who is further behind
// than this is disconnected and has to list again.
const maxQueued = 16384

// event is one change of a container's or sandbox' life. It is queued under
// the object's lock, so the order of one object's events is their order in
// fact; the statuses are collected when it is delivered.
type event struct {
	id        string
	sandboxID string
	kind      runtimeapi.ContainerEventType
	at        int64
	// sandbox is set where the sandbox is gone by the time of the delivery.
	sandbox *runtimeapi.PodSandboxStatus
}

// broker hands events to subscribers: each sees every event after its
// subscription once, in order.
type broker struct {
	mu     sync.Mutex
	subs   map[*subscriber]struct{}
	queue  []event
	wake   chan struct{} // made with the first subscriber
	closed bool
}

// subscriber is one listener with its queue.
type subscriber struct {
	mu    sync.Mutex
	queue []*runtimeapi.ContainerEventResponse
	wake  chan struct{}
	err   error
}

func (b *broker) emit(e event) {
	e.at = now()
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.subs) == 0 || b.closed {
		return
	}
	b.queue = append(b.queue, e)
	poke(b.wake)
}

func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// subscribe adds a listener; the first one brings the delivering goroutine.
func (s *Service) subscribe() (*subscriber, func(), error) {
	b := &s.events
	sub := &subscriber{wake: make(chan struct{}, 1)}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return nil, nil, fmt.Errorf("the runtime is stopping: %w", errdefs.ErrUnavailable)
	}
	if b.subs == nil {
		b.subs = make(map[*subscriber]struct{})
		b.wake = make(chan struct{}, 1)
		s.wg.Go(s.deliver)
	}
	b.subs[sub] = struct{}{}
	return sub, func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		delete(b.subs, sub)
	}, nil
}

// deliver turns queued events into messages for every subscriber.
func (s *Service) deliver() {
	b := &s.events
	for range b.wake {
		for {
			b.mu.Lock()
			batch := b.queue
			b.queue = nil
			subs := make([]*subscriber, 0, len(b.subs))
			for sub := range b.subs {
				subs = append(subs, sub)
			}
			closed := b.closed
			b.mu.Unlock()
			for _, e := range batch {
				m := s.message(e)
				for _, sub := range subs {
					sub.push(m)
				}
			}
			if closed {
				return
			}
			if len(batch) == 0 {
				break
			}
		}
	}
}

func (s *Service) message(e event) *runtimeapi.ContainerEventResponse {
	m := &runtimeapi.ContainerEventResponse{
		ContainerId: e.id, ContainerEventType: e.kind, CreatedAt: e.at, PodSandboxStatus: e.sandbox,
	}
	if m.PodSandboxStatus == nil {
		if sb, err := s.objects.sandbox(e.sandboxID); err == nil {
			m.PodSandboxStatus = sb.criStatus()
		}
	}
	m.ContainersStatuses = s.containerStatuses(e.sandboxID)
	return m
}

// close ends all subscriptions with an error.
func (b *broker) close() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed = true
	for sub := range b.subs {
		sub.fail(fmt.Errorf("the runtime is stopping: %w", errdefs.ErrUnavailable))
	}
	if b.wake != nil {
		poke(b.wake)
	}
}

func (s *subscriber) push(m *runtimeapi.ContainerEventResponse) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return
	}
	if len(s.queue) >= maxQueued {
		s.queue = nil
		s.err = fmt.Errorf("%d events wait for this client, which is too slow; list and subscribe again: %w", maxQueued, errdefs.ErrResourceExhausted)
	} else {
		s.queue = append(s.queue, m)
	}
	poke(s.wake)
}

func (s *subscriber) fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err == nil {
		s.err = err
	}
	poke(s.wake)
}

// next returns what has come, waiting for at least one.
func (s *subscriber) next(ctx context.Context) ([]*runtimeapi.ContainerEventResponse, error) {
	for {
		s.mu.Lock()
		batch, err := s.queue, s.err
		s.queue = nil
		s.mu.Unlock()
		if len(batch) > 0 {
			return batch, nil
		}
		if err != nil {
			return nil, err
		}
		select {
		case <-s.wake:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// Subscribe returns the container events from now on: created, started,
// stopped and deleted, of containers and of sandboxes, each once and in order.
// It carries nothing historical: list after subscribing. The channel is closed
// when ctx ends, the service is closed, or the receiver is so far behind that
// its queue is full.
func (s *Service) Subscribe(ctx context.Context) <-chan *runtimeapi.ContainerEventResponse {
	out := make(chan *runtimeapi.ContainerEventResponse)
	sub, leave, err := s.subscribe()
	if err != nil {
		close(out)
		return out
	}
	s.wg.Go(func() {
		defer close(out)
		defer leave()
		for {
			batch, err := sub.next(ctx)
			if err != nil {
				return
			}
			for _, m := range batch {
				select {
				case out <- m:
				case <-ctx.Done():
					return
				}
			}
		}
	})
	return out
}

// GetContainerEvents streams the events of Subscribe to a CRI client. A client
// that does not keep up gets ResourceExhausted.
func (s *Service) GetContainerEvents(_ *runtimeapi.GetEventsRequest, stream grpc.ServerStreamingServer[runtimeapi.ContainerEventResponse]) error {
	sub, leave, err := s.subscribe()
	if err != nil {
		return err
	}
	defer leave()
	for {
		batch, err := sub.next(stream.Context())
		if err != nil {
			return err
		}
		for _, m := range batch {
			if err := stream.Send(m); err != nil {
				return err
			}
		}
	}
}

// follow applies the shim's events. It runs for the life of the service and
// begins again where it stopped when the stream breaks.
func (s *Service) follow(ctx context.Context) {
	for ctx.Err() == nil {
		ch, err := s.procs.Events(ctx, s.seq.Get())
		if err != nil {
			s.log.Error("shim events unavailable, retrying", "error", err)
			select {
			case <-time.After(time.Second):
			case <-ctx.Done():
			}
			continue
		}
		for e := range ch {
			if last := s.seq.Get(); last != 0 && e.Seq > last+1 {
				s.log.Warn("shim events were missed, listing anew", "after", last, "next", e.Seq)
				s.relist(ctx)
			}
			s.apply(ctx, e)
			s.seq.Set(e.Seq)
		}
	}
}

// relist learns from the shim's present what events that are gone had told:
// its log keeps the newest few thousand.
func (s *Service) relist(ctx context.Context) {
	list, err := s.procs.List(ctx)
	if err != nil {
		s.log.Error("shim processes not listed", "error", err)
		return
	}
	procs := make(map[string]shim.Process, len(list))
	for _, p := range list {
		procs[p.ID] = p
	}
	for _, c := range s.objects.allContainers() {
		c.mu.Lock()
		running, pid := c.state == runtimeapi.ContainerState_CONTAINER_RUNNING, c.status.PID
		c.mu.Unlock()
		if !running {
			continue
		}
		p, known := procs[c.id]
		if !known {
			// It may have been started after the list was made.
			if _, err := s.procs.State(ctx, c.id); !errdefs.IsNotFound(err) {
				continue
			}
			s.lost(c)
		} else if p.Exit != nil {
			s.markExited(c, p.Exit, pid)
		}
	}
	for _, sb := range s.objects.allSandboxes() {
		if p, known := procs[sb.id]; known && p.Exit != nil {
			s.sandboxDied(sb)
		}
	}
}

// apply makes one event of the shim a change of state. Applying it again
// changes nothing: after a crash of podd the last ones come twice.
func (s *Service) apply(ctx context.Context, e shim.Event) {
	if e.Sandbox {
		if sb, err := s.objects.sandbox(e.ID); err == nil && e.Kind == shim.EventExited {
			s.sandboxDied(sb)
		}
		return
	}
	c, err := s.objects.container(e.ID)
	if err != nil {
		return // made by an attempt that was undone, or removed since
	}
	switch e.Kind {
	case shim.EventOOM:
		c.mu.Lock()
		if at := e.At.UnixNano(); at > c.status.OOMKilledAt { // not told before
			c.status.OOMKills++
			c.status.OOMKilledAt = at
			s.persistSoon(c)
		}
		c.mu.Unlock()
	case shim.EventStarted:
		c.mu.Lock()
		first := c.status.StartedAt == 0
		if first {
			s.markRunningLocked(c, e.PID, e.At.UnixNano())
			s.persistSoon(c)
		}
		c.mu.Unlock()
	case shim.EventExited:
		exit := e.Exit
		if exit == nil {
			exit = &shim.Exit{Code: exitUnknown, At: e.At}
		}
		c.mu.Lock()
		starting, created := c.starting, c.state == runtimeapi.ContainerState_CONTAINER_CREATED
		c.mu.Unlock()
		switch {
		case starting:
			// Create or Start of the shim has not answered yet, and whether
			// the payload ever ran is theirs to say.
			p, err := s.answered(ctx, c.id)
			if err != nil || p.StartedAt.IsZero() {
				return
			}
		case created:
			// A start would have been told before: this is the init of one that
			// a killed podd had begun and the sweep took back. It never ran, and
			// can still be started.
			return
		}
		s.markExited(c, exit, e.PID)
	}
}

// answered is the state of a process by a shim that may be away just now. The
// events of all wait meanwhile: they come from the same shim.
func (s *Service) answered(ctx context.Context, id string) (*shim.Process, error) {
	for {
		p, err := s.procs.State(ctx, id)
		if !errdefs.IsUnavailable(err) {
			return p, err
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(100 * time.Millisecond): // the client itself waits for seconds
		}
	}
}

// sandboxDied notes that a pause process has ended by itself; the pod cannot
// go on and the kubelet makes another sandbox.
func (s *Service) sandboxDied(sb *sandbox) {
	sb.mu.Lock()
	defer sb.mu.Unlock()
	if !sb.ready {
		return
	}
	sb.ready = false
	if err := s.saveSandbox(sb); err != nil {
		s.log.Error("sandbox record not written", "sandbox", sb.id, "error", err)
	}
	s.log.Warn("sandbox process ended", "sandbox", sb.id, "pid", sb.pid)
	s.events.emit(event{id: sb.id, sandboxID: sb.id, kind: runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT})
}

// sequence is the number of the last applied event, in a file below the run
// directory: it lives exactly as long as the shim's log does.
type sequence struct {
	mu  sync.Mutex
	f   *os.File
	seq uint64
}

func openSequence(path string) (*sequence, error) {
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CREAT|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	q := &sequence{f: os.NewFile(uintptr(fd), path)}
	var b [8]byte
	if n, _ := q.f.ReadAt(b[:], 0); n == len(b) {
		q.seq = binary.LittleEndian.Uint64(b[:])
	}
	return q, nil
}

// Get returns the number of the last applied event, 0 for none.
func (q *sequence) Get() uint64 {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.seq
}

// Set notes that all events up to n have been applied.
func (q *sequence) Set(n uint64) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.seq = n
	var b [8]byte
	binary.LittleEndian.PutUint64(b[:], n)
	_, _ = q.f.WriteAt(b[:], 0) // losing it means applying some events again, which is harmless
}

func (q *sequence) Close() { _ = q.f.Close() }
