package eviction

import (
	"testing"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	stats "k8s.io/kubelet/pkg/apis/stats/v1alpha1"
)

func fs(n uint64) *stats.FsStats { return &stats.FsStats{UsedBytes: &n} }

func volume(name string, n uint64) stats.VolumeStats {
	return stats.VolumeStats{Name: name, FsStats: *fs(n)}
}

func emptyDir(name, limit string) v1.Volume {
	e := &v1.EmptyDirVolumeSource{}
	if limit != "" {
		q := resource.MustParse(limit)
		e.SizeLimit = &q
	}
	return v1.Volume{Name: name, VolumeSource: v1.VolumeSource{EmptyDir: e}}
}

func container(name, limit string) v1.Container {
	c := v1.Container{Name: name}
	if limit != "" {
		c.Resources.Limits = v1.ResourceList{v1.ResourceEphemeralStorage: resource.MustParse(limit)}
	}
	return c
}

func TestLocal(t *testing.T) {
	for name, c := range map[string]struct {
		spec v1.PodSpec
		used stats.PodStats
		want string
	}{
		"no limits": {
			spec: v1.PodSpec{Volumes: []v1.Volume{emptyDir("a", "")}, Containers: []v1.Container{container("c", "")}},
			used: stats.PodStats{VolumeStats: []stats.VolumeStats{volume("a", 1<<40)}, EphemeralStorage: fs(1 << 40)},
		},
		"a limit of none": {
			spec: v1.PodSpec{Volumes: []v1.Volume{emptyDir("a", "0")}, Containers: []v1.Container{container("c", "")}},
			used: stats.PodStats{VolumeStats: []stats.VolumeStats{volume("a", 1<<40)}},
		},
		"a volume at its limit": {
			spec: v1.PodSpec{Volumes: []v1.Volume{emptyDir("a", "1Ki")}},
			used: stats.PodStats{VolumeStats: []stats.VolumeStats{volume("a", 1024)}},
		},
		"a volume above it": {
			spec: v1.PodSpec{Volumes: []v1.Volume{emptyDir("b", "1Gi"), emptyDir("a", "1Ki")}},
			used: stats.PodStats{VolumeStats: []stats.VolumeStats{volume("a", 1025), volume("b", 5000)}},
			want: `Usage of EmptyDir volume "a" exceeds the limit "1Ki". `,
		},
		"a volume's limit in thousandths of a byte": {
			spec: v1.PodSpec{Volumes: []v1.Volume{emptyDir("a", "500m")}},
			used: stats.PodStats{VolumeStats: []stats.VolumeStats{volume("a", 1)}},
			want: `Usage of EmptyDir volume "a" exceeds the limit "500m". 500m are thousandths of a byte: write 500M or 500Mi. `,
		},
		"a container's": {
			spec: v1.PodSpec{Containers: []v1.Container{container("c", "128m")}},
			used: stats.PodStats{EphemeralStorage: fs(4096)},
			want: "Pod ephemeral local storage usage exceeds the total limit of containers 128m. 128m are thousandths of a byte: write 128M or 128Mi. ",
		},
		"not measured yet": {
			spec: v1.PodSpec{Volumes: []v1.Volume{emptyDir("a", "1Ki")}, Containers: []v1.Container{container("c", "1Ki")}},
		},
		"the pod by one volume": {
			spec: v1.PodSpec{Volumes: []v1.Volume{emptyDir("a", "")}, Containers: []v1.Container{container("c", "1Ki"), container("d", "1Ki")}},
			used: stats.PodStats{EphemeralStorage: fs(2049)},
			want: "Pod ephemeral local storage usage exceeds the total limit of containers 2Ki. ",
		},
		"one container beside another with more": {
			spec: v1.PodSpec{Containers: []v1.Container{container("c", "1Ki"), container("d", "1Gi")}},
			used: stats.PodStats{EphemeralStorage: fs(1200), Containers: []stats.ContainerStats{{Name: "d", Rootfs: fs(5000)}, {Name: "c", Rootfs: fs(1000), Logs: fs(200)}}},
			want: `Container c exceeded its local ephemeral storage limit "1Ki". `,
		},
		"a container without a limit": {
			spec: v1.PodSpec{Containers: []v1.Container{container("c", "")}},
			used: stats.PodStats{Containers: []stats.ContainerStats{{Name: "c", Rootfs: fs(5000)}}},
		},
	} {
		pod := &v1.Pod{Spec: c.spec}
		if got := Local(pod, &c.used); got != c.want {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
}
