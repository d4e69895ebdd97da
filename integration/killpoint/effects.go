package killpoint

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// call is a system call at its entry.
type call struct {
	pid, tid int
	args     [6]uint64
}

// kind is a system call that may have an effect.
type kind struct {
	name string
	// has says whether this one has, and of what; nil: each has.
	has func(c *call) (about string, ok bool)
}

// kinds of calls that leave something behind which outlives the program, or
// which another program sees: files, mounts, links, cgroups, processes, signals,
// bytes in pipes and sockets, records of a child's end. What ends with the
// program anyway is none: memory, descriptors, locks on files.
var kinds = map[int]kind{
	unix.SYS_OPENAT:            {"openat", func(c *call) (string, bool) { return c.path(1), creates(c.args[2]) }},
	unix.SYS_OPENAT2:           {"openat2", func(c *call) (string, bool) { return c.path(1), creates(c.word(c.args[2])) }},
	unix.SYS_WRITE:             {"write", written},
	unix.SYS_PWRITE64:          {"pwrite64", written},
	unix.SYS_WRITEV:            {"writev", written},
	unix.SYS_PWRITEV:           {"pwritev", written},
	unix.SYS_PWRITEV2:          {"pwritev2", written},
	unix.SYS_SENDTO:            {"sendto", written},
	unix.SYS_SENDMSG:           {"sendmsg", written},
	unix.SYS_SENDMMSG:          {"sendmmsg", written},
	unix.SYS_SENDFILE:          {"sendfile", written},
	unix.SYS_SPLICE:            {"splice", at(fd(2))},
	unix.SYS_TEE:               {"tee", at(fd(1))},
	unix.SYS_COPY_FILE_RANGE:   {"copy_file_range", at(fd(2))},
	unix.SYS_RENAMEAT:          {"renameat", at(path(3))},
	unix.SYS_RENAMEAT2:         {"renameat2", at(path(3))},
	unix.SYS_UNLINKAT:          {"unlinkat", at(path(1))},
	unix.SYS_MKDIRAT:           {"mkdirat", at(path(1))},
	unix.SYS_MKNODAT:           {"mknodat", at(path(1))},
	unix.SYS_LINKAT:            {"linkat", at(path(3))},
	unix.SYS_SYMLINKAT:         {"symlinkat", at(path(2))},
	unix.SYS_TRUNCATE:          {"truncate", at(path(0))},
	unix.SYS_FTRUNCATE:         {"ftruncate", at(fd(0))},
	unix.SYS_FALLOCATE:         {"fallocate", at(fd(0))},
	unix.SYS_FCHOWN:            {"fchown", at(fd(0))},
	unix.SYS_FCHOWNAT:          {"fchownat", at(path(1))},
	unix.SYS_FCHMOD:            {"fchmod", at(fd(0))},
	unix.SYS_FCHMODAT:          {"fchmodat", at(path(1))},
	unix.SYS_UTIMENSAT:         {"utimensat", at(path(1))},
	unix.SYS_SETXATTR:          {"setxattr", at(path(0))},
	unix.SYS_LSETXATTR:         {"lsetxattr", at(path(0))},
	unix.SYS_FSETXATTR:         {"fsetxattr", at(fd(0))},
	unix.SYS_REMOVEXATTR:       {"removexattr", at(path(0))},
	unix.SYS_LREMOVEXATTR:      {"lremovexattr", at(path(0))},
	unix.SYS_FREMOVEXATTR:      {"fremovexattr", at(fd(0))},
	unix.SYS_MOUNT:             {"mount", at(path(1))},
	unix.SYS_UMOUNT2:           {"umount2", at(path(0))},
	unix.SYS_MOVE_MOUNT:        {"move_mount", at(path(3))},
	unix.SYS_OPEN_TREE:         {"open_tree", func(c *call) (string, bool) { return c.path(1), c.args[2]&unix.OPEN_TREE_CLONE != 0 }},
	unix.SYS_FSMOUNT:           {"fsmount", nil},
	unix.SYS_FSCONFIG:          {"fsconfig", nil},
	unix.SYS_MOUNT_SETATTR:     {"mount_setattr", at(path(1))},
	unix.SYS_PIVOT_ROOT:        {"pivot_root", at(path(0))},
	unix.SYS_CLONE:             {"clone", func(c *call) (string, bool) { return "", c.args[0]&unix.CLONE_THREAD == 0 }},
	unix.SYS_CLONE3:            {"clone3", func(c *call) (string, bool) { return "", c.word(c.args[0])&unix.CLONE_THREAD == 0 }},
	unix.SYS_EXECVE:            {"execve", at(path(0))},
	unix.SYS_EXECVEAT:          {"execveat", at(path(1))},
	unix.SYS_KILL:              {"kill", func(c *call) (string, bool) { return fmt.Sprint(int(c.args[1])), c.args[1] != 0 }},
	unix.SYS_TKILL:             {"tkill", nil},
	unix.SYS_TGKILL:            {"tgkill", func(c *call) (string, bool) { return "", int(c.args[0]) != c.pid }},
	unix.SYS_PIDFD_SEND_SIGNAL: {"pidfd_send_signal", func(c *call) (string, bool) { return fmt.Sprint(int(c.args[1])), c.args[1] != 0 }},
	unix.SYS_WAIT4:             {"wait4", nil},
	unix.SYS_WAITID:            {"waitid", func(c *call) (string, bool) { return "", c.args[3]&unix.WNOWAIT == 0 }},
	unix.SYS_UNSHARE:           {"unshare", nil},
	unix.SYS_SETNS:             {"setns", nil},
	unix.SYS_BIND:              {"bind", nil},
	unix.SYS_LISTEN:            {"listen", nil},
	unix.SYS_CONNECT:           {"connect", nil},
	unix.SYS_SHUTDOWN:          {"shutdown", nil},
	unix.SYS_PRLIMIT64:         {"prlimit64", func(c *call) (string, bool) { return "", c.args[0] != 0 && c.args[2] != 0 }},
	unix.SYS_SETHOSTNAME:       {"sethostname", nil},
	unix.SYS_KEYCTL:            {"keyctl", nil},
	unix.SYS_QUOTACTL:          {"quotactl", nil},
	unix.SYS_QUOTACTL_FD:       {"quotactl_fd", nil},
	unix.SYS_BPF: {"bpf", func(c *call) (string, bool) {
		return "", c.args[0] == unix.BPF_PROG_ATTACH || c.args[0] == unix.BPF_PROG_DETACH
	}},
	unix.SYS_IOCTL: {"ioctl", func(c *call) (string, bool) { return fmt.Sprintf("%#x", c.args[1]), changing[c.args[1]] }},
}

// changing are the requests of ioctl that do more than ask.
var changing = map[uint64]bool{
	unix.TIOCSWINSZ: true, unix.TIOCSPTLCK: true, unix.TCSETS: true, unix.TIOCSTI: true,
	unix.FICLONE: true, unix.FICLONERANGE: true, unix.FS_IOC_SETFLAGS: true,
	unix.SIOCSIFFLAGS: true, unix.SIOCSIFADDR: true, unix.SIOCADDRT: true,
}

// effect tells whether a call has one.
func effect(pid, tid, nr int, args [6]uint64) (text string, ok bool) {
	k, ok := kinds[nr]
	if !ok {
		if k, ok = older[nr]; !ok {
			return "", false
		}
	}
	c := &call{pid, tid, args}
	if k.has == nil {
		return k.name, true
	}
	about, ok := k.has(c)
	return strings.TrimSpace(k.name + " " + about), ok
}

func at(about func(*call) string) func(*call) (string, bool) {
	return func(c *call) (string, bool) { return about(c), true }
}

func path(arg int) func(*call) string { return func(c *call) string { return c.path(arg) } }
func fd(arg int) func(*call) string   { return func(c *call) string { return c.fd(arg) } }

func creates(flags uint64) bool {
	return flags&(unix.O_CREAT|unix.O_TRUNC) != 0 || flags&unix.O_TMPFILE == unix.O_TMPFILE
}

// written says where to. The program's own log and what wakes its own threads
// are no effects.
func written(c *call) (string, bool) {
	to := c.fd(0)
	own := c.args[0] == 1 || c.args[0] == 2 || strings.HasSuffix(to, "/shim.log") || strings.Contains(to, "[eventfd]")
	return to, !own
}

func (c *call) fd(arg int) string {
	to, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", c.tid, int32(c.args[arg])))
	if err != nil {
		return ""
	}
	return to
}

// path reads a string of the program's memory. A long one is cut off.
func (c *call) path(arg int) string {
	b := c.read(c.args[arg], 256)
	if i := bytes.IndexByte(b, 0); i >= 0 {
		b = b[:i]
	}
	return string(b)
}

// word reads a 64-bit number of the program's memory.
func (c *call) word(addr uint64) uint64 {
	if b := c.read(addr, 8); len(b) == 8 {
		return binary.NativeEndian.Uint64(b)
	}
	return 0
}

// read reads up to n bytes, no further than a page that ends meanwhile.
func (c *call) read(addr uint64, n int) []byte {
	const page = 4096
	if left := int(page - addr%page); n > left && n > 8 {
		n = left
	}
	b := make([]byte, n)
	local := []unix.Iovec{{Base: &b[0], Len: uint64(n)}}
	got, err := unix.ProcessVMReadv(c.tid, local, []unix.RemoteIovec{{Base: uintptr(addr), Len: n}}, 0)
	if err != nil {
		return nil
	}
	return b[:got]
}
