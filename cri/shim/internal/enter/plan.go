package enter

import (
	"encoding/binary"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// header is struct plan of enter.c.
type header struct {
	magic, size                         uint32
	child, err                          int32
	flags, ns                           uint32
	uid, gid                            uint32
	oom                                 int32
	umask, personality, ioprio          uint32
	rows, cols                          uint32
	filterFlags                         uint32
	keyring, cwd, path                  uint32
	caps                                Capabilities
	cgroups, attrs, rlimits             span
	initial, final, sched, groups, prog span
	argv, envp                          span
}

type span struct{ off, n uint32 }

const (
	planMagic  = 0x706f6465
	resultAt   = 8 // of child and err
	headerSize = 192
)

var _ = [1]int{}[headerSize-unsafe.Sizeof(header{})] // the two agree

const (
	flagOOM = 1 << iota
	flagCaps
	flagNoNewPrivs
	flagUmask
	flagPersonality
	flagIOPriority
	flagTerminal
	flagHome
	flagUserNS
)

// maxPlan is above what execve takes as arguments and environment.
const maxPlan = 16 << 20

// builder appends to the plan's bytes; offsets are from its start.
type builder []byte

func (b *builder) align() uint32 {
	for len(*b)%8 != 0 {
		*b = append(*b, 0)
	}
	return uint32(len(*b))
}

func (b *builder) text(s string) uint32 {
	off := uint32(len(*b))
	*b = append(append(*b, s...), 0)
	return off
}

// optional is 0 for "".
func (b *builder) optional(s string) uint32 {
	if s == "" {
		return 0
	}
	return b.text(s)
}

func (b *builder) bytes(p []byte, unit int) span {
	if len(p) == 0 {
		return span{}
	}
	off := b.align()
	*b = append(*b, p...)
	return span{off, uint32(len(p) / unit)}
}

// texts appends a table of offsets with spare zero entries behind it.
func (b *builder) texts(list []string, spare int) span {
	off := b.align()
	*b = append(*b, make([]byte, 8*(len(list)+spare))...)
	for i, s := range list {
		at := b.text(s) // may move the bytes
		binary.NativeEndian.PutUint64((*b)[int(off)+8*i:], uint64(at))
	}
	return span{off, uint32(len(list))}
}

func flagIf(on bool, flag uint32) uint32 {
	if on {
		return flag
	}
	return 0
}

func value[T uint32 | int](p *T) T {
	if p == nil {
		return 0
	}
	return *p
}

// encode lays the plan out as enter.c reads it.
func (p *Plan) encode() []byte {
	size := headerSize + len(p.Filter) + 1024
	for _, list := range [][]string{p.Args, p.Env, p.CgroupFiles} {
		for _, s := range list {
			size += len(s) + 16
		}
	}
	b := builder(make([]byte, headerSize, size))
	h := header{
		magic: planMagic, ns: p.Namespaces, uid: p.UID, gid: p.GID,
		oom: int32(value(p.OOMScoreAdj)), umask: value(p.Umask), personality: value(p.Personality), ioprio: value(p.IOPriority),
		rows: uint32(p.Height), cols: uint32(p.Width), filterFlags: p.FilterFlags,
	}
	h.flags = flagIf(p.OOMScoreAdj != nil, flagOOM) | flagIf(p.Caps != nil, flagCaps) | flagIf(p.NoNewPrivs, flagNoNewPrivs) |
		flagIf(p.Umask != nil, flagUmask) | flagIf(p.Personality != nil, flagPersonality) | flagIf(p.IOPriority != nil, flagIOPriority) |
		flagIf(p.Terminal, flagTerminal) | flagIf(p.Home, flagHome) | flagIf(p.Namespaces&unix.CLONE_NEWUSER != 0, flagUserNS)
	if p.Caps != nil {
		h.caps = *p.Caps
	}
	h.keyring, h.cwd, h.path = b.optional(p.Keyring), b.optional(p.Cwd), b.optional(p.Path)
	h.cgroups = b.texts(p.CgroupFiles, 0)
	attrs := make([]string, 0, 2*len(p.Attributes))
	for _, a := range p.Attributes {
		attrs = append(attrs, a.File, a.Text)
	}
	h.attrs = b.texts(attrs, 0)
	h.attrs.n /= 2
	if len(p.Rlimits) > 0 {
		h.rlimits = b.bytes(unsafe.Slice((*byte)(unsafe.Pointer(&p.Rlimits[0])), len(p.Rlimits)*24), 24)
	}
	for _, set := range []struct {
		at  *span
		set *unix.CPUSet
	}{{&h.initial, p.InitialCPUs}, {&h.final, p.FinalCPUs}} {
		if set.set != nil {
			*set.at = b.bytes(unsafe.Slice((*byte)(unsafe.Pointer(set.set)), unsafe.Sizeof(*set.set)), 1)
		}
	}
	if p.Scheduler != nil {
		h.sched = b.bytes(unsafe.Slice((*byte)(unsafe.Pointer(p.Scheduler)), unsafe.Sizeof(*p.Scheduler)), 1)
	}
	if len(p.Groups) > 0 {
		h.groups = b.bytes(unsafe.Slice((*byte)(unsafe.Pointer(&p.Groups[0])), len(p.Groups)*4), 4)
	}
	h.prog = b.bytes(p.Filter, 8)
	h.argv = b.texts(p.Args, 1)
	h.envp = b.texts(p.Env, 2) // one for HOME
	h.size = uint32(b.align())
	copy(b, unsafe.Slice((*byte)(unsafe.Pointer(&h)), headerSize))
	return b
}

// file returns the plan in a memfd that the process maps, and in which the
// kernel and outer leave their result.
func (p *Plan) file() (int, error) {
	data := p.encode()
	if len(data) > maxPlan {
		return -1, fmt.Errorf("arguments and environment of %d bytes: %w", len(data), unix.E2BIG)
	}
	fd, err := unix.MemfdCreate("podd-plan", unix.MFD_CLOEXEC|unix.MFD_NOEXEC_SEAL)
	if err == unix.EINVAL { // before Linux 6.3
		fd, err = unix.MemfdCreate("podd-plan", unix.MFD_CLOEXEC)
	}
	if err != nil {
		return -1, fmt.Errorf("memfd for a plan: %w", err)
	}
	for rest := data; len(rest) > 0; {
		n, err := unix.Write(fd, rest)
		if err != nil {
			unix.Close(fd)
			return -1, fmt.Errorf("write plan: %w", err)
		}
		rest = rest[n:]
	}
	return fd, nil
}
