package images

import (
	"context"
	"maps"
	"runtime"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// CritestPinned is the image that critest pulls by its digest, which must
// therefore be put into critest when it is built.
const CritestPinned = "k8s-staging-cri-tools/test-image-digest:latest"

// Critest makes stand-ins for the images whose names are compiled into critest
// of cri-tools 1.36, by repository:tag as a mirror of every registry is asked
// for them. Each has what the specs look at: users, groups, a port, a file.
func (b *Builder) Critest(ctx context.Context) (map[string]v1.Image, error) {
	shell, err := b.plainBusybox(ctx)
	if err != nil {
		return nil, err
	}
	program, err := b.compile(ctx, "standin")
	if err != nil {
		return nil, err
	}
	root := base()
	root.dir("/home", 0o755)
	root.dir("/var/run", 0o777)
	maps.Copy(root, shell)
	// Of util-linux and procps, absent from Debian's busybox.
	for _, tool := range []string{"pgrep", "ipcs"} {
		root["/bin/"+tool] = file{link: "standin"}
	}
	root["/bin/standin"] = file{mode: 0o755, from: program}

	all := map[string]v1.Image{}
	add := func(img v1.Image, e error, names ...string) {
		if err == nil {
			err = e
		}
		for _, n := range names {
			all[n] = img
		}
	}
	sh := func(user string, trees ...tree) (v1.Image, error) {
		return image(v1.Config{Env: []string{defaultPath}, Cmd: []string{"sh"}, User: user}, append([]tree{root}, trees...)...)
	}
	img, e := sh("")
	add(img, e, "e2e-test-images/busybox:1.29-2")
	img, e = image(v1.Config{Env: []string{defaultPath}, Entrypoint: []string{"/bin/sleep"}, Cmd: []string{"infinity"}, User: "65535:65535"}, root)
	add(img, e, "pause:3.9", "pause:3.10")

	// A copy, not a link: the name in /proc/<pid>/comm is that of the file.
	web := func(name, port string) (v1.Image, error) {
		return image(v1.Config{Env: []string{defaultPath, "PORT=" + port}, Cmd: []string{name}},
			root, tree{"/usr/sbin/" + name: {mode: 0o755, from: program}})
	}
	img, e = web("nginx", "80")
	add(img, e, "e2e-test-images/nginx:1.14-2")
	img, e = web("httpd", "80")
	add(img, e, "e2e-test-images/httpd:2.4.39-4")
	img, e = web("nginx", "12003")
	add(img, e, "k8s-staging-cri-tools/hostnet-nginx-"+runtime.GOARCH+":latest")
	img, e = image(v1.Config{Env: []string{defaultPath}, Cmd: []string{"/nonewprivs"}}, root, tree{"/nonewprivs": {mode: 0o4755, from: program}})
	add(img, e, "e2e-test-images/nonewprivs:1.3")

	for name, user := range map[string]string{
		"user-uid": "1002", "user-username": "www-data", "user-uid-group": "1003:1004", "user-username-group": "www-data:1004",
	} {
		img, e = sh(user)
		add(img, e, "k8s-staging-cri-tools/test-image-"+name+":latest")
	}
	img, e = sh("1000", tree{
		"/etc/passwd": {mode: 0o644, data: []byte("root:x:0:0:root:/root:/bin/sh\ndefault-user:x:1000:1000::/home/default-user:/bin/sh\n")},
		"/etc/group":  {mode: 0o644, data: []byte("root:x:0:\ndefault-user:x:1000:\ngroup-defined-in-image:x:50000:default-user\n")},
	})
	add(img, e, "k8s-staging-cri-tools/test-image-predefined-group:latest")

	// Each must be an image of its own.
	for mark, names := range map[string][]string{
		"latest": {"test-image-latest:latest"}, "tag": {"test-image-tag:test"}, "all": {"test-image-tag:all"},
		"1": {"test-image-1:latest"}, "2": {"test-image-2:latest"}, "3": {"test-image-3:latest"},
		"tags": {"test-image-tags:1", "test-image-tags:2", "test-image-tags:3"},
	} {
		img, e = sh("", tree{"/mark": {mode: 0o644, data: []byte(mark + "\n")}})
		for _, n := range names {
			add(img, e, "k8s-staging-cri-tools/"+n)
		}
	}
	// Not made of the programs above: critest need not be built again when they change.
	img, e = image(v1.Config{Env: []string{defaultPath}, Cmd: []string{"sh"}}, tree{"/mark": {mode: 0o644, data: []byte("digest\n")}})
	add(img, e, CritestPinned)
	return all, err
}

// plainBusybox is that of the package busybox with its libraries. Its shell
// executes what it is told, while that of busybox-static is most tools itself:
// a spec forbids /bin/ls and wants the shell to find that out.
func (b *Builder) plainBusybox(ctx context.Context) (tree, error) {
	d := newDebian(ctx, b.Dir)
	at, err := d.packaged("busybox", "bin/busybox", "usr/bin/busybox")
	if err != nil {
		return nil, err
	}
	t, err := applets(ctx, at)
	if err != nil {
		return nil, err
	}
	t["/bin/ls"] = file{mode: 0o755, from: at} // a file of its own, to be forbidden by itself
	libs, err := d.libraries(at, "busybox")
	for p, from := range libs {
		t[p] = file{mode: 0o755, from: from}
	}
	return t, err
}
