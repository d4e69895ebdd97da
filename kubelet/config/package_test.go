package config

import (
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"github.com/spf13/pflag"
)

const packaged = "../../systemd/package/podd.yaml"

// example is a commented line of the packaged configuration that shows a
// setting, not one that explains it.
var example = regexp.MustCompile(`(?m)^#([^ \n]|  )`)

// TestPackagedConfiguration: the configuration that packages install loads,
// explains every field that podd acts on, and what it shows as defaults are
// the defaults. Whoever adds a field says there what it is for.
func TestPackagedConfiguration(t *testing.T) {
	raw, err := os.ReadFile(packaged)
	if err != nil {
		t.Fatal(err)
	}
	text := string(raw)
	load := func(text string, args ...string) *Config {
		t.Helper()
		file := filepath.Join(t.TempDir(), "podd.yaml")
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		var c Config
		flags := pflag.NewFlagSet("", pflag.ContinueOnError)
		AddFlags(flags, &c)
		if err := flags.Parse(append([]string{"--config", file, "--hostname-override=node"}, args...)); err != nil {
			t.Fatal(err)
		}
		if err := c.Load(); err != nil {
			t.Fatalf("%v\n%s", err, text)
		}
		for _, w := range c.Warnings {
			t.Errorf("warns: %s", w)
		}
		return &c
	}
	as := load(text)
	if as.Kubelet.CgroupDriver != "systemd" || as.Podd.ShimUnit != "podd-shim.service" {
		t.Errorf("cgroup driver %q, shim unit %q", as.Kubelet.CgroupDriver, as.Podd.ShimUnit)
	}

	shown := example.ReplaceAllString(text, "$1")
	for _, name := range honoured {
		last := name[strings.LastIndexByte(name, '.')+1:]
		if !regexp.MustCompile(`(?m)^ *` + last + `:`).MatchString(shown) {
			t.Errorf("%s does not explain %s", packaged, name)
		}
	}
	for f := range reflect.TypeFor[PoddConfiguration]().Fields() {
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		if name != "" && !strings.Contains(shown, "\n"+name+":") {
			t.Errorf("%s does not explain %s", packaged, name)
		}
	}

	// What has no default of its own is an example: it is left out.
	for _, name := range []string{"shutdownGracePeriodByPodPriority", "maxParallelImagePulls", "serializeImagePulls", "singleProcessOOMKill", "userNamespaces", "memorySwap", "featureGates", "systemReserved", "kubeReserved"} {
		shown = regexp.MustCompile(`(?m)^`+name+`:.*\n([- ].*\n)*`).ReplaceAllString(shown, "")
	}
	all := load(shown)
	all.file, as.file, all.flags, as.flags = "", "", nil, nil
	all.Podd.NodeName, as.Podd.NodeName = "", ""
	for _, part := range []struct {
		name     string
		got, def any
	}{{"KubeletConfiguration", all.Kubelet, as.Kubelet}, {"PoddConfiguration", all.Podd, as.Podd}} {
		got, def := reflect.ValueOf(part.got), reflect.ValueOf(part.def)
		for i := range got.NumField() {
			g, d := got.Field(i), def.Field(i)
			empty := (g.Kind() == reflect.Slice || g.Kind() == reflect.Map) && g.Len() == 0 && d.Len() == 0
			if !empty && !reflect.DeepEqual(g.Interface(), d.Interface()) {
				t.Errorf("%s.%s: shown as %v, but the default is %v", part.name, got.Type().Field(i).Name, g.Interface(), d.Interface())
			}
		}
	}
}
