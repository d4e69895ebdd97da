package integration

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	v1 "k8s.io/api/core/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podd-runtime/podd/cri/shim"
	"github.com/podd-runtime/podd/integration/killpoint"
	"github.com/podd-runtime/podd/integration/node"
)

// pointPod has what a start does: an address and a port of the node's, volumes of
// several kinds, an init container and one that counts its starts. %[1]s is its
// name, %[2]s the directory for its notes.
const pointPod = `apiVersion: v1
kind: Pod
metadata: {name: %[1]s}
spec:
  terminationGracePeriodSeconds: 1
  volumes:
  - {name: counts, hostPath: {path: %[2]s}}
  - {name: conf, configMap: {name: conf}}
  - {name: scratch, emptyDir: {}}
  - {name: memory, emptyDir: {medium: Memory, sizeLimit: 1Mi}}
  initContainers:
  - name: first
    image: ` + testserver + `
    args: [note, /counts/init.$(POD_UID), ran]
    env: &env
    - {name: POD_UID, valueFrom: {fieldRef: {fieldPath: metadata.uid}}}
    - {name: POD_NAME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
    - {name: VERSION, value: "1"}
    volumeMounts: [{name: counts, mountPath: /counts}]
  containers:
  - name: main
    image: ` + testserver + `
    args: [counted, /counts/%[1]s/.., serve]
    env: *env
    volumeMounts:
    - {name: counts, mountPath: /counts}
    - {name: conf, mountPath: /conf}
    - {name: scratch, mountPath: /scratch}
    - {name: memory, mountPath: /memory}
`

func pointConf(version int) string {
	return fmt.Sprintf("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: conf}\ndata: {version: \"%d\"}\n", version)
}

func operations(t *testing.T) []operation {
	return []operation{
		startOperation(), execOperation(), streamOperation(), stopOperation(), volumeOperation(), pullOperation(t),
		upgradeOperation(t), restartOperation(), takeUpOperation(),
	}
}

var both = []string{"podd", "shim"}

func nothing(*stage) error { return nil }

// victim is the pod that is started or stopped: each round has its own.
func (s *stage) victim() string { return fmt.Sprintf("v%d", s.round) }

// notes makes the directory whose name tells a pod's program from others.
func (s *stage) notes(name string) {
	s.t.Helper()
	if err := os.MkdirAll(filepath.Join(s.counts, name), 0o755); err != nil {
		s.t.Fatal(err)
	}
}

func (s *stage) writeVictim() {
	s.t.Helper()
	s.notes(s.victim())
	s.Write("victim.yaml", fmt.Sprintf(pointPod, s.victim(), s.counts))
}

// removeVictim takes the pod away.
func (s *stage) removeVictim() error {
	s.Remove("victim.yaml")
	return s.gone()
}

// gone waits until podd tells of no such pod and its program has ended.
func (s *stage) gone() error {
	return within(settling, func() error {
		var list v1.PodList
		if err := s.Get("/api/v1/pods", &list); err != nil {
			return err
		}
		for _, p := range list.Items {
			if p.Name == node.PodName(s.victim()) {
				return fmt.Errorf("%s is not gone: %s", s.victim(), describePod(&p))
			}
		}
		if left := s.Processes("/" + s.victim() + "/"); len(left) > 0 {
			return fmt.Errorf("%s is told to be gone, its processes %v run", s.victim(), left)
		}
		return nil
	})
}

func describePod(p *v1.Pod) string {
	return fmt.Sprintf("%s %s, deleted at %v, init %+v, containers %+v", p.UID, p.Status.Phase, p.DeletionTimestamp, p.Status.InitContainerStatuses, p.Status.ContainerStatuses)
}

// runs waits until the victim is as its manifest says, each of its programs
// started once, and answers at the address that is told.
func (s *stage) runs() error {
	return within(settling, func() error {
		p, err := s.Pod(s.victim())
		if err != nil {
			return err
		}
		if !node.Running(p) || !status(p).Ready {
			return fmt.Errorf("does not run: %s", describePod(p))
		}
		if status(p).RestartCount != 0 || p.Status.InitContainerStatuses[0].RestartCount != 0 {
			return broken("told to be restarted: %s", describePod(p))
		}
		if starts, _ := soakStarts(s.counts, p.UID); starts > 1 {
			return broken("its program has started %d times: %s", starts, describePod(p))
		} else if starts == 0 {
			return fmt.Errorf("its program has not started: %s", describePod(p))
		}
		if b, _ := os.ReadFile(filepath.Join(s.counts, "init."+string(p.UID))); string(b) != "ran begins\nran ends\n" {
			return broken("its init container has run so: %q", b)
		}
		if body := fetch("http://" + p.Status.PodIP + ":8080/healthz"); body != "ok" {
			return fmt.Errorf("no answer at %s: %q", p.Status.PodIP, body)
		}
		return nil
	})
}

// startOperation: a pod is set up, attached to its network, and its containers
// begin.
func startOperation() operation {
	return operation{
		name: "start", daemons: both,
		begin: func(s *stage) func() bool {
			s.writeVictim()
			return func() bool { return len(s.Processes("counted /counts/"+s.victim()+"/")) > 0 }
		},
		holds: (*stage).runs,
		undo:  (*stage).removeVictim,
	}
}

// stopOperation: a pod is taken away.
func stopOperation() operation {
	return operation{
		name: "stop", daemons: both,
		trace: func(s *stage, pid int, aim killpoint.Aim) (*killpoint.Trace, error) {
			s.writeVictim()
			if err := s.runs(); err != nil {
				return nil, err
			}
			return killpoint.Start(pid, aim)
		},
		begin: func(s *stage) func() bool {
			s.Remove("victim.yaml")
			return func() bool { return len(s.Processes("/"+s.victim()+"/")) == 0 }
		},
		holds: (*stage).gone,
		undo:  nothing,
	}
}

// ask lets somebody ask for something; s.told is what he is told.
func (s *stage) ask(f func() error) (told func() bool) {
	done := make(chan struct{})
	s.done = done
	go func() {
		defer close(done)
		s.told = f()
	}()
	return func() bool {
		select {
		case <-done:
			return true
		default:
			return false
		}
	}
}

// execOperation: a command runs in a container, as probes and the CRI run it.
func execOperation() operation {
	return operation{
		name: "exec", daemons: both,
		begin: func(s *stage) func() bool { return s.ask(func() error { return s.execSync(s.noteArgs()...) }) },
		holds: (*stage).ranOnce,
		undo:  nothing,
	}
}

// streamOperation: the same by the local API's streams. Their client learns of
// podd's death in the middle of the set-up of a stream after 30 s only, as with
// any kubelet.
func streamOperation() operation {
	return operation{
		name: "stream", daemons: both, long: true,
		begin: func(s *stage) func() bool {
			return s.ask(func() error {
				_, errOut, err := s.Podd(append([]string{"exec", node.PodName("by"), "-c", "main", "--"}, s.noteArgs()...)...)
				if err != nil {
					return fmt.Errorf("%w: %s", err, errOut)
				}
				return nil
			})
		},
		holds: (*stage).ranOnce,
		undo:  nothing,
	}
}

// noteArgs is a command that notes its beginning and its end.
func (s *stage) noteArgs() []string {
	return []string{"/testserver", "note", fmt.Sprintf("/counts/exec.%d", s.round), "it"}
}

// ranOnce: the command has run as its caller was told, and another one runs.
func (s *stage) ranOnce() error {
	return within(settling, func() error {
		b, err := os.ReadFile(filepath.Join(s.counts, fmt.Sprintf("exec.%d", s.round)))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		switch ran := string(b); {
		case ran == "it begins\nit ends\n":
		case s.told == nil:
			return fmt.Errorf("told to have ended well, it has run so: %q", ran)
		case ran != "": // begun, and ended by nobody
			return fmt.Errorf("told %w, it has run so: %q", s.told, ran)
		}
		return s.execSync("/testserver", "env")
	})
}

// dial connects to podd's CRI.
func (s *stage) dial() (*grpc.ClientConn, error) {
	return grpc.NewClient("unix://"+filepath.Join(s.RunDir(), "podd.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()))
}

// execSync runs a command in the bystander.
func (s *stage) execSync(args ...string) error {
	conn, err := s.dial()
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(context.Background(), node.Scale(settling))
	defer cancel()
	resp, err := runtimeapi.NewRuntimeServiceClient(conn).ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: s.container, Cmd: args})
	if err == nil && resp.ExitCode != 0 {
		err = fmt.Errorf("exit code %d: %s%s", resp.ExitCode, resp.Stdout, resp.Stderr)
	}
	return err
}

// volumeOperation: what a volume is made of changes.
func volumeOperation() operation {
	return operation{
		name: "volume", daemons: []string{"podd"},
		begin: func(s *stage) func() bool {
			s.Write("conf.yaml", pointConf(s.round))
			return func() bool { return s.volume() == fmt.Sprint(s.round) }
		},
		holds: func(s *stage) error {
			return within(settling, func() error {
				if got := s.volume(); got != fmt.Sprint(s.round) {
					return fmt.Errorf("the volume has version %s, not %d", got, s.round)
				}
				return nil
			})
		},
		undo: func(s *stage) error {
			return within(settling, func() error {
				found, _ := filepath.Glob(filepath.Join(s.Dir, confVolume, "..20*", "version"))
				if len(found) != 1 {
					return fmt.Errorf("the volume keeps %v", found)
				}
				rel, err := filepath.Rel(s.Dir, found[0])
				s.before.Files = append(s.before.Files, rel)
				return err
			})
		},
	}
}

const confVolume = "kubelet/pods/*/volumes/kubernetes.io~configmap/conf"

// volume is what a container reads there.
func (s *stage) volume() string {
	found, _ := filepath.Glob(filepath.Join(s.Dir, confVolume, "version"))
	if len(found) != 1 {
		return fmt.Sprint(found)
	}
	b, err := os.ReadFile(found[0])
	if err != nil {
		return err.Error()
	}
	return string(b)
}

// imageService calls podd's.
func (s *stage) imageService(call func(ctx context.Context, c runtimeapi.ImageServiceClient) error) error {
	conn, err := s.dial()
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(context.Background(), node.Scale(settling))
	defer cancel()
	return call(ctx, runtimeapi.NewImageServiceClient(conn))
}

// pullOperation: an image is pulled.
func pullOperation(t *testing.T) operation {
	r, err := registry()
	if err != nil {
		t.Fatal(err)
	}
	const ref = "podd.test/points/pulled:1"
	if _, err := r.Push(t.Context(), "points/pulled:1", weighty(t, 256<<10)); err != nil {
		t.Fatal(err)
	}
	spec := &runtimeapi.ImageSpec{Image: ref}
	pull := func(ctx context.Context, c runtimeapi.ImageServiceClient) error {
		_, err := c.PullImage(ctx, &runtimeapi.PullImageRequest{Image: spec})
		return err
	}
	present := func(s *stage) (there bool, err error) {
		err = s.imageService(func(ctx context.Context, c runtimeapi.ImageServiceClient) error {
			resp, err := c.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: spec})
			there = resp.GetImage() != nil
			return err
		})
		return there, err
	}
	return operation{
		name: "pull", daemons: []string{"podd"},
		begin: func(s *stage) func() bool {
			return s.ask(func() error { return s.imageService(pull) })
		},
		holds: func(s *stage) error {
			there, err := present(s)
			if err != nil {
				return err
			}
			if s.told == nil && !there {
				return errors.New("told to be pulled, it is not there")
			}
			if err := s.imageService(pull); err != nil {
				return fmt.Errorf("pulled again, told %v before: %w", s.told, err)
			}
			s.writePulled(ref)
			defer s.Remove("victim.yaml")
			return s.runs()
		},
		undo: func(s *stage) error {
			if err := s.gone(); err != nil {
				return err
			}
			return s.imageService(func(ctx context.Context, c runtimeapi.ImageServiceClient) error {
				_, err := c.RemoveImage(ctx, &runtimeapi.RemoveImageRequest{Image: spec})
				return err
			})
		},
	}
}

// writePulled is the victim with another image.
func (s *stage) writePulled(ref string) {
	s.writeVictim()
	s.Write("victim.yaml", strings.ReplaceAll(fmt.Sprintf(pointPod, s.victim(), s.counts), testserver, ref))
}

// otherShim is podd-shim with another build's id, the same otherwise.
func otherShim(t *testing.T, path string) string {
	t.Helper()
	id, err := shim.BuildID(path)
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	other := strings.Map(func(r rune) rune { // of the same length
		if r == 'a' {
			return 'b'
		}
		return r
	}, "b"+id[1:])
	if other == id {
		other = "c" + id[1:]
	}
	to := filepath.Join(t.TempDir(), "podd-shim")
	if err := os.WriteFile(to, bytes.ReplaceAll(b, []byte(id), []byte(other)), 0o755); err != nil {
		t.Fatal(err)
	}
	return to
}

// upgradeOperation: podd-shim executes another program in its place.
func upgradeOperation(t *testing.T) operation {
	var other string
	return operation{
		name: "upgrade", daemons: []string{"shim"},
		begin: func(s *stage) func() bool {
			own := filepath.Join(s.Bin, "podd-shim")
			if other == "" {
				other = otherShim(t, own)
			}
			c := shim.New(s.RunDir())
			ctx, cancel := context.WithTimeout(context.Background(), node.Scale(settling))
			to := other
			if want, err := shim.BuildID(other); err != nil {
				s.t.Fatal(err)
			} else if info, err := c.Info(ctx); err == nil && info.BuildID == want {
				to = own
			}
			return s.ask(func() error {
				defer cancel()
				return c.Upgrade(ctx, to)
			})
		},
		holds: func(s *stage) error {
			return within(settling, func() error {
				if s.ShimPID() == 0 {
					return errors.New("podd-shim does not answer")
				}
				return s.execSync("/testserver", "env")
			})
		},
		undo: nothing,
	}
}

// restartOperation: podd begins, with pods that run and one that has come
// meanwhile.
func restartOperation() operation {
	return operation{
		name: "restart", daemons: []string{"podd"},
		trace: func(s *stage, _ int, aim killpoint.Aim) (*killpoint.Trace, error) {
			s.Signal(syscall.SIGKILL)
			s.writeVictim()
			s.LaunchStopped()
			trace, err := killpoint.Start(s.PID(), aim)
			_ = syscall.Kill(s.PID(), syscall.SIGCONT)
			return trace, err
		},
		begin: func(s *stage) func() bool {
			return func() bool { return len(s.Processes("counted /counts/"+s.victim()+"/")) > 0 }
		},
		holds: (*stage).runs,
		undo:  (*stage).removeVictim,
	}
}

// takeUpOperation: a podd-shim begins after the death of another one.
func takeUpOperation() operation {
	return operation{
		name: "takeup", daemons: []string{"shim"},
		trace: func(s *stage, pid int, aim killpoint.Aim) (*killpoint.Trace, error) {
			s.writeVictim()
			if err := s.runs(); err != nil {
				return nil, err
			}
			_ = syscall.Kill(s.PID(), syscall.SIGSTOP) // it would start one itself
			_ = syscall.Kill(pid, syscall.SIGKILL)
			shim := s.LaunchShimStopped()
			trace, err := killpoint.Start(shim, aim)
			_ = syscall.Kill(shim, syscall.SIGCONT)
			return trace, err
		},
		begin: func(s *stage) func() bool {
			c := shim.New(s.RunDir())
			return s.ask(func() error {
				ctx, cancel := context.WithTimeout(context.Background(), node.Scale(5*second))
				defer cancel()
				_, err := c.Info(ctx)
				return err
			})
		},
		resume: func(s *stage) { _ = syscall.Kill(s.PID(), syscall.SIGCONT) },
		holds:  (*stage).runs,
		undo:   (*stage).removeVictim,
	}
}
