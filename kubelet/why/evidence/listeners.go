package evidence

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	v1 "k8s.io/api/core/v1"

	"github.com/podd-runtime/podd/kubelet/why"
)

// States in /proc/net/tcp and udp (tcp_states.h): a listening TCP socket, and
// a UDP socket that is bound and not connected.
const (
	tcpListen = "0A"
	udpBound  = "07"
)

// listeners finds who listens on ports of this process' network, the host's.
func listeners(ctx context.Context, proc string, ports []int32) []why.Listener {
	type socket struct {
		port     int32
		protocol v1.Protocol
	}
	sockets := map[string]socket{} // by inode
	for _, t := range []struct {
		file, state string
		protocol    v1.Protocol
	}{{"tcp", tcpListen, v1.ProtocolTCP}, {"tcp6", tcpListen, v1.ProtocolTCP}, {"udp", udpBound, v1.ProtocolUDP}, {"udp6", udpBound, v1.ProtocolUDP}} {
		f, err := os.Open(filepath.Join(proc, "net", t.file))
		if err != nil {
			continue
		}
		for sc := bufio.NewScanner(f); sc.Scan(); {
			// sl local_address rem_address st tx:rx tr:when retrnsmt uid timeout inode
			c := strings.Fields(sc.Text())
			if len(c) < 10 || c[3] != t.state {
				continue
			}
			_, hex, _ := strings.Cut(c[1], ":")
			if port, err := strconv.ParseUint(hex, 16, 16); err == nil && slices.Contains(ports, int32(port)) {
				sockets[c[9]] = socket{int32(port), t.protocol}
			}
		}
		f.Close()
	}
	if len(sockets) == 0 {
		return nil
	}
	var out []why.Listener
	add := func(l why.Listener) {
		if !slices.ContainsFunc(out, func(o why.Listener) bool { return o.Port == l.Port && o.Protocol == l.Protocol }) {
			out = append(out, l)
		}
	}
	entries, _ := os.ReadDir(proc)
	for _, p := range entries {
		pid, err := strconv.Atoi(p.Name())
		if err != nil {
			continue
		}
		if ctx.Err() != nil || len(out) == len(sockets) {
			break
		}
		fds, err := os.ReadDir(filepath.Join(proc, p.Name(), "fd"))
		if err != nil {
			continue
		}
		for _, fd := range fds {
			to, err := os.Readlink(filepath.Join(proc, p.Name(), "fd", fd.Name()))
			if err != nil {
				continue
			}
			inode, ok := strings.CutPrefix(to, "socket:[")
			if !ok {
				continue
			}
			if s, ok := sockets[strings.TrimSuffix(inode, "]")]; ok {
				comm, _ := os.ReadFile(filepath.Join(proc, p.Name(), "comm"))
				add(why.Listener{Port: s.port, Protocol: s.protocol, PID: pid, Program: strings.TrimSpace(string(comm)), Pod: podUID(proc, pid)})
			}
		}
	}
	for _, s := range sockets { // of processes that could not be looked into
		add(why.Listener{Port: s.port, Protocol: s.protocol})
	}
	return out
}

// podUID of the pod in whose cgroup a process is; "": in none.
func podUID(proc string, pid int) string {
	b, err := os.ReadFile(filepath.Join(proc, fmt.Sprint(pid), "cgroup"))
	if err != nil {
		return ""
	}
	for part := range strings.SplitSeq(strings.TrimSpace(string(b)), "/") {
		name := part[strings.LastIndex(part, "-")+1:] // kubepods-burstable-podUID.slice
		if uid, ok := strings.CutPrefix(strings.TrimSuffix(name, ".slice"), "pod"); ok && len(uid) >= 32 {
			return strings.ReplaceAll(uid, "_", "-")
		}
	}
	return ""
}
