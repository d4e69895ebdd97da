package service

import (
	"encoding/json"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/podd-runtime/podd/integration/node"
)

// kept is where tests leave what a later one, after a boot, compares with.
const kept = "/payload/kept"

func keep(t *testing.T, name string, v any) {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(kept, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(kept, name), b, 0o644); err != nil {
		t.Fatal(err)
	}
}

func recall(t *testing.T, name string, v any) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(kept, name))
	if err != nil {
		t.Fatalf("the test before left nothing: %v", err)
	}
	if err := json.Unmarshal(b, v); err != nil {
		t.Fatal(err)
	}
}

// files of the machine, but those that a running machine changes by itself.
func files(t *testing.T) (found []string) {
	t.Helper()
	for _, root := range []string{"/etc", "/usr", "/opt", "/root", "/srv", "/var", "/run"} {
		err := filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
			if err != nil {
				return nil // gone meanwhile
			}
			for _, other := range []string{
				"/var/lib/dpkg", "/var/log/dpkg.log", "/var/log/journal", "/run/log/journal", "/var/lib/systemd/timers", "/var/lib/systemd/catalog",
				"/var/tmp", "/run/systemd", "/run/udev", "/run/user", "/run/lock", "/var/lib/private",
			} {
				if path == other && e.IsDir() {
					return fs.SkipDir
				} else if path == other {
					return nil
				}
			}
			found = append(found, path)
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return found
}

var units = []string{"podd.service", "podd-shim.service", "podd.socket"}

// TestPackageInstall: with the package podd runs, now and after a boot.
func TestPackageInstall(t *testing.T) {
	disposable(t)
	keep(t, "files", files(t))
	begin := time.Now()
	sh(t, "dpkg --force-unsafe-io -i /payload/podd.deb")
	t.Logf("installed in %.1f s", time.Since(begin).Seconds())
	for _, unit := range units {
		if out, err := try("systemctl is-active " + unit + " && systemctl is-enabled " + unit); err != nil || out != "active\nenabled" {
			t.Errorf("%s: %s (%v)", unit, out, err)
		}
	}
	node.Await(t, "the status line tells of pods", 30*second, func() bool {
		return strings.HasPrefix(sh(t, "systemctl show -P StatusText podd"), "0 pods: 0 running, 0 failed")
	})
	if out := sh(t, "systemd-analyze verify --man=no podd.service podd-shim.service podd.socket 2>&1 | grep podd || true"); out != "" {
		t.Errorf("systemd-analyze verify: %s", out)
	}
	if out := sh(t, "dpkg --verify podd; dpkg --audit"); out != "" {
		t.Errorf("dpkg: %s", out)
	}
	if out := sh(t, "sysctl -n fs.inotify.max_user_instances"); out != "8192" {
		t.Errorf("fs.inotify.max_user_instances is %s", out)
	}
	// A stock machine is one that podd runs on; what is missing has its remedy.
	out, err := try("podd preflight")
	t.Logf("podd preflight: %v\n%s", err, out)
	if err != nil {
		t.Errorf("podd preflight: %v", err)
	}
	const broken = "/etc/cni/net.d/10-broken.conflist"
	if err := os.WriteFile(broken, []byte("{"), 0o644); err != nil {
		t.Fatal(err)
	}
	if out, err := try("podd preflight; test $? = 1"); err != nil || !strings.Contains(out, broken) || !strings.Contains(out, "correct or remove it") {
		t.Errorf("podd preflight with %s: %v\n%s", broken, err, out)
	}
	if err := os.Remove(broken); err != nil {
		t.Fatal(err)
	}
}

// TestPackageUpgrade: a rebuilt version takes the place of the one that runs,
// podd-shim included, and no container notices.
func TestPackageUpgrade(t *testing.T) {
	installed(t)
	write(t, "web", web("web", 18080, ""))
	waitReady(t, 60*second, "web")
	before := programs("/testserver serve")
	shim := sh(t, "systemctl show -P MainPID podd-shim")
	was := versions()
	a := ask("http://127.0.0.1:18080/hostname")
	begin := time.Now()
	sh(t, "dpkg --force-unsafe-io -i /payload/podd-rebuilt.deb")
	t.Logf("upgraded in %.1f s", time.Since(begin).Seconds())
	waitReady(t, 60*second, "web")
	a.end(t)
	is := versions()
	if was.Shim == nil || is.Shim == nil || was.Daemon.Version == is.Daemon.Version || was.Shim.Version == is.Shim.Version {
		t.Errorf("versions were %+v %+v and are %+v %+v", was.Daemon, was.Shim, is.Daemon, is.Shim)
	}
	if now := sh(t, "systemctl show -P MainPID podd-shim"); now != shim {
		t.Errorf("podd-shim was process %s, is %s", shim, now)
	}
	if now := programs("/testserver serve"); len(before) != 1 || !slices.Equal(now, before) {
		t.Errorf("containers' programs were %v, are %v", before, now)
	}
	if c := pods()["web"].Status.ContainerStatuses[0]; c.RestartCount != 0 {
		t.Errorf("restarted: %+v", c)
	}
	sh(t, "podd exec web-node -- /testserver env")
	remove(t, "web")
	nothingLeft(t)
}

// TestPackageRemoval: removal ends pods in order and keeps data, purge leaves
// the machine as it was.
func TestPackageRemoval(t *testing.T) {
	installed(t)
	noted := startNoted(t)
	begin := time.Now()
	sh(t, "dpkg -r podd")
	t.Logf("removed in %.1f s", time.Since(begin).Seconds())
	endedInOrder(t, noted)
	nothingLeft(t)
	for _, unit := range units {
		if out, _ := try("systemctl is-active " + unit); out == "active" {
			t.Errorf("%s: %s", unit, out)
		}
	}
	for _, path := range []string{"/var/lib/podd/images", "/etc/podd/podd.yaml", manifests + "/ordinary.yaml"} {
		if _, err := os.Stat(path); err != nil {
			t.Errorf("not kept: %v", err)
		}
	}
	if long() {
		sh(t, "dpkg --force-unsafe-io -i /payload/podd.deb")
		waitReady(t, 60*second, "ordinary", "critical") // with the images that were kept
		sh(t, "dpkg -r podd")
	}
	remove(t, "ordinary", "critical")
	if err := os.RemoveAll(notes); err != nil {
		t.Fatal(err)
	}
	sh(t, "dpkg -P podd")
	var before []string
	recall(t, "files", &before)
	was := map[string]bool{}
	for _, path := range before {
		was[path] = true
	}
	for _, path := range files(t) {
		if !was[path] {
			t.Errorf("left by purge: %s", path)
		}
	}
	if out := sh(t, "systemctl list-unit-files --no-legend 'podd*'; systemctl list-units --all --no-legend 'podd*' 'kubepods*'; grep podd /proc/self/mounts || true"); out != "" {
		t.Errorf("left by purge:\n%s", out)
	}
}
