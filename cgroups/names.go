package cgroups

import (
	"path"
	"strings"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
)

// The kubelet's names (pkg/kubelet/cm: "kubepods", QoS class in lower case,
// "pod" + UID). Guaranteed pods live directly below kubepods.
const (
	nodeGroup   = "kubepods"
	podPrefix   = "pod"
	sliceSuffix = ".slice"
)

// levels are the groups that hold pod groups, nil is kubepods itself.
var levels = []v1.PodQOSClass{v1.PodQOSGuaranteed, v1.PodQOSBurstable, v1.PodQOSBestEffort}

// namer turns the components of a group ("kubepods", "burstable", "pod123")
// into what the driver calls it.
type namer struct {
	root    []string // components of Config.Root
	systemd bool
}

func newNamer(root string, systemd bool) namer {
	n := namer{systemd: systemd}
	root = strings.Trim(path.Clean("/"+root), "/")
	if root == "" {
		return n
	}
	if systemd && strings.HasSuffix(root, sliceSuffix) {
		// "a-b.slice" or "a.slice/a-b.slice": the last one says it all.
		root = strings.TrimSuffix(path.Base(root), sliceSuffix)
		if root == "-" {
			return n // the root slice
		}
		n.root = strings.Split(root, "-")
		return n
	}
	n.root = strings.Split(root, "/")
	return n
}

// level returns the components of a QoS level.
func (n namer) level(qos v1.PodQOSClass) []string {
	c := append(append(make([]string, 0, len(n.root)+3), n.root...), nodeGroup)
	if qos == v1.PodQOSBurstable || qos == v1.PodQOSBestEffort {
		c = append(c, strings.ToLower(string(qos)))
	}
	return c
}

func (n namer) pod(uid types.UID, qos v1.PodQOSClass) []string {
	return append(n.level(qos), podPrefix+safe(string(uid)))
}

// path is where the group is below a hierarchy's mount point.
func (n namer) path(components []string) string {
	if !n.systemd {
		return "/" + strings.Join(components, "/")
	}
	var full, name strings.Builder
	for i, c := range components {
		if i > 0 {
			name.WriteByte('-')
		}
		// systemd reads "-" as a level: upstream writes "_" instead.
		name.WriteString(strings.ReplaceAll(c, "-", "_"))
		full.WriteByte('/')
		full.WriteString(name.String())
		full.WriteString(sliceSuffix)
	}
	return full.String()
}

// unit is the slice's name, systemd driver only.
func (n namer) unit(components []string) string { return path.Base(n.path(components)) }

// podUID reads the UID out of the base name of a directory below a level.
func (n namer) podUID(base string) (types.UID, bool) {
	if n.systemd {
		if !strings.HasSuffix(base, sliceSuffix) {
			return "", false
		}
		base = strings.TrimSuffix(base, sliceSuffix)
		base = base[strings.LastIndexByte(base, '-')+1:]
		base = strings.ReplaceAll(base, "_", "-")
	}
	uid, ok := strings.CutPrefix(base, podPrefix)
	return types.UID(uid), ok && uid != "" && uid != "s" // "pods" is no pod
}

// safe keeps a UID that somebody wrote into a manifest from naming a group
// outside its level.
func safe(uid string) string {
	return strings.ReplaceAll(strings.ReplaceAll(uid, "/", "_"), "\x00", "_")
}

// validUID reports whether the UID names a group exactly.
func validUID(uid types.UID) bool {
	return uid != "" && safe(string(uid)) == string(uid) && len(uid) <= 200
}
