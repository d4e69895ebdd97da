package systemd

import (
	"errors"
	"fmt"
	"net"
	"os"

	"github.com/containerd/errdefs"
	"github.com/coreos/go-systemd/v22/activation"
	"golang.org/x/sys/unix"
)

// Passed are the descriptors that this process was started with
// (sd_listen_fds(3)): by systemd, or by whoever keeps to its protocol.
type Passed struct{ files []*os.File }

// Activation takes the descriptors passed to this process; to be called once.
// The environment keeps telling of them, for a program executed in its place.
func Activation() *Passed { return &Passed{activation.Files(false)} }

// Listener returns the socket that was passed under that name
// (FileDescriptorName=), nil when there is none. Closing it leaves the one that
// was passed open.
func (p *Passed) Listener(name string) (net.Listener, error) {
	for _, f := range p.files {
		if f.Name() != name {
			continue
		}
		l, err := net.FileListener(f)
		if err != nil {
			return nil, fmt.Errorf("passed descriptor %q is no listening socket: %w: %w", name, err, errdefs.ErrInvalidArgument)
		}
		return l, nil
	}
	return nil, nil
}

// Keep makes the descriptors stay open for a program that this process executes
// in its own place.
func (p *Passed) Keep() error {
	var errs []error
	for _, f := range p.files {
		if _, err := unix.FcntlInt(f.Fd(), unix.F_SETFD, 0); err != nil {
			errs = append(errs, fmt.Errorf("keep descriptor %q: %w", f.Name(), err))
		}
	}
	return errors.Join(errs...)
}
