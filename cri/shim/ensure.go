package shim

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/podd-runtime/podd/cri/shim/internal/wire"
)

// patience is how often who waits for a shim is told that it still does. A shim
// answers after some 20 ms, or after it has taken up the containers of a dead
// one: hundreds of them on a busy machine take minutes.
const patience = 5 * time.Second

// AlreadyRuns is podd-shim's exit status when another one has its directory.
const AlreadyRuns = 17

// again is the pause before another one is tried then.
const again = 200 * time.Millisecond

// Slow is told by Ensure and EnsureBy, every five seconds, for how long they
// have been waiting for a shim to answer. nil: nobody is told.
type Slow func(waited time.Duration)

// Ensure returns a client of the running shim of runDir, and starts binary
// detached (its own session, not ended with the caller) when there is none.
// Any number of callers start one. It waits as long as a shim is there that may
// yet answer, or until ctx ends; errdefs.ErrUnavailable: it ended instead.
func Ensure(ctx context.Context, runDir, binary string, slow Slow) (*Client, error) {
	return ensure(ctx, runDir, slow, func(_ context.Context, runDir string) (<-chan error, error) {
		ended, err := spawn(runDir, binary)
		if err != nil {
			err = fmt.Errorf("start podd-shim %s: %w", binary, err)
		}
		return ended, err
	})
}

// EnsureBy is Ensure where somebody else starts the shim: start asks for that
// and is called at most once, when none answers.
func EnsureBy(ctx context.Context, runDir string, slow Slow, start func(context.Context) error) (*Client, error) {
	return ensure(ctx, runDir, slow, func(ctx context.Context, _ string) (<-chan error, error) {
		return nil, start(ctx)
	})
}

func ensure(ctx context.Context, runDir string, slow Slow, start func(context.Context, string) (<-chan error, error)) (*Client, error) {
	runDir, err := filepath.Abs(runDir)
	if err != nil {
		return nil, err
	}
	defer slow.tell(patience)()
	c := New(runDir)
	if c.answers(ctx) {
		return c, nil
	}
	if err := os.MkdirAll(Dir(runDir), 0o700); err != nil {
		return nil, fmt.Errorf("start podd-shim: %w", err)
	}
	lock, err := os.OpenFile(filepath.Join(Dir(runDir), "start.lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("start podd-shim: %w", err)
	}
	defer lock.Close()
	for unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB) != nil {
		if err := sleep(ctx, 10*time.Millisecond); err != nil {
			return nil, fmt.Errorf("start podd-shim: another start does not end: %w", err)
		}
	}
	if c.answers(ctx) {
		return c, nil
	}
	begin := time.Now()
	ended, err := start(ctx, runDir)
	if err != nil {
		return nil, err
	}
	for pause := time.Millisecond; ; pause = min(2*pause, 20*time.Millisecond) {
		if c.answers(ctx) {
			return c, nil
		}
		select {
		case err := <-ended:
			if c.answers(ctx) { // somebody else's was faster
				return c, nil
			}
			var exit *exec.ExitError
			if errors.As(err, &exit) && exit.ExitCode() == AlreadyRuns && time.Since(begin) < retryFor {
				// One that was started before, by a podd that has died, say, is
				// about to answer, or to end.
				_ = os.Truncate(startLog(runDir), 0) // that it said so is no news
				if err := sleep(ctx, again); err != nil {
					return nil, err
				}
				if ended, err = start(ctx, runDir); err != nil {
					return nil, err
				}
				continue
			}
			return nil, fmt.Errorf("podd-shim ended at once (see %s): %w%s: %w", startLog(runDir), err, lastWords(runDir), errdefs.ErrUnavailable)
		case <-ctx.Done():
			return nil, fmt.Errorf("podd-shim does not answer (see %s): %w", startLog(runDir), ctx.Err())
		case <-time.After(pause):
		}
	}
}

// tell tells it until the function returned is called, and never after that.
func (s Slow) tell(every time.Duration) (enough func()) {
	if s == nil {
		return func() {}
	}
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		begin := time.Now()
		tick := time.NewTicker(every)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				s(time.Since(begin))
			case <-stop:
				return
			}
		}
	}()
	return func() {
		close(stop)
		<-stopped
	}
}

func startLog(runDir string) string { return filepath.Join(Dir(runDir), "start.log") }

// lastWords is what a shim that ended at once said last, to be appended to an
// error. Where its directory has no room there may be none.
func lastWords(runDir string) string {
	if f, err := os.Open(startLog(runDir)); err == nil {
		defer f.Close()
		text := make([]byte, 4<<10) // a line or a few; a trace of a crash is left to the file
		n, _ := io.ReadFull(f, text)
		if lines := bytes.Split(bytes.TrimSpace(text[:n]), []byte("\n")); n < len(text) && n > 0 {
			return fmt.Sprintf(": %s", lines[len(lines)-1])
		}
	}
	var st unix.Statfs_t
	if err := unix.Statfs(Dir(runDir), &st); err == nil && (st.Bavail == 0 || st.Files > 0 && st.Ffree == 0) {
		return fmt.Sprintf(": no space left on %s", Dir(runDir))
	}
	return ""
}

// answers tries one Info without waiting for a shim to appear.
func (c *Client) answers(ctx context.Context) bool {
	conn, err := wire.Dial(ctx, c.path)
	if err != nil {
		return false
	}
	defer conn.Close()
	frame, err := roundTrip(ctx, conn, wire.Info, []byte("{}"), nil)
	if err != nil {
		return false
	}
	frame.CloseFds()
	return true
}

// spawn starts the program; the channel tells its end, and it is reaped then.
// What the one before said last, such as the trace of a crash, stays in the
// file beside.
func spawn(runDir, binary string) (<-chan error, error) {
	if st, err := os.Stat(startLog(runDir)); err == nil && st.Size() > 0 {
		_ = os.Rename(startLog(runDir), startLog(runDir)+".last")
	}
	out, err := os.OpenFile(startLog(runDir), os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil { // a full file system is no reason not to start
		if out, err = os.OpenFile(os.DevNull, os.O_WRONLY, 0); err != nil {
			return nil, err
		}
	}
	defer out.Close()
	cmd := exec.Command(binary, "--run-dir", runDir)
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = out, out
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	ended := make(chan error, 1)
	go func() {
		err := cmd.Wait()
		if err == nil {
			err = errors.New("exit status 0")
		}
		ended <- err
	}()
	return ended, nil
}

// Shutdown ends the shim. It refuses (ErrFailedPrecondition) while containers
// or sandboxes are left.
func (c *Client) Shutdown(ctx context.Context) error {
	if err := c.call(ctx, wire.Shutdown, wire.Call{}, nil); err != nil {
		return fmt.Errorf("shut podd-shim down: %w", err)
	}
	return nil
}

// Upgrade makes the running shim execute the program at path in its place: the
// same process with the same children. It returns when the new one answers.
// Containers notice nothing; event streams reconnect by themselves, attached
// clients have to attach again.
func (c *Client) Upgrade(ctx context.Context, path string) error {
	want, err := BuildID(path)
	if err != nil {
		return err
	}
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("upgrade podd-shim: %w", err)
	}
	defer f.Close()
	if err := c.call(ctx, wire.Upgrade, wire.Call{ID: want}, nil, f); err != nil {
		return fmt.Errorf("upgrade podd-shim: %w", err)
	}
	for {
		info, err := c.Info(ctx)
		if err != nil {
			return fmt.Errorf("upgraded podd-shim: %w", err)
		}
		if info.BuildID == want {
			return nil
		}
		if err := sleep(ctx, time.Millisecond); err != nil {
			return fmt.Errorf("podd-shim still runs build %s: %w", info.BuildID, err)
		}
	}
}
