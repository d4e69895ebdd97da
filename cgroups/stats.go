package cgroups

import (
	"bytes"
	"errors"
	"fmt"
	"path"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// hostLayout is read once: cgroup file systems are mounted at boot.
var hostLayout = sync.OnceValues(discover)

// ReadStats reads the statistics of any group by its path below the
// hierarchies' mount points, e.g. "/kubepods/burstable/pod1/c1", or the cgroup
// path of a process. errdefs.ErrNotFound: there is no such group.
func ReadStats(group string) (*Stats, error) {
	l, err := hostLayout()
	if err != nil {
		return nil, err
	}
	return l.stats(group)
}

// noLimit: v1 reports "no limit" as the largest page-aligned int64.
const noLimit = 1<<63 - 1<<20

// reader reads small kernel files into one buffer.
type reader struct {
	dir int
	buf []byte
	err error // the first unexpected one
}

var readers = sync.Pool{New: func() any { return &reader{buf: make([]byte, 16<<10)} }}

// open enters a directory. ENOENT is errdefs.ErrNotFound.
func (r *reader) open(dir string) error {
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("cgroup %s: %w", dir, errdefs.ErrNotFound)
	}
	if err != nil {
		return fmt.Errorf("cgroup %s: %w", dir, err)
	}
	r.dir = fd
	return nil
}

func (r *reader) close() { unix.Close(r.dir) }

// read returns a file's content, valid until the next read; nil when the
// kernel or the controller does not have it.
func (r *reader) read(name string) []byte {
	fd, err := unix.Openat(r.dir, name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		if !errors.Is(err, unix.ENOENT) && r.err == nil {
			r.err = fmt.Errorf("read %s: %w", name, err)
		}
		return nil
	}
	defer unix.Close(fd)
	n := 0
	for {
		if n == len(r.buf) {
			r.buf = append(r.buf, make([]byte, len(r.buf))...)
		}
		m, err := unix.Read(fd, r.buf[n:])
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			// ENODEV: removed meanwhile. EOPNOTSUPP: PSI switched off.
			if !errors.Is(err, unix.ENODEV) && !errors.Is(err, unix.EOPNOTSUPP) && r.err == nil {
				r.err = fmt.Errorf("read %s: %w", name, err)
			}
			return nil
		}
		if m == 0 {
			return r.buf[:n]
		}
		n += m
	}
}

func (r *reader) uint(name string) *uint64 { return parseUint(r.read(name)) }

// parseUint reads one number; nil for "max" and for nothing.
func parseUint(b []byte) *uint64 {
	v, ok := number(bytes.TrimSpace(b))
	if !ok {
		return nil
	}
	return &v
}

func number(b []byte) (uint64, bool) {
	if len(b) == 0 {
		return 0, false
	}
	var v uint64
	for _, c := range b {
		if c < '0' || c > '9' {
			return 0, false
		}
		v = v*10 + uint64(c-'0')
	}
	return v, true
}

// flat looks a key up in a flat keyed file ("key value" lines).
func flat(b []byte, key string) *uint64 {
	for len(b) > 0 {
		line := b
		if i := bytes.IndexByte(b, '\n'); i >= 0 {
			line, b = b[:i], b[i+1:]
		} else {
			b = nil
		}
		if len(line) > len(key) && line[len(key)] == ' ' && string(line[:len(key)]) == key {
			return parseUint(line[len(key)+1:])
		}
	}
	return nil
}

func (l layout) stats(group string) (*Stats, error) {
	group = path.Clean("/" + group)
	if l.unified {
		return statsV2(l.hierarchies[0].dir + group)
	}
	return l.statsV1(group)
}

// statsV2 reads what Documentation/admin-guide/cgroup-v2.rst describes.
func statsV2(dir string) (*Stats, error) {
	r := readers.Get().(*reader)
	defer readers.Put(r)
	r.err = nil
	if err := r.open(dir); err != nil {
		return nil, err
	}
	defer r.close()
	s := &Stats{At: time.Now()}
	if us := flat(r.read("cpu.stat"), "usage_usec"); us != nil {
		d := time.Duration(*us) * time.Microsecond
		s.CPUUsage = &d
	}
	s.MemoryUsage = r.uint("memory.current")
	if m := r.read("memory.stat"); m != nil {
		s.MemoryRSS = flat(m, "anon")
		s.PageFaults, s.MajorPageFaults = flat(m, "pgfault"), flat(m, "pgmajfault")
		s.MemoryWorkingSet = workingSet(s.MemoryUsage, flat(m, "inactive_file"))
	}
	s.MemoryLimit = r.uint("memory.max")
	s.SwapUsage = r.uint("memory.swap.current")
	s.OOMKills = flat(r.read("memory.events"), "oom_kill")
	s.PIDs = r.uint("pids.current")
	if io := r.read("io.stat"); io != nil {
		s.IOReadBytes, s.IOWriteBytes = ioStat(io)
	}
	s.CPU = parsePressure(r.read("cpu.pressure"))
	s.Memory = parsePressure(r.read("memory.pressure"))
	s.IO = parsePressure(r.read("io.pressure"))
	if r.err != nil {
		return nil, fmt.Errorf("statistics of cgroup %s: %w", dir, r.err)
	}
	return s, nil
}

// statsV1 reads what Documentation/admin-guide/cgroup-v1 describes.
func (l layout) statsV1(group string) (*Stats, error) {
	r := readers.Get().(*reader)
	defer readers.Put(r)
	r.err = nil
	s := &Stats{At: time.Now()}
	found := false
	in := func(controller string, f func()) error {
		d := l.of(controller)
		if d == "" {
			return nil
		}
		if err := r.open(d + group); err != nil {
			if errdefs.IsNotFound(err) {
				return nil
			}
			return err
		}
		found = true
		f()
		r.close()
		return nil
	}
	err := errors.Join(
		in("cpuacct", func() {
			if ns := r.uint("cpuacct.usage"); ns != nil {
				d := time.Duration(*ns)
				s.CPUUsage = &d
			}
		}),
		in("memory", func() {
			s.MemoryUsage = r.uint("memory.usage_in_bytes")
			if m := r.read("memory.stat"); m != nil {
				s.MemoryRSS = flat(m, "total_rss")
				s.PageFaults, s.MajorPageFaults = flat(m, "total_pgfault"), flat(m, "total_pgmajfault")
				s.SwapUsage = flat(m, "total_swap")
				s.MemoryWorkingSet = workingSet(s.MemoryUsage, flat(m, "total_inactive_file"))
			}
			if v := r.uint("memory.limit_in_bytes"); v != nil && *v < noLimit {
				s.MemoryLimit = v
			}
			s.OOMKills = flat(r.read("memory.oom_control"), "oom_kill")
		}),
		in("pids", func() { s.PIDs = r.uint("pids.current") }),
		in("blkio", func() {
			if io := r.read("blkio.throttle.io_service_bytes_recursive"); io != nil {
				s.IOReadBytes, s.IOWriteBytes = blkioBytes(io)
			}
		}),
	)
	if err == nil {
		err = r.err
	}
	if err != nil {
		return nil, fmt.Errorf("statistics of cgroup %s: %w", group, err)
	}
	if !found {
		return nil, fmt.Errorf("cgroup %s: %w", group, errdefs.ErrNotFound)
	}
	return s, nil
}

// workingSet is what cannot be reclaimed easily, as the kubelet counts it.
func workingSet(usage, inactiveFile *uint64) *uint64 {
	if usage == nil || inactiveFile == nil {
		return usage
	}
	v := *usage - min(*usage, *inactiveFile)
	return &v
}

// ioStat sums rbytes and wbytes over the devices of io.stat.
func ioStat(b []byte) (read, write *uint64) {
	var rd, wr uint64
	for _, f := range bytes.Fields(b) {
		if v, ok := bytes.CutPrefix(f, []byte("rbytes=")); ok {
			n, _ := number(v)
			rd += n
		} else if v, ok := bytes.CutPrefix(f, []byte("wbytes=")); ok {
			n, _ := number(v)
			wr += n
		}
	}
	return &rd, &wr
}

// blkioBytes sums the Read and Write lines over the devices ("8:0 Read 4096").
func blkioBytes(b []byte) (read, write *uint64) {
	var rd, wr uint64
	for line := range bytes.Lines(b) {
		f := bytes.Fields(line)
		if len(f) != 3 {
			continue
		}
		n, _ := number(f[2])
		switch string(f[1]) {
		case "Read":
			rd += n
		case "Write":
			wr += n
		}
	}
	return &rd, &wr
}

// parsePressure reads one PSI file (Documentation/accounting/psi.rst); nil when
// there is none.
func parsePressure(b []byte) *Pressure {
	if len(b) == 0 {
		return nil
	}
	var p Pressure
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) == 0 {
			continue
		}
		var l PressureLine
		for _, kv := range f[1:] {
			k, v, _ := strings.Cut(kv, "=")
			switch k {
			case "avg10":
				l.Avg10, _ = strconv.ParseFloat(v, 64)
			case "avg60":
				l.Avg60, _ = strconv.ParseFloat(v, 64)
			case "avg300":
				l.Avg300, _ = strconv.ParseFloat(v, 64)
			case "total":
				us, _ := strconv.ParseInt(v, 10, 64)
				l.Total = time.Duration(us) * time.Microsecond
			}
		}
		switch f[0] {
		case "some":
			p.Some = l
		case "full":
			p.Full = l
		}
	}
	return &p
}

// contains looks for a word in a space-separated list.
func contains(list, word string) bool {
	for _, f := range strings.Fields(list) {
		if f == word {
			return true
		}
	}
	return false
}
