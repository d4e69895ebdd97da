package volumes

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func claimVolume(name, claim string) v1.Volume {
	return v1.Volume{Name: name, VolumeSource: v1.VolumeSource{PersistentVolumeClaim: &v1.PersistentVolumeClaimVolumeSource{ClaimName: claim}}}
}

// fakeClaims are claims that are bound to the volume of the same name.
type fakeClaims struct {
	volumes map[string]*v1.PersistentVolume
	modes   []v1.PersistentVolumeAccessMode
	owner   metav1.Object
	asked   int
}

func (f *fakeClaims) PersistentVolume(_ context.Context, namespace, claim string) (*v1.PersistentVolumeClaim, *v1.PersistentVolume, error) {
	f.asked++
	pv := f.volumes[claim]
	if pv == nil {
		return nil, nil, fmt.Errorf("claim %s: %w", claim, errdefs.ErrNotFound)
	}
	pvc := &v1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: claim}, Spec: v1.PersistentVolumeClaimSpec{AccessModes: f.modes}}
	if f.owner != nil {
		pvc.OwnerReferences = []metav1.OwnerReference{*metav1.NewControllerRef(f.owner, v1.SchemeGroupVersion.WithKind("Pod"))}
	}
	return pvc, pv, nil
}

func localPV(name, path string) *v1.PersistentVolume {
	return &v1.PersistentVolume{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: v1.PersistentVolumeSpec{
		PersistentVolumeSource: v1.PersistentVolumeSource{Local: &v1.LocalVolumeSource{Path: path}},
	}}
}

func TestLocalVolumeByClaim(t *testing.T) {
	needRoot(t)
	v, _ := testVolumes(t)
	data := t.TempDir()
	if err := os.WriteFile(data+"/precious", []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	claims := &fakeClaims{volumes: map[string]*v1.PersistentVolume{"db": localPV("pv-1", data)}}
	v.cfg.Claims = claims
	p := pod("u1", claimVolume("data", "db"))
	group := int64(4711)
	p.Spec.SecurityContext = &v1.PodSecurityContext{FSGroup: &group}
	p.Spec.Containers[0].VolumeMounts[0].SubPath = "sub"
	setup(t, v, p)
	at := filepath.Join(v.podDir("u1"), "volumes/kubernetes.io~local-volume/pv-1")
	if text, err := os.ReadFile(at + "/precious"); err != nil || string(text) != "x" {
		t.Fatalf("bound: %q, %v", text, err)
	}
	var st unix.Stat_t
	if err := unix.Stat(data+"/precious", &st); err != nil || st.Gid != 4711 || st.Mode&0o777 != 0o660 {
		t.Errorf("fsGroup: %d %o, %v", st.Gid, st.Mode, err)
	}
	if path := hostPaths(t, v, p)[0]; !strings.Contains(path, "/volume-subpaths/data/") {
		t.Errorf("subPath at %s", path)
	}
	if _, err := os.Stat(data + "/sub"); err != nil {
		t.Error(err)
	}
	// The pod keeps what it has when the claim is gone, and asks nobody.
	claims.volumes, claims.asked = nil, 0
	setup(t, v, p)
	hostPaths(t, v, p)
	if claims.asked != 0 {
		t.Errorf("asked %d times again", claims.asked)
	}
	if err := v.Teardown(context.Background(), "u1"); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(data + "/precious"); err != nil {
		t.Errorf("data of a PersistentVolume was deleted: %v", err)
	}
}

func TestClaimsThatMayNotBeUsed(t *testing.T) {
	needRoot(t)
	data := t.TempDir()
	block := v1.PersistentVolumeBlock
	away := localPV("away", data)
	away.Spec.NodeAffinity = &v1.VolumeNodeAffinity{Required: &v1.NodeSelector{NodeSelectorTerms: []v1.NodeSelectorTerm{{
		MatchExpressions: []v1.NodeSelectorRequirement{{Key: "kubernetes.io/hostname", Operator: v1.NodeSelectorOpIn, Values: []string{"other"}}}}}}}
	here := localPV("here", data)
	here.Spec.NodeAffinity = away.Spec.NodeAffinity.DeepCopy()
	here.Spec.NodeAffinity.Required.NodeSelectorTerms[0].MatchExpressions[0].Values[0] = "node"
	raw := localPV("raw", data)
	raw.Spec.VolumeMode = &block
	file := localPV("file", data+"/file")
	if err := os.WriteFile(data+"/file", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	iscsi := &v1.PersistentVolume{ObjectMeta: metav1.ObjectMeta{Name: "iscsi"}}
	for claim, c := range map[string]struct {
		pv   *v1.PersistentVolume
		want func(error) bool
	}{
		"none": {nil, errdefs.IsNotFound}, "away": {away, errdefs.IsFailedPrecondition}, "here": {here, nil}, "raw": {raw, errdefs.IsNotImplemented},
		"file": {file, errdefs.IsFailedPrecondition}, "missing": {localPV("missing", data+"/none"), errdefs.IsNotFound},
		"iscsi": {iscsi, errdefs.IsNotImplemented}, "name": {localPV("../up", data), errdefs.IsInvalidArgument},
	} {
		v, _ := testVolumes(t)
		v.cfg.Claims = &fakeClaims{volumes: map[string]*v1.PersistentVolume{claim: c.pv}}
		v.cfg.Node = func() *v1.Node {
			return &v1.Node{ObjectMeta: metav1.ObjectMeta{Name: "node", Labels: map[string]string{"kubernetes.io/hostname": "node"}}}
		}
		err := v.Setup(context.Background(), pod("u1", claimVolume("data", claim)))
		if (c.want == nil) != (err == nil) || c.want != nil && !c.want(err) {
			t.Errorf("%s: %v", claim, err)
		}
		if err != nil && !strings.Contains(err.Error(), "failed to process volumes=[data]: error processing PVC ns/"+claim+": ") &&
			!strings.Contains(err.Error(), `failed for volume "data" : claim `+claim) {
			t.Errorf("%s: the error does not name volume and claim: %v", claim, err)
		}
	}
}

func TestOnePodAtATime(t *testing.T) {
	needRoot(t)
	v, _ := testVolumes(t)
	v.cfg.Claims = &fakeClaims{modes: []v1.PersistentVolumeAccessMode{v1.ReadWriteOncePod}, volumes: map[string]*v1.PersistentVolume{"db": localPV("pv", t.TempDir())}}
	first, second := pod("u1", claimVolume("data", "db")), pod("u2", claimVolume("data", "db"))
	setup(t, v, first)
	if err := v.Setup(context.Background(), second); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "u1") {
		t.Errorf("two pods have it: %v", err)
	}
	if err := v.Teardown(context.Background(), "u1"); err != nil {
		t.Fatal(err)
	}
	setup(t, v, second)
}

func TestEphemeralClaimIsThePods(t *testing.T) {
	needRoot(t)
	v, _ := testVolumes(t)
	p := pod("u1", v1.Volume{Name: "data", VolumeSource: v1.VolumeSource{Ephemeral: &v1.EphemeralVolumeSource{}}})
	claims := &fakeClaims{volumes: map[string]*v1.PersistentVolume{"pod-data": localPV("pv", t.TempDir())}}
	v.cfg.Claims = claims
	if err := v.Setup(context.Background(), p); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a claim of somebody else's was taken: %v", err)
	}
	claims.owner = p
	setup(t, v, p)
}
