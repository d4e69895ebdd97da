package pods

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podd-runtime/podd/kubelet/pods/spec"
)

// ownMounts are the files that we put into every container: the managed hosts
// file and the one that takes the termination message.
func (s *launch) ownMounts() ([]*runtimeapi.Mount, error) {
	var out []*runtimeapi.Mount
	dir := s.w.t.cfg.Node.PodDir(s.pod.UID)
	if spec.WantsHosts(s.pod, s.c, s.sandbox.IPs) {
		content, err := s.w.t.cfg.Node.Hosts(s.pod, s.sandbox.IPs)
		if err != nil {
			return nil, err
		}
		path := filepath.Join(dir, spec.HostsFile)
		if err := writeShared(path, content, 0o644); err != nil {
			return nil, fmt.Errorf("write the hosts file of pod %s: %w", s.pod.Name, err)
		}
		out = append(out, &runtimeapi.Mount{ContainerPath: spec.EtcHosts, HostPath: path, SelinuxRelabel: true})
	}
	if s.c.TerminationMessagePath != "" {
		path := terminationFile(dir, s.c.Name, s.attempt)
		if err := writeShared(path, nil, 0o666); err != nil {
			return nil, fmt.Errorf("make the termination message file of container %s: %w", s.c.Name, err)
		}
		out = append(out, &runtimeapi.Mount{ContainerPath: s.c.TerminationMessagePath, HostPath: path, SelinuxRelabel: true})
	}
	return out, nil
}

// terminationFile takes the termination message of one instance.
func terminationFile(podDir, container string, attempt int32) string {
	return filepath.Join(podDir, spec.MessagesDir, container, fmt.Sprintf("%08x", attempt))
}

// writeShared writes a file that is mounted into containers: in place, so
// that those that have it see the same, and never through a link. Containers
// that start at the same time write the same.
func writeShared(path string, content []byte, mode os.FileMode) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o750); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, mode)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Chmod(mode); err != nil { // whatever the umask is
		return err
	}
	have, err := io.ReadAll(io.LimitReader(f, int64(len(content))+1))
	if err != nil || bytes.Equal(have, content) {
		return err
	}
	if _, err := f.WriteAt(content, 0); err != nil {
		return err
	}
	return f.Truncate(int64(len(content)))
}

// envFile reads one variable of a file in a volume (KEP-3721).
func (s *launch) envFile(volume, path, key string) (string, bool, error) {
	dir := filepath.Join(s.w.t.cfg.Node.PodDir(s.pod.UID), "volumes", "kubernetes.io~empty-dir", volume)
	const maxEnvFile = 1 << 20 // what upstream reads at most
	data, err := readBelow(dir, path, maxEnvFile)
	if err != nil {
		return "", false, err
	}
	return parseEnv(data, key)
}

// readBelow reads up to n bytes of a regular file in a directory that containers
// write. No link leads out of it. The file is looked at before it is opened: a
// FIFO would keep us waiting, a device node that a container has made would be
// the host's device.
func readBelow(dir, path string, n int64) ([]byte, error) {
	root, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: dir, Err: err}
	}
	defer unix.Close(root)
	fd, err := unix.Openat2(root, path, &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_MAGICLINKS})
	for try := 0; err == unix.EAGAIN && try < 128; try++ { // a rename anywhere on the system raced with a ".."
		fd, err = unix.Openat2(root, path, &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_MAGICLINKS})
	}
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, fmt.Errorf("%s is not a regular file", path)
	}
	f, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", fd)) // that very file
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, n))
}

// parseEnv finds key in lines of KEY='value', as KEP-3721 and upstream define
// them: values in single quotes, over several lines too, taken literally; no
// space around the name; comments on lines of their own or after a value. A
// space after the = makes the value empty, as in a shell, and one that is empty
// counts as not there.
func parseEnv(data []byte, key string) (string, bool, error) {
	lines := strings.Split(strings.TrimSuffix(string(data), "\n"), "\n")
	for i := 0; i < len(lines); i++ {
		bad := func(what string) (string, bool, error) {
			return "", false, fmt.Errorf("line %d: %s", i+1, what)
		}
		line := strings.TrimLeft(lines[i], " \t")
		if line == "" || line[0] == '#' {
			continue
		}
		name, value, ok := strings.Cut(line, "=")
		switch {
		case !ok:
			return bad("it has no =")
		case name == "":
			return bad("it names no variable")
		case strings.TrimRight(name, " \t") != name:
			return bad("there is a space before the =")
		case strings.TrimLeft(value, " \t") != value:
			if name == key {
				return "", false, nil
			}
			continue
		case !strings.HasPrefix(value, "'"):
			return bad("the value is not in single quotes")
		}
		value = value[1:]
		for !strings.Contains(value, "'") {
			if i++; i == len(lines) {
				return "", false, fmt.Errorf("value of %s has no closing quote", name)
			}
			value += "\n" + lines[i]
		}
		value, rest, _ := strings.Cut(value, "'")
		if rest = strings.TrimLeft(rest, " \t"); rest != "" && rest[0] != '#' {
			return bad("something follows the closing quote")
		}
		if name == key {
			return value, value != "", nil
		}
	}
	return "", false, nil
}
