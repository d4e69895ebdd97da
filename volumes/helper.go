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
	opBind     = "bind"     // bind the directory Path on Target
	opGroup    = "group"    // give Path and all below to Group by Policy
	opStatfs   = "statfs"   // Path's filesystem: how full it is
	opResolve  = "resolve"  // where Path's links lead; made if it is missing
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
	Group    int    `json:",omitempty"`
	Policy   string `json:",omitempty"`
	// Options are mount options as in fstab(5), one an element.
	Options []string `json:",omitempty"`
}

type response struct {
	Error string `json:",omitempty"`
	// Class is the kind of the error, to be told again on this side.
	Class string `json:",omitempty"`
	// Path and Usage are what was asked for.
	Path  string   `json:",omitempty"`
	Usage *fsUsage `json:",omitempty"`
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
		err = req.answer(&res)
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

// answer does the request and fills in what was asked for.
func (r request) answer(res *response) (err error) {
	switch r.Op {
	case opStatfs:
		res.Usage, err = statfs(r.Path)
	case opResolve:
		res.Path, err = resolve(r.Path)
	default:
		err = r.do()
	}
	return err
}

func (r request) do() error {
	switch r.Op {
	case opHostPath:
		return checkHostPath(r.Path, v1.HostPathType(r.Type))
	case opMountNFS:
		return mountNFS(r)
	case opUnmount:
		// The mount table's paths have no links; what a container puts into one
		// meanwhile leads nowhere.
		return unmountPoint(unix.AT_FDCWD, r.Path, r.Flags)
	case opSubPath:
		root, err := openVolume(r.Path)
		if err != nil {
			return err
		}
		defer root.close()
		return bindSubPath(root, r.SubPath, r.Target)
	case opBind:
		return bindDirectory(r.Path, r.Target)
	case opGroup:
		root, err := openDir(r.Path)
		if err != nil {
			return err
		}
		defer root.close()
		return applyGroup(context.Background(), root, r.Group, v1.PodFSGroupChangePolicy(r.Policy))
	}
	return fmt.Errorf("operation %q: %w", r.Op, errdefs.ErrInvalidArgument)
}

// helper runs one operation in a process of its own, for at most limit.
func (v *Volumes) helper(ctx context.Context, limit time.Duration, req request) error {
	_, err := v.ask(ctx, limit, req)
	return err
}

// ask is helper for operations that have an answer.
func (v *Volumes) ask(ctx context.Context, limit time.Duration, req request) (*response, error) {
	return v.run(ctx, limit, req, func() {})
}

// run is ask, and calls ended when the process is gone: that may be long after
// its time was over.
func (v *Volumes) run(ctx context.Context, limit time.Duration, req request, ended func()) (*response, error) {
	in, err := json.Marshal(req)
	if err != nil {
		ended()
		return nil, err
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
		ended()
		return nil, fmt.Errorf("volume helper %s: %w", v.cfg.Helper, err)
	}
	done := make(chan error, 1)
	go func() {
		err := cmd.Wait()
		ended()
		done <- err
	}()
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
		return nil, fmt.Errorf("%s: no answer within %v: %w", req.Path, limit, errdefs.ErrUnavailable)
	}
	var res response
	if jsonErr := json.Unmarshal(out.Bytes(), &res); jsonErr != nil {
		return nil, fmt.Errorf("volume helper: %w: %s", errors.Join(err, jsonErr), bytes.TrimSpace(errOut.Bytes()))
	}
	if res.Error == "" {
		return &res, nil
	}
	if sentinel, ok := classes[res.Class]; ok {
		return nil, helperError{res.Error, sentinel}
	}
	return nil, errors.New(res.Error)
}

// helperError is an error from the other side.
type helperError struct {
	message  string
	sentinel error
}

func (e helperError) Error() string { return e.message }
func (e helperError) Unwrap() error { return e.sentinel }

// unmountForeign takes a foreign mount away: politely, by force, lazily. It
// begins with force where the filesystem is known not to answer, and lazily when
// the others were tried before.
func (v *Volumes) unmountForeign(ctx context.Context, m mountEntry, lazily bool) error {
	ways := []int{0, unix.MNT_FORCE, unix.MNT_FORCE | unix.MNT_DETACH}
	switch {
	case lazily:
		ways = ways[2:]
	case v.isSilent(m.device):
		ways = ways[1:]
	}
	var errs []error
	for _, flags := range ways {
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
