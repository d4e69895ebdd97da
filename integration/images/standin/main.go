// Command standin is what critest's images hold besides busybox: servers that
// look like nginx and httpd where a spec looks, and the tools that Debian's
// static busybox lacks. It does what the name that it is run by says.
package main

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

func main() {
	if err := run(os.Args); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(args []string) error {
	name, _, _ := strings.Cut(filepath.Base(args[0]), ":")
	switch name {
	case "nginx", "httpd":
		return serve(name, args[0])
	case "pgrep":
		return pgrep(args[1:])
	case "ipcs":
		return ipcs()
	case "nmeter": // nmeter -d0 %3t, of which one line is read
		fmt.Println(time.Now().UTC().Format("15:04:05.000"))
		return nil
	case "pause":
		stop := make(chan os.Signal, 1)
		signal.Notify(stop, syscall.SIGTERM, syscall.SIGINT)
		<-stop
		return nil
	case "nonewprivs", "nnp":
		// Set-uid root: run by somebody else, it tells whether that counted.
		fmt.Printf("Effective uid: %d\n", os.Geteuid())
		return nil
	}
	return fmt.Errorf("%s: unknown name", args[0])
}

const (
	portEnv   = "PORT"
	masterEnv = "STANDIN_MASTER"
)

// serve answers on $PORT under the process title of the real one's master.
func serve(name, title string) error {
	if os.Getenv(masterEnv) == "" {
		self, err := os.Executable()
		if err != nil {
			return err
		}
		return syscall.Exec(self, []string{name + ": master process " + title}, append(os.Environ(), masterEnv+"=1"))
	}
	if err := os.MkdirAll("/var/run", 0o755); err != nil {
		return err
	}
	if err := os.WriteFile("/var/run/"+name+".pid", fmt.Appendln(nil, os.Getpid()), 0o644); err != nil {
		return err
	}
	fmt.Fprintf(os.Stderr, "[core:notice] AH00094: Command line: '%s -D FOREGROUND'\n", name)
	srv := &http.Server{Addr: ":" + os.Getenv(portEnv), Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		io.WriteString(w, "<!doctype html><title>It works</title>\n")
	})}
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGWINCH)
	go func() {
		<-stop
		srv.Close()
	}()
	if err := srv.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// pgrep prints the processes whose name holds the word; without any it exits
// with 1, as procps' does.
func pgrep(args []string) error {
	if len(args) != 1 {
		return errors.New("usage: pgrep WORD")
	}
	found := false
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return err
	}
	for _, dir := range dirs {
		pid := filepath.Base(dir)
		b, err := os.ReadFile(dir + "/comm")
		if err != nil || pid == fmt.Sprint(os.Getpid()) || !strings.Contains(string(b), args[0]) {
			continue // gone meanwhile, or another one
		}
		fmt.Println(pid)
		found = true
	}
	if !found {
		os.Exit(1)
	}
	return nil
}

// ipcs lists the shared memory segments of its IPC namespace.
func ipcs() error {
	b, err := os.ReadFile("/proc/sysvipc/shm") // proc_sysvipc(5): key shmid perms size …
	if err != nil {
		return err
	}
	fmt.Printf("\n------ Shared Memory Segments --------\n%-10s %-10s %-10s %-10s\n", "key", "shmid", "perms", "bytes")
	for i, line := range strings.Split(string(b), "\n") {
		if f := strings.Fields(line); i > 0 && len(f) > 3 {
			fmt.Printf("%-10s %-10s %-10s %-10s\n", f[0], f[1], f[2], f[3])
		}
	}
	return nil
}
