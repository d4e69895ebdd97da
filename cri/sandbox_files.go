package cri

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// shmSize of a pod's /dev/shm in bytes, as every runtime has it.
const shmSize = 64 << 20

// maxHostFile bounds what is copied of the node's resolv.conf and hosts.
const maxHostFile = 1 << 20

// makeSandboxFiles writes what containers of the pod get in /etc, and mounts
// the shared memory that goes with the pod's IPC namespace.
func (s *Service) makeSandboxFiles(sb *sandbox) error {
	dir, etc := s.sandboxDir(sb.id), s.etcDir(sb.id)
	for _, d := range []string{dir, etc} {
		if err := os.Mkdir(d, 0o700); err != nil {
			return fmt.Errorf("create sandbox directory: %w", err)
		}
	}
	hostname := sb.config.GetHostname()
	if hostname == "" {
		hostname, _ = os.Hostname()
	}
	files := []struct {
		name    string
		content func() ([]byte, error)
	}{
		{"hostname", func() ([]byte, error) { return []byte(hostname + "\n"), nil }},
		{"resolv.conf", func() ([]byte, error) { return resolvConf(sb.config.GetDnsConfig()) }},
		// The kubelet mounts a pod's hosts file itself; this one is for other clients.
		{"hosts", func() ([]byte, error) { return hostFile("/etc/hosts") }},
	}
	for _, f := range files {
		b, err := f.content()
		if err != nil {
			return fmt.Errorf("sandbox %s: %w", f.name, err)
		}
		if err := writeNew(filepath.Join(etc, f.name), b, 0o644); err != nil {
			return fmt.Errorf("sandbox %s: %w", f.name, err)
		}
	}
	if sb.namespaces().GetIpc() == runtimeapi.NamespaceMode_NODE {
		return nil
	}
	shm := filepath.Join(dir, "shm")
	if err := os.Mkdir(shm, 0o700); err != nil {
		return fmt.Errorf("sandbox shared memory: %w", err)
	}
	if err := unix.Mount("shm", shm, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, fmt.Sprintf("mode=1777,size=%d", shmSize)); err != nil {
		return fmt.Errorf("mount sandbox shared memory: %w", err)
	}
	return nil
}

// resolvConf renders the DNS config; without one the node's file is the pod's.
func resolvConf(c *runtimeapi.DNSConfig) ([]byte, error) {
	if c == nil {
		return hostFile("/etc/resolv.conf")
	}
	var b bytes.Buffer
	if len(c.GetSearches()) > 0 {
		fmt.Fprintf(&b, "search %s\n", strings.Join(c.GetSearches(), " "))
	}
	for _, server := range c.GetServers() {
		fmt.Fprintf(&b, "nameserver %s\n", server)
	}
	if len(c.GetOptions()) > 0 {
		fmt.Fprintf(&b, "options %s\n", strings.Join(c.GetOptions(), " "))
	}
	return b.Bytes(), nil
}

// hostFile reads a small file of the node; a missing one is empty.
func hostFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, maxHostFile))
}

// writeNew writes a file that must not exist yet.
func writeNew(path string, b []byte, mode uint32) error {
	fd, err := unix.Open(path, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, mode)
	if err != nil {
		return &fs.PathError{Op: "create", Path: path, Err: err}
	}
	f := os.NewFile(uintptr(fd), path)
	_ = unix.Fchmod(fd, mode) // containers read it whatever our umask is
	_, err = f.Write(b)
	return errors.Join(err, f.Close())
}
