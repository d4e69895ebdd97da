package stats

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	statsapi "k8s.io/kubelet/pkg/apis/stats/v1alpha1"

	"github.com/podd-runtime/podd/cri"
	"github.com/podd-runtime/podd/kubelet/eviction"
	"github.com/podd-runtime/podd/volumes/tree"
)

const mib = 1 << 20

// fakeRuntime has one sandbox of pod u1, with a container "main" that runs.
type fakeRuntime struct {
	layer uint64
	rest  cri.AtRest
}

func (f *fakeRuntime) ListPodSandboxStats(context.Context, *runtimeapi.ListPodSandboxStatsRequest) (*runtimeapi.ListPodSandboxStatsResponse, error) {
	main := &runtimeapi.ContainerStats{
		Attributes:    &runtimeapi.ContainerAttributes{Metadata: &runtimeapi.ContainerMetadata{Name: "main"}},
		WritableLayer: &runtimeapi.FilesystemUsage{FsId: &runtimeapi.FilesystemIdentifier{Mountpoint: "/"}, UsedBytes: &runtimeapi.UInt64Value{Value: f.layer}},
	}
	return &runtimeapi.ListPodSandboxStatsResponse{Stats: []*runtimeapi.PodSandboxStats{{
		Attributes: &runtimeapi.PodSandboxAttributes{Metadata: &runtimeapi.PodSandboxMetadata{Uid: "u1", Name: "web", Namespace: "ns"}},
		Linux:      &runtimeapi.LinuxPodSandboxStats{Containers: []*runtimeapi.ContainerStats{main}},
	}}}, nil
}

func (f *fakeRuntime) ImageFsInfo(context.Context, *runtimeapi.ImageFsInfoRequest) (*runtimeapi.ImageFsInfoResponse, error) {
	return &runtimeapi.ImageFsInfoResponse{}, nil
}
func (f *fakeRuntime) Metrics(context.Context, cri.EmitMetric) {}
func (f *fakeRuntime) DiskAtRest(_ context.Context, uid string) map[string]cri.AtRest {
	return map[string]cri.AtRest{"u1": f.rest}
}

type fakeVolumes struct{ stats []statsapi.VolumeStats }

func (f *fakeVolumes) Stats(types.UID) []statsapi.VolumeStats { return f.stats }

type noPods struct{}

func (noPods) List() []*v1.Pod { return nil }

// TestEachWritablePlaceIsLimited: a pod is over its limit wherever its containers
// write what is too much (CVE-2020-8557 and its kind), and not below it.
func TestEachWritablePlaceIsLimited(t *testing.T) {
	used := uint64(4 * mib)
	for name, fill := range map[string]func(f *fakeRuntime, vols *fakeVolumes, pods, logs string) string{
		"nothing": func(*fakeRuntime, *fakeVolumes, string, string) string { return "" },
		"/etc/hosts": func(_ *fakeRuntime, _ *fakeVolumes, pods, _ string) string {
			return filepath.Join(pods, "etc-hosts")
		},
		"the termination message": func(_ *fakeRuntime, _ *fakeVolumes, pods, _ string) string {
			return filepath.Join(pods, "containers", "main", "00000000")
		},
		"that of a container called volumes": func(_ *fakeRuntime, _ *fakeVolumes, pods, _ string) string {
			return filepath.Join(pods, "containers", "volumes", "00000000")
		},
		"the log": func(_ *fakeRuntime, _ *fakeVolumes, _, logs string) string {
			return filepath.Join(logs, "main", "0.log")
		},
		"the log of a container that has ended": func(_ *fakeRuntime, _ *fakeVolumes, _, logs string) string {
			return filepath.Join(logs, "init", "0.log")
		},
		"the layer and VOLUMEs": func(f *fakeRuntime, _ *fakeVolumes, _, _ string) string {
			f.layer = used
			return ""
		},
		"the layer of one that has ended": func(f *fakeRuntime, _ *fakeVolumes, _, _ string) string {
			f.rest.Containers = map[string]tree.Usage{"init": {Bytes: used}}
			return ""
		},
		"the sandbox' files": func(f *fakeRuntime, _ *fakeVolumes, _, _ string) string {
			f.rest.Files.Bytes = used
			return ""
		},
		"an emptyDir": func(_ *fakeRuntime, vols *fakeVolumes, _, _ string) string {
			vols.stats = []statsapi.VolumeStats{{Name: "tmp", FsStats: statsapi.FsStats{UsedBytes: &used}}}
			return ""
		},
	} {
		root := t.TempDir()
		rt, vols := &fakeRuntime{}, &fakeVolumes{}
		p := New(Config{RootDir: root, PodLogsDir: filepath.Join(root, "logs"), Pods: noPods{}, Runtime: rt, Volumes: vols})
		if path := fill(rt, vols, filepath.Join(root, "pods", "u1"), filepath.Join(root, "logs", "ns_web_u1")); path != "" {
			if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, make([]byte, used), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		pod := limitedPod("3Mi")
		ps, err := p.Storage(t.Context(), pod)
		if err != nil {
			t.Fatal(err)
		}
		message := eviction.Local(pod, ps)
		if over := strings.Contains(message, "exceeds the total limit"); over != (name != "nothing") {
			t.Errorf("%s: %q with %d bytes used", name, message, *ps.EphemeralStorage.UsedBytes)
		}
	}
}

// TestWhatIsLeftOfAnInstanceEndsNotTheNext: an instance that has ended and the
// one that runs do not add up, nor do init containers with what follows them.
func TestWhatIsLeftOfAnInstanceEndsNotTheNext(t *testing.T) {
	rt := &fakeRuntime{layer: 2 * mib, rest: cri.AtRest{Containers: map[string]tree.Usage{"main": {Bytes: 2 * mib}, "init": {Bytes: 2 * mib}}}}
	p := New(Config{RootDir: t.TempDir(), PodLogsDir: t.TempDir(), Pods: noPods{}, Runtime: rt, Volumes: &fakeVolumes{}})
	pod := limitedPod("3Mi")
	ps, err := p.Storage(t.Context(), pod)
	if err != nil {
		t.Fatal(err)
	}
	if message := eviction.Local(pod, ps); message != "" {
		t.Errorf("%q with %d bytes used", message, *ps.EphemeralStorage.UsedBytes)
	}
}

func limitedPod(limit string) *v1.Pod {
	limits := v1.ResourceRequirements{Limits: v1.ResourceList{v1.ResourceEphemeralStorage: resource.MustParse(limit)}}
	return &v1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "web", UID: "u1"},
		Spec: v1.PodSpec{
			InitContainers: []v1.Container{{Name: "init", Resources: limits}},
			Containers:     []v1.Container{{Name: "main", Resources: limits}},
			Volumes:        []v1.Volume{{Name: "tmp", VolumeSource: v1.VolumeSource{EmptyDir: &v1.EmptyDirVolumeSource{}}}},
		},
	}
}
