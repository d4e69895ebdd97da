// Command podd is the node agent. `podd run` is the daemon and `podd preflight`
// looks at the host before it; every other verb is podd-cli's, a program of its own beside this one because it links kubectl,
// which the daemon's memory would pay for.
package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"github.com/podd-runtime/podd/volumes"
)

// version is stamped by the build.
var version = "unknown"

func main() {
	volumes.HelperMain() // does not return when this process is a helper for a foreign file system
	if len(os.Args) > 1 && os.Args[1] == "run" {
		// A goroutine that ends while locked to its thread takes the thread
		// and the namespaces that it entered with it, unless it is the main
		// thread, which never ends: so nothing else may run on that one.
		runtime.LockOSThread()
		self, err := os.Executable() // before an upgrade replaces it
		status := make(chan int)
		go func() { status <- runDaemon(os.Args[2:]) }()
		code := <-status
		if code == again {
			// The same process, so that whoever watches it sees none end.
			signal.Ignore(syscall.SIGHUP) // until the next program listens
			if err == nil {
				err = syscall.Exec(self, os.Args, os.Environ())
			}
			fmt.Fprintln(os.Stderr, "podd run: execute", self, "again:", err)
			code = 1
		}
		os.Exit(code)
	}
	if len(os.Args) > 1 && os.Args[1] == "preflight" {
		os.Exit(runPreflight(os.Args[2:]))
	}
	if err := execClient(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "podd:", err)
		os.Exit(1)
	}
}

// execClient becomes podd-cli.
func execClient(args []string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	here := filepath.Dir(self)
	tried := []string{
		filepath.Join(here, "podd-cli"),
		filepath.Join(here, "..", "lib", "podd", "podd-cli"),
		"/usr/lib/podd/podd-cli",
	}
	for _, path := range tried {
		err := syscall.Exec(path, append([]string{"podd"}, args...), os.Environ())
		if !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("execute %s: %w", path, err)
		}
	}
	return fmt.Errorf("podd-cli is in none of %s: install it beside podd (make build leaves both in bin/)", strings.Join(tried, ", "))
}
