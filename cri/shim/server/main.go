package server

import (
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"sync"

	"github.com/opencontainers/runc/libcontainer/exeseal"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"github.com/containerd/errdefs"

	"github.com/podd-runtime/podd/cri/shim"
)

// Options are podd-shim's command line.
type Options struct {
	RunDir      string
	Pause       []byte // the program cmd/pause
	Enter       []byte // the program cmd/enter
	LogToStderr bool
}

// Main is podd-shim.
func Main(o Options) error {
	runDir, err := filepath.Abs(o.RunDir)
	if err != nil {
		return err
	}
	if err := seal(); err != nil {
		return err
	}
	dir := shim.Dir(runDir)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	h, err := inherited()
	if err != nil {
		return err
	}
	lock := -1
	if h != nil {
		lock = h.Lock
	} else if lock, err = lockInstance(filepath.Join(dir, "instance.lock")); err != nil {
		return err
	}
	var w io.Writer = os.Stderr
	if !o.LogToStderr {
		w = &boundedLog{path: filepath.Join(dir, "shim.log"), limit: 4 << 20}
	}
	log := slog.New(slog.NewJSONHandler(w, nil))
	forwardLogrus(log)
	heedSignals()
	go endOnSignal(log)
	protect(log)
	s, err := New(Config{RunDir: runDir, Pause: o.Pause, Enter: o.Enter, Lock: lock, Log: log})
	if err != nil {
		return err
	}
	log.Info("podd-shim serves", "pid", os.Getpid(), "runDir", runDir, "buildID", s.build)
	err = s.Run(h)
	log.Info("podd-shim ends", "error", err)
	return err
}

// endOnSignal ends the shim when asked to; the containers run on and a new shim
// takes them up. What would end or suspend it otherwise is caught.
func endOnSignal(log *slog.Logger) {
	ch := make(chan os.Signal, 4)
	signal.Notify(ch, unix.SIGHUP, unix.SIGPIPE, unix.SIGINT, unix.SIGQUIT, unix.SIGTERM)
	for sig := range ch {
		if sig == unix.SIGHUP || sig == unix.SIGPIPE {
			continue
		}
		log.Info("podd-shim ends on a signal, containers run on", "signal", sig.String())
		os.Exit(0)
	}
}

// protect makes the shim the last that the OOM killer takes, where that is
// permitted: it is the parent of everything.
func protect(log *slog.Logger) {
	if err := os.WriteFile("/proc/self/oom_score_adj", []byte("-999"), 0); err != nil {
		log.Info("cannot protect from the OOM killer", "error", err)
	}
}

// seal executes this program again from a sealed memfd, unless it runs from
// one: no container can then write to the program that its init is made of
// (CVE-2019-5736), and libcontainer need not make a safe copy at every start.
func seal() error {
	if exeseal.IsSelfExeCloned() {
		return nil
	}
	self, err := os.Open("/proc/self/exe")
	if err != nil {
		return err
	}
	defer self.Close()
	st, err := self.Stat()
	if err != nil {
		return err
	}
	f, err := exeseal.CloneBinary(self, st.Size(), "podd-shim", "/")
	if err != nil {
		return fmt.Errorf("seal own program: %w", err)
	}
	return fmt.Errorf("execute sealed program: %w",
		unix.Exec(fmt.Sprintf("/proc/self/fd/%d", f.Fd()), os.Args, os.Environ()))
}

// lockInstance makes sure that one shim owns a directory. The lock is held by
// the returned descriptor, which an upgrade in place passes on, for as long as
// the process lives.
func lockInstance(path string) (int, error) {
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CREAT|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return -1, fmt.Errorf("open %s: %w", path, err)
	}
	if err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB); err != nil {
		unix.Close(fd)
		if err == unix.EWOULDBLOCK {
			return -1, fmt.Errorf("another podd-shim runs on %s: %w", filepath.Dir(path), errdefs.ErrAlreadyExists)
		}
		return -1, fmt.Errorf("lock %s: %w", path, err)
	}
	return fd, nil
}

// boundedLog appends to a file and keeps one predecessor.
type boundedLog struct {
	path  string
	limit int64

	mu   sync.Mutex
	f    *os.File
	size int64
}

func (b *boundedLog) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.f != nil && b.size > b.limit {
		b.f.Close()
		b.f = nil
		if err := os.Rename(b.path, b.path+".old"); err != nil {
			return 0, err
		}
	}
	if b.f == nil {
		f, err := os.OpenFile(b.path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
		if err != nil {
			return 0, err
		}
		if st, err := f.Stat(); err == nil {
			b.size = st.Size()
		}
		b.f = f
	}
	n, err := b.f.Write(p)
	b.size += int64(n)
	return n, err
}

// forwardLogrus gives libcontainer's log lines to ours.
func forwardLogrus(log *slog.Logger) {
	logrus.SetOutput(io.Discard)
	logrus.SetLevel(logrus.WarnLevel)
	logrus.AddHook(logrusHook{log})
}

type logrusHook struct{ log *slog.Logger }

func (logrusHook) Levels() []logrus.Level {
	return []logrus.Level{logrus.PanicLevel, logrus.FatalLevel, logrus.ErrorLevel, logrus.WarnLevel}
}

func (h logrusHook) Fire(e *logrus.Entry) error {
	attrs := []any{"text", e.Message}
	for k, v := range e.Data {
		attrs = append(attrs, k, v)
	}
	h.log.Warn("libcontainer", attrs...)
	return nil
}
