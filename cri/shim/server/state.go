package server

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/podd-runtime/podd/cri/shim"
)

// recordVersion of the files below; a reader refuses other versions.
const recordVersion = 1

// record is what the shim must know of a sandbox or container after it died.
// It lives in run-dir (a tmpfs) and is replaced atomically, without fsync: it
// has to survive the process, not the machine.
type record struct {
	Version int          `json:"version"`
	Process shim.Process `json:"process"`
	// Making is true until creation is complete: whoever finds it undoes.
	Making bool `json:"making,omitempty"`
	// Digest of the specification: a repeated create must bring the same.
	Digest string `json:"digest"`
	// ProcStart with PID identifies the process.
	ProcStart uint64 `json:"procStart,omitempty"`
	// Pidfd is the inode of the process's pidfd; before Linux 6.9 all have one.
	Pidfd uint64 `json:"pidfd,omitempty"`
	// Cgroup paths by controller ("" for v2).
	Cgroup        string            `json:"cgroup,omitempty"`
	SystemdCgroup bool              `json:"systemdCgroup,omitempty"`
	CgroupPaths   map[string]string `json:"cgroupPaths,omitempty"`
	// Container only.
	LogPath     string `json:"logPath,omitempty"`
	LogMaxSize  int64  `json:"logMaxSize,omitempty"`
	LogMaxFiles int    `json:"logMaxFiles,omitempty"`
	Stdin       bool   `json:"stdin,omitempty"`
	StdinOnce   bool   `json:"stdinOnce,omitempty"`
	Terminal    bool   `json:"terminal,omitempty"`
	OwnPIDNS    bool   `json:"ownPIDNS,omitempty"`
	// SharesPIDs: its PID namespace is its pod's or another container's.
	SharesPIDs bool `json:"sharesPIDs,omitempty"`
	// Tracer: its processes may have CAP_SYS_PTRACE; nil in older records.
	Tracer *bool `json:"tracer,omitempty"`
	// Filter names the compiled seccomp program that execs get; "": none, or
	// libcontainer applies its own.
	Filter string `json:"filter,omitempty"`
	// Keyring and label that libcontainer's init would have set up.
	NoNewPrivs bool `json:"noNewPrivs,omitempty"`
}

// dirs of one kind of record: DIR/shim/<kind>/<id>/record.json.
type store struct {
	root       string // DIR/shim/containers
	quarantine string // DIR/shim/quarantine
	log        *slog.Logger
}

const recordName = "record.json"

func (s *store) dir(id string) string { return filepath.Join(s.root, id) }

// save replaces the record atomically. Only the first save of a record needs
// room: see exchange.
func (s *store) save(r *record) error {
	r.Version = recordVersion
	data, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("encode record of %s: %w", r.Process.ID, err)
	}
	return exchange(filepath.Join(s.dir(r.Process.ID), recordName), data)
}

// recordBlock is what records' files are made multiples of: the block of every
// file system that a run directory is on.
const recordBlock = 4096

// exchange replaces the file atomically without needing room: what is to be
// told when the file system is full, such as an exit, finds its place taken at
// creation. There are two files that trade places; the new text is written over
// the old one of the spare, which is filled up with newlines to whole blocks
// and is half a block longer than it need be at first. The spare's name is for
// our own root-only directories, where a fixed one is safe.
func exchange(path string, data []byte) error {
	spare := path + ".new"
	grown, err := overwrite(spare, data)
	if err != nil {
		return err
	}
	err = unix.Renameat2(unix.AT_FDCWD, spare, unix.AT_FDCWD, path, unix.RENAME_EXCHANGE)
	switch {
	case errors.Is(err, unix.ENOENT): // the first save
		err = os.Rename(spare, path)
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOSYS): // not on this file system
		return os.Rename(spare, path)
	case err != nil:
		err = &os.LinkError{Op: "exchange", Old: spare, New: path, Err: err}
	}
	if err == nil && grown { // the other one has to be as long
		_, err = overwrite(spare, data)
	}
	return err
}

// overwrite writes data and newlines up to the file's size, which never shrinks.
func overwrite(path string, data []byte) (grown bool, err error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE, 0o600)
	if err != nil {
		return false, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return false, err
	}
	size := int(st.Size())
	if size < len(data) {
		grown = true
		size = (len(data) + recordBlock/2 + recordBlock - 1) / recordBlock * recordBlock
	}
	padded := append(make([]byte, 0, size), data...)
	for len(padded) < size {
		padded = append(padded, '\n')
	}
	_, err = f.WriteAt(padded, 0)
	return grown, err
}

// writeFileAtomic is for our own root-only directories: a fixed temporary name
// is safe. What a write that fails leaves takes no room.
func writeFileAtomic(path string, data []byte) error {
	temp := path + ".new"
	err := os.WriteFile(temp, data, 0o600)
	if err == nil {
		err = os.Rename(temp, path)
	}
	if err != nil {
		_ = os.Remove(temp)
	}
	return err
}

// remove forgets the directory of id.
func (s *store) remove(id string) error { return os.RemoveAll(s.dir(id)) }

// load reads all records. Broken ones are moved to the quarantine, so that the
// rest can go on; directories without a record are half-made and are removed.
func (s *store) load() ([]*record, error) {
	entries, err := os.ReadDir(s.root)
	if err != nil {
		return nil, err
	}
	var records []*record
	for _, e := range entries {
		id := e.Name()
		r, err := s.read(id)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			s.log.Info("removing half-made state", "id", id)
			if err := s.remove(id); err != nil {
				s.log.Error("remove half-made state", "id", id, "error", err)
			}
		case err != nil:
			target := filepath.Join(s.quarantine, fmt.Sprintf("%s-%d", id, time.Now().UnixNano()))
			s.log.Error("broken record put into quarantine", "id", id, "quarantine", target, "error", err)
			if err := os.Rename(s.dir(id), target); err != nil {
				s.log.Error("quarantine", "id", id, "error", err)
			}
		default:
			records = append(records, r)
		}
	}
	return records, nil
}

func (s *store) read(id string) (*record, error) {
	data, err := os.ReadFile(filepath.Join(s.dir(id), recordName))
	if err != nil {
		return nil, err
	}
	r := new(record)
	if err := json.Unmarshal(data, r); err != nil {
		return nil, fmt.Errorf("record of %s: %w", id, err)
	}
	if r.Version != recordVersion {
		return nil, fmt.Errorf("record of %s has version %d, this shim knows %d", id, r.Version, recordVersion)
	}
	if r.Process.ID != id {
		return nil, fmt.Errorf("record in %s is of %q", id, r.Process.ID)
	}
	return r, nil
}

// validID accepts what is safe as a file name and as a cgroup name.
func validID(id string) bool {
	if id == "" || len(id) > 128 || id[0] == '.' {
		return false
	}
	return strings.Trim(id, "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_.-") == ""
}
