package cri

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/contrib/apparmor"
	"github.com/containerd/containerd/v2/contrib/seccomp"
	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	selinux "github.com/opencontainers/selinux/go-selinux"
	"github.com/opencontainers/selinux/go-selinux/label"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// defaultCapabilities of a container, the set every runtime gives.
var defaultCapabilities = []string{
	"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD", "CAP_NET_RAW", "CAP_SETGID",
	"CAP_SETUID", "CAP_SETFCAP", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT", "CAP_KILL", "CAP_AUDIT_WRITE",
}

const (
	appArmorProfile = "cri-containerd.apparmor.d" // the name that clusters' tooling knows
	localhostPrefix = "localhost/"
	maxProfile      = 4 << 20
)

// specCapabilities adds and drops. ALL comes first in either list, so that
// single ones can be named against it.
func (s *Service) specCapabilities(_ context.Context, in *specInput, spec *specs.Spec) error {
	c := in.security().GetCapabilities()
	set := slices.Clone(defaultCapabilities)
	if hasAll(c.GetAddCapabilities()) {
		set = slices.Clone(s.host.caps)
	}
	if hasAll(c.GetDropCapabilities()) {
		set = nil
	}
	add, err := capabilityNames("add_capabilities", c.GetAddCapabilities())
	if err != nil {
		return err
	}
	for _, n := range add {
		if !slices.Contains(set, n) {
			set = append(set, n)
		}
	}
	drop, err := capabilityNames("drop_capabilities", c.GetDropCapabilities())
	if err != nil {
		return err
	}
	set = slices.DeleteFunc(set, func(n string) bool { return slices.Contains(drop, n) })
	if in.privileged() {
		set = slices.Clone(s.host.caps)
	}
	ambient, err := capabilityNames("add_ambient_capabilities", c.GetAddAmbientCapabilities())
	if err != nil {
		return err
	}
	for _, n := range ambient {
		if !slices.Contains(set, n) {
			set = append(set, n)
		}
	}
	// Inheritable stays empty but for ambient ones: see CVE-2022-24769.
	spec.Process.Capabilities = &specs.LinuxCapabilities{
		Bounding: set, Effective: slices.Clone(set), Permitted: slices.Clone(set), Inheritable: ambient, Ambient: slices.Clone(ambient),
	}
	return nil
}

func hasAll(names []string) bool {
	return slices.ContainsFunc(names, func(n string) bool { return strings.EqualFold(n, "ALL") })
}

func capabilityNames(field string, names []string) ([]string, error) {
	var out []string
	for _, n := range names {
		n = strings.ToUpper(n)
		if n == "ALL" {
			if field == "add_ambient_capabilities" {
				return nil, invalid("config.linux.security_context.capabilities.%s: ALL is not possible", field)
			}
			continue
		}
		n = "CAP_" + strings.TrimPrefix(n, "CAP_")
		if len(n) > 64 || strings.Trim(n, "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_") != "" {
			return nil, invalid("config.linux.security_context.capabilities.%s %q", field, clip(n))
		}
		out = append(out, n)
	}
	return out, nil
}

// specPaths hides and protects parts of /proc and /sys: those the client
// names, which is upstream's way to say procMount. Nothing for privileged.
func (s *Service) specPaths(_ context.Context, in *specInput, spec *specs.Spec) error {
	if in.privileged() {
		return nil
	}
	spec.Linux.MaskedPaths = in.security().GetMaskedPaths()
	spec.Linux.ReadonlyPaths = in.security().GetReadonlyPaths()
	return nil
}

// specSeccomp sets the filter. An absent profile field is unconfined, as with
// containerd; an unreadable or empty profile is an error and never unconfined
// (CVE-2023-2431).
func (s *Service) specSeccomp(_ context.Context, in *specInput, spec *specs.Spec) error {
	//lint:ignore SA1019 a client that still sends it must not run unconfined
	old := in.security().GetSeccompProfilePath()
	p, err := profileOf("seccomp", in.security().GetSeccomp(), old)
	if err != nil || p == nil || in.privileged() || p.GetProfileType() == runtimeapi.SecurityProfile_Unconfined {
		return err
	}
	if !s.host.seccomp {
		return fmt.Errorf("security_context.seccomp: the kernel has no seccomp: %w", errdefs.ErrFailedPrecondition)
	}
	if p.GetProfileType() == runtimeapi.SecurityProfile_RuntimeDefault {
		spec.Linux.Seccomp = seccomp.DefaultProfile(spec)
		return nil
	}
	file := strings.TrimPrefix(p.GetLocalhostRef(), localhostPrefix)
	if !filepath.IsAbs(file) || badPath(file) {
		return invalid("security_context.seccomp.localhost_ref %q: want an absolute path", clip(file))
	}
	spec.Linux.Seccomp, err = readSeccomp(file)
	return err
}

func readSeccomp(file string) (*specs.LinuxSeccomp, error) {
	st, err := os.Stat(file)
	if err != nil {
		return nil, fmt.Errorf("security_context.seccomp.localhost_ref: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if !st.Mode().IsRegular() || st.Size() > maxProfile {
		return nil, invalid("security_context.seccomp.localhost_ref %q: no profile (mode %v, %d bytes)", file, st.Mode(), st.Size())
	}
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("security_context.seccomp.localhost_ref: %w", err)
	}
	p := new(specs.LinuxSeccomp)
	if err := json.Unmarshal(b, p); err != nil {
		return nil, invalid("security_context.seccomp.localhost_ref %q: %v", file, err)
	}
	if p.DefaultAction == "" {
		return nil, invalid("security_context.seccomp.localhost_ref %q: defaultAction is missing", file)
	}
	return p, nil
}

// specAppArmor sets the profile. Where the node has AppArmor an absent field
// means the default profile; where it has not, or nothing to load that profile
// with, asking for one is an error.
func (s *Service) specAppArmor(_ context.Context, in *specInput, spec *specs.Spec) error {
	//lint:ignore SA1019 a client that still sends it must not run unconfined
	old := in.security().GetApparmorProfile()
	p, err := profileOf("apparmor", in.security().GetApparmor(), old)
	if err != nil || p.GetProfileType() == runtimeapi.SecurityProfile_Unconfined {
		return err
	}
	if !s.host.appArmor {
		if p != nil {
			return fmt.Errorf("security_context.apparmor: this node has no AppArmor: %w", errdefs.ErrFailedPrecondition)
		}
		return nil
	}
	if p.GetProfileType() == runtimeapi.SecurityProfile_Localhost {
		name := strings.TrimPrefix(p.GetLocalhostRef(), localhostPrefix)
		ok, err := appArmorLoaded(name)
		if err != nil {
			return fmt.Errorf("security_context.apparmor: %w", err)
		}
		if !ok {
			return fmt.Errorf("security_context.apparmor.localhost_ref: profile %q is not loaded: %w", clip(name), errdefs.ErrInvalidArgument)
		}
		spec.Process.ApparmorProfile = name
		return nil
	}
	if in.privileged() {
		return nil
	}
	loaded, err := s.defaultAppArmor()
	switch {
	case err != nil:
		return fmt.Errorf("load AppArmor profile %s: %w", appArmorProfile, err)
	case loaded:
		spec.Process.ApparmorProfile = appArmorProfile
	case p != nil:
		return fmt.Errorf("security_context.apparmor: this node has no apparmor_parser to load profiles with, install package apparmor: %w", errdefs.ErrFailedPrecondition)
	}
	return nil
}

// defaultAppArmor loads the default profile unless it is loaded. false: this
// node cannot.
func (s *Service) defaultAppArmor() (bool, error) {
	if ok, err := appArmorLoaded(appArmorProfile); ok || err != nil {
		return ok, err
	}
	if !s.host.appArmorParser {
		return false, nil
	}
	// Parsing takes a tenth of a second: one does it for all who start at once.
	s.profiles.Lock()
	defer s.profiles.Unlock()
	return true, apparmor.LoadDefaultProfile(appArmorProfile)
}

func appArmorLoaded(name string) (bool, error) {
	if name == "" {
		return false, nil
	}
	f, err := os.Open("/sys/kernel/security/apparmor/profiles")
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer f.Close()
	for sc := bufio.NewScanner(f); sc.Scan(); {
		if strings.HasPrefix(sc.Text(), name+" (") {
			return true, nil
		}
	}
	return false, nil
}

// profileOf reads the profile field, or the deprecated path of older clients:
// runtime/default, unconfined, localhost/NAME, "" for none.
func profileOf(field string, p *runtimeapi.SecurityProfile, old string) (*runtimeapi.SecurityProfile, error) {
	if p != nil {
		switch p.GetProfileType() {
		case runtimeapi.SecurityProfile_RuntimeDefault, runtimeapi.SecurityProfile_Unconfined:
			if p.GetLocalhostRef() != "" {
				return nil, invalid("security_context.%s.localhost_ref is set with profile_type %v", field, p.GetProfileType())
			}
		case runtimeapi.SecurityProfile_Localhost:
			if p.GetLocalhostRef() == "" {
				return nil, invalid("security_context.%s.localhost_ref is missing", field)
			}
		default:
			return nil, invalid("security_context.%s.profile_type %d: unknown", field, p.GetProfileType())
		}
		return p, nil
	}
	switch {
	case old == "":
		return nil, nil
	case old == "runtime/default" || old == "docker/default":
		return &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_RuntimeDefault}, nil
	case old == "unconfined":
		return &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Unconfined}, nil
	case strings.HasPrefix(old, localhostPrefix) && len(old) > len(localhostPrefix):
		return &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Localhost, LocalhostRef: old}, nil
	}
	return nil, invalid("security_context: %s profile %q: want runtime/default, unconfined or localhost/NAME", field, clip(old))
}

// specSELinux labels the process and its files, by the container's options or
// else the pod's.
func (s *Service) specSELinux(_ context.Context, in *specInput, spec *specs.Spec) error {
	process, mount, err := s.selinuxLabels(in.security().GetSelinuxOptions(), in.sandbox.label)
	if err != nil {
		return err
	}
	in.mountLabel = mount
	spec.Linux.MountLabel = mount
	if !in.privileged() {
		spec.Process.SelinuxLabel = process
	}
	return nil
}

// reserveLabel keeps the categories of a label from being given out again.
func reserveLabel(l string) {
	if l != "" {
		selinux.ReserveLabel(l)
	}
}

// selinuxLabels makes the labels: by options, else those of the pod, else new
// ones with categories of their own. On a node without SELinux the options have
// no meaning and are ignored, as every runtime does: pods that carry them are
// meant to run everywhere.
func (s *Service) selinuxLabels(o *runtimeapi.SELinuxOption, pod string) (process, mount string, err error) {
	var opts []string
	for _, f := range []struct{ name, value string }{{"user", o.GetUser()}, {"role", o.GetRole()}, {"type", o.GetType()}, {"level", o.GetLevel()}} {
		if f.value == "" {
			continue
		}
		if len(f.value) > maxName || strings.ContainsAny(f.value, " \n\x00") {
			return "", "", invalid("security_context.selinux_options.%s %q", f.name, clip(f.value))
		}
		opts = append(opts, f.name+":"+f.value)
	}
	if !s.host.selinux {
		return "", "", nil
	}
	if len(opts) == 0 && pod != "" {
		if opts, err = selinux.DupSecOpt(pod); err != nil {
			return "", "", fmt.Errorf("SELinux label of the pod: %w", err)
		}
	}
	process, mount, err = label.InitLabels(opts)
	if err != nil {
		return "", "", fmt.Errorf("security_context.selinux_options: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	return process, mount, nil
}
