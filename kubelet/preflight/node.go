package preflight

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// otherAgents that run, or have left what would be taken for ours.
func otherAgents(l *look) {
	find := 0
	running := l.host.processes()
	for _, a := range []struct {
		name string
		s    Severity
		why  string
	}{
		{"kubelet", Error, "it runs the pods of the same manifests in the same directories"},
		{"containerd", Warning, "podd needs none, and its CNI networks and podd's may meet"},
		{"dockerd", Warning, "podd needs none, and Docker sets the packet filter's forward policy to drop"},
		{"crio", Warning, "podd needs none"},
		{"cri-dockerd", Warning, "podd needs none"},
	} {
		if pid, is := running[a.name]; is {
			find++
			l.found(a.s, fmt.Sprintf("systemctl disable --now %s, if nothing else needs it", a.name), "%s runs (process %d): %s", a.name, pid, a.why)
		}
	}
	for _, s := range []struct{ path, of string }{{"/run/containerd/containerd.sock", "containerd"}, {"/run/crio/crio.sock", "crio"}, {"/run/cri-dockerd.sock", "cri-dockerd"}} {
		if _, is := running[s.of]; !is && l.host.exists(s.path) {
			find++
			l.found(Warning, "rm "+s.path, "%s is left of %s, which does not run: CRI clients that look for a socket find that one", s.path, s.of)
		}
	}
	if !l.host.exists(filepath.Join(l.node.DataDir, "pods")) && len(l.host.glob(filepath.Join(l.node.RootDir, "pods/*"))) > 0 {
		find++
		l.found(Warning, "stop that kubelet and run kubeadm reset, or give podd another --root-dir", "%s holds pods of another kubelet: podd removes what it does not know", filepath.Join(l.node.RootDir, "pods"))
	}
	if find == 0 {
		l.found(OK, "", "no other kubelet or runtime")
	}
}

// ports that are taken, and by whom.
func ports(l *look) {
	find := 0
	for _, port := range l.node.Ports {
		inode, used := l.host.listener(port)
		if !used {
			continue
		}
		pid, name := l.host.owner(inode)
		if name == "podd" {
			continue
		}
		find++
		if name == "" {
			name = "a process of another namespace"
		} else {
			name = fmt.Sprintf("%s (process %d)", name, pid)
		}
		l.found(Error, "stop that, or configure another port", "port %d is taken by %s", port, name)
	}
	switch {
	case find > 0:
	case len(l.node.Ports) == 0:
		l.found(OK, "", "none needed")
	default:
		l.found(OK, "", "%s free", strings.Trim(fmt.Sprint(l.node.Ports), "[]"))
	}
}

// listener finds the socket that listens on a TCP port (proc_net_tcp(5)).
func (h *Host) listener(port int) (inode string, is bool) {
	const listening = "0A"
	for _, file := range []string{"/proc/net/tcp", "/proc/net/tcp6"} {
		for line := range strings.SplitSeq(h.read(file), "\n") {
			f := strings.Fields(line)
			if len(f) < 10 || f[3] != listening {
				continue
			}
			_, hexPort, _ := strings.Cut(f[1], ":")
			if b, err := hex.DecodeString(hexPort); err == nil && len(b) == 2 && int(b[0])<<8|int(b[1]) == port {
				return f[9], true
			}
		}
	}
	return "", false
}

// owner of a socket: the process that has it open.
func (h *Host) owner(inode string) (pid int, name string) {
	want := "socket:[" + inode + "]"
	for _, fd := range h.glob("/proc/[0-9]*/fd/*") {
		if to, err := os.Readlink(h.path(fd)); err != nil || to != want {
			continue
		}
		dir := filepath.Dir(filepath.Dir(fd))
		pid, _ := strconv.Atoi(filepath.Base(dir))
		return pid, h.read(filepath.Join(dir, "comm"))
	}
	return 0, ""
}

// cniConfigs as libcni looks for them.
func cniConfigs(l *look) (files []string) {
	for _, ext := range []string{"*.conf", "*.conflist", "*.json"} {
		files = append(files, l.host.glob(filepath.Join(l.node.CNIConfDir, ext))...)
	}
	slices.Sort(files)
	return files
}

func cni(l *look) {
	files := cniConfigs(l)
	if len(files) == 0 {
		l.found(OK, "", "no configuration: pods get the built-in network")
		return
	}
	var conf struct {
		Name    string `json:"name"`
		Type    string `json:"type"`
		Plugins []struct {
			Type string `json:"type"`
		} `json:"plugins"`
	}
	if err := json.Unmarshal([]byte(l.host.read(files[0])), &conf); err != nil {
		l.found(Error, "correct or remove it", "%s cannot be read: %v", files[0], err)
		return
	}
	types := []string{conf.Type}
	for _, p := range conf.Plugins {
		types = append(types, p.Type)
	}
	find := 0
	for _, name := range types {
		there := name == ""
		for _, dir := range l.node.CNIBinDirs {
			there = there || l.host.exists(filepath.Join(dir, name))
		}
		if !there {
			find++
			l.found(Error, "install the plugin, or remove the file and pods get the built-in network", "%s wants plugin %s, which is in none of %s", files[0], name, strings.Join(l.node.CNIBinDirs, ", "))
		}
	}
	if len(files) > 1 {
		find++
		l.found(Warning, "remove what is left of other networks", "%s is used, not %s", files[0], strings.Join(files[1:], ", "))
	}
	if find == 0 {
		l.found(OK, "", "network %s by %s", conf.Name, files[0])
	}
}

// resolver: pods cannot reach the host's loopback.
func resolver(l *look) {
	var servers, local []string
	for line := range strings.SplitSeq(l.host.read(l.node.ResolvConf), "\n") {
		f := strings.Fields(line)
		if len(f) < 2 || f[0] != "nameserver" {
			continue
		}
		servers = append(servers, f[1])
		if strings.HasPrefix(f[1], "127.") || f[1] == "::1" {
			local = append(local, f[1])
		}
	}
	switch {
	case len(servers) == 0:
		l.found(Warning, "write name servers there, or set resolvConf", "%s names no server: pods resolve no names", l.node.ResolvConf)
	case len(local) == len(servers):
		remedy := "set resolvConf to a file with servers that pods reach"
		if l.host.exists("/run/systemd/resolve/resolv.conf") {
			remedy = "set resolvConf: /run/systemd/resolve/resolv.conf"
		}
		l.found(Warning, remedy, "%s names only %s, which pods do not reach", l.node.ResolvConf, strings.Join(local, ", "))
	default:
		l.found(OK, "", "%s", strings.Join(servers, ", "))
	}
}

func hostname(l *look) {
	ctx, cancel := context.WithTimeout(l.ctx, 5*time.Second)
	defer cancel()
	if err := l.host.Resolve(ctx, l.node.NodeName); err != nil {
		l.found(Warning, fmt.Sprintf("add it to /etc/hosts: 127.0.1.1 %s", l.node.NodeName), "the node's name %q does not resolve: %v", l.node.NodeName, err)
		return
	}
	l.found(OK, "", "%s resolves", l.node.NodeName)
}

// File systems that cannot hold layers, by their magic numbers (statfs(2)).
var unfit = map[int64]string{0x794c7630: "overlayfs", 0x6969: "NFS", 0x65735546: "FUSE", 0xff534d42: "CIFS", 0xfe534d42: "SMB"}

const (
	leastFree = 1 << 30 // what a few images take
	lowPart   = 10      // percent, where upstream begins to evict: nodefs.available<10%
	lowInodes = 5       // percent, nodefs.inodesFree<5%
)

func disk(l *look) {
	find := 0
	seen := map[string]bool{}
	for _, d := range []struct {
		dir, flag string
		layers    bool
	}{{l.node.DataDir, "--data-dir", true}, {l.node.RootDir, "--root-dir", false}, {l.node.LogsDir, "--pod-logs-dir", false}} {
		dir := l.host.existing(d.dir)
		st, err := l.host.Statfs(l.host.path(dir))
		if err != nil {
			find++
			l.found(Error, "make the directory", "%s (%s): %v", d.dir, d.flag, err)
			continue
		}
		if name, bad := unfit[int64(st.Type)]; bad && d.layers {
			find++
			l.found(Error, "give "+d.flag+" a directory on ext4, xfs or btrfs", "%s is on %s, which cannot hold the layers of containers", d.dir, name)
		}
		if seen[dir] {
			continue
		}
		seen[dir] = true
		free, all := int64(st.Bavail)*int64(st.Bsize), int64(st.Blocks)*int64(st.Bsize)
		remedy := "make room, or give " + d.flag + " a directory elsewhere"
		switch {
		case all > 0 && free < leastFree/8:
			find++
			l.found(Error, remedy, "%s has %d MiB free", d.dir, free>>20)
		case all > 0 && (free < leastFree || free*100 < all*lowPart):
			find++
			l.found(Warning, remedy, "%s has %d MiB free, %d %%", d.dir, free>>20, free*100/all)
		}
		if st.Files > 0 && st.Ffree*100 < st.Files*lowInodes {
			find++
			l.found(Warning, remedy, "%s has %d inodes free, %d %%", d.dir, st.Ffree, st.Ffree*100/st.Files)
		}
	}
	if find == 0 {
		l.found(OK, "", "enough space and inodes")
	}
}
