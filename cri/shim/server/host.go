package server

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/opencontainers/cgroups"
	"golang.org/x/sys/unix"
)

// host is what this machine permits, found out once.
type host struct {
	// oomFloor is the lowest oom_score_adj that we may give: lowering it below
	// our own needs CAP_SYS_RESOURCE, and libcontainer fails where it is missing.
	oomFloor int
	unified  bool // cgroup v2 only
}

func probeHost() (*host, error) {
	h := &host{unified: cgroups.IsCgroup2UnifiedMode(), oomFloor: -1000}
	head := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&head, &data[0]); err != nil {
		return nil, fmt.Errorf("capget: %w", err)
	}
	if data[0].Effective&(1<<unix.CAP_SYS_RESOURCE) == 0 {
		text, err := os.ReadFile("/proc/self/oom_score_adj")
		if err != nil {
			return nil, err
		}
		if h.oomFloor, err = strconv.Atoi(strings.TrimSpace(string(text))); err != nil {
			return nil, fmt.Errorf("own oom_score_adj: %w", err)
		}
	}
	return h, nil
}

// oomScore clamps a wanted oom_score_adj to what may be set.
func (h *host) oomScore(want int) int { return min(max(want, h.oomFloor), 1000) }
