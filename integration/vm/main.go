// Command vm is a stock Debian 12 machine in QEMU, as users have it: systemd is
// PID 1, cgroup v2, AppArmor, kernel 6.1, all capabilities. Software emulation:
// no /dev/kvm is needed, everything takes about ten times as long.
//
//	vm build                    makes the machine's disk, once for each recipe; run as root:
//	                            in podd/vm of the user's cache directory, for all checkouts
//	vm test PAYLOAD [RESULTS]   boots it, runs PAYLOAD/run as root with PAYLOAD as
//	                            /payload, and exits with its status
//	vm attach                   a root shell on one that runs a test, on this terminal
//	vm shell [PAYLOAD]          boots it with a root shell on this terminal
//
// What run writes to /payload/out is brought back to RESULTS, with journal.txt
// and a console for each boot. The machine's own disk is as new for every test,
// and lasts through the reboots of one. It has no network.
//
// A run that wants the machine booted again makes /payload/rebooting and
// reboots; one that wants its power cut prints the line "vm: cut the power".
// Either way run is started once more at the next boot.
//
// Exit status: run's; 69 (EX_UNAVAILABLE of sysexits.h) when there can be no
// such machine here, 124 when the deadline ended it, 125 when it went down
// without a result.
package main

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	unavailable = 69
	late        = 124
	noResult    = 125
	mostBoots   = 10
	// powerCut is a line of the payload's output; see the package's comment.
	powerCut = "vm: cut the power"
	// shellSocket is the fourth serial line of a machine that runs a test.
	shellSocket = "shell"
)

type machine struct {
	recipe string // directory of this command
	cache  string // of this checkout
	built  string // of machines, for all checkouts
	memory int    // MiB
}

func main() {
	var m machine
	flag.StringVar(&m.recipe, "recipe", "integration/vm", "directory of the machine's recipe")
	flag.StringVar(&m.cache, "cache", ".cache/vm", "directory of what a run makes and brings back")
	flag.StringVar(&m.built, "machines", machines(), "directory that keeps machines' disks")
	flag.IntVar(&m.memory, "memory", 4096, "the machine's memory in MiB")
	deadline := flag.Duration("deadline", 30*time.Minute, "ends a test that takes longer")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	status, err := 0, error(nil)
	switch args := flag.Args(); {
	case len(args) == 1 && args[0] == "build":
		_, err = m.build(ctx)
	case len(args) == 2 && args[0] == "test":
		status, err = m.test(ctx, *deadline, args[1], filepath.Join(m.cache, "results"))
	case len(args) == 3 && args[0] == "test":
		status, err = m.test(ctx, *deadline, args[1], args[2])
	case len(args) == 1 && args[0] == "attach":
		err = m.attach(ctx)
	case len(args) == 1 && args[0] == "shell":
		err = m.shell(ctx, "")
	case len(args) == 2 && args[0] == "shell":
		err = m.shell(ctx, args[1])
	default:
		fmt.Fprintln(os.Stderr, "usage: vm [flags] build | test PAYLOAD [RESULTS] | attach | shell [PAYLOAD]")
		flag.PrintDefaults()
		os.Exit(2)
	}
	var missing unavailableError
	if errors.As(err, &missing) {
		status = unavailable
	} else if err != nil && status == 0 {
		status = 1
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "vm:", err)
	}
	os.Exit(status)
}

// machines is where machines are kept unless it is said: a machine depends on its
// recipe alone, so a new checkout need not build it again.
func machines() string {
	if dir, err := os.UserCacheDir(); err == nil {
		return filepath.Join(dir, "podd", "vm")
	}
	return ".cache/vm/machines"
}

// unavailableError says why there can be no test machine on this one.
type unavailableError struct{ error }

// build returns the directory of the machine's disk, kernel and initrd, and
// makes it if the recipe has not been made before.
func (m machine) build(ctx context.Context) (string, error) {
	h := sha256.New()
	files, err := filepath.Glob(filepath.Join(m.recipe, "guest", "*"))
	if err != nil {
		return "", err
	}
	for _, f := range append(files, filepath.Join(m.recipe, "build")) {
		b, err := os.ReadFile(f)
		if err != nil {
			return "", fmt.Errorf("the machine's recipe: %w", err)
		}
		h.Write(b)
	}
	if err := run(ctx, os.Stderr, filepath.Join(m.recipe, "../../.ci/deps"), "qemu-system-x86", "qemu-utils", "mmdebstrap", "e2fsprogs"); err != nil {
		return "", unavailableError{fmt.Errorf("install QEMU: %w", err)}
	}
	if err := run(ctx, io.Discard, "qemu-system-x86_64", "--version"); err != nil {
		return "", unavailableError{fmt.Errorf("QEMU does not start: %w", err)}
	}
	if err := errors.Join(os.MkdirAll(m.cache, 0o755), os.MkdirAll(m.built, 0o755)); err != nil {
		return "", err
	}
	// Two that want the same machine make it once.
	lock, err := os.OpenFile(filepath.Join(m.built, "lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return "", err
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return "", err
	}
	dir := filepath.Join(m.built, hex.EncodeToString(h.Sum(nil))[:16])
	now := time.Now()
	if err := os.Chtimes(dir, now, now); err == nil {
		return dir, nil
	}
	if err := m.removeUnused(now.Add(-unused)); err != nil {
		return "", err
	}
	fmt.Fprintln(os.Stderr, "==> build the test machine (once, about two minutes)")
	begin := time.Now()
	tmp := dir + ".tmp"
	if err := errors.Join(os.RemoveAll(tmp), os.Mkdir(tmp, 0o755)); err != nil {
		return "", err
	}
	name := filepath.Join(m.cache, "build.log")
	log, err := os.Create(name)
	if err != nil {
		return "", err
	}
	defer log.Close()
	if err := run(ctx, log, filepath.Join(m.recipe, "build"), tmp); err != nil {
		b, _ := os.ReadFile(name)
		lines := strings.Split(strings.TrimSpace(string(b)), "\n")
		return "", unavailableError{fmt.Errorf("the machine was not built: %w; %s ends:\n%s", err, name, strings.Join(lines[max(0, len(lines)-15):], "\n"))}
	}
	fmt.Fprintf(os.Stderr, "==> built in %.0f s\n", time.Since(begin).Seconds())
	return dir, os.Rename(tmp, dir)
}

// unused machines of other recipes are removed after that long: each takes a
// gigabyte.
const unused = 14 * 24 * time.Hour

func (m machine) removeUnused(before time.Time) error {
	entries, err := os.ReadDir(m.built)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if fi, err := e.Info(); err == nil && e.IsDir() && fi.ModTime().Before(before) {
			if err := os.RemoveAll(filepath.Join(m.built, e.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}

// run runs a program to its end, or ctx's.
func run(ctx context.Context, out io.Writer, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s: %w", filepath.Base(name), err)
	}
	return nil
}

// disks are those of one test.
type disks struct{ work, root, payload string }

// disks makes a directory with a disk over the machine's, and one with the
// payload's files and room for results.
func (m machine) disks(ctx context.Context, base, payload string) (d disks, err error) {
	if d.work, err = os.MkdirTemp(m.cache, "run."); err != nil {
		return d, err
	}
	if payload == "" {
		payload = filepath.Join(d.work, "empty")
		if err := os.Mkdir(payload, 0o755); err != nil {
			return d, err
		}
	}
	boot, err := os.ReadFile(filepath.Join(m.recipe, "boot"))
	if err != nil {
		return d, err
	}
	if err := os.WriteFile(filepath.Join(payload, "boot"), boot, 0o755); err != nil {
		return d, err
	}
	disk, err := filepath.Abs(filepath.Join(base, "disk.img"))
	if err != nil {
		return d, err
	}
	d.root, d.payload = filepath.Join(d.work, "root.qcow2"), filepath.Join(d.work, "payload.img")
	if err := run(ctx, os.Stderr, "qemu-img", "create", "-q", "-f", "qcow2", "-b", disk, "-F", "raw", d.root); err != nil {
		return d, err
	}
	size := int64(512 << 20)
	err = filepath.Walk(payload, func(_ string, fi os.FileInfo, err error) error {
		if err == nil {
			size += fi.Size()*5/4 + 4096
		}
		return err
	})
	if err != nil {
		return d, err
	}
	return d, run(ctx, os.Stderr, "/sbin/mkfs.ext4", "-q", "-E", "lazy_itable_init=1,root_owner=0:0", "-d", payload, d.payload, fmt.Sprint(size>>20)+"M")
}

// qemu is a machine that is not started yet. The root disk obeys the guest's
// flushes, and nothing is kept by QEMU itself that was flushed: killing QEMU
// is then what a power cut is to a disk with a cache. cache=unsafe would keep
// the overlay's own tables in QEMU, and lose what the guest had synced.
func (m machine) qemu(ctx context.Context, base string, d disks, cmdline string, args ...string) *exec.Cmd {
	// On a busy host a boot takes minutes: no time-out of systemd's own ends it.
	cmdline += " systemd.default_timeout_start_sec=1200"
	args = append([]string{
		"-accel", "tcg,thread=multi,tb-size=1024", "-cpu", "max", "-m", strconv.Itoa(m.memory), "-smp", "2",
		"-display", "none", "-no-reboot", "-nic", "none",
		"-kernel", filepath.Join(base, "vmlinuz"), "-initrd", filepath.Join(base, "initrd.img"),
		"-append", "console=ttyS0 root=/dev/vda rw panic=-1 quiet " + cmdline,
		"-drive", "file=" + d.root + ",if=virtio,format=qcow2,cache=writeback",
		"-drive", "file=" + d.payload + ",if=virtio,format=raw,cache=writeback",
	}, args...)
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", args...)
	cmd.Stderr = os.Stderr
	// Not left behind, whatever ends this program.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return cmd
}

// test boots the machine until the payload has a status.
func (m machine) test(ctx context.Context, deadline time.Duration, payload, results string) (status int, err error) {
	if fi, err := os.Stat(filepath.Join(payload, "run")); err != nil || fi.Mode()&0o111 == 0 {
		return 0, fmt.Errorf("%s/run is missing or cannot be executed", payload)
	}
	base, err := m.build(ctx)
	if err != nil {
		return 0, err
	}
	if err := errors.Join(os.RemoveAll(results), os.MkdirAll(results, 0o755)); err != nil {
		return 0, err
	}
	d, err := m.disks(ctx, base, payload)
	defer os.RemoveAll(d.work)
	if err != nil {
		return 0, err
	}
	begin := time.Now()
	ctx, cancel := context.WithTimeout(ctx, deadline)
	defer cancel()
	var peak int64 // KiB
	journals := []string{}
	for boot := 1; ; boot++ {
		journals = append(journals, filepath.Join(d.work, fmt.Sprintf("journal-%d", boot)))
		cut, rss, err := m.boot(ctx, base, d, filepath.Join(results, fmt.Sprintf("console-%d.txt", boot)), journals[boot-1])
		peak = max(peak, rss)
		// Brought back whatever happened, with a context of its own.
		again, got, berr := bringBack(context.WithoutCancel(ctx), d, results, journals)
		switch {
		case ctx.Err() != nil:
			return late, fmt.Errorf("ended after %.0f s; journal and console in %s", time.Since(begin).Seconds(), results)
		case err != nil || berr != nil:
			return noResult, errors.Join(err, berr)
		case got != "":
			if status, err = strconv.Atoi(got); err != nil {
				return noResult, fmt.Errorf("the payload's status is %q", got)
			}
			fmt.Fprintf(os.Stderr, "vm: status %d after %.0f s and %d boots, QEMU's peak memory %d MiB; journal and consoles in %s\n",
				status, time.Since(begin).Seconds(), boot, peak>>10, results)
			return status, nil
		case boot == mostBoots:
			return noResult, fmt.Errorf("no end after %d boots; see %s", boot, results)
		case !cut && !again:
			return noResult, fmt.Errorf("the machine went down without a result; see %s", results)
		}
		fmt.Fprintf(os.Stderr, "vm: boot %d after %.0f s\n", boot+1, time.Since(begin).Seconds())
	}
}

// boot runs the machine until it goes down, and shows the payload's output.
func (m machine) boot(ctx context.Context, base string, d disks, console, journal string) (cut bool, peak int64, err error) {
	cmd := m.qemu(ctx, base, d, "", "-serial", "file:"+console, "-chardev", "stdio,id=out,signal=off", "-serial", "chardev:out", "-serial", "file:"+journal,
		"-serial", "unix:"+filepath.Join(d.work, shellSocket)+",server=on,wait=off")
	out, err := cmd.StdoutPipe()
	if err != nil {
		return false, 0, err
	}
	if err := cmd.Start(); err != nil {
		return false, 0, unavailableError{fmt.Errorf("start QEMU: %w", err)}
	}
	for r := bufio.NewReader(out); ; {
		line, err := r.ReadString('\n')
		fmt.Print(line)
		if strings.TrimSpace(line) == powerCut {
			cut = true
			cmd.Process.Kill()
		}
		if err != nil {
			break
		}
	}
	err = cmd.Wait()
	if ru, ok := cmd.ProcessState.SysUsage().(*syscall.Rusage); ok {
		peak = ru.Maxrss
	}
	if cut || ctx.Err() != nil {
		return cut, peak, nil
	}
	if err != nil {
		if fi, serr := os.Stat(console); serr != nil || fi.Size() == 0 {
			return false, peak, unavailableError{fmt.Errorf("QEMU does not run: %w", err)}
		}
		return false, peak, fmt.Errorf("QEMU: %w", err)
	}
	return false, peak, nil
}

// bringBack copies results from the payload's disk and says whether the guest
// asked to be booted again, and the payload's status if it has one.
func bringBack(ctx context.Context, d disks, results string, journals []string) (again bool, status string, err error) {
	// After a cut the disk's own journal is replayed first; status 1 says that
	// something was mended.
	_ = run(ctx, io.Discard, "/sbin/e2fsck", "-fy", d.payload)
	read := func(request string) string {
		b, _ := exec.CommandContext(ctx, "/sbin/debugfs", "-R", request, d.payload).Output()
		return strings.TrimSpace(string(b))
	}
	if err := os.RemoveAll(filepath.Join(d.work, "out")); err != nil {
		return false, "", err
	}
	read("rdump /out " + d.work)
	complete := false // the journal, written at the payload's end
	entries, _ := os.ReadDir(filepath.Join(d.work, "out"))
	for _, e := range entries {
		complete = complete || e.Name() == "journal.txt"
		to := filepath.Join(results, e.Name())
		if err := errors.Join(os.RemoveAll(to), move(filepath.Join(d.work, "out", e.Name()), to)); err != nil {
			return false, "", err
		}
	}
	if !complete { // as far as it came
		var all []byte
		for _, j := range journals {
			b, _ := os.ReadFile(j)
			all = append(all, b...)
		}
		if err := os.WriteFile(filepath.Join(results, "journal.txt"), all, 0o644); err != nil {
			return false, "", err
		}
	}
	return strings.Contains(read("stat /rebooting"), "Inode:"), read("cat /status"), nil
}

// move renames, or copies where the two are on different file systems.
func move(from, to string) error {
	err := os.Rename(from, to)
	if errors.Is(err, unix.EXDEV) {
		return run(context.Background(), os.Stderr, "cp", "-a", from, to)
	}
	return err
}

// attach connects the terminal with the shell of a machine that runs a test.
func (m machine) attach(ctx context.Context) error {
	sockets, err := filepath.Glob(filepath.Join(m.cache, "run.*", shellSocket))
	if err != nil {
		return err
	}
	for _, path := range sockets {
		conn, err := (&net.Dialer{}).DialContext(ctx, "unix", path)
		if err != nil {
			continue // of one that is gone
		}
		defer conn.Close()
		go func() { _, _ = io.Copy(conn, os.Stdin) }()
		_, err = io.Copy(os.Stdout, conn)
		return err
	}
	return fmt.Errorf("no machine of %s runs a test", m.cache)
}

func (m machine) shell(ctx context.Context, payload string) error {
	base, err := m.build(ctx)
	if err != nil {
		return err
	}
	d, err := m.disks(ctx, base, payload)
	defer os.RemoveAll(d.work)
	if err != nil {
		return err
	}
	fmt.Fprintln(os.Stderr, "==> boots in half a minute; exit ends it, Ctrl-A X kills it")
	cmd := m.qemu(ctx, base, d, "podd.shell", "-serial", "mon:stdio")
	cmd.Stdin, cmd.Stdout = os.Stdin, os.Stdout
	return cmd.Run()
}
