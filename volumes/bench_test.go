package volumes

import (
	"context"
	"fmt"
	"testing"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// BenchmarkSetup is on the way of every pod's start.
func BenchmarkSetup(b *testing.B) {
	needRoot(b)
	for name, vols := range map[string][]v1.Volume{
		"none":      nil,
		"emptyDir":  {emptyDirVolume("a", "")},
		"configMap": {configMapVolume("a")},
		"secret":    {{Name: "s", VolumeSource: v1.VolumeSource{Secret: &v1.SecretVolumeSource{SecretName: "sec"}}}},
	} {
		b.Run(name, func(b *testing.B) {
			v, _ := testVolumes(b)
			for i := range b.N {
				p := pod(fmt.Sprintf("u%d", i), vols...)
				setup(b, v, p)
				hostPaths(b, v, p)
				b.StopTimer()
				if err := v.Teardown(context.Background(), p.UID); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
			}
		})
	}
}

func BenchmarkTeardown(b *testing.B) {
	needRoot(b)
	v, _ := testVolumes(b)
	for i := range b.N {
		b.StopTimer()
		p := pod(fmt.Sprintf("u%d", i), emptyDirVolume("a", ""), configMapVolume("b"), emptyDirVolume("c", v1.StorageMediumMemory))
		setup(b, v, p)
		b.StartTimer()
		if err := v.Teardown(context.Background(), p.UID); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkRefresh1000 changes a ConfigMap that 1,000 pods mount.
func BenchmarkRefresh1000(b *testing.B) {
	v, obj := testVolumes(b)
	var pods []*v1.Pod
	for i := range 1000 {
		p := pod(fmt.Sprintf("u%d", i), configMapVolume("a"))
		setup(b, v, p)
		pods = append(pods, p)
	}
	n := 0
	for b.Loop() {
		n++
		obj.set(&v1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "conf"}, Data: map[string]string{"a": fmt.Sprint(n)}})
		for _, p := range pods {
			if err := v.Refresh(context.Background(), p); err != nil {
				b.Fatal(err)
			}
		}
	}
}
