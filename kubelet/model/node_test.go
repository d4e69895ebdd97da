package model

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/rest"

	"github.com/podd-runtime/podd/cgroups"
	"github.com/podd-runtime/podd/kubelet/apiserver"
	"github.com/podd-runtime/podd/kubelet/manifests"
	"github.com/podd-runtime/podd/kubelet/pods"
	"github.com/podd-runtime/podd/kubelet/pods/spec"
	"github.com/podd-runtime/podd/kubelet/shutdown"
	"github.com/podd-runtime/podd/kubelet/status"
)

// daemon is one podd, from its start to its end.
type daemon struct {
	w      *world
	table  *pods.Table
	pods   *apiserver.Pods
	static manifests.Sink
	uses   *uses
	dead   chan struct{} // closed at a kill
	cancel context.CancelFunc
	work   sync.WaitGroup
}

// uses remembers for which pods objects are watched.
type uses struct {
	mu   sync.Mutex
	pods map[types.UID]bool
}

func (u *uses) Use(uid types.UID, pod *v1.Pod) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.pods[uid] = pod != nil; pod == nil {
		delete(u.pods, uid)
	}
}

func (u *uses) all() []types.UID {
	u.mu.Lock()
	defer u.mu.Unlock()
	return slices.Sorted(maps.Keys(u.pods))
}

type groups struct{ *caller }

func (g groups) Parent(uid types.UID, _ v1.PodQOSClass) string { return "/pods/" + string(uid) }
func (g groups) Name(types.UID, v1.PodQOSClass, string)        {}
func (g groups) List() ([]types.UID, error)                    { return g.kept(g.groups), nil }
func (g groups) Stats(types.UID) (*cgroups.Stats, error)       { return nil, errdefs.ErrNotFound }

func (g groups) Ensure(ctx context.Context, uid types.UID, _ v1.PodQOSClass, _ *specs.LinuxResources) error {
	return g.call(ctx, "EnsureCgroup", string(uid), func() error { g.keep(g.groups, uid, true); return nil })
}

func (g groups) Remove(ctx context.Context, uid types.UID) error {
	return g.call(ctx, "RemoveCgroup", string(uid), func() error { g.keep(g.groups, uid, false); return nil })
}

type noEvents struct{}

func (noEvents) Eventf(*v1.ObjectReference, string, string, string, ...any) {}

type noObjects struct{}

func (noObjects) ConfigMap(_, name string) (*v1.ConfigMap, error) {
	return nil, fmt.Errorf("configmap %s: %w", name, errdefs.ErrNotFound)
}
func (noObjects) Secret(_, name string) (*v1.Secret, error) {
	return nil, fmt.Errorf("secret %s: %w", name, errdefs.ErrNotFound)
}

// begin podd anew, on what the last one left.
func (w *world) begin() {
	d := &daemon{w: w, uses: &uses{pods: map[types.UID]bool{}}, dead: make(chan struct{})}
	rt := &caller{w.rt, d.dead}
	log := slog.New(slog.DiscardHandler)
	if os.Getenv("PODD_TEST_LOG") != "" {
		log = slog.New(slog.NewTextHandler(os.Stderr, nil))
	}
	d.table = pods.New(pods.Config{
		Node: spec.Node{
			Name: nodeName, RootDir: w.dir, PodLogsDir: filepath.Join(w.dir, "log/pods"), HostIPs: []string{"192.0.2.1"},
			Allocatable: v1.ResourceList{v1.ResourceCPU: resource.MustParse("64"), v1.ResourceMemory: resource.MustParse("64Gi")},
		},
		RecordDir: w.disk.dir, Sources: []string{"file", apiserver.SourceName}, Log: log,
	}, pods.Deps{Runtime: rt, Images: rt, Volumes: volumes{rt}, Objects: noObjects{}, Cgroups: groups{rt}, Events: noEvents{}})
	client, err := apiserver.NewClient(&rest.Config{Host: "http://apiserver", QPS: -1, Transport: &conn{s: w.api, dead: d.dead}})
	if err != nil {
		w.t.Fatal(err)
	}
	d.pods = apiserver.New(apiserver.Config{
		Client: client, NodeName: nodeName, Sink: d.table, Table: d.table, Uses: []apiserver.Uses{d.uses}, Log: log,
	})
	d.static = d.pods.Static(d.table)
	w.podd = d
	w.note("podd begins")
	ctx, cancel := context.WithCancel(context.Background())
	d.cancel = cancel
	d.run(ctx, log)
}

func (d *daemon) run(ctx context.Context, log *slog.Logger) {
	w := d.w
	d.work.Go(func() {
		if err := d.table.Run(ctx); err != nil {
			w.breach("the table ends: %v", err)
		}
	})
	d.work.Go(func() { _ = d.pods.Run(ctx) })
	events := d.table.Watch(ctx, "")
	d.work.Go(func() { d.follow(events) })
	d.work.Go(func() {
		_ = shutdown.Run(ctx, shutdown.Config{
			Steps: shutdown.Steps(20*time.Second, 5*time.Second, nil), Connect: w.machine.connect, Pods: d.table,
			Event: func(string, string) {}, Log: log,
		})
	})
	for _, name := range slices.Sorted(maps.Keys(w.statics)) {
		d.static.SetPod("file", w.statics[name])
	}
	d.static.Synced("file")
	d.pods.Registered(w.nodeUID)
}

// follow the table: of what it has told the end, nothing is left.
func (d *daemon) follow(events <-chan watch.Event) {
	for ev := range events {
		pod := ev.Object.(*v1.Pod)
		if ev.Type != watch.Deleted {
			continue
		}
		d.w.note("table: %s (%s) is gone", pod.Name, pod.UID)
		d.w.forgotten(pod.UID)
	}
}

// end podd as a restart does: it may finish.
func (w *world) end() {
	w.note("podd ends")
	w.podd.cancel()
	w.podd.work.Wait()
}

// kill podd: what it had not written is lost, and what it does from now on has
// no effect.
func (w *world) kill() {
	w.note("podd is killed")
	w.disk.freeze()
	close(w.podd.dead)
	w.podd.cancel()
	w.podd.work.Wait()
	w.mayForget()
	w.strayLogs()
}

// logs are the directories of pods' logs, by UID.
func (w *world) logs() (uids []types.UID) {
	dirs, _ := filepath.Glob(filepath.Join(w.dir, "log/pods/*"))
	for _, d := range dirs {
		uids = append(uids, types.UID(d[strings.LastIndexByte(d, '_')+1:]))
	}
	return uids
}

// strayLogs: those of a pod without a record are left, as they may be those of
// somebody else who shares the log directory (pods.Table.sweep).
func (w *world) strayLogs() {
	for _, uid := range w.logs() {
		if !w.disk.has(uid) {
			w.stray[uid] = true
		}
	}
}

// mayForget what neither a record says any more, nor the apiserver or the runtime.
func (w *world) mayForget() {
	over := func(uid types.UID) bool {
		p := w.api.byUID(uid)
		return p != nil && status.Over(p.Status.Phase)
	}
	w.unknowing(w.disk.has, over, w.rt.has)
}

// disk with the records, and the clock that all stored times were read from.
type disk struct {
	base string
	n    int
	dir  string // of the podd that lives

	mu    sync.Mutex
	steps []step
	// settled steps have been made in the records.
	settled int
	old     map[string][]byte // records as they were some time ago
}

// step of the wall clock. podd's own clock is the bubble's and never steps: it
// is all that was stored before that lies further away, or in the future.
type step struct {
	at time.Time
	by time.Duration
}

func newDisk(base string) *disk {
	d := &disk{base: base, old: map[string][]byte{}}
	d.dir = filepath.Join(base, "0")
	return d
}

// shifted is a time that was read from the wall clock, as it looks now.
func (d *disk) shifted(t time.Time) time.Time {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.shift(t, d.steps)
}

func (d *disk) shift(t time.Time, steps []step) time.Time {
	was := t
	for _, s := range steps {
		if was.Before(s.at) {
			t = t.Add(-s.by)
		}
	}
	return t
}

func (d *disk) setClock(by time.Duration) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.steps = append(d.steps, step{time.Now(), by})
}

// wall clock of others, whose does not step.
func (d *disk) wall() time.Time { return time.Now() }

func (d *disk) read() map[string][]byte {
	out := map[string][]byte{}
	entries, _ := os.ReadDir(d.dir)
	for _, e := range entries {
		out[e.Name()], _ = os.ReadFile(filepath.Join(d.dir, e.Name()))
	}
	return out
}

// age: what is on the disk now is what a power cut may bring back.
func (d *disk) age() { d.old = d.read() }

// moment as JSON has it.
var moment = regexp.MustCompile(`"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)"`)

// freeze the records as they are: who is killed writes in vain from now on.
func (d *disk) freeze() {
	records := d.read()
	d.n++
	d.dir = filepath.Join(d.base, fmt.Sprint(d.n))
	os.MkdirAll(d.dir, 0o700)
	d.mu.Lock()
	steps := d.steps[d.settled:]
	d.settled = len(d.steps)
	d.mu.Unlock()
	for name, raw := range records {
		if len(steps) > 0 {
			raw = moment.ReplaceAllFunc(raw, func(q []byte) []byte {
				t, err := time.Parse(time.RFC3339Nano, string(q[1:len(q)-1]))
				if err != nil {
					return q
				}
				return []byte(`"` + d.shift(t, steps).Format(time.RFC3339Nano) + `"`)
			})
		}
		os.WriteFile(filepath.Join(d.dir, name), raw, 0o600)
	}
}

func (d *disk) has(uid types.UID) bool {
	_, err := os.Stat(filepath.Join(d.dir, string(uid)+".json"))
	return err == nil
}

// revert a record to what it was.
func (d *disk) revert(name string) {
	os.WriteFile(filepath.Join(d.dir, name), d.old[name], 0o600)
}

// lose the record of a pod.
func (d *disk) lose(name string) { os.Remove(filepath.Join(d.dir, name)) }

// machine is logind: it holds a shutdown up for as long as there is a lock.
type machine struct {
	w  *world
	mu sync.Mutex
	// down: it is about to go down.
	down  bool
	conns []*bus
}

type bus struct {
	m    *machine
	mu   sync.Mutex
	out  chan bool
	over bool
}

func (m *machine) connect(context.Context) (shutdown.Machine, error) {
	b := &bus{m: m, out: make(chan bool, 64)}
	m.mu.Lock()
	m.conns = append(m.conns, b)
	m.mu.Unlock()
	return b, nil
}

// set whether it is about to go down, and tell all who listen.
func (m *machine) set(down bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.w.note("logind: shutdown %v", down)
	m.down = down
	for _, b := range m.conns {
		b.tell(down)
	}
}

func (m *machine) going() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.down
}

// lose all connections.
func (m *machine) lose() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, b := range m.conns {
		b.Close()
	}
	m.conns = nil
}

func (b *bus) tell(down bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.over {
		b.out <- down
	}
}

func (b *bus) Close() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.over {
		b.over = true
		close(b.out)
	}
	return nil
}

func (b *bus) DelayMax(context.Context) (time.Duration, error)  { return time.Minute, nil }
func (b *bus) SetDelayMax(context.Context, time.Duration) error { return nil }
func (b *bus) Preparing(context.Context) (bool, error)          { return b.m.going(), nil }

func (b *bus) Shutdowns(ctx context.Context) (<-chan bool, error) {
	context.AfterFunc(ctx, func() { b.Close() })
	return b.out, nil
}

func (b *bus) Delay(ctx context.Context, _ string) (io.Closer, error) {
	if b.m.going() {
		return nil, errors.New("the operation inhibition has been requested for is already running")
	}
	return io.NopCloser(nil), nil
}
