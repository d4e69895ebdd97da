// Package isolated runs a package's tests in network, IPC and mount namespaces
// of their own: suites of other projects want fixed ports, an address and a
// default route, and leave shared memory segments and mounts.
package isolated

import (
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"syscall"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	insideEnv     = "PODD_TEST_INSIDE"
	unpreparedEnv = "PODD_TEST_UNPREPARED"
)

// NodeIP is an address of the network namespace; the default route behind it
// leads nowhere.
const (
	NodeIP  = "10.98.0.1"
	gateway = "10.98.0.2"
)

// Run runs the tests inside, and returns their exit status. What has to be
// fetched (there is no network inside) prepare fetches before.
func Run(run func() int, prepare func() error) int {
	if os.Getuid() != 0 {
		return run() // and each test says that it needs root
	}
	if os.Getenv(insideEnv) == "" {
		flag.Parse()
		cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
		cmd.Args[0] = os.Args[0]
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
		cmd.Env = append(os.Environ(), insideEnv+"=1")
		if err := prepare(); err != nil {
			cmd.Env = append(cmd.Env, unpreparedEnv+"="+err.Error())
		}
		runtime.LockOSThread() // whose end would be taken for ours
		cmd.SysProcAttr = &syscall.SysProcAttr{
			Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWIPC | unix.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL,
		}
		err := cmd.Run()
		var exit *exec.ExitError
		switch {
		case errors.As(err, &exit):
			return max(exit.ExitCode(), 1)
		case err != nil:
			fmt.Fprintln(os.Stderr, "namespaces of the tests:", err)
			return 1
		}
		return 0
	}
	if err := furnish(); err != nil {
		fmt.Fprintln(os.Stderr, "namespaces of the tests:", err)
		return 1
	}
	return run()
}

// Prepared is nil, or says why prepare failed.
func Prepared() error {
	if msg := os.Getenv(unpreparedEnv); msg != "" {
		return errors.New(msg)
	}
	return nil
}

func furnish() error {
	// Mounts travel among the processes here, as on a machine with systemd, never out.
	for _, flag := range []uintptr{unix.MS_PRIVATE, unix.MS_SHARED} {
		if err := unix.Mount("", "/", "", unix.MS_REC|flag, ""); err != nil {
			return fmt.Errorf("propagation of /: %w", err)
		}
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return err
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "uplink"
	up := &netlink.Bridge{LinkAttrs: attrs}
	if err := netlink.LinkAdd(up); err != nil {
		return fmt.Errorf("add link: %w", err)
	}
	addr, err := netlink.ParseAddr(NodeIP + "/24")
	if err != nil {
		return err
	}
	if err := netlink.AddrAdd(up, addr); err != nil {
		return err
	}
	if err := netlink.LinkSetUp(up); err != nil {
		return err
	}
	return netlink.RouteAdd(&netlink.Route{LinkIndex: up.Index, Gw: net.ParseIP(gateway)})
}
