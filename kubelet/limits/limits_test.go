package limits

import (
	"strings"
	"testing"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"sigs.k8s.io/yaml"
)

func podOf(t *testing.T, spec string) *v1.Pod {
	t.Helper()
	pod := &v1.Pod{}
	if err := yaml.UnmarshalStrict([]byte("spec:\n"+spec), pod); err != nil {
		t.Fatal(err)
	}
	return pod
}

func TestAmountsThatCannotBeMeantAreFound(t *testing.T) {
	for spec, want := range map[string]string{
		"  containers: [{name: a, resources: {limits: {memory: 128m}}}]":                                     `spec.containers[0].resources.limits[memory]: fractional byte value "128m"`,
		"  containers: [{name: a, resources: {requests: {memory: 1500m}}}]":                                  "spec.containers[0].resources.requests[memory]: fractional",
		"  initContainers: [{name: a, resources: {limits: {memory: 1Mi}}}]":                                  "spec.initContainers[0].resources.limits[memory]: 1Mi is too small even to start a process",
		"  containers: [{name: a, resources: {limits: {memory: '1'}}}]":                                      "1 is too small",
		"  containers: [{name: a, resources: {limits: {ephemeral-storage: 500m}}}]":                          "limits[ephemeral-storage]: fractional",
		"  containers: [{name: a, resources: {limits: {ephemeral-storage: 500}}}]":                           "500 is less than the smallest file takes",
		"  resources: {limits: {memory: 128m}}":                                                              "spec.resources.limits[memory]: fractional",
		"  overhead: {memory: 128m}":                                                                         "spec.overhead[memory]: fractional",
		"  volumes: [{name: v, emptyDir: {sizeLimit: 500m}}]":                                                "spec.volumes[0].emptyDir.sizeLimit: fractional",
		"  volumes: [{name: v, emptyDir: {medium: Memory, sizeLimit: '512'}}]":                               "512 is less than",
		"  volumes: [{name: v, emptyDir: {sizeLimit: 1Mi}}, {name: w, emptyDir: {sizeLimit: 0}}]":            "",
		"  containers: [{name: a, resources: {limits: {memory: 4Mi}, requests: {memory: 1Ki}}}, {name: b}]":  "",
		"  containers: [{name: a, resources: {limits: {cpu: 100m, memory: 9Ei, ephemeral-storage: 1500M}}}]": "",
		"  containers: [{name: a, resources: {limits: {memory: 1500k}}, env: []}]":                           "1500k is too small",
	} {
		var got []string
		for _, f := range Of(podOf(t, spec)) {
			got = append(got, f.Field+": "+f.Message)
			if f.Remedy == "" {
				t.Errorf("%s: no remedy", spec)
			}
		}
		if text := strings.Join(got, "\n"); (want == "") != (text == "") || !strings.Contains(text, want) {
			t.Errorf("%s: %q, want %q", spec, text, want)
		}
	}
}

func TestWhatKeepsAPodFromStarting(t *testing.T) {
	for _, tt := range []struct{ spec, container, want string }{
		{"  containers: [{name: a, resources: {limits: {memory: 128m}}}]", "", "spec.containers[0].resources.limits[memory]"},
		{"  containers: [{name: a, resources: {limits: {memory: 128m}}}]", "a", "spec.containers[0].resources.limits[memory]"},
		{"  containers: [{name: a, resources: {limits: {memory: 128m}}}, {name: b}]", "", ""}, // the pod has no limit
		{"  containers: [{name: a, resources: {limits: {memory: 128m}}}, {name: b, resources: {limits: {memory: 1Gi}}}]", "", ""},
		{"  containers: [{name: a, resources: {limits: {memory: 128m}}}, {name: b}]", "b", ""},
		{"  resources: {limits: {memory: 1Mi}}\n  containers: [{name: a}]", "a", "spec.resources.limits[memory]"},
		{"  resources: {limits: {memory: 1Mi}}\n  containers: [{name: a}]", "", "spec.resources.limits[memory]"},
		{"  containers: [{name: a, resources: {limits: {memory: 2Gi, ephemeral-storage: 1m}}}]", "a", ""},
		{"  containers: [{name: a, resources: {limits: {memory: 4294967296500m}}}]", "a", ""}, // a fraction, and enough
	} {
		f, found := Memory(podOf(t, tt.spec), tt.container)
		if found != (tt.want != "") || f.Field != tt.want {
			t.Errorf("%s, container %q: %q, want %q", tt.spec, tt.container, f.Field, tt.want)
		}
	}
}

func TestFraction(t *testing.T) {
	for text, want := range map[string]bool{"128m": true, "1": false, "1.5": true, "1.5Ki": false, "0": false, "8E": false, "9223372036854775807": false, "100u": true, "-1m": true, "1e-3": true, "1000m": false} {
		if got := Fraction(resource.MustParse(text)); got != want {
			t.Errorf("%s: %v, want %v", text, got, want)
		}
	}
}
