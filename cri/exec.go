package cri

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	utilexec "k8s.io/utils/exec"

	"github.com/podd-runtime/podd/cri/shim"
)

const (
	// maxExecOutput caps each stream of an ExecSync; the CRI says 16 MB
	// (CVE-2022-1708, CVE-2022-31030). The rest is read and dropped.
	maxExecOutput = 16 << 20
	// drainTime is how long output is awaited after the process has ended.
	// What it wrote itself is in the pipe by then; only a process it left
	// behind can write more, and would hold the call for ever.
	drainTime = time.Second
	// beginTime bounds the wait for podd-shim to begin a process: twice what its
	// client waits for one that is being restarted. It is no part of a timeout
	// that the process has.
	beginTime = 10 * time.Second
)

// ExecSync runs a command and returns its output and exit code. A timeout in
// seconds, which begins with the process, kills it with all its descendants and
// answers DeadlineExceeded. A process that could not be begun, or of whose end
// podd-shim could not tell, is Unavailable: nothing is known of it then.
func (s *Service) ExecSync(ctx context.Context, r *runtimeapi.ExecSyncRequest) (*runtimeapi.ExecSyncResponse, error) {
	if r.GetTimeout() < 0 {
		return nil, invalid("timeout %d: must not be negative", r.GetTimeout())
	}
	c, spec, err := s.execSpec(r.GetContainerId(), r.GetCmd(), false)
	if err != nil {
		return nil, err
	}
	var timeout time.Duration
	if t := r.GetTimeout(); t < int64(time.Duration(1<<63-1)/time.Second) {
		timeout = time.Duration(t) * time.Second
	}
	stdout, stderr := capped{max: maxExecOutput}, capped{max: maxExecOutput}
	exit, err := s.runExec(ctx, spec, timeout, nil, &stdout, &stderr)
	if err != nil {
		if ctx.Err() == nil && errors.Is(err, context.DeadlineExceeded) {
			return nil, fmt.Errorf("exec in container %s: timeout %ds exceeded: %w", c.id, r.GetTimeout(), context.DeadlineExceeded)
		}
		return nil, fmt.Errorf("exec in container %s: %w", c.id, err)
	}
	return &runtimeapi.ExecSyncResponse{Stdout: stdout.b.Bytes(), Stderr: stderr.b.Bytes(), ExitCode: int32(exit.Code)}, nil
}

// execSpec is the process of an exec: what the container's first process has,
// with other arguments.
func (s *Service) execSpec(id string, cmd []string, tty bool) (*container, *shim.ExecSpec, error) {
	c, err := s.objects.container(id)
	if err != nil {
		return nil, nil, err
	}
	if len(cmd) == 0 || cmd[0] == "" {
		return nil, nil, invalid("cmd is empty")
	}
	if state := c.current(); state != runtimeapi.ContainerState_CONTAINER_RUNNING {
		return nil, nil, fmt.Errorf("container %s is %v, not running: %w", c.id, state, errdefs.ErrFailedPrecondition)
	}
	p := *c.process
	p.Args = cmd
	p.Terminal = tty
	if tty {
		p.Env = withTerm(p.Env)
	}
	return c, &shim.ExecSpec{ContainerID: c.id, Process: &p}, nil
}

func withTerm(env []string) []string {
	for _, e := range env {
		if len(e) > 5 && e[:5] == "TERM=" {
			return env
		}
	}
	return append(append(make([]string, 0, len(env)+1), env...), "TERM=xterm")
}

// begin starts the process of an exec. When ctx or beginTime is over before it
// has begun, that is not the process' doing and never its DeadlineExceeded.
func (s *Service) begin(ctx context.Context, e *shim.ExecSpec) (shim.Session, error) {
	return begun(ctx, func(ctx context.Context) (shim.Session, error) { return s.procs.Exec(ctx, e) })
}

// begun is begin for any session.
func begun(ctx context.Context, open func(context.Context) (shim.Session, error)) (shim.Session, error) {
	start, cancel := context.WithTimeout(ctx, beginTime)
	defer cancel()
	session, err := open(start)
	switch {
	case err == nil || start.Err() == nil:
		return session, err
	case errors.Is(ctx.Err(), context.Canceled):
		return nil, fmt.Errorf("given up before it began: %w", context.Canceled)
	}
	return nil, fmt.Errorf("podd-shim did not begin it in time, see that it runs and is not stopped: %w", errdefs.ErrUnavailable)
}

// runExec runs a process without a terminal and copies its streams; nil
// streams are /dev/null. After timeout it is killed, and the error is
// DeadlineExceeded; 0: never.
func (s *Service) runExec(ctx context.Context, e *shim.ExecSpec, timeout time.Duration, stdin io.Reader, stdout, stderr io.Writer) (*shim.Exit, error) {
	var p pipes
	defer p.close()
	var err error
	if stdin != nil {
		if e.Stdin, err = p.input(stdin); err != nil {
			return nil, err
		}
	}
	if stdout != nil {
		if e.Stdout, err = p.output(stdout); err != nil {
			return nil, err
		}
	}
	if stderr != nil {
		if e.Stderr, err = p.output(stderr); err != nil {
			return nil, err
		}
	}
	session, err := s.begin(ctx, e)
	if err != nil {
		return nil, err
	}
	defer session.Close()
	p.start()
	if timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, timeout)
		defer cancel()
	}
	exit, err := session.Wait(ctx)
	if err != nil {
		p.drain(0)
	} else {
		p.drain(drainTime)
	}
	return exit, err
}

// pipes connects a process' descriptors with readers and writers.
type pipes struct {
	theirs []*os.File // given to the process; closed here once it has them
	reads  []*os.File
	writes []*os.File // closed here unless a copy has begun, which does
	copies []func()
	inputs []func()
	wg     sync.WaitGroup
}

// output returns the end to give to the process; what it writes goes to w.
func (p *pipes) output(w io.Writer) (*os.File, error) {
	r, theirs, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	p.theirs = append(p.theirs, theirs)
	p.reads = append(p.reads, r)
	p.copies = append(p.copies, func() { copyOut(w, r) })
	return theirs, nil
}

// copyOut reads to the end even when w fails: the process must not block on a
// client that has gone. When the deadline of r has passed it still delivers
// what is there: the time may have gone by in w, with a client that reads
// slowly, and what the ended process had written is owed to it.
func copyOut(w io.Writer, r *os.File) {
	_, err := io.Copy(w, r)
	switch {
	case err == nil:
	case errors.Is(err, os.ErrDeadlineExceeded):
		copyRest(w, r)
	default:
		_, _ = io.Copy(io.Discard, r)
	}
}

// copyRest copies what r holds now and waits for nothing more. A process that
// was left behind and keeps writing is cut off after what fits into r.
func copyRest(w io.Writer, r *os.File) {
	raw, err := r.SyscallConn()
	if err != nil || r.SetReadDeadline(time.Time{}) != nil {
		return
	}
	room, buf := 64<<10, make([]byte, 32<<10) // a terminal's buffer, and a pipe's at first
	_ = raw.Control(func(fd uintptr) {
		if n, err := unix.FcntlInt(fd, unix.F_GETPIPE_SZ, 0); err == nil {
			room = n
		}
	})
	for room > 0 {
		n := 0
		err := raw.Read(func(fd uintptr) bool {
			n, _ = unix.Read(int(fd), buf[:min(room, len(buf))])
			return true
		})
		if err != nil || n <= 0 {
			return
		}
		room -= n
		if _, err := w.Write(buf[:n]); err != nil {
			return
		}
	}
}

// input returns the end to give to the process; it gets what r has, then EOF.
func (p *pipes) input(r io.Reader) (*os.File, error) {
	theirs, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	p.theirs, p.writes = append(p.theirs, theirs), append(p.writes, w)
	p.inputs = append(p.inputs, func() {
		_, _ = io.Copy(w, r)
		_ = w.Close()
	})
	return theirs, nil
}

// start lets go of the process' ends and copies. Inputs are not waited for: a
// client's stdin may stay open, and ends with its connection.
func (p *pipes) start() {
	for _, f := range p.theirs {
		_ = f.Close()
	}
	p.theirs = nil
	for _, c := range p.copies {
		p.wg.Go(c)
	}
	p.writes = nil
	for _, in := range p.inputs {
		go in()
	}
}

// drain waits for the outputs to end, at most d.
func (p *pipes) drain(d time.Duration) {
	deadline := time.Now().Add(d)
	for _, r := range p.reads {
		_ = r.SetReadDeadline(deadline)
	}
	p.wg.Wait()
}

func (p *pipes) close() {
	for _, f := range slices.Concat(p.theirs, p.reads, p.writes) {
		_ = f.Close()
	}
}

// capped keeps the first max bytes and drops the rest.
type capped struct {
	b   bytes.Buffer
	max int
}

func (c *capped) Write(p []byte) (int, error) {
	if room := c.max - c.b.Len(); room > 0 {
		c.b.Write(p[:min(room, len(p))])
	}
	return len(p), nil
}

// Exec returns the URL at which a client runs a command with streams.
func (s *Service) Exec(_ context.Context, r *runtimeapi.ExecRequest) (*runtimeapi.ExecResponse, error) {
	c, _, err := s.execSpec(r.GetContainerId(), r.GetCmd(), r.GetTty())
	if err != nil {
		return nil, err
	}
	r.ContainerId = c.id
	return s.stream.Exec(r)
}

// Attach returns the URL at which a client joins a container's own streams.
func (s *Service) Attach(_ context.Context, r *runtimeapi.AttachRequest) (*runtimeapi.AttachResponse, error) {
	c, err := s.runningContainer(r.GetContainerId())
	if err != nil {
		return nil, err
	}
	r.ContainerId = c.id
	return s.stream.Attach(r)
}

func (s *Service) runningContainer(id string) (*container, error) {
	c, err := s.objects.container(id)
	if err != nil {
		return nil, err
	}
	if state := c.current(); state != runtimeapi.ContainerState_CONTAINER_RUNNING {
		return nil, fmt.Errorf("container %s is %v, not running: %w", c.id, state, errdefs.ErrFailedPrecondition)
	}
	return c, nil
}

// streamRuntime is the service as the streaming server calls it.
type streamRuntime struct{ s *Service }

func (r streamRuntime) Exec(ctx context.Context, id string, cmd []string, in io.Reader, out, err io.WriteCloser, tty bool, resize <-chan remotecommand.TerminalSize) error {
	return r.s.ExecStream(ctx, id, cmd, in, out, err, tty, resize)
}

func (r streamRuntime) Attach(ctx context.Context, id string, in io.Reader, out, err io.WriteCloser, tty bool, resize <-chan remotecommand.TerminalSize) error {
	return r.s.AttachStream(ctx, id, in, out, err, tty, resize)
}

func (r streamRuntime) PortForward(ctx context.Context, id string, port int32, stream io.ReadWriteCloser) error {
	return r.s.PortForwardStream(ctx, id, port, stream)
}

// ExecStream runs a command with the given streams; any may be nil. It returns
// when the process has ended and its output is delivered: nil for exit code 0,
// an error of k8s.io/utils/exec with the code for others. Cancelling ctx kills
// the process.
func (s *Service) ExecStream(ctx context.Context, id string, cmd []string, stdin io.Reader, stdout, stderr io.WriteCloser, tty bool, resize <-chan remotecommand.TerminalSize) error {
	c, spec, err := s.execSpec(id, cmd, tty)
	if err != nil {
		return err
	}
	var exit *shim.Exit
	if tty {
		exit, err = s.runTTY(ctx, spec, stdin, stdout, resize)
	} else {
		exit, err = s.runExec(ctx, spec, 0, stdin, writer(stdout), writer(stderr))
	}
	if err != nil {
		return fmt.Errorf("exec in container %s: %w", c.id, err)
	}
	if exit.Code != 0 {
		return utilexec.CodeExitError{Err: fmt.Errorf("command terminated with exit code %d", exit.Code), Code: exit.Code}
	}
	return nil
}

// writer keeps a nil interface nil.
func writer(w io.WriteCloser) io.Writer {
	if w == nil {
		return nil
	}
	return w
}

// runTTY runs a process on a terminal of its own.
func (s *Service) runTTY(ctx context.Context, e *shim.ExecSpec, stdin io.Reader, stdout io.Writer, resize <-chan remotecommand.TerminalSize) (*shim.Exit, error) {
	e.Process.ConsoleSize = firstSize(ctx, resize)
	session, err := s.begin(ctx, e)
	if err != nil {
		return nil, err
	}
	defer session.Close()
	done := make(chan struct{})
	defer close(done)
	go resizes(resize, done, session.Resize)
	tty := session.TTY()
	if stdin != nil {
		go func() { _, _ = io.Copy(tty, stdin) }() // ends with the connection
	}
	if stdout == nil {
		stdout = io.Discard
	}
	copied := make(chan struct{})
	go func() {
		defer close(copied)
		copyOut(stdout, tty)
	}()
	exit, err := session.Wait(ctx)
	_ = tty.SetReadDeadline(time.Now().Add(drainTime))
	<-copied
	return exit, err
}

// sizeWait is how long a process waits for the size of its client's window.
// Clients send it right after they have connected, and without it what a
// program draws first is drawn for no window at all.
const sizeWait = 200 * time.Millisecond

// firstSize of the window; nil: the client tells none in time.
func firstSize(ctx context.Context, sizes <-chan remotecommand.TerminalSize) *specs.Box {
	if sizes == nil {
		return nil
	}
	late := time.NewTimer(sizeWait)
	defer late.Stop()
	select {
	case size := <-sizes: // zero when there will be none
		if size.Width > 0 && size.Height > 0 {
			return &specs.Box{Width: uint(size.Width), Height: uint(size.Height)}
		}
	case <-late.C:
	case <-ctx.Done():
	}
	return nil
}

// resizes applies window sizes until the stream or the session ends.
func resizes(sizes <-chan remotecommand.TerminalSize, done <-chan struct{}, set func(width, height uint16) error) {
	if sizes == nil {
		return
	}
	for {
		select {
		case size, ok := <-sizes:
			if !ok {
				return
			}
			if size.Width > 0 && size.Height > 0 {
				_ = set(size.Width, size.Height) // a terminal that has just gone
			}
		case <-done:
			return
		}
	}
}

// AttachStream joins a running container's own streams; any may be nil. It
// returns when the container ends, the client's streams do, or ctx does; the
// container goes on.
func (s *Service) AttachStream(ctx context.Context, id string, stdin io.Reader, stdout, stderr io.WriteCloser, tty bool, resize <-chan remotecommand.TerminalSize) error {
	c, err := s.runningContainer(id)
	if err != nil {
		return err
	}
	if !c.config.GetStdin() {
		stdin = nil // nobody reads it
	}
	if c.config.GetTty() {
		stderr = nil // a terminal has one stream
	}
	var p pipes
	defer p.close()
	var in, out, errOut *os.File
	if stdin != nil {
		if in, err = p.input(stdin); err != nil {
			return err
		}
	}
	if stdout != nil {
		if out, err = p.output(stdout); err != nil {
			return err
		}
	}
	if stderr != nil {
		if errOut, err = p.output(stderr); err != nil {
			return err
		}
	}
	session, err := begun(ctx, func(ctx context.Context) (shim.Session, error) { return s.procs.Attach(ctx, c.id, in, out, errOut) })
	if err != nil {
		return fmt.Errorf("attach to container %s: %w", c.id, err)
	}
	defer session.Close()
	done := make(chan struct{})
	defer close(done)
	if c.config.GetTty() {
		go resizes(resize, done, func(w, h uint16) error { return s.procs.ResizeTTY(ctx, c.id, w, h) })
	}
	p.start()
	_, err = session.Wait(ctx)
	if ctx.Err() != nil { // the client has gone: nobody waits for the rest
		p.drain(0)
		return nil
	}
	// The shim hands out what it has, and closes: that is the end, for which a
	// client that reads slowly may take its time.
	p.wg.Wait()
	if err != nil {
		return fmt.Errorf("attach to container %s: %w", c.id, err)
	}
	return nil
}
