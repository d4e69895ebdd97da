package netns

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// rangeRecord is the file DataDir/range.json: the pod range of this instance,
// chosen once and kept, so that addresses mean the same after a restart.
type rangeRecord struct {
	Version int `json:"version"`
	// CIDRs in the order in which they were set; the last is current.
	CIDRs []string `json:"cidrs"`
	// Given: by the cluster or the configuration, not chosen here.
	Given bool `json:"given"`
}

func loadRange(dir string) (*rangeRecord, error) {
	data, err := os.ReadFile(filepath.Join(dir, "range.json"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("network state: %w", err)
	}
	r := &rangeRecord{}
	if err := json.Unmarshal(data, r); err != nil || r.Version != recordVersion {
		return nil, fmt.Errorf("network state %s/range.json: version %d: %w", dir, r.Version, errors.Join(err, errdefs.ErrDataLoss))
	}
	return r, nil
}

func saveRange(dir string, r rangeRecord) error {
	r.Version = recordVersion
	data, err := json.Marshal(r)
	if err != nil {
		return err
	}
	path := filepath.Join(dir, "range.json")
	// It is asked for at every start, which a full disk must not prevent.
	if have, err := os.ReadFile(path); err == nil && bytes.Equal(have, data) {
		return nil
	}
	return writeAtomic(path, data)
}

// candidates are the IPv4 ranges tried in this order: blocks of 4,093 pods that
// stay clear of what others take by default (Podman 10.88/16 and up, kubeadm's
// services 10.96/12, Flannel 10.244/16, k3s 10.42/15, CRI-O 10.85/16, Docker
// 172.17/16 and up).
func candidates(yield func(netip.Prefix) bool) {
	for _, block := range []string{"10.86.0.0/15", "10.64.0.0/12", "100.80.0.0/14", "172.30.0.0/16", "192.168.192.0/18"} {
		p := netip.MustParsePrefix(block)
		for n := range uint32(1) << (20 - p.Bits()) {
			if !yield(netip.PrefixFrom(nth(p, n<<12), 20)) {
				return
			}
		}
	}
}

// ula is the instance's own IPv6 range (RFC 4193): stable for machine and
// instance, unlikely to be anybody else's.
func ula(machine, instance string) netip.Prefix {
	h := sha256.Sum256([]byte("podd pod range\x00" + machine + "\x00" + instance))
	b := [16]byte{0: 0xfd}
	copy(b[1:6], h[:5])
	return netip.PrefixFrom(netip.AddrFrom16(b), 64)
}

// choose picks the first candidate that overlaps no route and no address of
// the host. Routes of our own bridge do not count.
func choose(routes []netip.Prefix) (netip.Prefix, error) {
	for c := range candidates {
		free := true
		for _, r := range routes {
			free = free && !r.Overlaps(c)
		}
		if free {
			return c, nil
		}
	}
	return netip.Prefix{}, fmt.Errorf("no free IPv4 range for pods: the host's routes cover all candidates, set a pod range: %w", errdefs.ErrResourceExhausted)
}

// routes lists the destinations of all routes but default ones and our own
// bridge's.
func routes(h *netlink.Handle, bridge int) ([]netip.Prefix, error) {
	list, err := h.RouteListFiltered(unix.AF_UNSPEC, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	var out []netip.Prefix
	for _, r := range list {
		if r.Dst == nil || bridge != 0 && r.LinkIndex == bridge {
			continue
		}
		a, ok := netip.AddrFromSlice(r.Dst.IP)
		ones, _ := r.Dst.Mask.Size()
		if !ok || ones == 0 {
			continue
		}
		a = a.Unmap()
		if r.Type == unix.RTN_MULTICAST || a.IsMulticast() || a.IsLinkLocalUnicast() {
			continue
		}
		out = append(out, netip.PrefixFrom(a, ones))
	}
	return out, nil
}

func machineID() string {
	for _, p := range []string{"/etc/machine-id", "/proc/sys/kernel/random/boot_id"} {
		if b, err := os.ReadFile(p); err == nil && len(b) > 8 {
			return string(b)
		}
	}
	return ""
}

// names of an instance's kernel objects. The default instance's are pretty.
func instanceNames(instance string) (bridge, table string) {
	if instance == "" {
		return "podd0", "podd"
	}
	h := sha256.Sum256([]byte(instance))
	s := hex.EncodeToString(h[:5])
	return "podd-" + s, "podd-" + s
}

const linkPrefix = "pod"

// linkName of a sandbox's host side, 15 bytes.
func linkName(instance, sandbox string) string {
	h := sha256.Sum256([]byte(instance + "\x00" + sandbox))
	return linkPrefix + hex.EncodeToString(h[:6])
}
