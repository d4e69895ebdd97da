package cgroups

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"path"
	"time"

	"github.com/containerd/errdefs"
)

// Details of one cgroup: more than its Stats, for those who ask for all there
// is. As there, what the kernel or the controller does not give is nil.
type Details struct {
	Stats

	CPUUser, CPUSystem *time.Duration // cumulated
	// Periods of the CPU quota, and those in which it was used up.
	Periods, Throttled *uint64
	ThrottledTime      *time.Duration
	CPUShares          *uint64 // v1's scale, whose default is 1024
	CPUQuota           *uint64 // microseconds of CPU in each CPUPeriod; nil: no limit
	CPUPeriod          *uint64 // microseconds

	Cache, MappedFile, Kernel *uint64 // bytes
	ActiveFile, InactiveFile  *uint64
	MemoryPeak                *uint64
	MemoryFailures            *uint64 // times that the limit was hit
	MemoryReservation         *uint64 // nil: none
	SwapLimit                 *uint64 // memory and swap together; nil: none

	Processes []int // of this group, not of those below
	PIDsLimit *uint64
	Devices   []DeviceIO
}

// DeviceIO is what a group read from a block device and wrote to it.
type DeviceIO struct {
	Major, Minor          uint64
	ReadBytes, WriteBytes uint64
	Reads, Writes         uint64
}

// ReadDetails reads all statistics of a group, as ReadStats finds it.
func ReadDetails(group string) (*Details, error) {
	l, err := hostLayout()
	if err != nil {
		return nil, err
	}
	st, err := l.stats(group)
	if err != nil {
		return nil, err
	}
	d := &Details{Stats: *st}
	group = path.Clean("/" + group)
	if l.unified {
		err = d.readV2(l.hierarchies[0].dir + group)
	} else {
		err = d.readV1(l, group)
	}
	if err != nil && !errdefs.IsNotFound(err) { // gone meanwhile: what is there is true
		return nil, fmt.Errorf("statistics of cgroup %s: %w", group, err)
	}
	return d, nil
}

func micros(v *uint64) *time.Duration {
	if v == nil {
		return nil
	}
	d := time.Duration(*v) * time.Microsecond
	return &d
}

func nanos(v *uint64) *time.Duration {
	if v == nil {
		return nil
	}
	d := time.Duration(*v)
	return &d
}

func (d *Details) readV2(dir string) error {
	r := readers.Get().(*reader)
	defer readers.Put(r)
	r.err = nil
	if err := r.open(dir); err != nil {
		return err
	}
	defer r.close()
	if b := r.read("cpu.stat"); b != nil {
		d.CPUUser, d.CPUSystem = micros(flat(b, "user_usec")), micros(flat(b, "system_usec"))
		d.Periods, d.Throttled = flat(b, "nr_periods"), flat(b, "nr_throttled")
		d.ThrottledTime = micros(flat(b, "throttled_usec"))
	}
	if f := bytes.Fields(r.read("cpu.max")); len(f) == 2 {
		d.CPUQuota, d.CPUPeriod = parseUint(f[0]), parseUint(f[1])
	}
	if w := r.uint("cpu.weight"); w != nil {
		d.CPUShares = shares(*w)
	}
	if b := r.read("memory.stat"); b != nil {
		d.Cache, d.MappedFile, d.Kernel = flat(b, "file"), flat(b, "file_mapped"), flat(b, "kernel")
		d.ActiveFile, d.InactiveFile = flat(b, "active_file"), flat(b, "inactive_file")
	}
	d.MemoryPeak = r.uint("memory.peak") // Linux 5.19
	d.MemoryFailures = flat(r.read("memory.events"), "max")
	if v := r.uint("memory.low"); v != nil && *v > 0 {
		d.MemoryReservation = v
	}
	if v := r.uint("memory.swap.max"); v != nil && d.MemoryLimit != nil {
		both := *v + *d.MemoryLimit
		d.SwapLimit = &both
	}
	d.Processes = pids(r.read("cgroup.procs"))
	d.PIDsLimit = r.uint("pids.max")
	d.Devices = ioDevices(r.read("io.stat"))
	return r.err
}

func (d *Details) readV1(l layout, group string) error {
	r := readers.Get().(*reader)
	defer readers.Put(r)
	r.err = nil
	in := func(controller string, f func()) error {
		dir := l.of(controller)
		if dir == "" {
			return nil
		}
		if err := r.open(dir + group); err != nil {
			return err
		}
		defer r.close()
		f()
		return nil
	}
	err := errors.Join(
		in("cpu", func() {
			if b := r.read("cpu.stat"); b != nil {
				d.Periods, d.Throttled = flat(b, "nr_periods"), flat(b, "nr_throttled")
				d.ThrottledTime = nanos(flat(b, "throttled_time"))
			}
			d.CPUShares = r.uint("cpu.shares")
			d.CPUQuota, d.CPUPeriod = r.uint("cpu.cfs_quota_us"), r.uint("cpu.cfs_period_us") // -1 is no number
		}),
		in("cpuacct", func() {
			d.CPUUser, d.CPUSystem = nanos(r.uint("cpuacct.usage_user")), nanos(r.uint("cpuacct.usage_sys"))
			d.Processes = pids(r.read("cgroup.procs"))
		}),
		in("memory", func() {
			if b := r.read("memory.stat"); b != nil {
				d.Cache, d.MappedFile = flat(b, "total_cache"), flat(b, "total_mapped_file")
				d.ActiveFile, d.InactiveFile = flat(b, "total_active_file"), flat(b, "total_inactive_file")
			}
			d.Kernel = r.uint("memory.kmem.usage_in_bytes")
			d.MemoryPeak, d.MemoryFailures = r.uint("memory.max_usage_in_bytes"), r.uint("memory.failcnt")
			limited := func(name string) *uint64 {
				if v := r.uint(name); v != nil && *v < noLimit {
					return v
				}
				return nil
			}
			d.MemoryReservation, d.SwapLimit = limited("memory.soft_limit_in_bytes"), limited("memory.memsw.limit_in_bytes")
		}),
		in("pids", func() { d.PIDsLimit = r.uint("pids.max") }),
		in("blkio", func() {
			d.Devices = blkioDevices(r.read("blkio.throttle.io_service_bytes_recursive"), nil, func(io *DeviceIO) (*uint64, *uint64) { return &io.ReadBytes, &io.WriteBytes })
			d.Devices = blkioDevices(r.read("blkio.throttle.io_serviced_recursive"), d.Devices, func(io *DeviceIO) (*uint64, *uint64) { return &io.Reads, &io.Writes })
		}),
	)
	if err == nil {
		err = r.err
	}
	return err
}

// shares are the cpu.shares that runtimes make this weight of
// (weight = 10^(log2(shares)²/612 + 125·log2(shares)/612 − 7/34), which replaced
// the linear formula in 2025): its inverse, by the quadratic formula.
func shares(weight uint64) *uint64 {
	if weight == 0 {
		return nil
	}
	// l² + 125·l − 612·(log10(weight) + 7/34) = 0
	c := 612 * (math.Log10(float64(weight)) + 7.0/34)
	l := (-125 + math.Sqrt(125*125+4*c)) / 2
	v := uint64(math.Round(math.Pow(2, l)))
	return &v
}

func pids(b []byte) []int {
	var out []int
	for line := range bytes.Lines(b) {
		if v, ok := number(bytes.TrimSpace(line)); ok {
			out = append(out, int(v))
		}
	}
	return out
}

// device reads "8:0".
func device(b []byte) (major, minor uint64, ok bool) {
	a, c, found := bytes.Cut(b, []byte(":"))
	major, ok1 := number(a)
	minor, ok2 := number(c)
	return major, minor, found && ok1 && ok2
}

// ioDevices reads io.stat: "8:0 rbytes=4096 wbytes=0 rios=1 wios=0 …".
func ioDevices(b []byte) []DeviceIO {
	var out []DeviceIO
	for line := range bytes.Lines(b) {
		f := bytes.Fields(line)
		if len(f) < 2 {
			continue
		}
		d := DeviceIO{}
		var ok bool
		if d.Major, d.Minor, ok = device(f[0]); !ok {
			continue
		}
		for _, kv := range f[1:] {
			k, v, _ := bytes.Cut(kv, []byte("="))
			n, _ := number(v)
			switch string(k) {
			case "rbytes":
				d.ReadBytes = n
			case "wbytes":
				d.WriteBytes = n
			case "rios":
				d.Reads = n
			case "wios":
				d.Writes = n
			}
		}
		out = append(out, d)
	}
	return out
}

// blkioDevices adds the Read and Write lines of a blkio file to devs.
func blkioDevices(b []byte, devs []DeviceIO, in func(*DeviceIO) (read, write *uint64)) []DeviceIO {
	for line := range bytes.Lines(b) {
		f := bytes.Fields(line)
		if len(f) != 3 {
			continue
		}
		major, minor, ok := device(f[0])
		if !ok {
			continue
		}
		i := 0
		for i < len(devs) && (devs[i].Major != major || devs[i].Minor != minor) {
			i++
		}
		if i == len(devs) {
			devs = append(devs, DeviceIO{Major: major, Minor: minor})
		}
		read, write := in(&devs[i])
		n, _ := number(f[2])
		switch string(f[1]) {
		case "Read":
			*read = n
		case "Write":
			*write = n
		}
	}
	return devs
}
