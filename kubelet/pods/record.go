package pods

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/podd-runtime/podd/probes"
)

// recordVersion of the format below. A record of a later version is set
// aside: it is not ours to understand.
const recordVersion = 1

// record is what outlives the daemon of a pod: its spec as applied, what was
// last reported, and what neither the runtime nor the source can tell.
// Records of every release must load for ever; see testdata.
type record struct {
	Version int `json:"version"`
	// Build of the daemon that wrote it.
	Build  string `json:"build,omitempty"`
	Source string `json:"source"`
	// Pod without status.
	Pod     *v1.Pod      `json:"pod"`
	Status  v1.PodStatus `json:"status"`
	Started time.Time    `json:"started"`
	// Completed and Stopped pods stay down.
	Completed bool  `json:"completed,omitempty"`
	Stopped   bool  `json:"stopped,omitempty"`
	Stop      *Stop `json:"stop,omitempty"`
	// Applied holds the spec of containers whose instance was made of
	// another one than the pod's now.
	Applied    map[string]*v1.Container `json:"applied,omitempty"`
	SandboxPod *v1.Pod                  `json:"sandboxPod,omitempty"` // nil: as Pod
	Attempts   map[string]int32         `json:"attempts,omitempty"`
	Backoffs   map[string]Backoff       `json:"backoffs,omitempty"`
	Ended      map[string]time.Time     `json:"ended,omitempty"`
	// Actual are the resources of containers that have not got those of Pod
	// yet; PodActual is the pod whose resources its group has.
	Actual    map[string]v1.ResourceRequirements `json:"actual,omitempty"`
	PodActual *v1.Pod                            `json:"podActual,omitempty"`
	Probes    map[string]probes.State            `json:"probes,omitempty"` // by container id
	// Starting are the ids of containers whose postStart hook was not over.
	Starting []string `json:"starting,omitempty"`
}

// rebase the times that something is counted from on this process' clock.
func (r *record) rebase(now time.Time) {
	r.Started = past(r.Started, now)
	if r.Stop != nil {
		r.Stop.Since = past(r.Stop.Since, now)
	}
	for name, b := range r.Backoffs {
		b.Updated = past(b.Updated, now)
		r.Backoffs[name] = b
	}
	for name, at := range r.Ended {
		r.Ended[name] = past(at, now)
	}
}

// records writes records behind: the worker hands over a value, a writer puts
// the last one of each pod to disk a moment later. There is no fsync: what a
// power cut takes is what the runtime's state and the sources give again.
type records struct {
	dir string
	log *slog.Logger

	mu    sync.Mutex
	dirty map[types.UID]*record // nil: delete
	wake  chan struct{}
}

func newRecords(dir string, log *slog.Logger) *records {
	return &records{dir: dir, log: log, dirty: map[types.UID]*record{}, wake: make(chan struct{}, 1)}
}

// save r, or delete the pod's record when r is nil. r must not change any more.
func (s *records) save(uid types.UID, r *record) {
	s.mu.Lock()
	s.dirty[uid] = r
	s.mu.Unlock()
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// gather is how long changes of a starting pod are put together.
const gather = 200 * time.Millisecond

// retryWrites is when records that could not be written are tried again: a
// full disk is made room on by someone, some time.
const retryWrites = 5 * time.Second

// run writes until ctx ends, and then what is left.
func (s *records) run(ctx context.Context) {
	retry := time.NewTimer(0)
	defer retry.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.wake:
		case <-retry.C:
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(gather):
		}
		if !s.flush() {
			retry.Reset(retryWrites)
		}
	}
}

// flush says whether all is written. What is not stays to be tried again,
// unless something newer has come in.
func (s *records) flush() bool {
	s.mu.Lock()
	batch := s.dirty
	s.dirty = map[types.UID]*record{}
	s.mu.Unlock()
	for uid, r := range batch {
		if err := s.write(uid, r); err != nil {
			s.log.Warn("pod record is not written", "uid", uid, "error", err)
			continue
		}
		delete(batch, uid)
	}
	if len(batch) == 0 {
		return true
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for uid, r := range batch {
		if _, newer := s.dirty[uid]; !newer {
			s.dirty[uid] = r
		}
	}
	return false
}

func (s *records) path(uid types.UID) string { return filepath.Join(s.dir, string(uid)+".json") }

func (s *records) write(uid types.UID, r *record) error {
	if r == nil {
		if err := os.Remove(s.path(uid)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	}
	data, err := json.Marshal(r)
	if err != nil {
		return err
	}
	tmp := s.path(uid) + ".tmp"
	if err := os.WriteFile(tmp, data, 0o600); err != nil {
		os.Remove(tmp) // half a record helps no full disk
		return err
	}
	return os.Rename(tmp, s.path(uid))
}

// load all records. One that cannot be read is set aside and reported; the
// pod is then known only by what the runtime says of it.
func (s *records) load() (map[types.UID]*record, error) {
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the directory of pod records: %w", err)
	}
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, fmt.Errorf("read pod records: %w", err)
	}
	out := map[types.UID]*record{}
	for _, e := range entries {
		path := filepath.Join(s.dir, e.Name())
		if strings.HasSuffix(e.Name(), ".tmp") {
			os.Remove(path) // of a write that was cut
			continue
		}
		if !strings.HasSuffix(e.Name(), ".json") {
			continue
		}
		r, err := readRecord(path)
		if err == nil && string(r.Pod.UID)+".json" != e.Name() {
			err = fmt.Errorf("record is of pod %s", r.Pod.UID)
		}
		if err != nil {
			s.log.Error("pod record is broken, set aside", "path", path, "error", err)
			os.Rename(path, path+".broken")
			continue
		}
		out[r.Pod.UID] = r
	}
	return out, nil
}

func readRecord(path string) (*record, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	r := &record{}
	if err := json.Unmarshal(data, r); err != nil {
		return nil, err
	}
	if r.Version < 1 || r.Version > recordVersion {
		return nil, fmt.Errorf("version %d is not known", r.Version)
	}
	if r.Pod == nil || r.Pod.UID == "" || r.Pod.Name == "" || r.Pod.Namespace == "" {
		return nil, errors.New("it names no pod")
	}
	return r, nil
}
