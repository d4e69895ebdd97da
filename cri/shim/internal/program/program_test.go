package program

import (
	"os"
	"os/exec"
	"testing"

	"golang.org/x/sys/unix"
)

// Whatever descriptors a process has open and hands on, the program is the one
// that runs.
func TestManyDescriptors(t *testing.T) {
	data, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Skip("needs busybox-static")
	}
	p, err := New("busybox", data)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	for range 100 {
		// One file more than before is open, and the last ones are handed on.
		low, err := os.Open(os.DevNull)
		if err != nil {
			t.Fatal(err)
		}
		defer low.Close()
		fd, err := unix.FcntlInt(low.Fd(), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		last := os.NewFile(uintptr(fd), "last")
		defer last.Close()
		files := []*os.File{null, null, null, low, last, null, low, null}
		numbers := make([]uintptr, len(files))
		for i, f := range files {
			numbers[i] = f.Fd()
		}
		prog, err := p.Descriptor(numbers...)
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.Cmd{Path: Path(prog), Args: []string{"true"}, Stdin: null, Stdout: null, Stderr: null, ExtraFiles: files[3:]}
		err = cmd.Run()
		unix.Close(prog)
		if err != nil {
			t.Fatalf("with %d as the last descriptor: %v", fd, err)
		}
	}
}
