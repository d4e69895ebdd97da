package kubelet

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/podd-runtime/podd/cri/shim"
	"github.com/podd-runtime/podd/kubelet/server"
	"github.com/podd-runtime/podd/kubelet/server/api"
	"github.com/podd-runtime/podd/systemd"
)

// awaitShim is ensureShim that is not given up: pods run on without podd-shim,
// and to end would only begin the same anew, with nobody there to say why. Who
// asks meanwhile is told what is waited for.
func (a *agent) awaitShim(ctx context.Context) (*shim.Client, error) {
	if _, err := shim.BuildID(a.cfg.ShimProgram); err != nil {
		return nil, err // no such program: that does not mend itself
	}
	a.notice = new(notice)
	defer func() {
		a.notice.end()
		a.notice = nil
	}()
	last := ""
	for {
		client, err := a.ensureShim(ctx)
		if err == nil || ctx.Err() != nil {
			return client, err
		}
		if text := err.Error(); text != last { // once: it is tried every second
			last = text
			a.log.Error("podd-shim cannot be started, trying on", "error", err, "every", shimRetry)
		}
		systemd.Status(a.log, "podd-shim cannot be started, trying again: "+err.Error())
		systemd.Extend(a.log, shimExtension)
		a.notice.post(a, err)
		select {
		case <-time.After(shimRetry):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// notice answers every request to the local API with what podd waits for,
// before it can do better. One goroutine posts at a time.
type notice struct {
	text   atomic.Pointer[string]
	server *http.Server
}

// post changes what is said, and begins to say it.
func (n *notice) post(a *agent, why error) {
	text := fmt.Sprintf("podd waits for podd-shim: %v. Pods that run go on; nothing is started, stopped or probed", why)
	n.text.Store(&text)
	if n.server != nil {
		return
	}
	l, err := api.Listen(filepath.Join(a.cfg.RunDir, api.SocketName))
	if err != nil {
		a.log.Warn("local API cannot say what podd waits for", "error", err)
		return
	}
	n.server = &http.Server{
		ReadHeaderTimeout: noticeTimeout, WriteTimeout: noticeTimeout,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			status := server.StatusOf(fmt.Errorf("%s: %w", *n.text.Load(), errdefs.ErrUnavailable))
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(int(status.Code))
			_ = json.NewEncoder(w).Encode(&status) // who has left is told nothing
		}),
	}
	go func() { _ = n.server.Serve(l) }() // ends with end
}

// noticeTimeout is for a client on the same machine that sends a few lines.
const noticeTimeout = 10 * time.Second

func (n *notice) end() {
	if n.server != nil {
		n.server.Close()
	}
}

// listen opens a unix socket. In a full file system it waits for room: pods need
// the agent more than its clients do.
func (a *agent) listen(ctx context.Context, path string) (net.Listener, error) {
	for {
		l, err := api.Listen(path)
		if !errors.Is(err, unix.ENOSPC) && !errors.Is(err, unix.EDQUOT) {
			return l, err
		}
		a.log.Error("no room for a socket, waiting for it", "path", path, "error", err)
		systemd.Status(a.log, "waiting for room in a full file system: "+err.Error())
		systemd.Extend(a.log, shimExtension)
		select {
		case <-time.After(shimRetry):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}
