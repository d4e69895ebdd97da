package systemd

import (
	"bytes"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
)

const activated = "PODD_TEST_ACTIVATED"

func TestMain(m *testing.M) {
	switch os.Getenv(activated) {
	case "":
		os.Exit(m.Run())
	case "once":
		// As a reload does: the next program finds what this one was given.
		p := Activation()
		if l, err := p.Listener("cri"); err != nil || l == nil || l.Close() != nil {
			os.Exit(3)
		}
		if err := p.Keep(); err != nil {
			os.Exit(4)
		}
		os.Setenv(activated, "twice")
		self, err := os.Executable()
		if err == nil {
			err = syscall.Exec(self, os.Args, os.Environ())
		}
		println(err.Error())
		os.Exit(9)
	case "twice":
		p := Activation()
		none, err := p.Listener("other")
		if none != nil || err != nil {
			os.Exit(5)
		}
		if _, err := p.Listener("file"); err == nil {
			os.Exit(6) // it is no socket
		}
		l, err := p.Listener("cri")
		if err != nil || l == nil {
			os.Exit(7)
		}
		c, err := l.Accept()
		if err != nil {
			os.Exit(8)
		}
		c.Write([]byte("hello"))
		c.Close()
	}
}

// TestActivation: a socket that is passed is found by its name, also by the
// program that a reload executes, and a client that came first is answered.
func TestActivation(t *testing.T) {
	path := filepath.Join(t.TempDir(), "socket")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	socket, err := l.File()
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	file, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	client, err := net.Dial("unix", path) // before anybody accepts
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	// LISTEN_PID is that of the process that the shell becomes.
	cmd := exec.Command("/bin/sh", "-c", `LISTEN_PID=$$ exec "$0"`, self)
	cmd.Env = append(os.Environ(), activated+"=once", "LISTEN_FDS=2", "LISTEN_FDNAMES=file:cri")
	cmd.ExtraFiles = []*os.File{file, socket}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		t.Fatalf("%v\n%s", err, out.String())
	}
	buf := make([]byte, 16)
	if n, err := client.Read(buf); err != nil || string(buf[:n]) != "hello" {
		t.Errorf("read %q, %v", buf[:n], err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Errorf("the socket was removed: %v", err)
	}
}

func TestNothingPassed(t *testing.T) {
	t.Setenv("LISTEN_PID", "1") // another's
	t.Setenv("LISTEN_FDS", "1")
	if l, err := Activation().Listener("cri"); l != nil || err != nil {
		t.Errorf("%v, %v", l, err)
	}
}
