package main

import (
	"bytes"
	"errors"
	"log/slog"
	"strings"
	"testing"

	utilruntime "k8s.io/apimachinery/pkg/util/runtime"
	"k8s.io/klog/v2"
)

// TestLibrariesLogThroughOurs: what Kubernetes' libraries log comes out as our
// own lines, at our levels.
func TestLibrariesLogThroughOurs(t *testing.T) {
	defer klog.ClearLogger()
	defer forwardKlog(slog.New(slog.DiscardHandler), 0)
	for _, tt := range []struct {
		level slog.Level
		v     uint32
		want  []string
		not   []string
	}{
		{slog.LevelInfo, 0, []string{"level=WARN", "client is gone", "level=INFO", "plain"}, []string{"level=ERROR", "detail", "context"}},
		{slog.LevelDebug, 4, []string{"level=WARN", "level=DEBUG msg=context"}, []string{"noise"}},
	} {
		var out bytes.Buffer
		forwardKlog(slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{Level: tt.level})), tt.v)
		utilruntime.HandleError(errors.New("client is gone"))
		klog.Info("plain")
		klog.V(4).InfoS("detail", "port", 80)
		klog.V(9).InfoS("noise")
		klog.Background().V(4).Info("context")
		klog.Background().V(8).Info("noise")
		text := out.String()
		for _, w := range append(tt.want, "part=library") {
			if !strings.Contains(text, w) {
				t.Errorf("-v=%d: %q is missing in:\n%s", tt.v, w, text)
			}
		}
		for _, n := range tt.not {
			if strings.Contains(text, n) {
				t.Errorf("-v=%d: %q is in:\n%s", tt.v, n, text)
			}
		}
		if tt.v >= 4 && !strings.Contains(text, "detail") {
			t.Errorf("-v=%d: no detail in:\n%s", tt.v, text)
		}
	}
}
