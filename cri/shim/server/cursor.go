package server

import (
	"encoding/binary"
	"fmt"
	"os"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// cursor is the log pump's memory in a file of run-dir (tmpfs), mapped, so that
// what the shim stored is there after kill -9 at any instruction. Only the
// shim's user can reach it.
//
// The pump's states, see output.batch:
//
//	idle     the spill pipe is empty, or holds bytes moved there and not looked at
//	writing  the batch's records are being written to the log from offset on
//	drain    they are written and the unfinished line is in the other slot;
//	         the spill pipe is being emptied
//
// A store into a page that the file system has no room for ends the process
// (SIGBUS). So the page of the fields is reserved before anything is pumped, and
// a slot before it is used, see room: most containers never write an unfinished
// line, and need none. What has been reserved stays.
type cursor struct {
	mem  []byte
	path string
	has  [2][2]bool // [stream][slot]: reserved
}

const (
	cursorMagic   = 0x706f6464 // "podd"
	cursorVersion = 1
	cursorSlots   = 4096
	cursorSize    = cursorSlots + 2*2*maxLine

	phaseIdle    = 0
	phaseWriting = 1
	phaseDrain   = 2
)

// Offsets of the fields.
const (
	curMagic   = 0
	curVersion = 4
	curPhase   = 8
	curStream  = 12
	curSec     = 16
	curNsec    = 24
	curOffset  = 32
	curDev     = 40
	curIno     = 48
	curSlot    = 56 // current slot, one uint32 per stream
	curLen     = 64 // [stream][slot] uint32
	curFinal   = 80 // nothing of the batch is kept for the next one
	curNext    = 84 // slot of the staged unfinished line
	curLeft    = 88 // bytes in the spill pipe behind the batch
)

// openCursor maps the file; a new or foreign one starts empty.
func openCursor(path string) (*cursor, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if err := f.Truncate(cursorSize); err != nil {
		return nil, fmt.Errorf("size %s: %w", path, err)
	}
	if err := reserve(f, 0, cursorSlots); err != nil {
		return nil, err
	}
	mem, err := unix.Mmap(int(f.Fd()), 0, cursorSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map %s: %w", path, err)
	}
	c := &cursor{mem: mem, path: path}
	if *c.u32(curMagic) != cursorMagic || *c.u32(curVersion) != cursorVersion || !c.valid() {
		clear(mem[:cursorSlots])
		*c.u32(curMagic), *c.u32(curVersion) = cursorMagic, cursorVersion
	}
	return c, nil
}

// room reserves the slot that the stream's next unfinished line goes to. An
// error says that it must not be used: the file system is full.
func (c *cursor) room(stream int) error {
	slot := 1 - int(*c.u32(curSlot + 4*stream))
	if c.has[stream][slot] {
		return nil
	}
	f, err := os.OpenFile(c.path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := reserve(f, int64(slotOffset(stream, slot)), maxLine); err != nil {
		return err
	}
	c.has[stream][slot] = true
	return nil
}

func (c *cursor) valid() bool {
	for s := range 2 {
		if *c.u32(curSlot + 4*s) > 1 {
			return false
		}
		for i := range 2 {
			if *c.u32(curLen + 8*s + 4*i) > maxLine {
				return false
			}
		}
	}
	return *c.u32(curPhase) <= phaseDrain && *c.u32(curStream) <= 1 && *c.u32(curNext) <= 1
}

func (c *cursor) close() {
	if c.mem != nil {
		_ = unix.Munmap(c.mem)
		c.mem = nil
	}
}

func (c *cursor) u32(off int) *uint32 { return (*uint32)(unsafe.Pointer(&c.mem[off])) }

// setPhase is an atomic store: what was stored before it stays before it.
func (c *cursor) setPhase(p uint32) { atomic.StoreUint32(c.u32(curPhase), p) }
func (c *cursor) phase() uint32     { return atomic.LoadUint32(c.u32(curPhase)) }

func (c *cursor) setStream(i int) { *c.u32(curStream) = uint32(i) }
func (c *cursor) stream() int     { return int(*c.u32(curStream)) }

// setFinal notes whether all of the batch is logged, its last line too if that
// is unfinished.
func (c *cursor) setFinal(yes bool) {
	*c.u32(curFinal) = 0
	if yes {
		*c.u32(curFinal) = 1
	}
}

func (c *cursor) put64(off int, v uint64) { binary.NativeEndian.PutUint64(c.mem[off:], v) }
func (c *cursor) get64(off int) uint64    { return binary.NativeEndian.Uint64(c.mem[off:]) }

func (c *cursor) setTime(t time.Time) {
	c.put64(curSec, uint64(t.Unix()))
	c.put64(curNsec, uint64(t.Nanosecond()))
}

func (c *cursor) time() time.Time {
	return time.Unix(int64(c.get64(curSec)), int64(c.get64(curNsec)))
}

// rest is the stream's unfinished line.
func (c *cursor) rest(stream int) []byte {
	slot := int(*c.u32(curSlot + 4*stream))
	return c.slot(stream, slot)[:*c.u32(curLen + 8*stream + 4*slot)]
}

func (c *cursor) slot(stream, slot int) []byte {
	off := slotOffset(stream, slot)
	return c.mem[off : off+maxLine]
}

func slotOffset(stream, slot int) int { return cursorSlots + (2*stream+slot)*maxLine }

// stageRest stores the next unfinished line beside the current one; there must
// be room for one that is not empty.
func (c *cursor) stageRest(stream int, parts [2][]byte) {
	slot := 1 - int(*c.u32(curSlot + 4*stream))
	dst := c.slot(stream, slot)
	n := copy(dst, parts[0])
	n += copy(dst[n:], parts[1])
	*c.u32(curLen + 8*stream + 4*slot) = uint32(n)
	*c.u32(curNext) = uint32(slot)
}

// commitRest makes the staged line the current one. Repeating it is harmless.
func (c *cursor) commitRest(stream int) {
	atomic.StoreUint32(c.u32(curSlot+4*stream), *c.u32(curNext))
}
