package apiserver

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/types"

	"github.com/podd-runtime/podd/kubelet/pods/spec"
)

// Services are those whose addresses pods of this node have in their
// environment: of the namespaces of pods that want them, each watched from the
// first such pod until the last is gone, and kubernetes of namespace default.
type Services struct {
	client  *Client
	log     *slog.Logger
	watches sync.WaitGroup

	mu         sync.Mutex
	ctx        context.Context
	users      map[types.UID]string
	namespaces map[string]*services
}

// services of one namespace; guarded by Services.mu.
type services struct {
	users int
	stop  context.CancelFunc
	known chan struct{}
	asked bool
	have  map[string]*v1.Service
}

// NewServices returns Services; Run must be called for anything to be known.
func NewServices(client *Client, log *slog.Logger) *Services {
	return &Services{client: client, log: log, users: map[types.UID]string{}, namespaces: map[string]*services{}}
}

// Run ends with ctx, and the watches with it.
func (s *Services) Run(ctx context.Context) error {
	s.mu.Lock()
	s.ctx = ctx
	s.need(v1.NamespaceDefault) // it has the apiserver's own service, which every pod gets
	for ns, n := range s.namespaces {
		if n.stop == nil {
			s.watch(ns, n)
		}
	}
	s.mu.Unlock()
	<-ctx.Done()
	s.watches.Wait()
	return nil
}

// need a namespace; s.mu is held.
func (s *Services) need(namespace string) {
	n := s.namespaces[namespace]
	if n == nil {
		n = &services{known: make(chan struct{}), have: map[string]*v1.Service{}}
		s.namespaces[namespace] = n
		s.watch(namespace, n)
	}
	n.users++
}

// Use says that a pod needs services, or no more.
func (s *Services) Use(uid types.UID, pod *v1.Pod) {
	s.mu.Lock()
	defer s.mu.Unlock()
	had, used := s.users[uid]
	if used == (needs(pod) && links(pod)) {
		return
	}
	if !used {
		s.users[uid] = pod.Namespace
		s.need(pod.Namespace)
		return
	}
	delete(s.users, uid)
	n := s.namespaces[had]
	if n.users--; n.users == 0 {
		if n.stop != nil {
			n.stop()
		}
		delete(s.namespaces, had)
	}
}

func links(pod *v1.Pod) bool {
	return pod.Spec.EnableServiceLinks == nil || *pod.Spec.EnableServiceLinks
}

// watch a namespace's services; s.mu is held.
func (s *Services) watch(namespace string, n *services) {
	if s.ctx == nil || s.ctx.Err() != nil {
		return
	}
	ctx, stop := context.WithCancel(s.ctx)
	n.stop = stop
	s.watches.Go(func() {
		defer stop()
		locked := func(f func()) {
			s.mu.Lock()
			defer s.mu.Unlock()
			f()
			if !n.asked {
				n.asked = true
				close(n.known)
			}
		}
		s.client.follow(ctx, Ref{Resource: "services", Namespace: namespace}, fields.Everything(), &v1.Service{}, changes[*v1.Service]{
			set:    func(v *v1.Service) { v.ManagedFields = nil; locked(func() { n.have[v.Name] = v }) },
			remove: func(v *v1.Service) { locked(func() { delete(n.have, v.Name) }) },
			replace: func(all []*v1.Service) {
				locked(func() {
					clear(n.have)
					for _, v := range all {
						v.ManagedFields = nil
						n.have[v.Name] = v
					}
				})
			},
		})
	})
}

// Env are the variables that a pod gets for services: those of its namespace
// when it has enableServiceLinks, and the apiserver's always.
// errdefs.ErrUnavailable until the apiserver has told the services there are:
// an environment cannot be made good later.
func (s *Services) Env(ctx context.Context, pod *v1.Pod) (map[string]string, error) {
	var all []*v1.Service
	namespaces := []string{v1.NamespaceDefault}
	if links(pod) && pod.Namespace != v1.NamespaceDefault {
		namespaces = append(namespaces, pod.Namespace)
	}
	for _, ns := range namespaces {
		n, err := s.await(ctx, ns)
		if err != nil {
			return nil, err
		}
		s.mu.Lock()
		all = slices.AppendSeq(all, maps.Values(n.have))
		s.mu.Unlock()
	}
	return spec.ServiceVariables(all, pod.Namespace, links(pod)), nil
}

// await the first word on a namespace that is watched.
func (s *Services) await(ctx context.Context, namespace string) (*services, error) {
	s.mu.Lock()
	n := s.namespaces[namespace]
	s.mu.Unlock()
	late := fmt.Errorf("services of namespace %s: the apiserver has not told them yet: %w", namespace, errdefs.ErrUnavailable)
	if n == nil {
		return nil, late
	}
	t := time.NewTimer(objectWait)
	defer t.Stop()
	select {
	case <-n.known:
		return n, nil
	case <-t.C:
		return nil, late
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}
