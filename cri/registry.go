package cri

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
)

// registry finds sandboxes and containers. Its lock is held for map accesses
// only; each object has its own.
type registry struct {
	mu         sync.RWMutex
	sandboxes  map[string]*sandbox
	containers map[string]*container
	byName     map[string]string // attempt name → id, sandboxes' and containers'
}

func (r *registry) addSandbox(s *sandbox) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.sandboxes == nil {
		r.sandboxes = make(map[string]*sandbox)
	}
	r.sandboxes[s.id] = s
	r.name(s.name, s.id)
}

func (r *registry) addContainer(c *container) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.containers == nil {
		r.containers = make(map[string]*container)
	}
	r.containers[c.id] = c
	r.name(c.name, c.id)
}

func (r *registry) name(name, id string) {
	if r.byName == nil {
		r.byName = make(map[string]string)
	}
	r.byName[name] = id
}

func (r *registry) dropSandbox(s *sandbox) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.sandboxes, s.id)
	if r.byName[s.name] == s.id {
		delete(r.byName, s.name)
	}
}

func (r *registry) dropContainer(c *container) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.containers, c.id)
	if r.byName[c.name] == c.id {
		delete(r.byName, c.name)
	}
}

// named returns the id of what was made under name.
func (r *registry) named(name string) (string, bool) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	id, ok := r.byName[name]
	return id, ok
}

// sandbox finds by id or unambiguous prefix.
func (r *registry) sandbox(id string) (*sandbox, error) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return find(r.sandboxes, "pod sandbox", id)
}

// container finds by id or unambiguous prefix.
func (r *registry) container(id string) (*container, error) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return find(r.containers, "container", id)
}

func find[T any](m map[string]T, kind, id string) (T, error) {
	var found, none T
	if id == "" {
		return none, fmt.Errorf("%s id is empty: %w", kind, errdefs.ErrNotFound)
	}
	if o, ok := m[id]; ok {
		return o, nil
	}
	n := 0
	if len(id) < 64 {
		for k, o := range m {
			if strings.HasPrefix(k, id) {
				found = o
				n++
			}
		}
	}
	switch n {
	case 0:
		return none, fmt.Errorf("%s %q: %w", kind, clip(id), errdefs.ErrNotFound)
	case 1:
		return found, nil
	}
	return none, fmt.Errorf("%s %q: %d match, give more digits: %w", kind, clip(id), n, errdefs.ErrInvalidArgument)
}

// clip keeps hostile identifiers out of logs and messages at full length.
func clip(s string) string {
	if len(s) > 128 {
		return s[:128] + "…"
	}
	return s
}

func (r *registry) allSandboxes() []*sandbox {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return slices.Collect(maps.Values(r.sandboxes))
}

func (r *registry) allContainers() []*container {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return slices.Collect(maps.Values(r.containers))
}

// containersOf returns the containers of a sandbox, oldest first.
func (r *registry) containersOf(sandboxID string) []*container {
	r.mu.RLock()
	var out []*container
	for _, c := range r.containers {
		if c.sandboxID == sandboxID {
			out = append(out, c)
		}
	}
	r.mu.RUnlock()
	slices.SortFunc(out, func(a, b *container) int {
		if a.createdAt != b.createdAt {
			if a.createdAt < b.createdAt {
				return -1
			}
			return 1
		}
		return strings.Compare(a.id, b.id)
	})
	return out
}
