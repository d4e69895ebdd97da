package preflight

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// well is a host on which everything is as it should be.
var well = map[string]string{
	"/proc/self/ns/mnt": "", "/proc/self/ns/pid": "", "/proc/self/ns/net": "", "/proc/self/ns/ipc": "", "/proc/self/ns/uts": "",
	"/proc/self/ns/cgroup": "", "/proc/self/ns/user": "",
	"/proc/sys/user/max_user_namespaces":          "15000",
	"/proc/sys/kernel/seccomp/actions_avail":      "kill_process kill_thread trap errno trace log allow",
	"/proc/filesystems":                           "nodev\ttmpfs\n\text4\n",
	"/lib/modules/6.1.0-18-amd64/modules.builtin": "kernel/net/bridge/bridge.ko\n",
	"/lib/modules/6.1.0-18-amd64/modules.dep":     "kernel/fs/overlayfs/overlay.ko:\nkernel/drivers/net/veth.ko.xz:\nkernel/net/netfilter/nf_tables.ko: kernel/x.ko\n",
	"/sys/fs/cgroup/cgroup.controllers":           "cpuset cpu io memory hugetlb pids",
	"/run/systemd/system/x":                       "",
	"/run/dbus/system_bus_socket":                 "",
	"/proc/sys/fs/inotify/max_user_instances":     "8192",
	"/proc/sys/fs/inotify/max_user_watches":       "524288",
	"/proc/sys/kernel/keys/maxkeys":               "20000",
	"/proc/swaps":                                 "Filename\tType\tSize\tUsed\tPriority",
	"/proc/1/comm":                                "systemd",
	"/proc/net/tcp":                               "  sl  local_address rem_address   st\n   0: 0100007F:1F90 00000000:0000 0A 0 0 0 0 0 4711 1\n",
	"/etc/resolv.conf":                            "nameserver 192.0.2.1\n",
	"/proc/self/mountinfo":                        "21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n",
	"/sys/module/apparmor/parameters/enabled":     "Y",
	"/sbin/apparmor_parser":                       "",
	"/var/lib/podd/pods/x":                        "",
}

func host(t *testing.T, changes map[string]string) *Host {
	t.Helper()
	files := maps.Clone(well)
	for name, text := range changes {
		if files[name] = text; text == "-" {
			delete(files, name)
		}
	}
	root := t.TempDir()
	for name, text := range files {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if to, is := strings.CutPrefix(text, "-> "); is {
			if err := os.Symlink(to, path); err != nil {
				t.Fatal(err)
			}
			continue
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return &Host{Root: root, Kernel: Kernel{
		Release: func() string { return "6.1.0-18-amd64" },
		UID:     func() int { return 0 },
		Statfs: func(string) (*unix.Statfs_t, error) {
			return &unix.Statfs_t{Type: 0xef53, Bsize: 4096, Blocks: 10 << 20, Bavail: 8 << 20, Files: 1000, Ffree: 900}, nil
		},
		Syscall:        func(string) error { return nil },
		Unsynchronized: func() bool { return false },
		Year:           func() int { return 2026 },
		Resolve:        func(context.Context, string) error { return nil },
	}}
}

func node() *Node {
	return &Node{
		DataDir: "/var/lib/podd", RunDir: "/run/podd", RootDir: "/var/lib/kubelet", LogsDir: "/var/log/pods",
		CNIConfDir: "/etc/cni/net.d", CNIBinDirs: []string{"/opt/cni/bin"}, ResolvConf: "/etc/resolv.conf",
		CgroupDriver: "systemd", NodeName: "node", Ports: []int{10250}, FailSwapOn: true, Shutdown: true,
	}
}

func TestWellHost(t *testing.T) {
	results, err := Run(t.Context(), host(t, nil), node(), nil)
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for _, r := range results {
		if seen[r.Check] = true; r.Severity != OK {
			t.Errorf("%+v", r)
		}
	}
	if len(seen) != len(checks) {
		t.Errorf("%d checks of %d said something", len(seen), len(checks))
	}
}

func TestFindings(t *testing.T) {
	statfs := func(st unix.Statfs_t) func(*Host, *Node) {
		return func(h *Host, _ *Node) { h.Statfs = func(string) (*unix.Statfs_t, error) { return &st, nil } }
	}
	for _, tt := range []struct {
		check   string
		files   map[string]string
		change  func(*Host, *Node)
		s       Severity
		message string
	}{
		{"Privileges", nil, func(h *Host, _ *Node) { h.UID = func() int { return 1000 } }, Error, "user 1000"},
		{"Kernel", nil, func(h *Host, _ *Node) { h.Release = func() string { return "5.4.0" } }, Error, "5.4.0 is too old"},
		{"Kernel", map[string]string{"/proc/filesystems": "nodev\toverlay\n"}, func(h *Host, _ *Node) { h.Release = func() string { return "5.10.0" } }, Warning, "no id-mapped mounts"},
		{"KernelFeatures", map[string]string{"/proc/self/ns/pid": "-"}, nil, Error, "no pid namespaces"},
		{"KernelFeatures", map[string]string{"/proc/sys/user/max_user_namespaces": "0"}, nil, Warning, "no user namespaces"},
		{"KernelFeatures", nil, func(h *Host, _ *Node) {
			h.Syscall = func(name string) error {
				if name == "openat2" {
					return unix.EPERM
				}
				return nil
			}
		}, Error, "openat2 does not work"},
		{"KernelFeatures", map[string]string{"/proc/sys/kernel/seccomp/actions_avail": "-"}, nil, Error, "no seccomp"},
		{"Modules", map[string]string{"/lib/modules/6.1.0-18-amd64/modules.dep": "kernel/drivers/net/veth.ko:\n"}, nil, Error, "no overlay"},
		{"Modules", map[string]string{"/lib/modules/6.1.0-18-amd64/modules.dep": "kernel/fs/overlayfs/overlay.ko:\nkernel/drivers/net/veth.ko:\n"}, nil, Warning, "no module nf_tables"},
		{"Cgroups", map[string]string{"/sys/fs/cgroup/cgroup.controllers": "cpu pids"}, nil, Error, "without memory"},
		{"Cgroups", map[string]string{"/sys/fs/cgroup/cgroup.controllers": "cpu memory pids cpuset io"}, nil, Warning, "without hugetlb"},
		{"Cgroups", map[string]string{"/sys/fs/cgroup/cgroup.controllers": "-", "/proc/cgroups": "#n h n e\ncpu 1 1 1\nmemory 1 1 0\npids 1 1 1\ndevices 1 1 1\nfreezer 1 1 1"}, nil, Error, "cgroup v1 without memory"},
		{"Cgroups", map[string]string{"/sys/fs/cgroup/cgroup.controllers": "-", "/proc/cgroups": "#n h n e\ncpu 1 1 1\nmemory 1 1 1\npids 1 1 1\ndevices 1 1 1\nfreezer 1 1 1"}, nil, Warning, "deprecated"},
		{"Cgroups", map[string]string{"/sys/fs/cgroup/cgroup.controllers": "-"}, nil, Error, "no control groups"},
		{"CgroupDriver", nil, func(_ *Host, n *Node) { n.CgroupDriver = "cgroupfs" }, Warning, "systemd runs here"},
		{"CgroupDriver", map[string]string{"/run/systemd/system/x": "-"}, nil, Error, "systemd does not run"},
		{"Sysctls", map[string]string{"/proc/sys/fs/inotify/max_user_instances": "128"}, nil, Warning, "max_user_instances is 128"},
		{"Sysctls", map[string]string{"/proc/sys/kernel/keys/maxkeys": "200"}, nil, Warning, "maxkeys is 200"},
		{"Sysctls", map[string]string{"/etc/cni/net.d/a.conf": "{}", "/proc/sys/net/ipv4/ip_forward": "0"}, nil, Warning, "ip_forward is 0"},
		{"Sysctls", map[string]string{"/etc/cni/net.d/a.conf": "{}", "/proc/sys/net/bridge/bridge-nf-call-iptables": "0"}, nil, Warning, "bridge-nf-call-iptables is 0"},
		{"Swap", map[string]string{"/proc/swaps": "Filename\n/dev/sda2 partition 1 0 -2"}, nil, Warning, "/dev/sda2"},
		{"Swap", nil, func(_ *Host, n *Node) { n.Swap = true }, Warning, "there is none"},
		{"OtherAgents", map[string]string{"/proc/77/comm": "kubelet"}, nil, Error, "kubelet runs (process 77)"},
		{"OtherAgents", map[string]string{"/proc/78/comm": "dockerd"}, nil, Warning, "dockerd runs"},
		{"OtherAgents", map[string]string{"/run/containerd/containerd.sock": ""}, nil, Warning, "is left of containerd"},
		{"OtherAgents", map[string]string{"/var/lib/podd/pods/x": "-", "/var/lib/kubelet/pods/u/x": ""}, nil, Warning, "another kubelet"},
		{"Ports", map[string]string{"/proc/77/comm": "nginx", "/proc/77/fd/6": "-> socket:[4711]"}, func(_ *Host, n *Node) { n.Ports = []int{8080} }, Error, "port 8080 is taken by nginx (process 77)"},
		{"Ports", nil, func(_ *Host, n *Node) { n.Ports = []int{8080} }, Error, "another namespace"},
		{"CNI", map[string]string{"/etc/cni/net.d/10-x.conflist": `{"name":"x","plugins":[{"type":"bridge"}]}`}, nil, Error, "plugin bridge"},
		{"CNI", map[string]string{"/etc/cni/net.d/10-x.conflist": `{`}, nil, Error, "cannot be read"},
		{"CNI", map[string]string{"/etc/cni/net.d/10-x.conf": `{"name":"x","type":"p"}`, "/etc/cni/net.d/20-y.conf": "{}", "/opt/cni/bin/p": ""}, nil, Warning, "not /etc/cni/net.d/20-y.conf"},
		{"Resolver", map[string]string{"/etc/resolv.conf": "nameserver 127.0.0.53\n"}, nil, Warning, "do not reach"},
		{"Resolver", map[string]string{"/etc/resolv.conf": "-"}, nil, Warning, "names no server"},
		{"Hostname", nil, func(h *Host, _ *Node) {
			h.Resolve = func(context.Context, string) error { return errors.New("no such host") }
		}, Warning, "does not resolve"},
		{"Disk", nil, statfs(unix.Statfs_t{Type: 0x794c7630, Bsize: 4096, Blocks: 10 << 20, Bavail: 8 << 20}), Error, "is on overlayfs"},
		{"Disk", nil, statfs(unix.Statfs_t{Bsize: 4096, Blocks: 10 << 20, Bavail: 1 << 10}), Error, "4 MiB free"},
		{"Disk", nil, statfs(unix.Statfs_t{Bsize: 4096, Blocks: 100 << 20, Bavail: 1 << 20}), Warning, "4096 MiB free, 1 %"},
		{"Disk", nil, statfs(unix.Statfs_t{Bsize: 4096, Blocks: 10 << 20, Bavail: 8 << 20, Files: 1000, Ffree: 10}), Warning, "10 inodes free"},
		{"MountPropagation", map[string]string{"/proc/self/mountinfo": "21 1 8:1 / / rw - ext4 /dev/sda1 rw\n"}, nil, Warning, "not shared"},
		{"Clock", nil, func(h *Host, _ *Node) { h.Year = func() int { return 1970 } }, Error, "1970"},
		{"Clock", nil, func(h *Host, _ *Node) { h.Unsynchronized = func() bool { return true } }, Warning, "not synchronized"},
		{"SecurityModules", map[string]string{"/sbin/apparmor_parser": "-"}, nil, Warning, "no apparmor_parser"},
		{"SecurityModules", map[string]string{"/sys/fs/selinux/enforce": "1"}, nil, Warning, "SELinux"},
		{"Shutdown", map[string]string{"/run/dbus/system_bus_socket": "-"}, nil, Warning, "no logind"},
	} {
		h, n := host(t, tt.files), node()
		if tt.change != nil {
			tt.change(h, n)
		}
		results, err := Run(t.Context(), h, n, nil)
		if err != nil {
			t.Fatal(err)
		}
		at := slices.IndexFunc(results, func(r Result) bool { return r.Check == tt.check && r.Severity != OK })
		if at < 0 {
			t.Errorf("%s: nothing found, want %q", tt.check, tt.message)
			continue
		}
		r := results[at]
		if r.Severity != tt.s || !strings.Contains(r.Message, tt.message) || r.Remedy == "" {
			t.Errorf("%s: %+v, want %s %q and a remedy", tt.check, r, tt.s, tt.message)
		}
		if Failed(results) != (tt.s == Error) {
			t.Errorf("%s: failed is %v", tt.check, Failed(results))
		}
	}
}

func TestIgnored(t *testing.T) {
	h := host(t, map[string]string{"/proc/77/comm": "kubelet"})
	for ignore, want := range map[string]bool{"": true, "otheragents": false, "all": false, "Swap": true} {
		var list []string
		if ignore != "" {
			list = []string{ignore}
		}
		results, err := Run(t.Context(), h, node(), list)
		if err != nil || Failed(results) != want {
			t.Errorf("ignore %q: failed is %v, %v", ignore, Failed(results), err)
		}
	}
	if _, err := Run(t.Context(), h, node(), []string{"Nonsense"}); err == nil {
		t.Error("an unknown check is ignored")
	}
}

func TestPrint(t *testing.T) {
	results := []Result{{"Kernel", OK, "Linux 6.1", ""}, {"Swap", Warning, "swap is on", "swapoff -a"}}
	var text, raw bytes.Buffer
	if err := Print(&text, results, ""); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"WARNING  Swap    swap is on", "→ swapoff -a", "0 errors, 1 warnings"} {
		if !strings.Contains(text.String(), want) {
			t.Errorf("%q is not in\n%s", want, text.String())
		}
	}
	if err := Print(&raw, results, "json"); err != nil {
		t.Fatal(err)
	}
	var back struct {
		Results []Result
		Failed  bool
	}
	if err := json.Unmarshal(raw.Bytes(), &back); err != nil || !slices.Equal(back.Results, results) || back.Failed {
		t.Errorf("%s: %v", raw.String(), err)
	}
	if err := Print(&raw, results, "xml"); err == nil {
		t.Error("xml")
	}
}
