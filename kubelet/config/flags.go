package config

import (
	"fmt"
	"net"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/spf13/pflag"
)

// kind is how the text of a flag is read.
type kind int

const (
	kindString     kind = iota
	kindIP              // an address
	kindBool            // true, false; alone: true
	kindInt             // a whole number
	kindDuration        // 10s, 1m0s
	kindList            // a,b; may be repeated
	kindMap             // k=v,k=v; may be repeated
	kindBoolMap         // k=true,k=false; may be repeated
	kindThresholds      // memory.available<100Mi,…
	kindOpaque          // not looked at
)

// flagDef describes a flag.
type flagDef struct {
	name string
	kind kind
	// field of the KubeletConfiguration, or of the PoddConfiguration, that the
	// flag sets; both empty: the flag has no effect.
	field, podd string
	// def is the default of a flag that has no effect: giving it is no warning.
	def string
	// deprecated is upstream's message.
	deprecated string
	usage      string
}

// flagValue holds what a flag was given, until Load.
type flagValue struct {
	def   *flagDef
	given []string
}

func (d *flagDef) add(fs *pflag.FlagSet) *flagValue {
	v := &flagValue{def: d}
	usage, short := d.usage, ""
	if usage == "" {
		usage = usages[d.name]
	}
	if d.name == "v" {
		short = "v"
	}
	f := fs.VarPF(v, d.name, short, usage)
	if d.kind == kindBool {
		f.NoOptDefVal = "true"
	}
	// Flags that have no effect are accepted, not advertised.
	f.Hidden = usage == ""
	if d.deprecated != "" {
		fs.MarkDeprecated(d.name, d.deprecated)
	}
	return v
}

func (v *flagValue) String() string { return strings.Join(v.given, ",") }

func (v *flagValue) Type() string {
	switch v.def.kind {
	case kindBool:
		return "bool"
	case kindInt:
		return "int"
	case kindDuration:
		return "duration"
	case kindList:
		return "strings"
	case kindMap, kindBoolMap, kindThresholds:
		return "map"
	}
	return "string"
}

func (v *flagValue) Set(s string) error {
	if _, err := parseFlag(v.def.kind, s); err != nil {
		return err
	}
	if v.def.kind != kindList && v.def.kind != kindMap && v.def.kind != kindBoolMap {
		v.given = v.given[:0]
	}
	v.given = append(v.given, s)
	return nil
}

// parseFlag reads the text of a flag into what JSON has for it.
func parseFlag(k kind, s string) (any, error) {
	bad := func(want string) (any, error) {
		return nil, fmt.Errorf("%q: want %s", s, want)
	}
	switch k {
	case kindIP:
		if net.ParseIP(s) == nil {
			return bad("an IP address")
		}
	case kindBool:
		b, err := strconv.ParseBool(s)
		if err != nil {
			return bad("true or false")
		}
		return b, nil
	case kindInt:
		n, err := strconv.ParseInt(s, 0, 64)
		if err != nil {
			return bad("a whole number")
		}
		return float64(n), nil
	case kindDuration:
		d, err := time.ParseDuration(s)
		if err != nil {
			return bad("a duration such as 10s")
		}
		return d.String(), nil
	case kindList:
		out := []any{}
		for part := range strings.SplitSeq(s, ",") {
			if part != "" {
				out = append(out, part)
			}
		}
		return out, nil
	case kindMap, kindBoolMap, kindThresholds:
		sep := "="
		if k == kindThresholds {
			sep = "<"
		}
		out := settings{}
		for part := range strings.SplitSeq(s, ",") {
			if part == "" {
				continue
			}
			key, value, ok := strings.Cut(part, sep)
			if !ok {
				return bad("pairs like key" + sep + "value")
			}
			key, value = strings.TrimSpace(key), strings.TrimSpace(value)
			if k == kindBoolMap {
				b, err := strconv.ParseBool(value)
				if err != nil {
					return bad("pairs like key=true")
				}
				out[key] = b
				continue
			}
			out[key] = value
		}
		return out, nil
	}
	return s, nil
}

// takeFlag puts a flag that was given over what the files say.
func (l *loader) takeFlag(f *flagValue) error {
	if len(f.given) == 0 {
		return nil
	}
	d := f.def
	value, err := parseFlag(d.kind, strings.Join(f.given, ","))
	if err != nil {
		return fmt.Errorf("--%s: %w: %w", d.name, err, errdefs.ErrInvalidArgument)
	}
	switch {
	case d.podd != "":
		set(l.podd, d.podd, value)
		l.forget("podd." + d.podd)
		l.from["podd."+d.podd] = "--" + d.name
	case d.field != "":
		if d.kind == kindBoolMap { // gates of the file that the flag does not name stay, as upstream
			patch := settings{}
			set(patch, d.field, value)
			merge(l.kubelet, patch)
		} else {
			set(l.kubelet, d.field, value)
		}
		l.forget("kubelet." + d.field)
		l.from["kubelet."+d.field] = "--" + d.name
	case f.String() != d.def:
		l.unused = append(l.unused, Warning{Name: "--" + d.name, Value: f.String(), From: "flag", Reason: reason(d.name)})
	}
	return nil
}

// forget drops where a field, or what is below it, came from.
func (l *loader) forget(field string) {
	for _, m := range []map[string]string{l.from, l.dirs} {
		for k := range m {
			if k == field || strings.HasPrefix(k, field+".") {
				delete(m, k)
			}
		}
	}
}
