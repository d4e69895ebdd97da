package volumes

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	nodeaffinity "k8s.io/component-helpers/scheduling/corev1"
)

// volume is one of a pod's volumes as it is made: in the place of a claim is
// what the claim is bound to.
type volume struct {
	// Volume has the pod's name for it and a source that is no claim.
	*v1.Volume
	// dir is its name in the directory of its kind: the PersistentVolume's, or
	// the pod's own.
	dir string
	// local is the path of a PersistentVolume of that kind, which no Volume of
	// a pod can be.
	local string
	// options are the PersistentVolume's mountOptions.
	options []string
	// readOnly by PersistentVolume or claim: no container writes.
	readOnly bool
	// claim by which it was found; "": none.
	claim string
}

// plugin is the name of its kind's directory; "": it has none.
func (vol *volume) plugin() string {
	if vol.local != "" {
		return pluginLocal
	}
	return plugin(vol.Volume)
}

// isClaim says whether a pod's volume is found through a claim.
func isClaim(vol *v1.Volume) bool { return vol.PersistentVolumeClaim != nil || vol.Ephemeral != nil }

// claimOf names the claim of a volume (upstream: ephemeral.VolumeClaimName).
func claimOf(pod *v1.Pod, vol *v1.Volume) string {
	if vol.Ephemeral != nil {
		return pod.Name + "-" + vol.Name
	}
	return vol.PersistentVolumeClaim.ClaimName
}

// claimsFile in a pod's directory says what the pod's claims were bound to when
// its volumes were made. A claim is never bound anew, so that holds as long as
// the pod does.
const (
	claimsFile    = "volume-claims.json"
	claimsVersion = 1
)

type claimsRecord struct {
	Version int                     `json:"version"`
	Volumes map[string]*boundVolume `json:"volumes"` // by the pod's name for them
}

type boundVolume struct {
	Claim    string                  `json:"claim"`
	ReadOnly bool                    `json:"readOnly,omitempty"`
	PVName   string                  `json:"pv"`
	PV       v1.PersistentVolumeSpec `json:"spec"`
}

func readClaims(p *dir) (*claimsRecord, error) {
	r := &claimsRecord{Version: claimsVersion, Volumes: map[string]*boundVolume{}}
	fd, err := unix.Openat(p.fd, claimsFile, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) {
		return r, nil
	} else if err != nil {
		return nil, &os.PathError{Op: "open", Path: p.name + "/" + claimsFile, Err: err}
	}
	f := os.NewFile(uintptr(fd), claimsFile)
	defer f.Close()
	if err := json.NewDecoder(f).Decode(r); err != nil || r.Version != claimsVersion {
		return nil, fmt.Errorf("%s/%s, version %d: cannot be read: %w", p.name, claimsFile, r.Version, errors.Join(err, errdefs.ErrDataLoss))
	}
	return r, nil
}

func (r *claimsRecord) write(p *dir) error {
	data, err := json.Marshal(r)
	if err != nil {
		return err
	}
	const temporary = "." + claimsFile
	unix.Unlinkat(p.fd, temporary, 0)
	if err := writeFile(p, temporary, projection{data: data, mode: 0o600}, -1); err != nil {
		return err
	}
	if err := unix.Renameat(p.fd, temporary, p.fd, claimsFile); err != nil {
		return &os.PathError{Op: "rename", Path: p.name + "/" + claimsFile, Err: err}
	}
	return nil
}

// hasClaims says whether any volume of a pod is found through a claim.
func hasClaims(pod *v1.Pod) bool {
	return slices.ContainsFunc(pod.Spec.Volumes, func(vol v1.Volume) bool { return isClaim(&vol) })
}

// bind finds what the claims of a pod are bound to: by the record, and else by
// asking.
func (v *Volumes) bind(ctx context.Context, pod *v1.Pod, p *dir) (*claimsRecord, error) {
	if !hasClaims(pod) {
		return &claimsRecord{}, nil
	}
	record, err := readClaims(p)
	if err != nil {
		return nil, err
	}
	names := used(pod)
	changed := false
	for i := range pod.Spec.Volumes {
		vol := &pod.Spec.Volumes[i]
		if !isClaim(vol) || !names[vol.Name] {
			continue
		}
		claim := claimOf(pod, vol)
		if have := record.Volumes[vol.Name]; have != nil && have.Claim == claim {
			continue
		}
		bound, err := v.lookUp(ctx, pod, vol, claim)
		if err != nil {
			// Upstream's words for a volume that it has not come to mount.
			return nil, fmt.Errorf("Unable to attach or mount volumes: unmounted volumes=[%[1]s], unattached volumes=[], failed to process volumes=[%[1]s]: error processing PVC %[2]s/%[3]s: %[4]w", vol.Name, pod.Namespace, claim, err) //nolint:staticcheck
		}
		record.Volumes[vol.Name] = bound
		changed = true
	}
	if changed {
		err = record.write(p)
	}
	return record, err
}

// lookUp asks for a claim's volume and checks that the pod may have it here.
func (v *Volumes) lookUp(ctx context.Context, pod *v1.Pod, vol *v1.Volume, claim string) (*boundVolume, error) {
	if v.cfg.Claims == nil {
		return nil, fmt.Errorf("this node knows no claims; use hostPath or nfs: %w", errdefs.ErrNotImplemented)
	}
	pvc, pv, err := v.cfg.Claims.PersistentVolume(ctx, pod.Namespace, claim)
	if err != nil {
		return nil, err
	}
	if vol.Ephemeral != nil && !metav1.IsControlledBy(pvc, pod) {
		return nil, fmt.Errorf("was not made for this pod: delete it: %w", errdefs.ErrFailedPrecondition)
	}
	if m := pv.Spec.VolumeMode; m != nil && *m == v1.PersistentVolumeBlock {
		return nil, fmt.Errorf("volume %s has volumeMode Block, which is not supported yet: %w", pv.Name, errdefs.ErrNotImplemented)
	}
	if a := pv.Spec.NodeAffinity; a != nil && a.Required != nil {
		node := &v1.Node{}
		if v.cfg.Node != nil {
			node = v.cfg.Node()
		}
		if ok, err := nodeaffinity.MatchNodeSelectorTerms(node, a.Required); err != nil || !ok {
			return nil, fmt.Errorf("volume %s: its nodeAffinity does not match node %s: %w", pv.Name, node.Name, errors.Join(err, errdefs.ErrFailedPrecondition))
		}
	}
	bound := &boundVolume{Claim: claim, PVName: pv.Name, PV: pv.Spec}
	if c := vol.PersistentVolumeClaim; c != nil {
		bound.ReadOnly = c.ReadOnly
	}
	if err := checkSource(pv); err != nil {
		return nil, err
	}
	// A scheduler sees to this for the pods that it places.
	if slices.Contains(pvc.Spec.AccessModes, v1.ReadWriteOncePod) {
		if other := v.otherUser(pod.UID, pv.Name); other != "" {
			return nil, fmt.Errorf("volume %s is ReadWriteOncePod, and pod %s uses it: %w", pv.Name, other, errdefs.ErrFailedPrecondition)
		}
	}
	return bound, nil
}

// checkSource refuses volumes of a kind that cannot be mounted here, and names
// that are no names of directories.
func checkSource(pv *v1.PersistentVolume) error {
	if s := &pv.Spec.PersistentVolumeSource; s.NFS == nil && s.HostPath == nil && s.Local == nil {
		return fmt.Errorf("volume %s: this kind of PersistentVolume is not supported; use nfs, local or hostPath: %w", pv.Name, errdefs.ErrNotImplemented)
	}
	return checkUID(types.UID(pv.Name))
}

// otherUser finds another pod of the node that has the volume.
func (v *Volumes) otherUser(uid types.UID, pv string) types.UID {
	uids, err := v.Pods()
	if err != nil {
		return ""
	}
	for _, other := range uids {
		if other == uid {
			continue
		}
		p, err := v.openPod(other, false)
		if err != nil {
			continue
		}
		r, err := readClaims(p)
		p.close()
		if err != nil {
			continue
		}
		for _, b := range r.Volumes {
			if b.PVName == pv {
				return other
			}
		}
	}
	return ""
}

// volume is a pod's volume as it is made.
func (r *claimsRecord) volume(pod *v1.Pod, vol *v1.Volume) (*volume, error) {
	if !isClaim(vol) {
		out := &volume{Volume: vol, dir: vol.Name}
		if vol.NFS != nil {
			out.readOnly = vol.NFS.ReadOnly
		}
		return out, nil
	}
	b := r.Volumes[vol.Name]
	if b == nil {
		return nil, fmt.Errorf("claim %s/%s: the volume has not been made: %w", pod.Namespace, claimOf(pod, vol), errdefs.ErrFailedPrecondition)
	}
	out := &volume{Volume: &v1.Volume{Name: vol.Name}, dir: b.PVName, options: b.PV.MountOptions, readOnly: b.ReadOnly, claim: b.Claim}
	switch s := &b.PV.PersistentVolumeSource; {
	case s.NFS != nil:
		out.NFS = s.NFS
		out.readOnly = out.readOnly || s.NFS.ReadOnly
	case s.HostPath != nil:
		out.HostPath = s.HostPath
	case s.Local != nil:
		out.local = s.Local.Path
	}
	return out, nil
}

// hostPath is where a volume is on the host.
func (v *Volumes) hostPath(uid types.UID, vol *volume) string {
	if vol.HostPath != nil {
		return vol.HostPath.Path
	}
	return filepath.Join(v.podDir(uid), volumesDir, vol.plugin(), vol.dir)
}
