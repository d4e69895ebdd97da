package images

import (
	"io"
	"log/slog"
	"sync"

	"github.com/containerd/log"
	"github.com/sirupsen/logrus"
)

var forwardOnce sync.Once

// forwardLogs sends what containerd's libraries log to l at level Debug
// instead of standard error: what matters of it comes back as an error. Their
// logger is a variable of the library, hence once per process.
func forwardLogs(l *slog.Logger) {
	forwardOnce.Do(func() {
		to := logrus.New()
		to.SetOutput(io.Discard)
		to.SetLevel(logrus.WarnLevel)
		to.AddHook(slogHook{l})
		log.L = logrus.NewEntry(to)
	})
}

type slogHook struct{ l *slog.Logger }

func (slogHook) Levels() []logrus.Level {
	return []logrus.Level{logrus.PanicLevel, logrus.FatalLevel, logrus.ErrorLevel, logrus.WarnLevel}
}

func (h slogHook) Fire(e *logrus.Entry) error {
	h.l.Debug("image library", "message", e.Message, "fields", map[string]any(e.Data))
	return nil
}
