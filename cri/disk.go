package cri

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podd-runtime/podd/volumes/tree"
)

// What containers write on the node's disk outside of volumes: their layers, the
// VOLUMEs of their images, and the files in /etc that a sandbox' containers
// share. All of it is in the statistics, whose reader evicts.

// writable is what a container has on disk: its layer and its image's VOLUMEs,
// and the sandbox' files, which count once, with the oldest container that runs.
func (s *Service) writable(ctx context.Context, c *container) (tree.Usage, error) {
	u, err := s.ownDisk(ctx, c)
	if err == nil && s.oldestRunning(c.sandboxID) == c {
		u = u.Plus(s.sandboxDisk(c.sandboxID))
	}
	return u, err
}

// ownDisk is what a container alone has on disk, whether it runs or not.
func (s *Service) ownDisk(ctx context.Context, c *container) (tree.Usage, error) {
	bytes, inodes, err := s.images.Usage(ctx, c.id)
	if err != nil {
		return tree.Usage{}, err
	}
	u := tree.Usage{Bytes: bytes, Inodes: inodes}
	if _, err := os.Lstat(s.volumeDir(c.id)); errors.Is(err, fs.ErrNotExist) {
		return u, nil
	}
	volumes, err := s.volumes.Usage(ctx, c.id)
	return u.Plus(volumes), err
}

// measureVolumes measures the VOLUMEs of a container for the meter.
func (s *Service) measureVolumes(ctx context.Context, id string, pace tree.Stepper) (tree.Usage, error) {
	fd, err := unix.Open(s.volumeDir(id), unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return tree.Usage{}, err
	}
	defer unix.Close(fd)
	return tree.Measure(ctx, fd, pace)
}

// sandboxDisk is what the files take that a sandbox' containers see in /etc.
func (s *Service) sandboxDisk(id string) (u tree.Usage) {
	for _, name := range []string{"hostname", "hosts", "resolv.conf"} {
		var st unix.Stat_t
		if unix.Lstat(filepath.Join(s.etcDir(id), name), &st) == nil {
			u.Bytes += uint64(st.Blocks) * 512
			u.Inodes++
		}
	}
	return u
}

// oldestRunning container of a sandbox; nil: none runs.
func (s *Service) oldestRunning(sandboxID string) *container {
	all := s.objects.containersOf(sandboxID)
	i := slices.IndexFunc(all, func(c *container) bool { return c.current() == runtimeapi.ContainerState_CONTAINER_RUNNING })
	if i < 0 {
		return nil
	}
	return all[i]
}

// AtRest is what the statistics of a pod's running containers lack of its disk.
type AtRest struct {
	// Containers that do not run, by name; of several with one name the largest.
	Containers map[string]tree.Usage
	// Files of its sandboxes, unless a running container stands for them.
	Files tree.Usage
}

// atRestWait is how long DiskAtRest waits for first measurements, of all
// containers together. Those that have none by then are in the next answer.
const atRestWait = 2 * time.Second

// DiskAtRest is what pods have on disk that no running container's statistics
// tell, by the pods' UIDs; of one pod if uid is not empty.
func (s *Service) DiskAtRest(ctx context.Context, uid string) map[string]AtRest {
	ctx, cancel := context.WithTimeout(ctx, atRestWait)
	defer cancel()
	out := map[string]AtRest{}
	for _, sb := range s.objects.allSandboxes() {
		pod := sb.config.GetMetadata().GetUid()
		if uid != "" && pod != uid {
			continue
		}
		at := out[pod]
		if at.Containers == nil {
			at.Containers = map[string]tree.Usage{}
		}
		running := false
		for _, c := range s.objects.containersOf(sb.id) {
			if c.current() == runtimeapi.ContainerState_CONTAINER_RUNNING {
				running = true
				continue
			}
			name := c.config.GetMetadata().GetName()
			// One that is being removed has no figure, and soon nothing.
			if u, err := s.ownDisk(ctx, c); err == nil && u.Bytes >= at.Containers[name].Bytes {
				at.Containers[name] = u
			}
		}
		if !running {
			at.Files = at.Files.Plus(s.sandboxDisk(sb.id))
		}
		out[pod] = at
	}
	return out
}
