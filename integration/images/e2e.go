package images

import (
	"context"
	"fmt"
	"maps"
	"path/filepath"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// E2E makes the images of Kubernetes' end-to-end tests of 1.36, by
// repository:tag as a mirror of every registry is asked for them. agnhost is
// the path of upstream's program, which most tests run; beside it are the
// certificate and key that it serves with. The other images are of Debian's
// packages, with what the tests look at.
func (b *Builder) E2E(ctx context.Context, agnhost string) (map[string]v1.Image, error) {
	box, err := b.plainBusybox(ctx)
	if err != nil {
		return nil, err
	}
	standin, err := b.compile(ctx, "standin")
	if err != nil {
		return nil, err
	}
	d := newDebian(ctx, b.Dir)
	root := base()
	root.dir("/home", 0o755)
	root.dir("/var/run", 0o777)
	root.dir("/uploads", 0o755)
	maps.Copy(root, box)
	maps.Copy(root, tree{"/bin/standin": {mode: 0o755, from: standin}, "/bin/nmeter": {link: "standin"}})
	// It hands on variables whose names are no identifiers, as newer busyboxes do.
	if err := root.program(d, "/bin/sh", "/bin/bash", "bash"); err != nil {
		return nil, err
	}
	root["/etc/passwd"] = file{mode: 0o644, data: []byte("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\nuser-defined-in-image:x:1000:1000::/home:/bin/sh\n")}
	root["/etc/os-release"] = file{mode: 0o644, data: []byte("NAME=\"a stand-in for Alpine Linux\"\n")}
	root["/etc/group"] = file{mode: 0o644, data: []byte("root:x:0:\nnogroup:x:65534:\nuser-defined-in-image:x:1000:\ngroup-defined-in-image:x:50000:user-defined-in-image\n")}

	tools := tree{}
	for program, pkg := range map[string]string{"/usr/bin/curl": "curl", "/bin/nc.openbsd": "netcat-openbsd", "/bin/bash": "bash", "/bin/ip": "iproute2"} {
		if err := tools.program(d, program, program, pkg); err != nil {
			return nil, err
		}
	}
	maps.Copy(tools, tree{"/bin/nc": {link: "nc.openbsd"}, "/agnhost": {mode: 0o755, from: agnhost}, "/agnhost-2": {link: "agnhost"}})
	for _, name := range []string{"localhost.crt", "localhost.key"} {
		tools["/"+name] = file{mode: 0o644, from: filepath.Join(filepath.Dir(agnhost), name)}
	}

	all := map[string]v1.Image{}
	add := func(img v1.Image, e error, names ...string) {
		if err == nil {
			err = e
		}
		for _, n := range names {
			all[n] = img
		}
	}
	env := []string{defaultPath}
	img, e := image(v1.Config{Env: env, Entrypoint: []string{"/agnhost"}, Cmd: []string{"pause"}}, root, tools)
	add(img, e, "e2e-test-images/agnhost:2.63.0", "e2e-test-images/agnhost:2.55")
	names := tree{} // a hostname that asks glibc's resolver
	if err := names.program(d, "/usr/local/bin/hostname", "/bin/hostname", "hostname"); err != nil {
		return nil, err
	}
	img, e = image(v1.Config{Env: env, Cmd: []string{"bash"}}, root, tools, names)
	add(img, e, "e2e-test-images/glibc-dns-testing:2.0.0")
	img, e = image(v1.Config{Env: env, Cmd: []string{"sh"}}, root)
	add(img, e, "e2e-test-images/busybox:1.37.0-1", "e2e-test-images/busybox:1.36.1-1")
	img, e = image(v1.Config{Env: env, Cmd: []string{"sh"}, User: "1234"}, root)
	add(img, e, "e2e-test-images/nonroot:1.5")
	img, e = image(v1.Config{Env: env, Cmd: []string{"nnp"}}, root, tree{"/usr/local/bin/nnp": {mode: 0o6755, from: standin}})
	add(img, e, "e2e-test-images/nonewprivs:1.4")
	img, e = image(v1.Config{Env: env, Entrypoint: []string{"/pause"}, User: "65535:65535"}, root, tree{"/pause": {mode: 0o755, from: standin}})
	add(img, e, "pause:3.10.2", "pause:3.10.1", "pause:3.10")
	img, e = b.Nginx(ctx)
	add(img, e, "e2e-test-images/nginx:1.15-4", "e2e-test-images/nginx:1.27-0")
	for _, name := range []string{"kitten", "nautilus"} { // pictures on a web page; also mounted as volumes
		img, e = image(v1.Config{Env: env, Entrypoint: []string{"/agnhost"}, Cmd: []string{"test-webserver"}}, root, tools,
			tree{"/data.json": {mode: 0o644, data: fmt.Appendf(nil, "{\n\"image\": \"%s.jpg\"\n}\n", name)}})
		add(img, e, "e2e-test-images/"+name+":1.8")
	}
	img, e = image(v1.Config{Env: env, Cmd: []string{"sh"}}, root, tree{"/usr/bin/ipcs": {link: "/bin/standin"}})
	add(img, e, "e2e-test-images/ipc-utils:1.4")
	return all, err
}
