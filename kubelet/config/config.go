// Package config reads podd's configuration: a KubeletConfiguration file as
// upstream's kubelet has it, with documents of kind PoddConfiguration beside it
// for what only podd has, a directory of drop-ins, and flags.
//
// What comes later wins: defaults, file, drop-ins in order of their names,
// flags. A field or flag that upstream has and podd does not act on yet is a
// warning; one that nobody knows is an error with file, line and field.
package config

import (
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/spf13/pflag"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	kubeletv1beta1 "k8s.io/kubelet/config/v1beta1"

	"github.com/podd-runtime/podd/kubelet/manifests/document"
)

// Config is what podd runs with, after Load: defaulted, checked, all paths
// absolute.
type Config struct {
	// Kubelet are the settings that upstream's kubelet has, too.
	Kubelet kubeletv1beta1.KubeletConfiguration
	// Podd are the others.
	Podd PoddConfiguration
	// Warnings are about settings that are known but have no effect.
	Warnings []Warning

	// serialize is an explicit serializeImagePulls: true.
	serialize bool

	// from is where fields were set: "kubelet.port" → "file:12".
	from map[string]string

	file, dir string
	flags     []*flagValue
}

// UserIDsPerPod is userNamespaces.idsPerPod; 0: not set.
func (c *Config) UserIDsPerPod() int64 {
	if u := c.Kubelet.UserNamespaces; u != nil && u.IDsPerPod != nil {
		return *u.IDsPerPod
	}
	return 0
}

// Warning is a setting that is accepted and not acted on.
type Warning struct {
	// Name of the field or, with its dashes, of the flag.
	Name string
	// Value that was asked for.
	Value string
	// From is file and line, or "flag".
	From string
	// Reason why it has no effect.
	Reason string
}

func (w Warning) String() string {
	return fmt.Sprintf("%s: %s=%s has no effect: %s", w.From, w.Name, w.Value, w.Reason)
}

// defaultsJSON is what upstream's SetDefaults_KubeletConfiguration of 1.36.3
// makes of an empty KubeletConfiguration. Its package cannot be imported at a
// price: it brings the apiserver and etcd's client along.
//
//go:embed defaults.json
var defaultsJSON []byte

const (
	kubeletAPIVersion = "kubelet.config.k8s.io/v1beta1"
	kubeletKind       = "KubeletConfiguration"
	poddAPIVersion    = "podd.dev/v1alpha1"
	poddKind          = "PoddConfiguration"
)

// settings is a configuration on its way: JSON as maps.
type settings = map[string]any

// loader collects what the sources say.
type loader struct {
	kubelet, podd settings
	// from is where a field was last set: "kubelet.maxPods" → "file:12".
	from map[string]string
	// dirs is the directory that a relative path of a field is relative to.
	dirs map[string]string
	// unused are flags without effect.
	unused []Warning
}

// Load reads files, drop-ins and the flags that AddFlags registered in c.
func (c *Config) Load() error {
	l := &loader{kubelet: settings{}, podd: settings{}, from: map[string]string{}, dirs: map[string]string{}}
	if c.file != "" {
		if err := l.readFile(c.file); err != nil {
			return fmt.Errorf("configuration (--config): %w", err)
		}
	}
	if c.dir != "" {
		if err := l.readDir(c.dir); err != nil {
			return fmt.Errorf("configuration (--config-dir): %w", err)
		}
	}
	var errs []error
	for _, f := range c.flags {
		if err := l.takeFlag(f); err != nil {
			errs = append(errs, err)
		}
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	return c.finish(l)
}

// readDir reads the drop-ins: *.conf, in order of their paths, as upstream does.
func (l *loader) readDir(dir string) error {
	return filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case e.IsDir() || filepath.Ext(path) != ".conf":
			return nil
		}
		return l.readFile(path)
	})
}

// maxFile of a configuration, in bytes: a hundred times one that sets everything.
const maxFile = 1 << 20

func read(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err == nil && len(data) > maxFile {
		err = fmt.Errorf("%s: is larger than %d MiB, which no configuration is: %w", path, maxFile>>20, errdefs.ErrInvalidArgument)
	}
	return data, err
}

func (l *loader) readFile(path string) error {
	path, err := filepath.Abs(path)
	if err != nil {
		return err
	}
	data, err := read(path)
	if err != nil {
		return err
	}
	docs := document.Split(data)
	if len(docs) == 0 {
		return fmt.Errorf("%s: is empty: start it with apiVersion: %s, kind: %s: %w", path, kubeletAPIVersion, kubeletKind, errdefs.ErrInvalidArgument)
	}
	var errs []error
	for _, doc := range docs {
		for _, p := range l.readDocument(path, doc) {
			errs = append(errs, fmt.Errorf("%s: %w", path, p))
		}
	}
	if len(errs) > 0 {
		return fmt.Errorf("%w: %w", errors.Join(errs...), errdefs.ErrInvalidArgument)
	}
	return nil
}

func (l *loader) readDocument(path string, doc document.Document) []document.Problem {
	raw, problems := doc.JSON()
	if problems != nil {
		return problems
	}
	var head metav1.TypeMeta
	if err := json.Unmarshal(raw, &head); err != nil {
		return []document.Problem{{Line: doc.Line, Message: "is not a mapping with apiVersion and kind"}}
	}
	var into any
	var target settings
	var prefix string
	switch head {
	case metav1.TypeMeta{APIVersion: kubeletAPIVersion, Kind: kubeletKind}:
		into, target, prefix = &kubeletv1beta1.KubeletConfiguration{}, l.kubelet, "kubelet"
	case metav1.TypeMeta{APIVersion: poddAPIVersion, Kind: poddKind}:
		into, target, prefix = &PoddConfiguration{}, l.podd, "podd"
	default:
		return []document.Problem{{Line: doc.Locate("kind"), Field: "kind", Message: fmt.Sprintf("is %q of %q", head.Kind, head.APIVersion),
			Remedy: fmt.Sprintf("use %s of %s or %s of %s", kubeletKind, kubeletAPIVersion, poddKind, poddAPIVersion)}}
	}
	if problems := doc.Strict(raw, "", into); problems != nil {
		return problems
	}
	var patch settings
	if err := json.Unmarshal(raw, &patch); err != nil {
		return []document.Problem{{Line: doc.Line, Message: err.Error()}}
	}
	delete(patch, "apiVersion")
	delete(patch, "kind")
	leaves(patch, "", func(field string, _ any) {
		l.from[prefix+"."+field] = fmt.Sprintf("%s:%d", path, doc.Locate(field))
		l.dirs[prefix+"."+field] = filepath.Dir(path)
	})
	merge(target, patch)
	return nil
}

// merge is a JSON merge patch (RFC 7396), which upstream merges drop-ins by:
// mappings are merged, all else is replaced, null removes.
func merge(into, patch settings) {
	for k, v := range patch {
		switch v := v.(type) {
		case nil:
			delete(into, k)
		case settings:
			sub, ok := into[k].(settings)
			if !ok {
				sub = settings{}
				into[k] = sub
			}
			merge(sub, v)
		default:
			into[k] = v
		}
	}
}

// leaves visits every value that is not a mapping.
func leaves(s settings, prefix string, visit func(field string, v any)) {
	for k, v := range s {
		field := document.Join(prefix, k)
		if sub, ok := v.(settings); ok && len(sub) > 0 {
			leaves(sub, field, visit)
			continue
		}
		visit(field, v)
	}
}

func lookup(s settings, field string) (any, bool) {
	// Keys of maps may hold dots (evictionHard's): the longest one that fits.
	for k, v := range s {
		if k == field {
			return v, true
		}
		if rest, ok := strings.CutPrefix(field, k+"."); ok {
			if sub, isMap := v.(settings); isMap {
				if found, ok := lookup(sub, rest); ok {
					return found, true
				}
			}
		}
	}
	return nil, false
}

func set(s settings, field string, v any) {
	parts := strings.Split(field, ".")
	for _, p := range parts[:len(parts)-1] {
		sub, ok := s[p].(settings)
		if !ok {
			sub = settings{}
			s[p] = sub
		}
		s = sub
	}
	s[parts[len(parts)-1]] = v
}

// finish puts defaults under what was collected, decodes, checks and warns.
func (c *Config) finish(l *loader) error {
	var defaults settings
	if err := json.Unmarshal(defaultsJSON, &defaults); err != nil {
		return fmt.Errorf("built-in defaults: %w", err)
	}
	if err := dropUnset(l.kubelet, defaults); err != nil {
		return fmt.Errorf("%s: %w", kubeletKind, err)
	}
	c.warn(l, defaults)
	c.serialize = l.kubelet["serializeImagePulls"] == true
	all := settings{}
	merge(all, defaults)
	merge(all, l.kubelet)
	if err := decode(all, &c.Kubelet); err != nil {
		return fmt.Errorf("%s: %w", kubeletKind, err)
	}
	podd := defaultPodd()
	if err := decode(l.podd, &podd); err != nil {
		return fmt.Errorf("%s: %w", poddKind, err)
	}
	c.Podd = podd
	c.from = l.from
	if err := c.paths(l); err != nil {
		return err
	}
	return c.check(l)
}

// dropUnset takes out the fields that upstream takes for unset although they are
// written down: the zero values of fields that are no pointers. kubeadm writes
// many of them.
func dropUnset(s, defaults settings) error {
	var typed kubeletv1beta1.KubeletConfiguration
	if err := decode(s, &typed); err != nil {
		return err
	}
	raw, err := json.Marshal(typed)
	if err != nil {
		return err
	}
	var kept settings
	if err := json.Unmarshal(raw, &kept); err != nil {
		return err
	}
	var unset []string
	leaves(s, "", func(field string, v any) {
		value, ok := lookup(kept, field)
		// Durations and the endpoint are encoded even when they are zero.
		if !ok || value == "0s" || value == "" || field == "logging.flushFrequency" && value == 0.0 {
			unset = append(unset, field)
		}
	})
	for _, field := range unset {
		if def, ok := lookup(defaults, field); ok {
			set(s, field, def)
		}
	}
	return nil
}

func decode(s settings, into any) error {
	raw, err := json.Marshal(s)
	if err != nil {
		return err
	}
	return json.Unmarshal(raw, into)
}

// warn collects what has no effect: what differs from the default and is not
// acted on.
func (c *Config) warn(l *loader, defaults settings) {
	leaves(l.kubelet, "", func(field string, v any) {
		if isHonoured(field) {
			return
		}
		if def, ok := lookup(defaults, field); ok && reflect.DeepEqual(def, v) || !ok && isZero(v) {
			return
		}
		from := l.from["kubelet."+field]
		if from == "" {
			for name := field; from == "" && name != ""; {
				name = name[:max(strings.LastIndexByte(name, '.'), 0)]
				from = l.from["kubelet."+name]
			}
		}
		value, _ := json.Marshal(v)
		c.Warnings = append(c.Warnings, Warning{Name: field, Value: string(value), From: from, Reason: reason(field)})
	})
	c.Warnings = append(c.Warnings, l.unused...)
	slices.SortFunc(c.Warnings, func(a, b Warning) int { return strings.Compare(a.Name, b.Name) })
}

func isZero(v any) bool {
	switch v := v.(type) {
	case nil:
		return true
	case string:
		return v == "" || v == "0s"
	case bool:
		return !v
	case float64:
		return v == 0
	case []any:
		return len(v) == 0
	case settings:
		return len(v) == 0
	}
	return false
}

// paths makes all paths absolute: relative ones of a file are relative to it,
// those of flags to the working directory, as upstream has it.
func (c *Config) paths(l *loader) error {
	wd, err := os.Getwd()
	if err != nil {
		return err
	}
	abs := func(p *string, field string) {
		if *p == "" || filepath.IsAbs(*p) {
			return
		}
		dir := l.dirs[field]
		if dir == "" {
			dir = wd
		}
		*p = filepath.Join(dir, *p)
	}
	if c.Kubelet.StaticPodPath == "" {
		// Upstream has none by default; a node without a cluster lives by it.
		c.Kubelet.StaticPodPath = "/etc/kubernetes/manifests"
	}
	abs(&c.Kubelet.StaticPodPath, "kubelet.staticPodPath")
	abs(&c.Kubelet.PodLogsDir, "kubelet.podLogsDir")
	p := &c.Podd
	for field, path := range map[string]*string{
		"dataDir": &p.DataDir, "runDir": &p.RunDir, "rootDir": &p.RootDir, "criSocket": &p.CRISocket,
		"kubeconfig": &p.Kubeconfig, "bootstrapKubeconfig": &p.BootstrapKubeconfig, "certDir": &p.CertDir,
		"registryConfigPath": &p.RegistryConfigPath, "cniConfDir": &p.CNIConfDir, "credentialsFile": &p.CredentialsFile,
		"imageCredentialProviderConfig": &p.ImageCredentialProviderConfig, "imageCredentialProviderBinDir": &p.ImageCredentialProviderBinDir,
	} {
		abs(path, "podd."+field)
	}
	if strings.Contains(p.ShimPath, "/") {
		abs(&p.ShimPath, "podd.shimPath")
	}
	for i := range p.CNIBinDirs {
		abs(&p.CNIBinDirs[i], "podd.cniBinDirs")
	}
	for i := range p.CDIDirs {
		abs(&p.CDIDirs[i], "podd.cdiDirs")
	}
	if p.Instance == "" && p.RunDir != defaultRunDir {
		p.Instance = fmt.Sprintf("%08x", crc32.ChecksumIEEE([]byte(p.RunDir)))
	}
	if p.CertDir == "" {
		p.CertDir = filepath.Join(p.RootDir, "pki")
	}
	if p.CRISocket == "" {
		p.CRISocket = filepath.Join(p.RunDir, "podd.sock")
	}
	if p.NodeName == "" {
		name, err := os.Hostname()
		if err != nil {
			return fmt.Errorf("host name: %w; give --hostname-override", err)
		}
		p.NodeName = name
	}
	p.NodeName = strings.ToLower(strings.TrimSpace(p.NodeName)) // as upstream
	return nil
}

// Said tells whether a field of the KubeletConfiguration was set, by a file or
// a flag, and is not only a default.
func (c *Config) Said(field string) bool { return c.from["kubelet."+field] != "" }

// Given are the flags that were given, with their values.
func (c *Config) Given() map[string]string {
	out := map[string]string{}
	for _, f := range c.flags {
		if len(f.given) > 0 {
			out[f.def.name] = f.String()
		}
	}
	return out
}

// LogLevel is the least level that is logged: --v=0 and up is Info, --v=4 and
// up is Debug, as klog's levels are used.
func (c *Config) LogLevel() slog.Level { return LogLevel(uint32(c.Kubelet.Logging.Verbosity)) }

// LogLevel is the least level that is logged with that verbosity.
func LogLevel(v uint32) slog.Level {
	if v >= 4 {
		return slog.LevelDebug
	}
	return slog.LevelInfo
}

// LogMaxSize is containerLogMaxSize in bytes.
func (c *Config) LogMaxSize() int64 {
	q, err := resource.ParseQuantity(c.Kubelet.ContainerLogMaxSize)
	if err != nil {
		return 0 // check has refused it
	}
	return q.Value()
}

// ParallelPulls is how many images may be pulled at once; 0 when nothing is
// said. Upstream pulls one after the other by default; podd does so only when
// serializeImagePulls is asked for.
func (c *Config) ParallelPulls() int {
	switch {
	case c.Kubelet.MaxParallelImagePulls != nil:
		return int(*c.Kubelet.MaxParallelImagePulls)
	case c.serialize:
		return 1
	}
	return 0
}

// AddFlags registers all flags, of upstream's kubelet and of podd, in fs. Their
// values come into c with Load, once fs is parsed.
func AddFlags(fs *pflag.FlagSet, c *Config) {
	fs.StringVar(&c.file, "config", "", "file of KubeletConfiguration and PoddConfiguration documents")
	fs.StringVar(&c.dir, "config-dir", "", "directory of drop-ins (*.conf) that change the file, in order of their names")
	for _, list := range [][]flagDef{poddFlags, upstreamFlags} {
		for i := range list {
			c.flags = append(c.flags, list[i].add(fs))
		}
	}
	fs.SetNormalizeFunc(func(_ *pflag.FlagSet, name string) pflag.NormalizedName {
		return pflag.NormalizedName(strings.ReplaceAll(name, "_", "-"))
	})
}
