package images

import (
	"encoding/json"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Bounds on an image's config: what Linux takes for one program, or far beyond
// what real images have.
const (
	maxStrings     = 4096      // env, args, labels, volumes, ports
	maxString      = 128 << 10 // MAX_ARG_STRLEN: execve takes no longer argument or variable
	maxStringTotal = 1 << 20
	maxUser        = 256
)

// reservedLabels are prefixes that other programs act on; an image must not
// set them (CVE-2026-53488 was a label that ended in a command on the host).
var reservedLabels = []string{"containerd.io/", "io.containerd.", "io.kubernetes.cri", "io.cri-containerd", "io.podd."}

// parseConfig reads an image config as what it is: input from a stranger.
func parseConfig(raw []byte, layers int) (*ocispec.Image, error) {
	// Times are nobody's business here, and often wrong: "" for one. The
	// fields hide those of the embedded type.
	var doc struct {
		ocispec.Image
		Created json.RawMessage `json:"created"`
		History json.RawMessage `json:"history"`
	}
	if err := json.Unmarshal(raw, &doc); err != nil {
		return nil, fmt.Errorf("image config: %v: %w", err, ErrHostile)
	}
	c := doc.Image
	var created time.Time
	if json.Unmarshal(doc.Created, &created) == nil && !created.IsZero() {
		c.Created = &created
	}
	bad := func(field, format string, args ...any) error {
		return fmt.Errorf("image config: %s: %s: %w", field, fmt.Sprintf(format, args...), ErrHostile)
	}
	if c.OS != "" && c.OS != "linux" {
		return nil, fmt.Errorf("image is for operating system %q, this node runs linux: %w", clip(c.OS), errdefs.ErrFailedPrecondition)
	}
	if c.RootFS.Type != "" && c.RootFS.Type != "layers" {
		return nil, bad("rootfs.type", "%q is not known", clip(c.RootFS.Type))
	}
	if n := len(c.RootFS.DiffIDs); n != layers {
		return nil, bad("rootfs.diff_ids", "%d for %d layers", n, layers)
	}
	for i, d := range c.RootFS.DiffIDs {
		if err := d.Validate(); err != nil {
			return nil, bad("rootfs.diff_ids", "number %d is %q: %v", i, clip(string(d)), err)
		}
	}
	if err := checkUser(c.Config.User); err != nil {
		return nil, bad("user", "%v", err)
	}
	if w := c.Config.WorkingDir; len(w) >= 4096 || control(w) {
		return nil, bad("workingDir", "unusable")
	}
	if s := c.Config.StopSignal; len(s) > 32 || control(s) {
		return nil, bad("stopSignal", "%q is no signal", clip(s))
	}
	env := c.Config.Env[:0]
	for _, e := range c.Config.Env {
		name, value, ok := strings.Cut(e, "=")
		if !ok || name == "" {
			continue // nothing that execve could pass on under a name
		}
		if name == "HOME" && control(value) { // ends up in passwd (CVE-2026-15809)
			return nil, bad("env", "HOME contains control characters")
		}
		env = append(env, e)
	}
	c.Config.Env = env
	for _, f := range []struct {
		name string
		list []string
	}{{"env", c.Config.Env}, {"entrypoint", c.Config.Entrypoint}, {"cmd", c.Config.Cmd}} {
		if err := checkStrings(f.list); err != nil {
			return nil, bad(f.name, "%v", err)
		}
	}
	labels := make([]string, 0, len(c.Config.Labels))
	for k, v := range c.Config.Labels {
		for _, p := range reservedLabels {
			if strings.HasPrefix(k, p) {
				delete(c.Config.Labels, k)
				k = ""
				break
			}
		}
		if k != "" {
			labels = append(labels, k+v)
		}
	}
	if err := checkStrings(labels); err != nil {
		return nil, bad("labels", "%v", err)
	}
	if len(c.Config.Volumes) > maxStrings || len(c.Config.ExposedPorts) > maxStrings {
		return nil, bad("volumes or exposedPorts", "more than %d", maxStrings)
	}
	for v := range c.Config.Volumes {
		if len(v) >= 4096 || control(v) {
			return nil, bad("volumes", "%q is unusable", clip(v))
		}
	}
	// Whoever appends to them gets a copy.
	c.Config.Env, c.Config.Entrypoint, c.Config.Cmd = slices.Clip(c.Config.Env), slices.Clip(c.Config.Entrypoint), slices.Clip(c.Config.Cmd)
	return &c, nil
}

// checkUser takes name, uid, name:group, uid:gid; numbers must be ids that
// exist: CVE-2024-40635 was one beyond int32 that wrapped round to root.
func checkUser(u string) error {
	if len(u) > maxUser || control(u) {
		return fmt.Errorf("%q is unusable", clip(u))
	}
	user, group, _ := strings.Cut(u, ":")
	if strings.Contains(group, ":") {
		return fmt.Errorf("%q has more than one colon", u)
	}
	for _, part := range []string{user, group} {
		if part == "" || strings.Trim(part, "+-0123456789") != "" {
			continue
		}
		if n, err := strconv.ParseInt(part, 10, 64); err != nil || n < 0 || n > math.MaxInt32 {
			return fmt.Errorf("id %q is not between 0 and %d", part, math.MaxInt32)
		}
	}
	return nil
}

func checkStrings(list []string) error {
	if len(list) > maxStrings {
		return fmt.Errorf("%d entries, at most %d are allowed", len(list), maxStrings)
	}
	total := 0
	for _, s := range list {
		if len(s) >= maxString {
			return fmt.Errorf("an entry of %d bytes, at most %d are allowed", len(s), maxString-1)
		}
		if strings.IndexByte(s, 0) >= 0 {
			return fmt.Errorf("an entry contains a NUL byte")
		}
		if total += len(s); total > maxStringTotal {
			return fmt.Errorf("more than %d bytes in all", maxStringTotal)
		}
	}
	return nil
}

func control(s string) bool {
	return strings.ContainsFunc(s, func(r rune) bool { return r < 0x20 || r == 0x7f })
}
