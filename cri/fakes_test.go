package cri

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podd-runtime/podd/cri/images"
	"github.com/podd-runtime/podd/cri/shim"
	"github.com/podd-runtime/podd/netns"
)

// fakeShim is Processes in memory. Its processes have this test's pid, so
// namespace paths are real.
type fakeShim struct {
	mu     sync.Mutex
	procs  map[string]*shim.Process
	specs  map[string]*shim.ContainerSpec
	pauses map[string]*shim.SandboxSpec
	log    []shim.Event
	wake   chan struct{} // closed and replaced at every event

	// fail makes a call fail: "Create", "CreateSandbox", …
	fail map[string]error
	// block makes a call wait until the channel is closed or its context ends.
	block map[string]chan struct{}
	// ignoreTerm: only SIGKILL ends containers.
	ignoreTerm bool
	signals    []int
	exec       func(*shim.ExecSpec) *shim.Exit
	calls      map[string]int
	skip       uint64 // events up to here are lost
}

func newFakeShim() *fakeShim {
	return &fakeShim{
		procs: map[string]*shim.Process{}, specs: map[string]*shim.ContainerSpec{}, pauses: map[string]*shim.SandboxSpec{},
		wake: make(chan struct{}), fail: map[string]error{}, block: map[string]chan struct{}{}, calls: map[string]int{},
	}
}

func (f *fakeShim) enter(ctx context.Context, call string) error {
	f.mu.Lock()
	f.calls[call]++
	b, err := f.block[call], f.fail[call]
	f.mu.Unlock()
	if b != nil {
		select {
		case <-b:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return err
}

func (f *fakeShim) called(call string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.calls[call]
}

func (f *fakeShim) failing(call string, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.fail[call] = err
}

func (f *fakeShim) emit(e shim.Event) {
	e.Seq = uint64(len(f.log) + 1)
	e.At = time.Now()
	f.log = append(f.log, e)
	close(f.wake)
	f.wake = make(chan struct{})
}

func (f *fakeShim) CreateSandbox(ctx context.Context, s *shim.SandboxSpec) (*shim.Process, error) {
	if err := f.enter(ctx, "CreateSandbox"); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	p := &shim.Process{ID: s.ID, State: shim.Running, PID: os.Getpid(), CreatedAt: time.Now(), StartedAt: time.Now()}
	f.procs[s.ID] = p
	f.pauses[s.ID] = s
	f.emit(shim.Event{Kind: shim.EventStarted, ID: s.ID, Sandbox: true, PID: p.PID})
	c := *p
	return &c, nil
}

func (f *fakeShim) DeleteSandbox(ctx context.Context, id string) error {
	if err := f.enter(ctx, "DeleteSandbox"); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.procs[id] != nil {
		delete(f.procs, id)
		f.emit(shim.Event{Kind: shim.EventDeleted, ID: id, Sandbox: true})
	}
	return nil
}

func (f *fakeShim) Create(ctx context.Context, c *shim.ContainerSpec) (*shim.Process, error) {
	if err := f.enter(ctx, "Create"); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	p := &shim.Process{ID: c.ID, SandboxID: c.SandboxID, State: shim.Created, PID: os.Getpid(), CreatedAt: time.Now()}
	f.procs[c.ID] = p
	f.specs[c.ID] = c
	f.emit(shim.Event{Kind: shim.EventCreated, ID: c.ID})
	r := *p
	return &r, nil
}

func (f *fakeShim) Start(ctx context.Context, id string) (*shim.Process, error) {
	if err := f.enter(ctx, "Start"); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	p := f.procs[id]
	if p == nil {
		return nil, errdefs.ErrNotFound
	}
	p.State, p.StartedAt = shim.Running, time.Now()
	f.emit(shim.Event{Kind: shim.EventStarted, ID: id, PID: p.PID})
	r := *p
	return &r, nil
}

// exit ends a container as the kernel would.
func (f *fakeShim) exit(id string, e shim.Exit) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.exitLocked(id, e)
}

func (f *fakeShim) exitLocked(id string, e shim.Exit) {
	p := f.procs[id]
	if p == nil || p.Exit != nil {
		return
	}
	e.At = time.Now()
	p.State, p.Exit = shim.Exited, &e
	f.emit(shim.Event{Kind: shim.EventExited, ID: id, Sandbox: p.SandboxID == "", Exit: &e, PID: p.PID})
}

func (f *fakeShim) Signal(ctx context.Context, id string, signal int, _ bool) error {
	if err := f.enter(ctx, "Signal"); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.procs[id] == nil {
		return errdefs.ErrNotFound
	}
	f.signals = append(f.signals, signal)
	if signal == 9 || !f.ignoreTerm {
		f.exitLocked(id, shim.Exit{Code: 128 + signal, Signal: signal, Known: true})
	}
	return nil
}

func (f *fakeShim) Delete(ctx context.Context, id string) error {
	if err := f.enter(ctx, "Delete"); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.exitLocked(id, shim.Exit{Code: 137, Signal: 9, Known: true})
	delete(f.procs, id)
	return nil
}

func (f *fakeShim) State(ctx context.Context, id string) (*shim.Process, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if p := f.procs[id]; p != nil {
		c := *p
		return &c, nil
	}
	return nil, errdefs.ErrNotFound
}

func (f *fakeShim) List(ctx context.Context) ([]shim.Process, error) {
	if err := f.enter(ctx, "List"); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	var out []shim.Process
	for _, p := range f.procs {
		out = append(out, *p)
	}
	return out, nil
}

func (f *fakeShim) Update(ctx context.Context, id string, r *specs.LinuxResources) error {
	return f.enter(ctx, "Update")
}

type fakeSession struct{ exit *shim.Exit }

func (s fakeSession) TTY() *os.File               { return nil }
func (s fakeSession) PID() int                    { return 1 }
func (s fakeSession) Resize(uint16, uint16) error { return nil }
func (s fakeSession) Signal(int) error            { return nil }
func (s fakeSession) Close() error                { return nil }
func (s fakeSession) Wait(ctx context.Context) (*shim.Exit, error) {
	if s.exit == nil {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	return s.exit, nil
}

func (f *fakeShim) Exec(ctx context.Context, e *shim.ExecSpec) (shim.Session, error) {
	if err := f.enter(ctx, "Exec"); err != nil {
		return nil, err
	}
	if f.exec == nil {
		return fakeSession{&shim.Exit{Known: true}}, nil
	}
	return fakeSession{f.exec(e)}, nil
}

func (f *fakeShim) Attach(ctx context.Context, id string, in, out, err *os.File) (shim.Session, error) {
	return fakeSession{&shim.Exit{Known: true}}, nil
}

func (f *fakeShim) ResizeTTY(context.Context, string, uint16, uint16) error { return nil }
func (f *fakeShim) ReopenLog(ctx context.Context, id string) error          { return f.enter(ctx, "ReopenLog") }

func (f *fakeShim) Events(ctx context.Context, after uint64) (<-chan shim.Event, error) {
	out := make(chan shim.Event)
	go func() {
		defer close(out)
		for {
			f.mu.Lock()
			wake := f.wake
			var todo []shim.Event
			after = max(after, f.skip)
			if after < uint64(len(f.log)) {
				todo = append(todo, f.log[after:]...)
			}
			f.mu.Unlock()
			for _, e := range todo {
				select {
				case out <- e:
					after = e.Seq
				case <-ctx.Done():
					return
				}
			}
			if len(todo) > 0 {
				continue
			}
			select {
			case <-wake:
			case <-ctx.Done():
				return
			}
		}
	}()
	return out, nil
}

func (f *fakeShim) Info(context.Context) (*shim.Info, error) { return &shim.Info{PID: 1}, nil }

// fakeImages is Images with one image and root file systems that are plain
// directories, filled by fill.
type fakeImages struct {
	mu    sync.Mutex
	image images.Image
	fill  func(dir string) error
	fail  map[string]error
	roots map[string]string
}

func newFakeImages() *fakeImages {
	return &fakeImages{
		image: images.Image{
			ID: "sha256:aaaa", RepoTags: []string{"example.com/app:1"}, RepoDigests: []string{"example.com/app@sha256:bbbb"}, Size: 100,
			Config: ocispec.Image{Config: ocispec.ImageConfig{Entrypoint: []string{"/bin/app"}, Env: []string{"A=image", "B=image"}, WorkingDir: "/work", StopSignal: "SIGQUIT"}},
		},
		fail: map[string]error{}, roots: map[string]string{},
	}
}

func (f *fakeImages) Pull(ctx context.Context, ref string, _ *runtimeapi.AuthConfig, progress func(images.Progress)) (*images.Image, error) {
	return f.Get(ctx, ref)
}

func (f *fakeImages) Get(_ context.Context, ref string) (*images.Image, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.fail["Get"]; err != nil {
		return nil, err
	}
	if ref == f.image.ID || ref == f.image.RepoTags[0] || ref == f.image.RepoDigests[0] {
		i := f.image
		return &i, nil
	}
	return nil, fmt.Errorf("image %s: %w", ref, errdefs.ErrNotFound)
}

func (f *fakeImages) List(ctx context.Context) ([]*images.Image, error) {
	i, err := f.Get(ctx, f.image.ID)
	return []*images.Image{i}, err
}

func (f *fakeImages) Remove(_ context.Context, ref string) error { return nil }

func (f *fakeImages) MountRootfs(_ context.Context, key, image, target string, _, _ []specs.LinuxIDMapping) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.fail["MountRootfs"]; err != nil {
		return err
	}
	f.roots[key] = target
	if f.fill != nil {
		return f.fill(target)
	}
	return nil
}

func (f *fakeImages) UnmountRootfs(_ context.Context, key, target string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.roots, key)
	entries, _ := os.ReadDir(target)
	for _, e := range entries {
		if err := os.RemoveAll(filepath.Join(target, e.Name())); err != nil {
			return err
		}
	}
	return nil
}

func (f *fakeImages) MountImage(ctx context.Context, key, image, target string, _, _ []specs.LinuxIDMapping) error {
	return f.MountRootfs(ctx, key, image, target, nil, nil)
}

func (f *fakeImages) Snapshots(context.Context) ([]string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Collect(maps.Keys(f.roots)), f.fail["Snapshots"]
}

func (f *fakeImages) Usage(context.Context, string) (uint64, uint64, error) { return 4096, 3, nil }

func (f *fakeImages) FsInfo(context.Context) (*runtimeapi.FilesystemUsage, error) {
	return &runtimeapi.FilesystemUsage{FsId: &runtimeapi.FilesystemIdentifier{Mountpoint: "/store"}}, nil
}

// fakeNet is Network without a network.
type fakeNet struct {
	mu       sync.Mutex
	attached map[string]bool
	fail     map[string]error
	cidr     string
	swept    [][]string
}

func newFakeNet() *fakeNet { return &fakeNet{attached: map[string]bool{}, fail: map[string]error{}} }

func (f *fakeNet) Attach(_ context.Context, p *netns.Pod) (*netns.Result, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.fail["Attach"]; err != nil {
		return nil, err
	}
	f.attached[p.SandboxID] = true
	return &netns.Result{IPs: []string{"10.1.2.3", "fd00::3"}}, nil
}

func (f *fakeNet) Detach(_ context.Context, p *netns.Pod) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.fail["Detach"]; err != nil {
		return err
	}
	delete(f.attached, p.SandboxID)
	return nil
}

func (f *fakeNet) Ready(context.Context) error { return f.fail["Ready"] }

func (f *fakeNet) SetPodCIDR(_ context.Context, cidr string) error {
	f.cidr = cidr
	return nil
}

func (f *fakeNet) Sweep(_ context.Context, keep []string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.swept = append(f.swept, keep)
	maps.DeleteFunc(f.attached, func(id string, _ bool) bool { return !slices.Contains(keep, id) })
	return nil
}

// bench is a service on fakes.
type fixture struct {
	*Service
	shim   *fakeShim
	images *fakeImages
	net    *fakeNet
	cfg    Config
}

func needRoot(t testing.TB) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root: sandboxes mount tmpfs and pin namespaces")
	}
}

func newFixture(t testing.TB) *fixture {
	t.Helper()
	needRoot(t)
	dir := t.TempDir()
	f := &fixture{shim: newFakeShim(), images: newFakeImages(), net: newFakeNet()}
	f.cfg = Config{DataDir: filepath.Join(dir, "data"), RunDir: filepath.Join(dir, "run"), Log: slog.New(slog.DiscardHandler)}
	f.start(t)
	t.Cleanup(func() {
		for _, sb := range f.Service.objects.allSandboxes() {
			f.net.fail, f.shim.fail, f.shim.block = map[string]error{}, map[string]error{}, map[string]chan struct{}{}
			if _, err := f.RemovePodSandbox(context.Background(), &runtimeapi.RemovePodSandboxRequest{PodSandboxId: sb.id}); err != nil {
				t.Errorf("clean-up: %v", err)
			}
		}
		if err := f.Service.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return f
}

// start makes the service, or makes it again from what is on disk.
func (f *fixture) start(t testing.TB) {
	t.Helper()
	s, err := New(f.cfg, f.shim, f.images, f.net)
	if err != nil {
		t.Fatal(err)
	}
	f.Service = s
}

func (f *fixture) restart(t testing.TB) {
	t.Helper()
	if err := f.Service.Close(); err != nil {
		t.Fatal(err)
	}
	f.start(t)
}

func podConfig(name string) *runtimeapi.PodSandboxConfig {
	return &runtimeapi.PodSandboxConfig{
		Metadata: &runtimeapi.PodSandboxMetadata{Name: name, Namespace: "default", Uid: name + "-uid"},
		Hostname: name, Labels: map[string]string{"app": name},
		DnsConfig: &runtimeapi.DNSConfig{Servers: []string{"10.0.0.10"}, Searches: []string{"a.b", "c"}, Options: []string{"ndots:5"}},
	}
}

func containerConfig(name string) *runtimeapi.ContainerConfig {
	return &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: name}, Image: &runtimeapi.ImageSpec{Image: "example.com/app:1"},
		Labels: map[string]string{"c": name},
	}
}

func (f *fixture) pod(t testing.TB, name string) string {
	t.Helper()
	r, err := f.RunPodSandbox(context.Background(), &runtimeapi.RunPodSandboxRequest{Config: podConfig(name)})
	if err != nil {
		t.Fatal(err)
	}
	return r.GetPodSandboxId()
}

func (f *fixture) create(t testing.TB, pod string, c *runtimeapi.ContainerConfig) string {
	t.Helper()
	sb, err := f.objects.sandbox(pod)
	if err != nil {
		t.Fatal(err)
	}
	r, err := f.CreateContainer(context.Background(), &runtimeapi.CreateContainerRequest{PodSandboxId: pod, Config: c, SandboxConfig: sb.config})
	if err != nil {
		t.Fatal(err)
	}
	return r.GetContainerId()
}

func (f *fixture) running(t testing.TB, pod, name string) string {
	t.Helper()
	id := f.create(t, pod, containerConfig(name))
	if _, err := f.StartContainer(context.Background(), &runtimeapi.StartContainerRequest{ContainerId: id}); err != nil {
		t.Fatal(err)
	}
	return id
}

func (f *fixture) status(t testing.TB, id string) *runtimeapi.ContainerStatus {
	t.Helper()
	r, err := f.ContainerStatus(context.Background(), &runtimeapi.ContainerStatusRequest{ContainerId: id})
	if err != nil {
		t.Fatal(err)
	}
	return r.GetStatus()
}

// eventually waits for a condition.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("not within 10 s: %s", what)
		}
		time.Sleep(time.Millisecond)
	}
}

var errBoom = errors.New("boom")
