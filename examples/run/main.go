// Command run is `make run`: it makes the example images, starts podd on a
// private root with the example manifests, and shows the pods until Ctrl-C.
package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"

	"github.com/podd-runtime/podd/integration/images"
	"github.com/podd-runtime/podd/kubelet/server/api"
)

const (
	// These are in examples/manifests/web.yaml, too.
	registryAddr = "127.0.0.1:18500"
	registryUser = "podd"
	registryPass = "example"
	webAddr      = "127.0.0.1:18080"
)

type demo struct {
	bin, root, manifests string
	client               *http.Client
	podd                 *exec.Cmd
	exited               chan error
}

func main() {
	d := &demo{exited: make(chan error, 1)}
	flag.StringVar(&d.bin, "bin", "bin", "directory with podd, podd-shim and podd-cli")
	flag.StringVar(&d.root, "root", "_run", "directory for everything podd keeps")
	flag.StringVar(&d.manifests, "manifests", "examples/manifests", "directory with the pods")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := d.run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "make run:", err)
		os.Exit(1)
	}
}

func (d *demo) run(ctx context.Context) error {
	if os.Getuid() != 0 {
		return errors.New("pods need root: run it as root, for example with sudo")
	}
	for _, p := range []*string{&d.bin, &d.root, &d.manifests} {
		abs, err := filepath.Abs(*p)
		if err != nil {
			return err
		}
		*p = abs
	}
	socket := filepath.Join(d.root, "run", api.SocketName)
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) { return api.Dial(ctx, socket) }
	d.client = &http.Client{Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}}
	if c, err := dial(ctx, "", ""); err == nil {
		c.Close()
		return fmt.Errorf("a podd already runs on %s", d.root)
	}

	step("images from Debian's packages")
	registry, tar, err := d.images(ctx)
	if err != nil {
		return interrupted(ctx, err)
	}
	defer registry.Close()

	step("podd on " + d.root)
	running := d.runningPods()
	if err := d.start(); err != nil {
		return err
	}
	defer d.stop()
	if err := d.await(ctx, func() bool {
		c, err := dial(ctx, "", "")
		if err == nil {
			c.Close()
		}
		return err == nil
	}); err != nil {
		return interrupted(ctx, err)
	}
	if running {
		say("pods of the last run go on")
	}
	if err := d.load(ctx, tar); err != nil {
		return interrupted(ctx, err)
	}

	step("pods of " + d.manifests)
	// Only now does podd see the pods: their images are there.
	link := filepath.Join(d.root, "manifests")
	if have, err := os.Readlink(link); err != nil || have != d.manifests {
		os.Remove(link + ".new")
		if err := os.Symlink(d.manifests, link+".new"); err != nil {
			return err
		}
		if err := os.Rename(link+".new", link); err != nil {
			return err
		}
	}
	return interrupted(ctx, d.show(ctx))
}

func step(what string) { fmt.Println("==>", what) }
func say(what string)  { fmt.Println("   ", what) }

// interrupted makes Ctrl-C no error.
func interrupted(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// images makes the images, pushes the private one and packs the others.
func (d *demo) images(ctx context.Context) (*images.Registry, string, error) {
	cache := filepath.Join(d.root, "cache")
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return nil, "", err
	}
	b := &images.Builder{Dir: cache}
	made := map[string]v1.Image{}
	for _, i := range []struct {
		name  string
		build func(context.Context) (v1.Image, error)
	}{{"busybox", b.Busybox}, {"redis", b.Redis}, {"nginx", b.Nginx}} {
		img, err := i.build(ctx)
		if err != nil {
			return nil, "", fmt.Errorf("image %s: %w", i.name, err)
		}
		made[i.name] = img
		say(i.name + ": made")
	}
	registry, err := images.Serve(registryAddr, registryUser, registryPass)
	if err != nil {
		return nil, "", err
	}
	if _, err := registry.Push(ctx, "web/nginx:1", made["nginx"]); err != nil {
		registry.Close()
		return nil, "", err
	}
	say("nginx: in a registry with a password at " + registryAddr)
	tar := filepath.Join(cache, "examples.tar")
	err = images.WriteTar(tar, images.Tag{Ref: "example/busybox:1", Image: made["busybox"]}, images.Tag{Ref: "example/redis:1", Image: made["redis"]})
	if err != nil {
		registry.Close()
		return nil, "", err
	}
	return registry, tar, nil
}

// runningPods says whether the last run has left something.
func (d *demo) runningPods() bool {
	found, _ := filepath.Glob(filepath.Join(d.root, "kubelet", "pods", "*"))
	return len(found) > 0
}

func (d *demo) start() error {
	for _, dir := range []string{"cni", "certs.d"} {
		if err := os.MkdirAll(filepath.Join(d.root, dir), 0o755); err != nil {
			return err
		}
	}
	log, err := os.OpenFile(filepath.Join(d.root, "podd.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	at := func(p string) string { return filepath.Join(d.root, p) }
	d.podd = exec.Command(filepath.Join(d.bin, "podd"), "run",
		"--data-dir", at("data"), "--run-dir", at("run"), "--root-dir", at("kubelet"),
		"--pod-manifest-path", at("manifests"), "--pod-logs-dir", at("log/pods"),
		"--cni-conf-dir", at("cni"), "--registry-config-path", at("certs.d"))
	d.podd.Stdout, d.podd.Stderr = log, log
	// Ctrl-C is for this program; it stops podd itself.
	d.podd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
	if err := d.podd.Start(); err != nil {
		return err
	}
	say(fmt.Sprintf("pid %d, log in %s", d.podd.Process.Pid, log.Name()))
	go func() { d.exited <- d.podd.Wait() }()
	return nil
}

// stop ends the daemon and leaves the pods running.
func (d *demo) stop() {
	fmt.Println()
	step("stop")
	d.podd.Process.Signal(syscall.SIGTERM)
	select {
	case <-d.exited:
	case <-time.After(10 * time.Second):
		d.podd.Process.Kill()
		<-d.exited
	}
	rel := d.root
	if wd, err := os.Getwd(); err == nil {
		if r, err := filepath.Rel(wd, d.root); err == nil {
			rel = r
		}
	}
	say("The daemon has stopped; the pods go on. `make run` takes them up again.")
	say("Stop the pods with: bin/podd stop --all --run-dir " + filepath.Join(rel, "run"))
}

// died tells why podd ended by itself.
func (d *demo) died(err error) error {
	d.exited <- err // for stop
	log, _ := os.ReadFile(filepath.Join(d.root, "podd.log"))
	lines := bytes.Split(bytes.TrimSpace(log), []byte("\n"))
	return fmt.Errorf("podd has ended (%v); its last words:\n%s", err, bytes.Join(lines[max(0, len(lines)-15):], []byte("\n")))
}

// await waits until cond holds, podd dies or half a minute is over.
func (d *demo) await(ctx context.Context, cond func() bool) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !cond() {
		select {
		case <-tick.C:
		case err := <-d.exited:
			return d.died(err)
		case <-ctx.Done():
			return errors.New("podd does not answer; see " + filepath.Join(d.root, "podd.log"))
		}
	}
	return nil
}

// load puts the images into the store, unless they are there.
func (d *demo) load(ctx context.Context, tar string) error {
	f, err := os.Open(tar)
	if err != nil {
		return err
	}
	defer f.Close()
	req, err := http.NewRequestWithContext(ctx, http.MethodPut, "http://podd"+api.Prefix+"/images", f)
	if err != nil {
		return err
	}
	resp, err := d.client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		b, _ := io.ReadAll(io.LimitReader(resp.Body, 4096))
		return fmt.Errorf("load images: %s", b)
	}
	var list api.Images
	if err := json.NewDecoder(resp.Body).Decode(&list); err != nil {
		return err
	}
	for _, i := range list.Items {
		for _, t := range i.Tags {
			say("loaded " + t)
		}
	}
	return nil
}

// show prints the pods whenever they change, and once where the web pod answers.
func (d *demo) show(ctx context.Context) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://podd/api/v1/pods?watch=true", nil)
	if err != nil {
		return err
	}
	resp, err := d.client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	changes := make(chan struct{}, 1)
	ended := make(chan error, 1)
	go func() {
		for r := bufio.NewReader(resp.Body); ; {
			_, err := r.ReadSlice('\n')
			if err != nil && !errors.Is(err, bufio.ErrBufferFull) {
				ended <- err
				return
			}
			select {
			case changes <- struct{}{}:
			default:
			}
		}
	}()
	answered := make(chan struct{})
	go func() {
		for !answers(ctx) {
			select {
			case <-time.After(50 * time.Millisecond):
			case <-ctx.Done():
				return
			}
		}
		close(answered)
	}()

	_, err = unix.IoctlGetTermios(1, unix.TCGETS)
	t := &table{live: err == nil}
	age := time.NewTicker(10 * time.Second) // the ages change
	defer age.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case err := <-d.exited:
			return d.died(err)
		case err := <-ended:
			select {
			case derr := <-d.exited:
				return d.died(derr)
			case <-ctx.Done():
				return nil
			case <-time.After(time.Second):
				return fmt.Errorf("watch pods: %w", err)
			}
		case <-answered:
			answered = nil
			t.above([]string{
				"",
				"    The example web pod answers:  curl http://" + webAddr + "/",
				"    In another terminal:          export PODD_RUN_DIR=" + filepath.Join(d.root, "run"),
				"                                  bin/podd get pods; bin/podd logs -f POD; bin/podd exec -it POD -- sh",
				"    Ctrl-C stops the daemon; the pods go on.",
				"",
			})
		case <-changes:
			// A burst of changes is one picture.
			select {
			case <-time.After(100 * time.Millisecond):
			case <-ctx.Done():
				return nil
			}
		case <-age.C:
			if !t.live {
				continue
			}
		}
		cmd := exec.CommandContext(ctx, filepath.Join(d.bin, "podd-cli"), "--run-dir", filepath.Join(d.root, "run"), "get", "pods", "-A", "-o", "wide")
		out, err := cmd.CombinedOutput()
		if err != nil && ctx.Err() == nil {
			out = fmt.Appendf(out, "%v\n", err)
		}
		if ctx.Err() == nil {
			t.draw(strings.Split(strings.TrimRight(string(out), "\n"), "\n"))
		}
	}
}

func answers(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+webAddr+"/", nil)
	if err != nil {
		return false
	}
	resp, err := (&http.Transport{DisableKeepAlives: true}).RoundTrip(req)
	if err != nil {
		return false
	}
	resp.Body.Close()
	return resp.StatusCode == http.StatusOK
}

// table is a block of lines at the bottom that is redrawn in place; without a
// terminal each new state is printed once.
type table struct {
	live bool
	last []string
}

func (t *table) erase() {
	if t.live && len(t.last) > 0 {
		fmt.Printf("\x1b[%dA\x1b[J", len(t.last))
	}
}

func (t *table) draw(lines []string) {
	if ws, err := unix.IoctlGetWinsize(1, unix.TIOCGWINSZ); t.live && err == nil && ws.Col > 1 {
		for i, l := range lines { // a line that wraps would be two to erase
			lines[i] = l[:min(len(l), int(ws.Col)-1)]
		}
	}
	if !t.live && slices.Equal(lines, t.last) {
		return
	}
	t.erase()
	for _, l := range lines {
		fmt.Println(l)
	}
	if !t.live {
		fmt.Println()
	}
	t.last = lines
}

func (t *table) above(lines []string) {
	t.erase()
	for _, l := range lines {
		fmt.Println(l)
	}
	if t.live {
		for _, l := range t.last {
			fmt.Println(l)
		}
	}
}
