package volumes

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"
)

// A filesystem that another machine or a user's process serves can stop
// answering at any system call, and then the calling thread sleeps until it
// answers or the process is killed. So nothing in the daemon touches one: this
// program runs itself again for each operation, waits with a deadline, and
// kills it.

// helperName is the name (argv[0]) under which the program is a helper.
const helperName = "podd-volume-helper"

// Operations of a helper.
const (
	opHostPath = "hostPath" // check (or make) Path of Type
	opMountNFS = "nfs"      // mount Source on Path
	opUnmount  = "unmount"  // unmount Path with Flags
	opSubPath  = "subPath"  // bind SubPath of Path on Target
)

// request is what a helper is to do, response what came of it.
type request struct {
	Op       string
	Path     string
	Type     string `json:",omitempty"`
	Server   string `json:",omitempty"`
	Source   string `json:",omitempty"`
	SubPath  string `json:",omitempty"`
	Target   string `json:",omitempty"`
	Flags    int    `json:",omitempty"`
	ReadOnly bool   `json:",omitempty"`
}

type response struct {
	Error string `json:",omitempty"`
	// Class is the kind of the error, to be told again on this side.
	Class string `json:",omitempty"`
}

var classes = map[string]error{
	"not found":           errdefs.ErrNotFound,
	"invalid argument":    errdefs.ErrInvalidArgument,
	"failed precondition": errdefs.ErrFailedPrecondition,
	"unavailable":         errdefs.ErrUnavailable,
}

// HelperMain makes this process a helper if it was started as one, and then
// does not return. Every program that uses the package calls it first in main.
func HelperMain() {
	if len(os.Args) == 0 || os.Args[0] != helperName {
		return
	}
	var req request
	var res response
	err := json.NewDecoder(io.LimitReader(os.Stdin, 1<<20)).Decode(&req)
	if err == nil {
		err = req.do()
	}
	if err != nil {
		res.Error = err.Error()
		for class, sentinel := range classes {
			if errors.Is(err, sentinel) {
				res.Class = class
			}
		}
	}
	if json.NewEncoder(os.Stdout).Encode(res) != nil {
		os.Exit(1)
	}
	os.Exit(0)
}

func (r request) do() error {
	switch r.Op {
	case opHostPath:
		return checkHostPath(r.Path, v1.HostPathType(r.Type))
	case opMountNFS:
		return mountNFS(r.Server, r.Source, r.Path, r.ReadOnly)
	case opUnmount:
		if err := unix.Unmount(r.Path, r.Flags); err != nil {
			return &os.PathError{Op: "unmount", Path: r.Path, Err: err}
		}
		return nil
	case opSubPath:
		root, err := openVolume(r.Path)
		if err != nil {
			return err
		}
		defer root.close()
		return bindSubPath(root, r.SubPath, r.Target)
	}
	return fmt.Errorf("operation %q: %w", r.Op, errdefs.ErrInvalidArgument)
}

// helper runs one operation in a process of its own, for at most limit.
func (v *Volumes) helper(ctx context.Context, limit time.Duration, req request) error {
	in, err := json.Marshal(req)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	cmd := exec.Command(v.cfg.Helper)
	cmd.Args = []string{helperName}
	cmd.Env = []string{"GOMAXPROCS=1", "GOGC=off"}
	cmd.Dir = "/"
	var out, errOut bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(in), &out, &errOut
	// The pipes close when the process is gone, or soon after it was killed even
	// if it is not.
	cmd.WaitDelay = time.Second
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("volume helper %s: %w", v.cfg.Helper, err)
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	select {
	case err = <-done:
	case <-ctx.Done():
		cmd.Process.Kill()
		// A process in an uninterruptible sleep outlives its kill. It is left
		// to itself; the goroutine above collects it when it ends.
		select {
		case <-done:
		case <-time.After(2 * time.Second):
		}
		return fmt.Errorf("%s: no answer within %v: %w", req.Path, limit, errdefs.ErrUnavailable)
	}
	var res response
	if jsonErr := json.Unmarshal(out.Bytes(), &res); jsonErr != nil {
		return fmt.Errorf("volume helper: %w: %s", errors.Join(err, jsonErr), bytes.TrimSpace(errOut.Bytes()))
	}
	if res.Error == "" {
		return nil
	}
	if sentinel, ok := classes[res.Class]; ok {
		return helperError{res.Error, sentinel}
	}
	return errors.New(res.Error)
}

// helperError is an error from the other side.
type helperError struct {
	message  string
	sentinel error
}

func (e helperError) Error() string { return e.message }
func (e helperError) Unwrap() error { return e.sentinel }

// unmountForeign takes a foreign mount away: politely, by force, lazily; lazily
// at once when the others were tried before.
func (v *Volumes) unmountForeign(ctx context.Context, m mountEntry, lazily bool) error {
	var errs []error
	for _, flags := range []int{0, unix.MNT_FORCE, unix.MNT_FORCE | unix.MNT_DETACH} {
		if lazily && flags&unix.MNT_DETACH == 0 {
			continue
		}
		err := v.helper(ctx, unmountTimeout, request{Op: opUnmount, Path: m.point, Flags: flags | unix.UMOUNT_NOFOLLOW})
		if err == nil {
			return nil
		}
		errs = append(errs, err)
		if ctx.Err() != nil {
			break
		}
	}
	return fmt.Errorf("unmount %s (%s of %s): %w", m.point, m.fstype, m.source, errors.Join(errs...))
}
