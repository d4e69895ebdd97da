package server

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Streams of a container, as the cursor numbers them.
const (
	stdout = 0
	stderr = 1
)

var streamNames = [2]string{"stdout", "stderr"}

const (
	// chunk is what one batch moves at most once a stream is busy.
	chunk = 256 << 10
	// busyPipe is the size of a busy stream's pipe: the most that an
	// unprivileged pipe may have (/proc/sys/fs/pipe-max-size).
	busyPipe = 1 << 20
	// drainTimeout bounds the wait for a log that does not take its tail.
	drainTimeout = 5 * time.Second
)

// output moves what a container writes into its log and to those attached.
//
// Bytes go from the container's pipe into the spill pipe (splice moves them,
// and nobody but us touches the spill pipe, so what it holds is exactly what
// is being worked on), are looked at there without being consumed (tee),
// formatted, written to the log, and only then dropped from the spill pipe.
// Each step is noted in the cursor first. Both pipes and the cursor outlive
// the shim, so the next one finishes the batch where it stood: nothing is
// lost and nothing is doubled.
type output struct {
	id     string
	loop   *loop
	log    *slog.Logger
	pace   *pace
	onPipe func(spill int) // keeps a new spill pipe in the descriptor store

	mu      sync.Mutex // one batch at a time; guards all below
	file    *logFile   // nil: output is dropped
	cur     *cursor
	spill   int // O_RDWR, -1 until the first output
	streams [2]*stream
	sinks   map[*sink]struct{}
	closed  bool
	failing bool // the log could not be written; said once
}

// stream is one of the container's pipes, or its terminal as stdout.
type stream struct {
	out    *output
	n      int
	fd     int
	w      *watch
	tty    bool
	busy   int // full batches in a row
	errors int // in a row
	lost   bool
	big    bool
	eof    bool
}

func newOutput(id string, l *loop, log *slog.Logger) *output {
	return &output{id: id, loop: l, log: log, pace: newPace(), spill: -1, sinks: map[*sink]struct{}{}}
}

// open prepares log and cursor; "" drops the output.
func (o *output) open(cursorPath, logPath string, maxSize int64, maxFiles int) (err error) {
	if logPath == "" {
		return nil
	}
	if o.file, err = openLog(logPath, maxSize, maxFiles, o.pace, o.log); err != nil {
		o.file = nil
		return err
	}
	if o.cur, err = openCursor(cursorPath); err != nil {
		o.file.close()
		o.file = nil
		return err
	}
	return nil
}

// addStream takes fd over; start begins to read.
func (o *output) addStream(n, fd int, tty bool) error {
	if err := unix.SetNonblock(fd, true); err != nil {
		return fmt.Errorf("set %s of %s non-blocking: %w", streamNames[n], o.id, err)
	}
	o.streams[n] = &stream{out: o, n: n, fd: fd, tty: tty}
	return nil
}

// start reads from now on.
func (o *output) start() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.closed {
		return nil // init has ended already; the numbers of its descriptors are others' now
	}
	for _, s := range o.streams {
		if s == nil || s.eof {
			continue
		}
		var err error
		if s.w, err = o.loop.add(s.fd, unix.EPOLLIN, func(uint32) { go s.pump() }); err != nil {
			return err
		}
	}
	return nil
}

// pump runs while there is output and ends when there is none.
func (s *stream) pump() {
	sc := getScratch()
	defer putScratch(sc)
	for {
		s.out.mu.Lock()
		more := false
		err := s.out.pace.charge(func() (err error) {
			more, err = s.batch(sc)
			return err
		})
		if err != nil {
			more = s.failed(err)
		}
		if !more && !s.eof && !s.out.closed {
			if err := s.w.rearm(unix.EPOLLIN); err != nil {
				s.out.log.Error("wait for output", "id", s.out.id, "stream", streamNames[s.n], "error", err)
			}
		}
		s.out.mu.Unlock()
		if err != nil {
			time.Sleep(retryOutput)
		}
		if !more {
			return
		}
		s.out.pace.await() // the pipe fills up meanwhile, and holds the container
	}
}

const (
	retryOutput  = 100 * time.Millisecond
	maxOutputErr = 20
)

// failed gives the batch up after an error, so that the container is not held
// up for ever: what was in work is lost and said to be. Of a stream that keeps
// failing (the shim has no descriptors left, say) what there is now is dropped.
func (s *stream) failed(err error) (again bool) {
	o := s.out
	o.log.Error("read output", "id", o.id, "stream", streamNames[s.n], "error", err)
	if o.spill >= 0 && o.cur != nil {
		if held, e := unix.IoctlGetInt(o.spill, unix.TIOCINQ); e == nil && held > 0 {
			o.log.Error("output is lost", "id", o.id, "bytes", held)
			_ = consume(o.spill, held)
		}
		o.cur.setPhase(phaseIdle)
	}
	if s.errors++; s.errors < maxOutputErr {
		return true
	}
	if !s.lost {
		o.log.Error("output is lost", "id", o.id, "stream", streamNames[s.n])
		s.lost, s.errors = true, 0
		return true
	}
	s.end()
	return false
}

// batch moves one batch; more is false when nothing is left for now. The
// output is locked.
func (s *stream) batch(sc *scratch) (more bool, err error) {
	o := s.out
	if o.closed || s.eof {
		return false, nil
	}
	if o.file == nil {
		return s.discard(sc)
	}
	if s.lost {
		if more, err = s.discard(sc); !more && err == nil {
			s.lost, s.errors = false, maxOutputErr-1 // another try, which may not take long
		}
		return more, err
	}
	if err := o.needSpill(); err != nil {
		return false, err
	}
	o.cur.setStream(s.n)
	n, err := s.take(sc)
	if err != nil {
		return false, err
	}
	s.errors = 0
	if n < 0 {
		return false, nil
	}
	if n == 0 {
		s.end()
		return false, o.finishBatch(sc, s.n, 0, true)
	}
	s.grow(n)
	return true, o.finishBatch(sc, s.n, n, false)
}

// take moves output into the empty spill pipe: the bytes moved, 0 at the end
// of the stream, -1 when there is nothing now.
func (s *stream) take(sc *scratch) (int, error) {
	size := chunk
	if s.tty {
		size = maxLine // more than a terminal holds; the kernel reserves pages for as much
	}
	for {
		n, err := unix.Splice(s.fd, nil, s.out.spill, nil, size, unix.SPLICE_F_NONBLOCK|unix.SPLICE_F_MOVE)
		switch {
		case err == nil:
			return int(n), nil
		case err == unix.EINTR:
		case err == unix.EAGAIN:
			return -1, nil
		case s.tty && err == unix.EIO:
			return 0, nil // no process has the terminal open any more
		case s.tty && err == unix.EINVAL:
			// A kernel that cannot splice terminals (before Linux 5.11). Here
			// a kill between the two calls costs what was read.
			n, err := s.read(sc.buf[:maxLine])
			if n > 0 {
				return writeAll(s.out.spill, sc.buf[:n])
			}
			return n, err
		default:
			return -1, fmt.Errorf("splice: %w", err)
		}
	}
}

// read is for what is not spliced, with take's results.
func (s *stream) read(buf []byte) (int, error) {
	for {
		n, err := unix.Read(s.fd, buf)
		switch err {
		case nil:
			return n, nil
		case unix.EINTR:
		case unix.EAGAIN:
			return -1, nil
		case unix.EIO:
			return 0, nil // no process has the terminal open any more
		default:
			return -1, fmt.Errorf("read: %w", err)
		}
	}
}

// discard serves a container without a log.
func (s *stream) discard(sc *scratch) (bool, error) {
	n, err := s.read(sc.buf)
	if n <= 0 {
		if n == 0 && err == nil {
			s.end()
		}
		return false, err
	}
	s.grow(n)
	s.out.share(s.n, sc.buf[:n])
	return true, nil
}

// grow enlarges the pipe of a stream that keeps filling its batches, so that
// the container and we switch less often. Idle pipes stay at 64 KiB.
func (s *stream) grow(n int) {
	if s.big || s.tty {
		return
	}
	if n < 32<<10 {
		s.busy = 0
		return
	}
	if s.busy++; s.busy < 4 {
		return
	}
	s.big = true
	_, _ = unix.FcntlInt(uintptr(s.fd), unix.F_SETPIPE_SZ, busyPipe)
	if s.out.spill >= 0 {
		_, _ = unix.FcntlInt(uintptr(s.out.spill), unix.F_SETPIPE_SZ, chunk)
	}
}

func (s *stream) end() {
	s.eof = true
	s.w.remove()
}

// finishBatch logs n bytes that are in the spill pipe (with end: and the
// unfinished line) and empties the pipe. It does so in batches that leave no
// file of the log longer than it may be.
func (o *output) finishBatch(sc *scratch, stream, n int, end bool) error {
	var data []byte
	if n > 0 {
		var err error
		if data, err = sc.peek(o.spill, n); err != nil {
			return err
		}
	}
	for {
		if end && len(data) == 0 && len(o.cur.rest(stream)) == 0 {
			return nil
		}
		o.file.rotate()
		now := fits(len(o.cur.rest(stream)), data, o.file.room())
		left := len(data) - now
		if err := o.logBatch(sc, stream, data[:now], left, end && left == 0); err != nil {
			return err
		}
		if data = data[now:]; len(data) == 0 {
			return nil
		}
	}
}

// logBatch logs data, the first bytes in the spill pipe, and takes them out; so
// many are left.
func (o *output) logBatch(sc *scratch, stream int, data []byte, left int, end bool) error {
	end = end || !o.canKeep(stream, data)
	now := time.Now()
	c := o.cur
	c.setTime(now)
	c.put64(curOffset, uint64(o.file.size))
	c.put64(curDev, o.file.dev)
	c.put64(curIno, o.file.ino)
	c.setFinal(end)
	*c.u32(curLeft) = uint32(left)
	c.setPhase(phaseWriting)
	o.write(sc, stream, now, c.rest(stream), data, end, o.file)
	o.share(stream, data)
	return o.drop(len(data))
}

// canKeep says whether the unfinished line at the end of data, if there is one,
// can be kept. Otherwise it is logged at once as a part, which readers join with
// the rest.
func (o *output) canKeep(stream int, data []byte) bool {
	if len(data) == 0 || data[len(data)-1] == '\n' {
		return true
	}
	err := o.cur.room(stream)
	if err != nil {
		o.log.Debug("unfinished line is logged as a part", "id", o.id, "error", err)
	}
	return err == nil
}

// write formats and writes; the unfinished line is staged. A log that cannot
// be written (disk full) loses what has no room rather than stopping the
// container.
func (o *output) write(sc *scratch, stream int, at time.Time, rest, data []byte, end bool, w logWriter) (whole bool) {
	sc.format.begin(w, at, streamNames[stream])
	next := sc.format.lines(rest, data, end)
	o.cur.stageRest(stream, next)
	o.cur.setPhase(phaseDrain)
	if err := sc.format.err; err != nil {
		if !o.failing {
			o.log.Error("write log, output is lost", "id", o.id, "path", o.file.path, "error", err)
		}
		o.failing = true
		return false
	}
	o.failing = false
	return true
}

// drop empties the spill pipe of n bytes and ends the batch.
func (o *output) drop(n int) error {
	err := consume(o.spill, n)
	o.cur.commitRest(o.cur.stream())
	o.cur.setPhase(phaseIdle)
	return err
}

// resume finishes the batch that was under way when the last shim died, and what
// was moved with it.
func (o *output) resume() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.cur == nil {
		return nil
	}
	held := 0
	if o.spill >= 0 {
		var err error
		if held, err = unix.IoctlGetInt(o.spill, unix.TIOCINQ); err != nil {
			return fmt.Errorf("size of spill pipe: %w", err)
		}
	}
	sc := getScratch()
	defer putScratch(sc)
	left := min(int(*o.cur.u32(curLeft)), held)
	var err error
	switch o.cur.phase() {
	case phaseWriting:
		err = o.resumeWriting(sc, held-left)
	case phaseDrain:
		err = o.drop(held - left)
	default:
		left = held // moved, but not looked at
	}
	if err == nil && left > 0 {
		err = o.finishBatch(sc, o.cur.stream(), left, false)
	}
	return err
}

// resumeWriting goes on with a batch of n bytes of which the log may have a part.
func (o *output) resumeWriting(sc *scratch, n int) error {
	stream, end := o.cur.stream(), *o.cur.u32(curFinal) == 1
	var data []byte
	if n > 0 {
		var err error
		if data, err = sc.peek(o.spill, n); err != nil {
			return err
		}
	} else if !end {
		o.cur.setPhase(phaseIdle) // the spill pipe itself was lost
		return nil
	}
	if !end && !o.canKeep(stream, data) { // a batch of a shim that did not ask before
		end = true
		o.cur.setFinal(true)
	}
	var w logWriter = o.file
	begin := o.file.size
	if o.file.dev == o.cur.get64(curDev) && o.file.ino == o.cur.get64(curIno) {
		begin = min(begin, int64(o.cur.get64(curOffset)))
		if done := o.file.size - begin; done > 0 {
			w = &skipWriter{skip: done, w: o.file}
		}
	}
	if !o.write(sc, stream, o.cur.time(), o.cur.rest(stream), data, end, w) {
		o.file.cut(begin) // it may have ended within a record
	}
	return o.drop(n)
}

// skipWriter leaves out what is in the file already.
type skipWriter struct {
	skip int64
	w    logWriter
}

func (s *skipWriter) Write(p []byte) (int, error) {
	n := min(s.skip, int64(len(p)))
	s.skip -= n
	if int(n) == len(p) {
		return len(p), nil
	}
	m, err := s.w.Write(p[n:])
	return int(n) + m, err
}

// needSpill makes the spill pipe on first use. Opened read-write, one
// descriptor serves both ends.
func (o *output) needSpill() error {
	if o.spill >= 0 {
		return nil
	}
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return fmt.Errorf("make spill pipe: %w", err)
	}
	defer unix.Close(p[0])
	defer unix.Close(p[1])
	fd, err := unix.Open("/proc/self/fd/"+strconv.Itoa(p[0]), unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open spill pipe: %w", err)
	}
	o.spill = fd
	if o.onPipe != nil {
		o.onPipe(fd)
	}
	return nil
}

// drain reads what is there until the streams are empty, for at most
// drainTimeout: to be called when the container's processes have ended.
func (o *output) drain() {
	deadline := time.Now().Add(drainTimeout)
	sc := getScratch()
	defer putScratch(sc)
	for n := range o.streams {
		for more := true; more && time.Now().Before(deadline); {
			o.mu.Lock()
			if s := o.streams[n]; s != nil {
				var err error
				if more, err = s.batch(sc); err != nil {
					o.log.Error("drain output", "id", o.id, "stream", streamNames[n], "error", err)
				}
			} else {
				more = false
			}
			o.mu.Unlock()
		}
	}
}

// finish drains within drainTimeout. Where the log's disk hangs it goes on in
// the background and closes then; false says so.
func (o *output) finish() bool {
	done := make(chan struct{})
	go func() {
		defer close(done)
		o.drain()
	}()
	select {
	case <-done:
		return true
	case <-time.After(2 * drainTimeout):
		o.log.Error("the log does not take the container's last output", "id", o.id)
		go func() {
			<-done
			o.close()
		}()
		return false
	}
}

// close ends the streams: unfinished lines are written, descriptors closed.
func (o *output) close() {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.closed {
		return
	}
	sc := getScratch()
	defer putScratch(sc)
	for n, s := range o.streams {
		if s == nil {
			continue
		}
		if !s.eof && o.file != nil {
			o.cur.setStream(n)
			if err := o.finishBatch(sc, n, 0, true); err != nil {
				o.log.Error("end log", "id", o.id, "error", err)
			}
		}
		s.w.remove()
		unix.Close(s.fd)
	}
	o.closed = true
	for k := range o.sinks {
		k.end()
	}
	o.sinks = nil
	if o.spill >= 0 {
		unix.Close(o.spill)
	}
	if o.file != nil {
		o.file.close()
		o.cur.close()
	}
}

// reopen opens the log path anew, between two batches.
func (o *output) reopen() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.file == nil || o.closed {
		return nil
	}
	return o.file.reopen()
}

// share copies data to those attached. Sinks that stay full are dropped.
func (o *output) share(stream int, data []byte) {
	if len(o.sinks) == 0 || len(data) == 0 {
		return
	}
	var patience deadline
	defer patience.stop()
	for k := range o.sinks {
		if k.stream == stream && !k.push(data, &patience) {
			delete(o.sinks, k)
		}
	}
}

// attach adds a sink; false when the output has ended.
func (o *output) attach(k *sink) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.closed {
		return false
	}
	o.sinks[k] = struct{}{}
	return true
}

func (o *output) detach(k *sink) {
	o.mu.Lock()
	defer o.mu.Unlock()
	delete(o.sinks, k)
}

// scratch is what a running pump needs; idle containers have none.
type scratch struct {
	r, w   int // pipe for tee, -1 until needed
	size   int
	buf    []byte
	format formatter
}

var (
	scratchMu   sync.Mutex
	scratchIdle []*scratch
)

const (
	scratchKept = 2
	smallBuf    = 64 << 10
)

func getScratch() *scratch {
	scratchMu.Lock()
	defer scratchMu.Unlock()
	if n := len(scratchIdle); n > 0 {
		sc := scratchIdle[n-1]
		scratchIdle = scratchIdle[:n-1]
		return sc
	}
	return &scratch{r: -1, w: -1, buf: make([]byte, smallBuf)}
}

func putScratch(sc *scratch) {
	scratchMu.Lock()
	defer scratchMu.Unlock()
	if len(scratchIdle) < scratchKept {
		if cap(sc.format.out) > smallBuf || len(sc.buf) > smallBuf {
			sc.buf, sc.format.out = make([]byte, smallBuf), nil
		}
		scratchIdle = append(scratchIdle, sc)
		return
	}
	sc.close()
}

func (sc *scratch) close() {
	if sc.r >= 0 {
		unix.Close(sc.r)
		unix.Close(sc.w)
	}
}

// peek returns the n bytes in the pipe fd and leaves them there.
func (sc *scratch) peek(fd, n int) ([]byte, error) {
	if sc.r < 0 {
		var p [2]int
		if err := unix.Pipe2(p[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
			return nil, fmt.Errorf("make scratch pipe: %w", err)
		}
		sc.r, sc.w, sc.size = p[0], p[1], smallBuf
	}
	// tee copies buffers, not bytes: as many slots as the source has are enough.
	if size, err := unix.FcntlInt(uintptr(fd), unix.F_GETPIPE_SZ, 0); err == nil && size > sc.size {
		if _, err := unix.FcntlInt(uintptr(sc.w), unix.F_SETPIPE_SZ, size); err == nil {
			sc.size = size
		}
	}
	if len(sc.buf) < n {
		sc.buf = make([]byte, max(n, chunk))
	}
	for {
		got, err := unix.Tee(fd, sc.w, n, unix.SPLICE_F_NONBLOCK)
		if err == unix.EINTR {
			continue
		}
		if err != nil || int(got) != n {
			if got > 0 {
				_ = consume(sc.r, int(got))
			}
			return nil, fmt.Errorf("tee %d bytes: got %d: %w", n, got, errors.Join(err, errShort))
		}
		break
	}
	for done := 0; done < n; {
		m, err := unix.Read(sc.r, sc.buf[done:n])
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read scratch pipe: %w", err)
		}
		done += m
	}
	return sc.buf[:n], nil
}

var errShort = errors.New("pipe gave less than it holds")

// devNull is where consumed pages go without being copied.
var devNull = sync.OnceValues(func() (int, error) {
	return unix.Open(os.DevNull, unix.O_WRONLY|unix.O_CLOEXEC, 0)
})

// consume drops n bytes from the pipe fd.
func consume(fd, n int) error {
	null, err := devNull()
	if err != nil {
		return err
	}
	for n > 0 {
		m, err := unix.Splice(fd, nil, null, nil, n, unix.SPLICE_F_NONBLOCK|unix.SPLICE_F_MOVE)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return fmt.Errorf("consume output: %w", err)
		}
		if m == 0 {
			return errShort
		}
		n -= int(m)
	}
	return nil
}

// writeAll writes to the empty spill pipe, which takes it at once.
func writeAll(fd int, p []byte) (int, error) {
	for done := 0; done < len(p); {
		n, err := unix.Write(fd, p[done:])
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return done, fmt.Errorf("write spill pipe: %w", err)
		}
		done += n
	}
	return len(p), nil
}
