package kubelet

import (
	"context"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/podd-runtime/podd/cri/shim"
)

// shimRetry is the pause between attempts to start podd-shim. It is what a
// shim that dies at once may cost, not what a restart takes.
const shimRetry = time.Second

// shimAnswer is longer than a healthy shim takes to answer. One that takes
// longer is asked again.
const shimAnswer = 250 * time.Millisecond

// keepShim starts podd-shim again whenever it dies. Its containers go on
// meanwhile; the new one takes them up.
func (a *agent) keepShim(ctx context.Context) error {
	for ctx.Err() == nil {
		info, err := a.askShim(ctx)
		if err == nil {
			a.shimPID.Store(int64(info.PID))
			if err = untilExit(ctx, info.PID); err == nil && ctx.Err() == nil {
				a.log.Warn("podd-shim died, starting it again", "pid", info.PID)
			}
		}
		if ctx.Err() != nil {
			break
		}
		begin := time.Now()
		if _, err = a.ensureShim(ctx); err == nil {
			a.log.Info("podd-shim is back", "took", time.Since(begin))
			continue
		}
		a.log.Error("podd-shim cannot be started", "error", err, "again", shimRetry)
		select {
		case <-time.After(shimRetry):
		case <-ctx.Done():
		}
	}
	return nil
}

// askShim is told at once, or not at all: the client would wait for a shim
// that restarts, which is what its callers want and we must not.
func (a *agent) askShim(ctx context.Context) (*shim.Info, error) {
	ctx, cancel := context.WithTimeout(ctx, shimAnswer)
	defer cancel()
	return a.shim.Info(ctx)
}

// untilExit waits for the end of a process that need not be a child. It holds
// no thread: the runtime's poller waits.
func untilExit(ctx context.Context, pid int) error {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if err == unix.ESRCH {
		return nil
	}
	if err != nil {
		return fmt.Errorf("watch process %d: %w", pid, err)
	}
	f := os.NewFile(uintptr(fd), "pidfd")
	defer f.Close()
	conn, err := f.SyscallConn()
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { f.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	err = conn.Read(func(fd uintptr) bool {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, _ := unix.Poll(p, 0)
		return n > 0
	})
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return err
}
