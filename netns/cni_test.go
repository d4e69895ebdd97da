package netns

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// fakePlugin is what the test binary does when libcni runs it: it writes down
// what it was asked into "calls" and answers as its configuration says.
func fakePlugin() {
	var conf struct {
		Calls, Fail, Hang, Result, Version string
		CNIVersion                         string          `json:"cniVersion"`
		RuntimeConfig                      json.RawMessage `json:"runtimeConfig"`
		PrevResult                         json.RawMessage `json:"prevResult"`
		Valid                              json.RawMessage `json:"cni.dev/valid-attachments"`
	}
	stdin, _ := io.ReadAll(os.Stdin)
	_ = json.Unmarshal(stdin, &conf)
	cmd := os.Getenv("CNI_COMMAND")
	if cmd == "VERSION" {
		fmt.Println(`{"cniVersion":"1.1.0","supportedVersions":["0.3.1","0.4.0","1.0.0","1.1.0"]}`)
		return
	}
	call, _ := json.Marshal(fakeCall{cmd, os.Getenv("CNI_CONTAINERID"), os.Getenv("CNI_NETNS"), os.Getenv("CNI_ARGS"), os.Getenv("CNI_IFNAME"),
		conf.RuntimeConfig, conf.PrevResult, conf.Valid})
	f, err := os.OpenFile(conf.Calls, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(3)
	}
	fmt.Fprintf(f, "%s\n", call)
	f.Close()
	switch {
	case slices.Contains(strings.Fields(conf.Hang), cmd):
		time.Sleep(time.Minute)
	case slices.Contains(strings.Fields(conf.Fail), cmd):
		fmt.Printf(`{"cniVersion":%q,"code":11,"msg":"the vlan is full","details":"try another"}`, conf.CNIVersion)
		os.Exit(1)
	}
	if cmd == "ADD" {
		fmt.Println(conf.Result)
	}
}

type fakeCall struct {
	Cmd, ID, Netns, Args, IfName string
	RuntimeConfig, Prev, Valid   json.RawMessage
}

// cniWorld is a world with one fake plugin.
func cniWorld(t *testing.T, change ...func(*Config)) (*world, string) {
	t.Helper()
	needRoot(t)
	bin := t.TempDir()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(self, filepath.Join(bin, "fake")); err != nil {
		t.Fatal(err)
	}
	w := newWorld(t, append([]func(*Config){func(c *Config) { c.BinDirs = []string{bin} }}, change...)...)
	return w, filepath.Join(bin, "calls")
}

func (w *world) conflist(file, calls string, extra map[string]any) {
	w.t.Helper()
	plugin := map[string]any{
		"type": "fake", "calls": calls,
		"capabilities": map[string]bool{"portMappings": true, "dns": true, "bandwidth": true, "ips": true, "mac": true},
		"result": `{"cniVersion":"1.0.0","interfaces":[{"name":"host0"},{"name":"eth0","mac":"02:00:00:00:00:01","sandbox":"x"},{"name":"net1","mac":"02:00:00:00:00:02","sandbox":"x"}],
			"ips":[{"interface":2,"address":"10.7.0.9/24"},{"interface":1,"address":"10.5.0.9/24"},{"interface":1,"address":"fd05::9/64"},{"interface":0,"address":"10.5.0.1/24"}],
			"dns":{"nameservers":["10.5.0.53"]}}`,
	}
	version := "1.1.0"
	for k, v := range extra {
		if k == "cniVersion" {
			version = v.(string)
		} else {
			plugin[k] = v
		}
	}
	data, _ := json.Marshal(map[string]any{"cniVersion": version, "name": "testnet", "plugins": []any{plugin}})
	w.conf(file, string(data))
}

func (w *world) conf(file, data string) {
	w.t.Helper()
	if err := os.MkdirAll(w.cfg.ConfDir, 0o755); err != nil {
		w.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(w.cfg.ConfDir, file), []byte(data), 0o644); err != nil {
		w.t.Fatal(err)
	}
}

func calls(t testing.TB, path string) (out []fakeCall) {
	t.Helper()
	data, _ := os.ReadFile(path)
	for line := range strings.Lines(string(data)) {
		var c fakeCall
		if err := json.Unmarshal([]byte(line), &c); err != nil {
			t.Fatal(err)
		}
		out = append(out, c)
	}
	_ = os.Remove(path)
	return out
}

func TestCNI(t *testing.T) {
	w, log := cniWorld(t)
	// Without a configuration the built-in network serves; one that comes
	// later is used without a restart, and what was attached before is given
	// back where it came from.
	early := w.pod()
	w.attach(early)
	w.conflist("10-test.conflist", log, nil)
	if err := w.net.Ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	if c := calls(t, log); len(c) != 1 || c[0].Cmd != "STATUS" {
		t.Errorf("ready asked %v, want STATUS", c)
	}

	p := w.pod(&runtimeapi.PortMapping{HostPort: 8080, ContainerPort: 80, HostIp: "127.0.0.1", Protocol: runtimeapi.Protocol_UDP},
		&runtimeapi.PortMapping{ContainerPort: 81})
	p.Annotations = map[string]string{ingressAnnotation: "1M", ipsAnnotation: "10.5.0.9/24, fd05::9", macAnnotation: "02:00:00:00:00:01"}
	p.DNS = &runtimeapi.DNSConfig{Servers: []string{"10.0.0.1"}, Searches: []string{"a.example"}}
	r := w.attach(p)
	if want := []string{"10.5.0.9", "fd05::9"}; !slices.Equal(r.IPs, want) {
		t.Errorf("addresses %v, want eth0's %v", r.IPs, want)
	}
	if r.Interfaces["eth0"] != "02:00:00:00:00:01" || r.Interfaces["net1"] == "" || r.Interfaces["host0"] != "" {
		t.Errorf("interfaces %v", r.Interfaces)
	}
	if !slices.Equal(r.DNS, []string{"10.5.0.53"}) {
		t.Errorf("dns %v", r.DNS)
	}
	c := calls(t, log)
	if len(c) != 1 || c[0].Cmd != "ADD" {
		t.Fatalf("calls %v, want one ADD", c)
	}
	for _, want := range []string{"IgnoreUnknown=1", "K8S_POD_NAMESPACE=default", "K8S_POD_NAME=" + p.Name, "K8S_POD_INFRA_CONTAINER_ID=" + p.SandboxID, "K8S_POD_UID=" + p.UID} {
		if !strings.Contains(c[0].Args, want) {
			t.Errorf("CNI_ARGS %q without %s", c[0].Args, want)
		}
	}
	if c[0].ID != p.SandboxID || c[0].IfName != "eth0" || c[0].Netns != p.NetnsPath {
		t.Errorf("call %+v", c[0])
	}
	for _, want := range []string{`"portMappings":[{"hostPort":8080,"containerPort":80,"protocol":"udp","hostIP":"127.0.0.1"}]`,
		`"dns":{"searches":["a.example"],"servers":["10.0.0.1"]}`, `"bandwidth":{"ingressBurst":2147483647,"ingressRate":1000000}`,
		`"ips":["10.5.0.9/24","fd05::9"]`, `"mac":"02:00:00:00:00:01"`} {
		if !strings.Contains(string(c[0].RuntimeConfig), want) {
			t.Errorf("runtimeConfig %s without %s", c[0].RuntimeConfig, want)
		}
	}
	if err := w.net.Check(t.Context(), p); err != nil {
		t.Error(err)
	}
	if c := calls(t, log); len(c) != 1 || c[0].Cmd != "CHECK" || len(c[0].Prev) == 0 {
		t.Errorf("check called %v", c)
	}

	// After a restart, and with the configuration changed, DEL still gets the
	// old one with the cached result; the early pod's network is ours.
	w.restart()
	w.conflist("10-test.conflist", filepath.Join(t.TempDir(), "others"), nil)
	w.detach(p)
	if c := calls(t, log); len(c) != 1 || c[0].Cmd != "DEL" || !strings.Contains(string(c[0].Prev), "10.5.0.9") || !strings.Contains(string(c[0].RuntimeConfig), "8080") {
		t.Errorf("detach called %+v, want DEL with the result of ADD", c)
	}
	w.detach(early)
	w.detach(p)
	if c := calls(t, log); len(c) != 0 {
		t.Errorf("detaching again called %v", c)
	}
	if w.leases() != 0 {
		t.Error("the early pod's address was not given back")
	}
}

func TestCNIFailures(t *testing.T) {
	w, log := cniWorld(t)
	p := w.pod()

	w.conflist("10-test.conflist", log, map[string]any{"fail": "ADD"})
	_, err := w.net.Attach(t.Context(), p)
	for _, want := range []string{"default/" + p.Name, "testnet", `"fake"`, "the vlan is full", "try another"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v does not say %s", err, want)
		}
	}
	if c := calls(t, log); len(c) != 2 || c[1].Cmd != "DEL" {
		t.Errorf("after a failed ADD: %v, want DEL", c)
	}

	// DEL fails too: the record stays, and Sweep comes back to it.
	w.conflist("10-test.conflist", log, map[string]any{"fail": "ADD DEL"})
	if _, err = w.net.Attach(t.Context(), p); err == nil {
		t.Error("no error")
	}
	if w.net.entry(p.SandboxID) == nil {
		t.Error("the failed attachment is forgotten although DEL failed")
	}
	if err := w.net.Detach(t.Context(), p); err == nil || !strings.Contains(err.Error(), "the vlan is full") {
		t.Errorf("detach with failing DEL: %v", err)
	}
	w.restart()
	calls(t, log)
	if err := w.net.Sweep(t.Context(), nil); err == nil {
		t.Error("sweep with failing DEL: no error")
	}
	w.net.entry(p.SandboxID).CNI.Config = json.RawMessage(strings.ReplaceAll(string(w.net.entry(p.SandboxID).CNI.Config), "ADD DEL", ""))
	if err := Unpin(p.NetnsPath); err != nil {
		t.Fatal(err)
	}
	calls(t, log)
	w.conflist("10-test.conflist", log, nil)
	if err := w.net.Sweep(t.Context(), nil); err != nil {
		t.Error(err)
	}
	got := calls(t, log)
	if len(got) < 2 || got[0].Cmd != "DEL" || got[0].Netns != "" || got[len(got)-1].Cmd != "GC" {
		t.Errorf("sweep called %+v; want DEL without the vanished namespace, then GC", got)
	}
	if w.net.entry(p.SandboxID) != nil {
		t.Error("record left after sweep")
	}

	w.conflist("10-test.conflist", log, map[string]any{"fail": "STATUS"})
	if err := w.net.Ready(t.Context()); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "the vlan is full") {
		t.Errorf("ready: %v, want unavailable with the plugin's words", err)
	}
	// An older version has no STATUS and no GC: not asked.
	calls(t, log)
	w.conflist("10-test.conflist", log, map[string]any{"fail": "STATUS GC", "cniVersion": "0.4.0"})
	if err := errors.Join(w.net.Ready(t.Context()), w.net.Sweep(t.Context(), nil)); err != nil {
		t.Error(err)
	}
	if got := calls(t, log); len(got) != 0 {
		t.Errorf("version 0.4.0 was asked %v", got)
	}
	w.conflist("10-test.conflist", log, map[string]any{"type": "nosuch"})
	if _, err := w.net.Attach(t.Context(), w.pod()); err == nil || !strings.Contains(err.Error(), "nosuch") {
		t.Errorf("missing plugin: %v", err)
	}
	if err := os.RemoveAll(w.cfg.ConfDir); err != nil {
		t.Fatal(err)
	}
}

func TestCNIDeadline(t *testing.T) {
	w, log := cniWorld(t, func(c *Config) { c.PluginTimeout = time.Second })
	p := w.pod()
	start := time.Now()
	w.conflist("10-test.conflist", log, map[string]any{"hang": "ADD"})
	if _, err := w.net.Attach(t.Context(), p); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("hanging plugin: %v, want deadline exceeded", err)
	}
	if d := time.Since(start); d > 15*time.Second {
		t.Errorf("a hanging plugin took %s", d)
	}
	if c := calls(t, log); len(c) == 0 || c[len(c)-1].Cmd != "DEL" {
		t.Errorf("calls %v, want DEL after the failed ADD", c)
	}
}

// The first usable file in order of name counts; when none is, the error says
// why each is not.
func TestCNIConfigFiles(t *testing.T) {
	w, log := cniWorld(t)
	w.conf("05-broken.conflist", "{")
	w.conf("06-empty.conflist", `{"cniVersion":"1.0.0","name":"x","plugins":[]}`)
	w.conf("07-list.conf", `{"cniVersion":"1.0.0","name":"x","plugins":[{"type":"fake"}]}`)
	w.conf("readme.txt", "no")
	_, err := w.net.cni.config()
	for _, want := range []string{"05-broken.conflist", "06-empty.conflist", "07-list.conf"} {
		if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v does not name %s", err, want)
		}
	}
	if err := w.net.Ready(t.Context()); err == nil {
		t.Error("ready with no usable configuration")
	}
	w.conf("20-b.conf", fmt.Sprintf(`{"cniVersion":"0.3.1","name":"single","type":"fake","calls":%q,"result":"{\"cniVersion\":\"0.3.1\",\"ips\":[{\"version\":\"4\",\"address\":\"10.6.0.2/24\"}]}"}`, log))
	p := w.pod()
	if r := w.attach(p); !slices.Equal(r.IPs, []string{"10.6.0.2"}) {
		t.Errorf("addresses %v", r.IPs)
	}
	w.detach(p)
	w.conflist("10-a.conflist", log, nil)
	if l, err := w.net.cni.config(); err != nil || l.Name != "testnet" {
		t.Errorf("config %v, %v; want testnet", l, err)
	}
	if err := os.RemoveAll(w.cfg.ConfDir); err != nil {
		t.Fatal(err)
	}
	if l, err := w.net.cni.config(); err != nil || l != nil {
		t.Errorf("config %v, %v; want none", l, err)
	}
}

// lo is up whatever the plugins do.
func TestCNILoopback(t *testing.T) {
	w, log := cniWorld(t)
	w.conflist("10-test.conflist", log, nil)
	p := w.pod()
	w.attach(p)
	in(t, p, func() error {
		l, err := netlink.LinkByIndex(1)
		if err == nil && l.Attrs().Flags&net.FlagUp == 0 {
			t.Error("lo is down")
		}
		return err
	})
	w.detach(p)
	// No address is an error, and DEL follows.
	w.conflist("10-test.conflist", log, map[string]any{"result": `{"cniVersion":"1.0.0"}`})
	calls(t, log)
	if _, err := w.net.Attach(t.Context(), w.pod()); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("no address: %v", err)
	}
	if c := calls(t, log); len(c) != 2 || c[1].Cmd != "DEL" {
		t.Errorf("calls %v", c)
	}
}

// TestASTATUSThatHangsHoldsUpNoPod: it is a plugin's, and others need no answer.
func TestASTATUSThatHangsHoldsUpNoPod(t *testing.T) {
	w, log := cniWorld(t)
	w.conflist("10-test.conflist", log, map[string]any{"hang": "STATUS"})
	patient, giveUp := context.WithCancel(t.Context())
	first := make(chan error, 1)
	go func() { first <- w.net.Ready(patient) }()
	deadline := time.Now().Add(20 * time.Second)
	for { // the plugin has been asked, and hangs
		if data, _ := os.ReadFile(log); strings.Contains(string(data), "STATUS") {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the plugin is not asked")
		}
		time.Sleep(time.Millisecond)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	done, p := make(chan struct{}), w.pod()
	go func() {
		defer close(done)
		if _, err := w.net.Attach(ctx, p); err != nil {
			t.Error(err)
		}
		if err := w.net.Detach(ctx, p); err != nil {
			t.Error(err)
		}
	}()
	select {
	case <-done:
	case <-ctx.Done():
		t.Error("a pod waits for the plugin")
	}
	// Who asks too waits no longer than he has time.
	soon, stop := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer stop()
	if err := w.net.Ready(soon); !errdefs.IsUnavailable(err) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("the second: %v", err)
	}
	giveUp()
	if err := <-first; !errors.Is(err, context.Canceled) {
		t.Errorf("the first: %v", err)
	}
	<-done
	// And the network closes without waiting for the plugin: see newWorld.
}
