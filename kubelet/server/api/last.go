package api

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
)

// LastName is the record of how the daemon of a run directory was started.
const LastName = "podd.last.json"

// Last is how a daemon was started. `podd stop --all` uses it to stop the pods
// of a daemon that is down: only its flags tell where they are.
type Last struct {
	// Program is the daemon's binary, Dir its working directory and Args the
	// arguments after "run".
	Program string   `json:"program"`
	Dir     string   `json:"dir"`
	Args    []string `json:"args"`
}

// Save writes the record of this process into the run directory.
func (l Last) Save(runDir string) error {
	b, err := json.Marshal(l)
	if err != nil {
		return err
	}
	path := filepath.Join(runDir, LastName)
	if err := os.WriteFile(path+".new", b, 0o600); err != nil {
		_ = os.Remove(path + ".new") // it holds what room there was
		return fmt.Errorf("record of this start: %w", err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		return fmt.Errorf("record of this start: %w", err)
	}
	return nil
}

// LoadLast reads the record of a run directory; os.ErrNotExist: there is none.
func LoadLast(runDir string) (l Last, err error) {
	path := filepath.Join(runDir, LastName)
	b, err := os.ReadFile(path)
	if err != nil {
		return l, err
	}
	if err := json.Unmarshal(b, &l); err != nil {
		return l, fmt.Errorf("%s: %w", path, err)
	}
	return l, nil
}
