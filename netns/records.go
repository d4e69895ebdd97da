package netns

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
)

// recordVersion of attachment files.
const recordVersion = 1

// attachment is what one sandbox holds of the network. It is written before
// anything is taken and removed after everything is given back, so that
// whatever a crash leaves can be found. No fsync: after a power cut there are
// no sandboxes.
//
// Those of the built-in network are in RunDir, which dies with the host's
// uptime as their links do. Those of CNI are in DataDir: plugins keep leases
// across a boot.
type attachment struct {
	Version   int          `json:"version"`
	SandboxID string       `json:"sandboxID"`
	Pod       string       `json:"pod"` // namespace/name
	UID       string       `json:"uid,omitempty"`
	Link      string       `json:"link,omitempty"` // host side, built-in network
	IPs       []netip.Addr `json:"ips,omitempty"`
	Ports     []hostPort   `json:"ports,omitempty"`
	CNI       *cniRecord   `json:"cni,omitempty"`
}

// records is one directory of attachments.
type records struct{ dir string }

func (r records) path(id string) string { return filepath.Join(r.dir, id+".json") }

// save writes atomically.
func (r records) save(a *attachment) error {
	data, err := json.Marshal(a)
	if err != nil {
		return err
	}
	return writeAtomic(r.path(a.SandboxID), data)
}

func writeAtomic(path string, data []byte) error {
	tmp := path + ".tmp"
	if err := os.WriteFile(tmp, data, 0o600); err != nil {
		return fmt.Errorf("network state: %w", err)
	}
	if err := os.Rename(tmp, path); err != nil {
		_ = os.Remove(tmp)
		return fmt.Errorf("network state: %w", err)
	}
	return nil
}

func (r records) drop(id string) error {
	if err := os.Remove(r.path(id)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("network state: %w", err)
	}
	return nil
}

// load reads all. A record that cannot be read is set aside as *.broken and
// reported; what it held is found by Sweep from the kernel's side.
func (r records) load(log *slog.Logger) ([]*attachment, error) {
	if err := os.MkdirAll(r.dir, 0o700); err != nil {
		return nil, fmt.Errorf("network state: %w", err)
	}
	entries, err := os.ReadDir(r.dir)
	if err != nil {
		return nil, fmt.Errorf("network state: %w", err)
	}
	var out []*attachment
	for _, e := range entries {
		path := filepath.Join(r.dir, e.Name())
		id, ok := strings.CutSuffix(e.Name(), ".json")
		if !ok {
			if strings.HasSuffix(e.Name(), ".tmp") {
				_ = os.Remove(path) // a write that a crash cut short
			}
			continue
		}
		data, err := os.ReadFile(path)
		a := &attachment{}
		if err == nil {
			err = json.Unmarshal(data, a)
		}
		if err == nil && (a.Version != recordVersion || a.SandboxID != id) {
			err = fmt.Errorf("version %d of sandbox %q", a.Version, a.SandboxID)
		}
		if err != nil {
			log.Error("network record is unreadable, set aside", "file", path, "error", err)
			_ = os.Rename(path, path+".broken")
			continue
		}
		out = append(out, a)
	}
	return out, nil
}

// checkID refuses what cannot be a file's name; CRI's ids are hexadecimal.
func checkID(id string) error {
	if id == "" || len(id) > 128 || id[0] == '.' || strings.ContainsAny(id, "/\x00") {
		return fmt.Errorf("sandbox id %q: must be a file name of at most 128 bytes: %w", id, errdefs.ErrInvalidArgument)
	}
	return nil
}

func splitComma(s string) []string {
	var out []string
	for _, f := range strings.Split(s, ",") {
		if f = strings.TrimSpace(f); f != "" {
			out = append(out, f)
		}
	}
	return out
}
