package manifests

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"github.com/containerd/errdefs"
	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"

	"github.com/podd-runtime/podd/volumes"
)

var _ volumes.Claims = (*Source)(nil)

// bindings say which PersistentVolume each claim of the directory has. A claim
// that is bound stays bound, also when a better fit appears and while its
// document is away: its data is there and nowhere else. A volume is free for
// others only when the documents of both, claim and volume, have gone.
type bindings struct {
	path string // of the file that keeps them; "": memory only

	mu     sync.Mutex
	loaded bool
	have   map[types.NamespacedName]string // volume by claim
}

const bindingsVersion = 1

type bindingsFile struct {
	Version int               `json:"version"`
	Claims  map[string]string `json:"claims"` // "namespace/name": volume
}

func (b *bindings) load() error {
	if b.loaded {
		return nil
	}
	b.have = map[types.NamespacedName]string{}
	data, err := os.ReadFile(b.path)
	if b.path == "" || errors.Is(err, fs.ErrNotExist) {
		b.loaded = true
		return nil
	} else if err != nil {
		return err
	}
	var f bindingsFile
	if err := json.Unmarshal(data, &f); err != nil || f.Version != bindingsVersion {
		// To bind anew could give a claim other data than it had.
		return fmt.Errorf("%s, version %d: cannot be read; repair it, or remove it to bind all claims anew: %w", b.path, f.Version, errors.Join(err, errdefs.ErrDataLoss))
	}
	for claim, volume := range f.Claims {
		namespace, name := filepath.Split(claim)
		b.have[types.NamespacedName{Namespace: filepath.Clean(namespace), Name: name}] = volume
	}
	b.loaded = true
	return nil
}

func (b *bindings) save() error {
	if b.path == "" {
		return nil
	}
	f := bindingsFile{Version: bindingsVersion, Claims: map[string]string{}}
	for claim, volume := range b.have {
		f.Claims[claim.String()] = volume
	}
	data, err := json.Marshal(f)
	if err != nil {
		return err
	}
	temporary := b.path + ".tmp"
	if err := os.WriteFile(temporary, data, 0o600); err != nil {
		return err
	}
	return os.Rename(temporary, b.path)
}

// PersistentVolume returns a claim of the directory and the volume that it is
// bound to, and binds it when it is not yet, as upstream's controller does with
// volumes that exist: by name, by the volume's claimRef, or the smallest that
// fits in storage class, access modes, volume mode, size and selector.
func (s *Source) PersistentVolume(_ context.Context, namespace, name string) (*v1.PersistentVolumeClaim, *v1.PersistentVolume, error) {
	o, err := s.objects.get(ObjectRef{"PersistentVolumeClaim", namespace, name})
	if err != nil {
		return nil, nil, err
	}
	claim := o.claim
	key := types.NamespacedName{Namespace: namespace, Name: name}
	all := map[string]*v1.PersistentVolume{}
	claims := map[types.NamespacedName]bool{}
	s.objects.each(func(o object) {
		switch {
		case o.volume != nil:
			all[o.volume.Name] = o.volume
		case o.claim != nil:
			claims[types.NamespacedName{Namespace: o.claim.Namespace, Name: o.claim.Name}] = true
		}
	})
	b := &s.bindings
	b.mu.Lock()
	defer b.mu.Unlock()
	if err := b.load(); err != nil {
		return nil, nil, err
	}
	before := len(b.have)
	maps.DeleteFunc(b.have, func(c types.NamespacedName, volume string) bool { return !claims[c] && all[volume] == nil })
	if len(b.have) < before {
		if err := b.save(); err != nil {
			return nil, nil, err
		}
	}
	if bound, ok := b.have[key]; ok {
		volume := all[bound]
		if volume == nil {
			return nil, nil, fmt.Errorf("its PersistentVolume %s has no document in the manifests directory any more: %w", bound, errdefs.ErrUnavailable)
		}
		return claim, volume, nil
	}
	taken := map[string]types.NamespacedName{}
	for c, volume := range b.have {
		taken[volume] = c
	}
	volume, err := choose(claim, all, taken)
	if err != nil {
		return nil, nil, err
	}
	b.have[key] = volume.Name
	if err := b.save(); err != nil {
		delete(b.have, key)
		return nil, nil, fmt.Errorf("keep that it is bound: %w", err)
	}
	s.log.Info("claim bound", "claim", key.String(), "volume", volume.Name)
	return claim, volume, nil
}

// choose a volume for a claim. It reads its arguments only.
func choose(claim *v1.PersistentVolumeClaim, all map[string]*v1.PersistentVolume, taken map[string]types.NamespacedName) (*v1.PersistentVolume, error) {
	if name := claim.Spec.VolumeName; name != "" {
		volume := all[name]
		if volume == nil {
			return nil, fmt.Errorf("volumeName: no PersistentVolume %s in the manifests directory: %w", name, errdefs.ErrUnavailable)
		}
		if why := unfit(claim, volume, taken); why != "" {
			return nil, fmt.Errorf("PersistentVolume %s %s: %w", name, why, errdefs.ErrFailedPrecondition)
		}
		return volume, nil
	}
	var best *v1.PersistentVolume
	reserved := func(v *v1.PersistentVolume) bool { return v.Spec.ClaimRef != nil }
	for _, name := range slices.Sorted(maps.Keys(all)) {
		volume := all[name]
		if unfit(claim, volume, taken) != "" || (claim.Spec.Selector != nil && !selected(claim.Spec.Selector, volume)) {
			continue
		}
		smaller := best != nil && volume.Spec.Capacity.Storage().Cmp(*best.Spec.Capacity.Storage()) < 0
		if best == nil || reserved(volume) && !reserved(best) || reserved(volume) == reserved(best) && smaller {
			best = volume
		}
	}
	if best == nil {
		return nil, fmt.Errorf("no PersistentVolume in the manifests directory is free and fits (storageClassName %q, accessModes %v, storage %s): %w",
			className(claim.Spec.StorageClassName), claim.Spec.AccessModes, claim.Spec.Resources.Requests.Storage(), errdefs.ErrUnavailable)
	}
	return best, nil
}

// unfit says why a claim cannot have a volume; "": it can.
func unfit(claim *v1.PersistentVolumeClaim, volume *v1.PersistentVolume, taken map[string]types.NamespacedName) string {
	if other, ok := taken[volume.Name]; ok {
		return "is bound to claim " + other.String()
	}
	if r := volume.Spec.ClaimRef; r != nil && (r.Namespace != claim.Namespace || r.Name != claim.Name) {
		return fmt.Sprintf("is reserved for claim %s/%s", r.Namespace, r.Name)
	}
	if have, want := volume.Spec.StorageClassName, className(claim.Spec.StorageClassName); have != want {
		return fmt.Sprintf("has storageClassName %q, not %q", have, want)
	}
	for _, mode := range claim.Spec.AccessModes {
		if !slices.Contains(volume.Spec.AccessModes, mode) {
			return fmt.Sprintf("has no access mode %s", mode)
		}
	}
	if have, want := volumeMode(volume.Spec.VolumeMode), volumeMode(claim.Spec.VolumeMode); have != want {
		return fmt.Sprintf("has volumeMode %s, not %s", have, want)
	}
	if have, want := volume.Spec.Capacity.Storage(), claim.Spec.Resources.Requests.Storage(); have.Cmp(*want) < 0 {
		return fmt.Sprintf("has %s, not %s", have, want)
	}
	return ""
}

func className(name *string) string {
	if name == nil {
		return ""
	}
	return *name
}

func volumeMode(m *v1.PersistentVolumeMode) v1.PersistentVolumeMode {
	if m == nil {
		return v1.PersistentVolumeFilesystem
	}
	return *m
}

func selected(selector *metav1.LabelSelector, volume *v1.PersistentVolume) bool {
	s, err := metav1.LabelSelectorAsSelector(selector)
	return err == nil && s.Matches(labels.Set(volume.Labels))
}
