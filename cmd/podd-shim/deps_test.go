package main

import (
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// allowed is the budget: podd-shim is executed anew for every container start
// and every exec, so each package it links costs time and memory there.
var allowed = []string{
	"github.com/podd-runtime/podd/cmd/podd-shim",
	"github.com/podd-runtime/podd/cri/shim",
	"github.com/containerd/errdefs",
	"github.com/opencontainers/runtime-spec",
	"github.com/opencontainers/runc",
	"github.com/opencontainers/cgroups",
	"github.com/opencontainers/selinux",
	"github.com/seccomp/libseccomp-golang",
	"golang.org/x/sys",
	// libcontainer's own
	"cyphar.com/go-pathrs",
	"github.com/cilium/ebpf",
	"github.com/containerd/console",
	"github.com/coreos/go-systemd/v22",
	"github.com/cyphar/filepath-securejoin",
	"github.com/godbus/dbus/v5",
	"github.com/moby/sys",
	"github.com/mrunalp/fileutils",
	"github.com/sirupsen/logrus",
	"github.com/vishvananda/netlink",
	"github.com/vishvananda/netns",
	"golang.org/x/net/bpf",
}

func TestImports(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", "-tags", "seccomp,netgo,osusergo,runc_nocriu", ".").CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for pkg := range strings.FieldsSeq(string(out)) {
		first, _, _ := strings.Cut(pkg, "/")
		if !strings.Contains(first, ".") || first == "vendor" {
			continue // standard library
		}
		if !slices.ContainsFunc(allowed, func(a string) bool { return pkg == a || strings.HasPrefix(pkg, a+"/") }) {
			t.Errorf("podd-shim imports %s: beyond its budget", pkg)
		}
	}
}
