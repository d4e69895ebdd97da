// Package packaging tests what make deb and make install do.
package packaging

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// programs returns a directory with the client as it is built and stand-ins for
// the other programs, which packaging only copies.
func programs(t *testing.T) string {
	t.Helper()
	client, err := filepath.Abs("../../bin/podd-cli")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(client); err != nil {
		t.Skip("bin/podd-cli is not built (make build)")
	}
	if out, err := exec.Command(client, "man", t.TempDir()).CombinedOutput(); err != nil {
		t.Skipf("bin/podd-cli is of another time: %s", out)
	}
	dir := t.TempDir()
	if err := os.Symlink(client, filepath.Join(dir, "podd-cli")); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"podd", "podd-shim"} {
		script := "#!/bin/sh\necho '      --config string   a file'\n"
		if err := os.WriteFile(filepath.Join(dir, name), []byte(script), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func run(t *testing.T, env []string, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), env...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
	return strings.TrimSpace(string(out))
}

// deb makes a package and returns its path.
func deb(t *testing.T, bin string, env ...string) string {
	t.Helper()
	if _, err := exec.LookPath("dpkg-deb"); err != nil {
		t.Skip("no dpkg-deb")
	}
	env = append([]string{"BIN=" + bin, "DEB_COMPRESSION=none", "SOURCE_DATE_EPOCH=1700000000", "VERSION=v1.2.3"}, env...)
	return run(t, env, "./deb", t.TempDir())
}

// TestSamePackage: equal programs make equal packages, whenever, wherever and
// by whomever they are packed.
func TestSamePackage(t *testing.T) {
	bin := programs(t)
	one := deb(t, bin)
	time.Sleep(time.Until(time.Now().Truncate(time.Second).Add(time.Second))) // another second of the clock, and only that
	two := deb(t, bin, "TMPDIR="+t.TempDir(), "TZ=Asia/Tokyo", "LANG=de_DE.UTF-8", "HOME="+t.TempDir())
	a, err := os.ReadFile(one)
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(two)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(a, b) {
		t.Errorf("%s and %s differ", one, two)
	}
	if filepath.Base(one) != filepath.Base(two) || !strings.HasPrefix(filepath.Base(one), "podd_1.2.3_") {
		t.Errorf("named %s", one)
	}
}

// TestPackageHolds what it promises, with the modes it promises.
func TestPackageHolds(t *testing.T) {
	path := deb(t, programs(t))
	cmd := exec.Command("dpkg-deb", "--fsys-tarfile", path)
	raw, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]fs.FileMode{}
	content := map[string]string{}
	for r := tar.NewReader(bytes.NewReader(raw)); ; {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if h.Uid != 0 || h.Gid != 0 || h.ModTime.Unix() != 1700000000 {
			t.Errorf("%s: owner %d:%d, time %s", h.Name, h.Uid, h.Gid, h.ModTime)
		}
		name := strings.TrimPrefix(h.Name, ".")
		got[name] = h.FileInfo().Mode().Perm()
		if h.Size < 1<<20 {
			b, _ := io.ReadAll(r)
			content[name] = string(b)
		}
	}
	for name, mode := range map[string]fs.FileMode{
		"/usr/bin/podd": 0o755, "/usr/lib/podd/podd-cli": 0o755, "/usr/lib/podd/podd-shim": 0o755,
		"/lib/systemd/system/podd.service": 0o644, "/lib/systemd/system/podd-shim.service": 0o644, "/lib/systemd/system/podd.socket": 0o644,
		"/lib/systemd/logind.conf.d/podd.conf": 0o644, "/usr/lib/sysctl.d/50-podd.conf": 0o644, "/usr/lib/modules-load.d/podd.conf": 0o644,
		"/etc/podd/podd.yaml": 0o644, "/etc/default/podd": 0o644, "/etc/podd/conf.d/": 0o755, "/etc/podd/certs.d/": 0o755,
		"/etc/cni/net.d/": 0o755, "/etc/kubernetes/manifests/": 0o750,
		"/usr/share/man/man1/podd.1.gz": 0o644, "/usr/share/man/man1/podd-get.1.gz": 0o644, "/usr/share/man/man5/podd.yaml.5.gz": 0o644,
		"/usr/share/man/man8/podd-run.8.gz": 0o644, "/usr/share/man/man8/podd-shim.8.gz": 0o644,
		"/usr/share/bash-completion/completions/podd": 0o644, "/usr/share/zsh/vendor-completions/_podd": 0o644, "/usr/share/fish/vendor_completions.d/podd.fish": 0o644,
		"/usr/share/doc/podd/copyright": 0o644, "/usr/share/doc/podd/changelog.gz": 0o644,
	} {
		if have, ok := got[name]; !ok || have != mode {
			t.Errorf("%s: there %v, mode %o, want %o", name, ok, have, mode)
		}
	}
	page, err := gzip.NewReader(strings.NewReader(content["/usr/share/man/man8/podd-run.8.gz"]))
	if err != nil {
		t.Fatal(err)
	}
	if text, _ := io.ReadAll(page); !strings.Contains(string(text), `\-\-config string`) {
		t.Errorf("podd-run(8) does not have the flags:\n%s", text)
	}
	conffiles := run(t, nil, "dpkg-deb", "-I", path, "conffiles")
	if conffiles != "/etc/default/podd\n/etc/podd/podd.yaml" {
		t.Errorf("conffiles: %s", conffiles)
	}
	if home, err := os.UserHomeDir(); err == nil && home != "/" {
		for name, text := range content {
			if strings.HasSuffix(name, ".1") && strings.Contains(text, home) {
				t.Errorf("%s names the builder's home", name)
			}
		}
	}
}

// TestVersions: packages of later commits are later to dpkg.
func TestVersions(t *testing.T) {
	var versions []string
	for _, v := range []struct{ described, epoch string }{
		{"abc1234", "1700000000"}, {"0def567", "1700000001"}, {"v1.2.3", "1600000000"}, {"v1.2.3-5-gabc1234", "1700000000"},
		{"v1.2.3-12-g0def567", "1700000000"}, {"v1.2.3-12-g0def567-dirty", "1700000000"}, {"v1.3.0", "1700000000"},
	} {
		versions = append(versions, run(t, []string{"VERSION=" + v.described, "SOURCE_DATE_EPOCH=" + v.epoch}, "./deb", "--version"))
	}
	if _, err := exec.LookPath("dpkg"); err != nil {
		t.Skip("no dpkg")
	}
	for i := range len(versions) - 1 {
		run(t, nil, "dpkg", "--compare-versions", versions[i], "lt", versions[i+1])
	}
}

// TestInstall: make install puts units that name its own places, keeps what the
// administrator wrote, and uninstall leaves only that.
func TestInstall(t *testing.T) {
	bin, dest := programs(t), t.TempDir()
	env := []string{"BIN=" + bin, "DESTDIR=" + dest, "PREFIX=/opt/podd", "SYSCONFDIR=/opt/podd/etc"}
	run(t, env, "./install")
	read := func(name string) string {
		t.Helper()
		b, err := os.ReadFile(filepath.Join(dest, name))
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	unit := read("/opt/podd/lib/systemd/system/podd.service")
	for _, want := range []string{"ExecStart=/opt/podd/bin/podd run --config=/opt/podd/etc/podd/podd.yaml", "EnvironmentFile=-/opt/podd/etc/default/podd"} {
		if !strings.Contains(unit, want) {
			t.Errorf("%q is not in\n%s", want, unit)
		}
	}
	if shim := read("/opt/podd/lib/systemd/system/podd-shim.service"); !strings.Contains(shim, "ExecStart=/opt/podd/lib/podd/podd-shim") {
		t.Errorf("podd-shim.service:\n%s", shim)
	}
	mine := filepath.Join(dest, "/opt/podd/etc/podd/podd.yaml")
	if err := os.WriteFile(mine, []byte("mine"), 0o644); err != nil {
		t.Fatal(err)
	}
	run(t, env, "./install")
	if got := read("/opt/podd/etc/podd/podd.yaml"); got != "mine" {
		t.Errorf("configuration was overwritten: %s", got)
	}
	run(t, env, "./install", "-u")
	var left []string
	if err := filepath.WalkDir(dest, func(path string, e fs.DirEntry, err error) error {
		if err == nil && !e.IsDir() {
			left = append(left, strings.TrimPrefix(path, dest))
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	if want := []string{"/opt/podd/etc/default/podd", "/opt/podd/etc/podd/podd.yaml"}; !slices.Equal(left, want) {
		t.Errorf("left: %q, want %q", left, want)
	}
}

// TestUnits as systemd itself reads them, where it is installed.
func TestUnits(t *testing.T) {
	if _, err := exec.LookPath("systemd-analyze"); err != nil {
		t.Skip("no systemd-analyze")
	}
	dir := t.TempDir()
	for _, name := range []string{"podd.service", "podd-shim.service", "podd.socket"} {
		raw, err := os.ReadFile(filepath.Join("../units", name))
		if err != nil {
			t.Fatal(err)
		}
		// What they execute is not installed here, nor are the pages.
		var lines []string
		for line := range strings.SplitSeq(string(raw), "\n") {
			if strings.HasPrefix(line, "ExecStart=") {
				line = "ExecStart=/bin/true"
			}
			if !strings.HasPrefix(line, "Documentation=") {
				lines = append(lines, line)
			}
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(strings.Join(lines, "\n")), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command("systemd-analyze", "verify", "--man=no", "podd.service", "podd-shim.service", "podd.socket")
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "SYSTEMD_UNIT_PATH="+dir+":")
	out, err := cmd.CombinedOutput()
	for line := range strings.Lines(string(out)) {
		// Of this machine's other units it may say what it likes.
		if strings.Contains(line, "podd") {
			t.Error(line)
		}
	}
	if err != nil && t.Failed() {
		t.Error(err)
	}
}
