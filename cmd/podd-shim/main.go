// podd-shim is the parent of all containers of a node: it starts, watches and
// reaps them, writes their logs and outlives podd, which talks to it over
// RUN-DIR/shim/shim.sock. One runs per node. It is started by podd or systemd.
package main

import (
	"embed"
	"flag"
	"fmt"
	"os"
	"runtime"
	"unsafe"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/podd-runtime/podd/cri/shim"
	"github.com/podd-runtime/podd/cri/shim/server"
)

//go:embed embed/*
var embedded embed.FS

func main() {
	// Forks from threads in foreign cgroups end with their thread; the main
	// thread never ends, so nothing else may run on it.
	runtime.LockOSThread()
	// The sealed program has only a number for a name.
	name := []byte("podd-shim\x00")
	_ = unix.Prctl(unix.PR_SET_NAME, uintptr(unsafe.Pointer(&name[0])), 0, 0, 0)
	done := make(chan error, 1)
	go func() { done <- run() }()
	if err := <-done; err != nil {
		fmt.Fprintln(os.Stderr, "podd-shim:", err)
		if errdefs.IsAlreadyExists(err) {
			os.Exit(shim.AlreadyRuns)
		}
		os.Exit(1)
	}
}

func run() error {
	runDir := flag.String("run-dir", "/run/podd", "podd's `directory` of sockets and runtime state")
	stderr := flag.Bool("log-stderr", false, "log to standard error instead of RUN-DIR/shim/shim.log")
	flag.Parse()
	if flag.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q", flag.Arg(0))
	}
	pause, err := embedded.ReadFile("embed/pause")
	if err != nil {
		return fmt.Errorf("built without pause, use cmd/podd-shim/build.sh: %w", err)
	}
	enter, err := embedded.ReadFile("embed/enter")
	if err != nil {
		return fmt.Errorf("built without enter, use cmd/podd-shim/build.sh: %w", err)
	}
	return server.Main(server.Options{RunDir: *runDir, Pause: pause, Enter: enter, LogToStderr: *stderr})
}
