package service

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/podd-runtime/podd/integration/node"
)

// TestServicesRestartWithoutDisturbingPods restarts and kills podd
// and podd-shim by systemd while somebody asks a pod.
func TestServicesRestartWithoutDisturbingPods(t *testing.T) {
	installed(t)
	write(t, "web", web("web", 18080, ""))
	waitReady(t, 60*second, "web")
	before := programs("/testserver serve")
	if len(before) != 1 {
		t.Fatalf("programs: %v", before)
	}
	shim := sh(t, "systemctl show -P MainPID podd-shim")
	if shim == "0" {
		t.Fatal("podd-shim is not its service's main process")
	}
	tree := sh(t, "systemd-cgls --no-pager --xattr=yes /kubepods.slice")
	t.Log(tree)
	if uid := strings.ReplaceAll(string(pods()["web"].UID), "-", "_"); !strings.Contains(tree, "kubepods-pod"+uid+".slice") {
		t.Errorf("systemd-cgls does not show the pod's slice kubepods-pod%s.slice", uid)
	}
	if !strings.Contains(tree, "default/web-node") {
		t.Error("systemd-cgls --xattr=yes does not show the pod's name")
	}

	a := ask("http://127.0.0.1:18080/hostname")
	restarts := 2
	if long() {
		restarts = 20
	}
	for range restarts {
		sh(t, "systemctl restart podd")
		if now := sh(t, "systemctl show -P MainPID podd-shim"); now != shim {
			t.Fatalf("restart of podd touched podd-shim: PID was %s, is %s", shim, now)
		}
	}
	sh(t, "systemctl kill -s KILL podd")
	node.Await(t, "podd answering after SIGKILL", 30*second, func() bool { return pods()["web"] != nil })
	for _, how := range []string{"restart", "kill -s KILL"} {
		was := sh(t, "systemctl show -P MainPID podd-shim")
		begin := time.Now()
		sh(t, "systemctl "+how+" podd-shim")
		node.Await(t, "podd-shim new after "+how, 30*second, func() bool {
			now, err := try("systemctl show -P MainPID podd-shim")
			return err == nil && now != "0" && now != was
		})
		up := time.Since(begin)
		node.Await(t, "podd and podd-shim in touch after "+how, 30*second, func() bool { v := versions(); return v.Shim != nil })
		t.Logf("%s of podd-shim: up after %v, in touch with podd after %v", how, up.Round(time.Millisecond), time.Since(begin).Round(time.Millisecond))
		if shims := sh(t, "pgrep -x podd-shim"); len(strings.Fields(shims)) != 1 {
			t.Errorf("podd-shims after %s: %s", how, shims)
		}
		group, err := os.ReadFile(filepath.Join("/proc", sh(t, "systemctl show -P MainPID podd-shim"), "cgroup"))
		if err != nil || !strings.Contains(string(group), "podd-shim.service") {
			t.Errorf("podd-shim after %s is in %s, not in its service (%v)", how, group, err)
		}
	}
	waitReady(t, 30*second, "web")
	a.end(t)
	sh(t, "podd exec web-node -- /testserver env")
	if now := programs("/testserver serve"); !slices.Equal(now, before) {
		t.Errorf("containers' programs were %v, are %v", before, now)
	}
	if c := pods()["web"].Status.ContainerStatuses[0]; c.RestartCount != 0 {
		t.Errorf("restarted: %+v", c)
	}
	remove(t, "web")
	nothingLeft(t)
}
