package kubelet

import (
	"reflect"
	"testing"

	statsapi "k8s.io/kubelet/pkg/apis/stats/v1alpha1"

	"github.com/podd-runtime/podd/kubelet/server/api"
)

func TestHoldersOfADisk(t *testing.T) {
	fs := func(n uint64) *statsapi.FsStats { return &statsapi.FsStats{UsedBytes: &n} }
	pod := func(name string, layers, logs, all uint64) statsapi.PodStats {
		return statsapi.PodStats{
			PodRef:     statsapi.PodReference{Namespace: "default", Name: name},
			Containers: []statsapi.ContainerStats{{Rootfs: fs(layers), Logs: fs(logs)}}, EphemeralStorage: fs(all),
		}
	}
	pods := []statsapi.PodStats{pod("small", 1, 2, 3), pod("volume", 10, 20, 130), {PodRef: statsapi.PodReference{Namespace: "default", Name: "silent"}}}
	for _, tc := range []struct {
		name          string
		logs, volumes bool
		want          []api.Holder
	}{
		{"one disk", true, true, []api.Holder{{What: "files that are not podd's", Bytes: 778}, {What: "pod default/volume", Bytes: 130}, {What: "images", Bytes: 89}, {What: "pod default/small", Bytes: 3}}},
		{"volumes elsewhere", true, false, []api.Holder{{What: "files that are not podd's", Bytes: 878}, {What: "images", Bytes: 89}, {What: "pod default/volume", Bytes: 30}, {What: "pod default/small", Bytes: 3}}},
		{"all elsewhere", false, false, []api.Holder{{What: "files that are not podd's", Bytes: 900}, {What: "images", Bytes: 89}, {What: "pod default/volume", Bytes: 10}, {What: "pod default/small", Bytes: 1}}},
	} {
		if got := holders(pods, 100, 1000, tc.logs, tc.volumes); !reflect.DeepEqual(got, tc.want) {
			t.Errorf("%s:\ngot  %v\nwant %v", tc.name, got, tc.want)
		}
	}
	var many []statsapi.PodStats
	for range 9 {
		many = append(many, pod("p", 1, 0, 1))
	}
	if got := holders(many, 9, 9, true, true); len(got) != shownHolders+1 || got[0] != (api.Holder{What: "other pods", Bytes: 4}) {
		t.Errorf("many pods: %v", got)
	}
}
