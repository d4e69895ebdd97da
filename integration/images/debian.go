package images

import (
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// debian finds files of Debian packages: on this machine if they are installed,
// else in packages downloaded and unpacked (not installed) below dir. Nothing
// that a package's installation would start is started.
type debian struct {
	ctx   context.Context
	dir   string   // cache of unpacked packages
	roots []string // where files are looked for, in order
	tried map[string]bool
}

func newDebian(ctx context.Context, dir string) *debian {
	d := &debian{ctx: ctx, dir: dir, roots: []string{"/"}, tried: map[string]bool{}}
	unpacked, _ := filepath.Glob(filepath.Join(dir, "*", "root"))
	d.roots = append(d.roots, unpacked...)
	for _, u := range unpacked {
		d.tried[filepath.Base(filepath.Dir(u))] = true
	}
	return d
}

// file returns where the file called path in an installed system is, getting
// the package that has it if need be.
func (d *debian) file(path, pkg string) (string, error) {
	if p, ok := d.find(path); ok {
		return p, nil
	}
	if err := d.get(pkg); err != nil {
		return "", err
	}
	if p, ok := d.find(path); ok {
		return p, nil
	}
	return "", fmt.Errorf("package %s has no %s", pkg, path)
}

// packaged returns where a file of a package is, whatever is installed here; it
// is the first of paths that the package has.
func (d *debian) packaged(pkg string, paths ...string) (string, error) {
	if err := d.get(pkg); err != nil {
		return "", err
	}
	for _, p := range paths {
		at := filepath.Join(d.dir, pkg, "root", p)
		if st, err := os.Lstat(at); err == nil && st.Mode().IsRegular() {
			return at, nil
		}
	}
	return "", fmt.Errorf("package %s has none of %s", pkg, strings.Join(paths, ", "))
}

func (d *debian) find(path string) (string, bool) {
	for _, root := range d.roots {
		p := filepath.Join(root, path)
		// Links of an unpacked package lead within it.
		for range 8 {
			link, err := os.Readlink(p)
			if err != nil {
				break
			}
			if filepath.IsAbs(link) {
				p = filepath.Join(root, link)
			} else {
				p = filepath.Join(filepath.Dir(p), link)
			}
		}
		if st, err := os.Stat(p); err == nil && st.Mode().IsRegular() {
			return p, true
		}
	}
	return "", false
}

// get downloads and unpacks a package.
func (d *debian) get(pkg string) error {
	if d.tried[pkg] {
		return nil
	}
	d.tried[pkg] = true
	dir := filepath.Join(d.dir, pkg)
	tmp := dir + ".tmp"
	if err := os.RemoveAll(tmp); err != nil {
		return err
	}
	if err := os.MkdirAll(tmp, 0o755); err != nil {
		return err
	}
	download := func() ([]byte, error) {
		cmd := exec.CommandContext(d.ctx, "apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", pkg)
		cmd.Dir = tmp
		return cmd.CombinedOutput()
	}
	out, err := download()
	if err != nil { // stale or no package lists
		if out, uerr := exec.CommandContext(d.ctx, "apt-get", "-qq", "update").CombinedOutput(); uerr != nil {
			return fmt.Errorf("apt-get update: %w: %s", uerr, out)
		}
		out, err = download()
	}
	if err != nil {
		return fmt.Errorf("download package %s: %w: %s", pkg, err, out)
	}
	debs, _ := filepath.Glob(filepath.Join(tmp, "*.deb"))
	if len(debs) != 1 {
		return fmt.Errorf("download package %s: %d files", pkg, len(debs))
	}
	if out, err := exec.CommandContext(d.ctx, "dpkg-deb", "-x", debs[0], filepath.Join(tmp, "root")).CombinedOutput(); err != nil {
		return fmt.Errorf("unpack package %s: %w: %s", pkg, err, out)
	}
	if out, err := exec.CommandContext(d.ctx, "dpkg-deb", "-f", debs[0], "Depends", "Pre-Depends").Output(); err != nil {
		return fmt.Errorf("read package %s: %w", pkg, err)
	} else if err := os.WriteFile(filepath.Join(tmp, "depends"), out, 0o644); err != nil {
		return err
	}
	if err := os.Remove(debs[0]); err != nil {
		return err
	}
	if err := os.Rename(tmp, dir); err != nil {
		return err
	}
	d.roots = append(d.roots, filepath.Join(dir, "root"))
	return nil
}

var packageName = regexp.MustCompile(`[a-z0-9][a-z0-9+.-]+`)

// depends are the library packages that pkg needs, as far as it was unpacked.
func (d *debian) depends(pkg string) []string {
	b, err := os.ReadFile(filepath.Join(d.dir, pkg, "depends"))
	if err != nil {
		return nil
	}
	var names []string
	for line := range strings.Lines(string(b)) {
		_, list, _ := strings.Cut(line, ":")
		for dep := range strings.SplitSeq(list, ",") {
			name := packageName.FindString(strings.TrimSpace(dep))
			if strings.HasPrefix(name, "lib") || strings.HasPrefix(name, "zlib") {
				names = append(names, name)
			}
		}
	}
	return names
}

// libraries are the shared libraries that the program at path needs, by the
// path they are to have in an image, the dynamic loader included. pkg is the
// program's package, whose dependencies have them.
func (d *debian) libraries(path, pkg string) (map[string]string, error) {
	libs := map[string]string{}
	queue := []string{path}
	for len(queue) > 0 {
		f, err := elf.Open(queue[0])
		if err != nil {
			return nil, fmt.Errorf("read program %s: %w", queue[0], err)
		}
		needed, err := f.ImportedLibraries()
		var loader string
		for _, p := range f.Progs {
			if p.Type == elf.PT_INTERP {
				b := make([]byte, p.Filesz)
				if _, rerr := p.ReadAt(b, 0); rerr == nil {
					loader = strings.TrimRight(string(b), "\x00")
				}
			}
		}
		f.Close()
		queue = queue[1:]
		if err != nil {
			return nil, err
		}
		if loader != "" {
			at, err := d.file(loader, "libc6")
			if err != nil {
				return nil, err
			}
			libs[loader] = at
		}
		for _, name := range needed {
			to := "/lib/" + name // searched by default, on every architecture
			if _, have := libs[to]; have || filepath.Base(loader) == name {
				continue
			}
			at, err := d.library(name, pkg)
			if err != nil {
				return nil, err
			}
			libs[to] = at
			queue = append(queue, at)
		}
	}
	return libs, nil
}

// library finds one shared library, here or in what pkg depends on.
func (d *debian) library(name, pkg string) (string, error) {
	look := func() (string, bool) {
		for _, root := range d.roots {
			for _, dir := range []string{"lib/*-linux-gnu*", "usr/lib/*-linux-gnu*", "lib64", "usr/lib64", "lib", "usr/lib"} {
				found, _ := filepath.Glob(filepath.Join(root, dir, name))
				for _, p := range found {
					rel, err := filepath.Rel(root, p)
					if err != nil {
						continue
					}
					if at, ok := d.find("/" + rel); ok {
						return at, true
					}
				}
			}
		}
		return "", false
	}
	if at, ok := look(); ok {
		return at, nil
	}
	// Breadth first through the libraries that the package depends on. An
	// installed package was found in place; then its own package is got first,
	// for the list of what it depends on.
	if err := d.get(pkg); err != nil {
		return "", err
	}
	for queue, seen := d.depends(pkg), []string{}; len(queue) > 0; queue = queue[1:] {
		if slices.Contains(seen, queue[0]) {
			continue
		}
		seen = append(seen, queue[0])
		if err := d.get(queue[0]); err != nil {
			return "", err
		}
		if at, ok := look(); ok {
			return at, nil
		}
		queue = append(queue, d.depends(queue[0])...)
	}
	return "", fmt.Errorf("shared library %s of package %s: %w", name, pkg, fs.ErrNotExist)
}

var errNoApplets = errors.New("busybox lists no applets")
