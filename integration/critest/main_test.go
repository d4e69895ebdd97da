// Package critest runs programs of other projects against bin/podd's CRI
// socket: critest of cri-tools, crictl, and upstream's kubelet.
package critest

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	gcr "github.com/google/go-containerregistry/pkg/v1"

	"github.com/podd-runtime/podd/integration/images"
	"github.com/podd-runtime/podd/integration/node"
)

func TestMain(m *testing.M) {
	if os.Getenv("PODD_TEST_BIN") == "" {
		os.Setenv("PODD_TEST_BIN", fromRoot("bin"))
	}
	node.Main(func() int { return isolated(m.Run) })
}

// fromRoot is a path in the checkout; tests run in this folder.
func fromRoot(parts ...string) string {
	p, err := filepath.Abs(filepath.Join(append([]string{"../.."}, parts...)...))
	if err != nil {
		panic(err)
	}
	return p
}

// full says whether the long form was asked for: peers that take minutes to
// build, and critest's specs one by one, three times.
func full() bool { return os.Getenv("PODD_TEST_ALL") != "" }

const (
	insideEnv     = "PODD_TEST_INSIDE"
	unpreparedEnv = "PODD_TEST_UNPREPARED"
)

// isolated runs the tests in network, IPC and mount namespaces of their own:
// critest wants fixed ports and leaves shared memory segments, upstream's
// kubelet wants an address and a default route. What comes from Debian's archive
// and from the module proxy is fetched before.
func isolated(run func() int) int {
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

// prepare fetches and builds what the tests run and what the images hold, or
// finds it done by an earlier run.
func prepare() error {
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Minute)
	defer cancel()
	all, err := builder().Critest(ctx)
	if err != nil {
		return err
	}
	digest, err := all[images.CritestPinned].Digest()
	if err != nil {
		return err
	}
	names := []string{"critest", "ginkgo"}
	if full() {
		names = append(names, "crictl", "kubelet", "containerd", "runc", "cni")
	}
	cmd := exec.CommandContext(ctx, fromRoot("integration", "peer", "build.sh"), append([]string{peers()}, names...)...)
	cmd.Env = append(os.Environ(), "CRITEST_PINNED="+digest.String())
	cmd.WaitDelay = 5 * time.Second
	began := time.Now()
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build %s: %w\n%s", strings.Join(names, ", "), err, out)
	}
	if took := time.Since(began); took > 5*time.Second {
		fmt.Printf("%s built in %.0f s\n", strings.Join(names, ", "), took.Seconds())
	}
	return nil
}

// prepared fails the test when the programs that it runs could not be had.
func prepared(t *testing.T) {
	t.Helper()
	if msg := os.Getenv(unpreparedEnv); msg != "" {
		t.Fatal(msg)
	}
}

// nodeIP is an address of the network namespace; the route behind it leads nowhere.
const (
	nodeIP  = "10.98.0.1"
	gateway = "10.98.0.2"
)

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
	addr, err := netlink.ParseAddr(nodeIP + "/24")
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

// peers is the directory of other projects' programs.
func peers() string {
	if dir := os.Getenv("PODD_TEST_PEERS"); dir != "" {
		return dir
	}
	return fromRoot(".cache", "peers")
}

func builder() *images.Builder {
	dir := os.Getenv("PODD_TEST_CACHE")
	if dir == "" {
		dir = fromRoot(".cache", "images")
	}
	return &images.Builder{Dir: dir}
}

// serve starts a registry with the images by repository:tag.
func serve(t *testing.T, all map[string]gcr.Image) *images.Registry {
	t.Helper()
	r, err := images.Serve("127.0.0.1:0", "", "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	for name, img := range all {
		if _, err := r.Push(t.Context(), name, img); err != nil {
			t.Fatal(err)
		}
	}
	return r
}

// socket is where the node serves the CRI.
func socket(n *node.Node) string { return "unix://" + filepath.Join(n.RunDir(), "podd.sock") }
