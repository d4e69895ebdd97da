// Package state keeps small versioned records on disk, one file for each
// object. A record is replaced by writing beside it and renaming, so a reader
// sees the old or the new one and never half of either. There is no fsync: a
// power cut may lose the newest change or leave an empty file, which counts as
// a broken record. A broken or unknown record is moved to quarantine and the
// rest is loaded.
package state

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

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Version of the envelope. A record of a higher version is quarantined: it was
// written by a later release and nothing here can say what it means.
const Version = 1

// maxRecord bounds what is read for one record. The largest legitimate part is
// a container's specification with a few thousand mounts.
const maxRecord = 16 << 20

const (
	suffix        = ".json"
	tempPrefix    = ".tmp-"
	quarantineDir = "quarantine"
)

// Store is a directory with one sub-directory for each kind of record. Its
// methods may be called concurrently; writers of one record order themselves.
type Store struct {
	dir string
	log *slog.Logger
}

type envelope struct {
	Version int             `json:"version"`
	Kind    string          `json:"kind"`
	ID      string          `json:"id"`
	Data    json.RawMessage `json:"data"`
}

// Open creates dir with its kinds where they are missing, mode 0700, and removes
// what writes that were cut off have left.
func Open(dir string, log *slog.Logger, kinds ...string) (*Store, error) {
	for _, d := range append([]string{quarantineDir}, kinds...) {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o700); err != nil {
			return nil, fmt.Errorf("create state directory: %w", err)
		}
		entries, err := os.ReadDir(filepath.Join(dir, d))
		if err != nil {
			return nil, fmt.Errorf("read state directory: %w", err)
		}
		for _, e := range entries {
			if strings.HasPrefix(e.Name(), tempPrefix) {
				if err := os.Remove(filepath.Join(dir, d, e.Name())); err != nil {
					log.Warn("remains of a record stay", "file", filepath.Join(dir, d, e.Name()), "error", err)
				}
			}
		}
	}
	return &Store{dir: dir, log: log}, nil
}

// validName guards the file names: ids come from clients' requests at times.
func validName(id string) error {
	if id == "" || len(id) > 200 || strings.ContainsAny(id, "/\x00") || id[0] == '.' {
		return fmt.Errorf("record id %q: %w", id, errdefs.ErrInvalidArgument)
	}
	return nil
}

func (s *Store) path(kind, id string) string {
	return filepath.Join(s.dir, kind, id+suffix)
}

// Put writes the record of id.
func (s *Store) Put(kind, id string, v any) error {
	if err := validName(id); err != nil {
		return err
	}
	data, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encode %s record %s: %w", kind, id, err)
	}
	b, err := json.Marshal(envelope{Version: Version, Kind: kind, ID: id, Data: data})
	if err != nil {
		return fmt.Errorf("encode %s record %s: %w", kind, id, err)
	}
	temp := filepath.Join(s.dir, kind, tempPrefix+id)
	if err := writeFile(temp, b); err != nil {
		return fmt.Errorf("write %s record %s: %w", kind, id, err)
	}
	if err := os.Rename(temp, s.path(kind, id)); err != nil {
		return fmt.Errorf("write %s record %s: %w", kind, id, err)
	}
	return nil
}

func writeFile(path string, b []byte) error {
	fd, err := unix.Open(path, unix.O_WRONLY|unix.O_CREAT|unix.O_TRUNC|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return &fs.PathError{Op: "open", Path: path, Err: err}
	}
	f := os.NewFile(uintptr(fd), path)
	_, err = f.Write(b)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		_ = os.Remove(path)
	}
	return err
}

// Get reads one record into v. What is absent is errdefs.ErrNotFound, what
// cannot be understood errdefs.ErrDataLoss.
func (s *Store) Get(kind, id string, v any) error {
	if err := validName(id); err != nil {
		return err
	}
	b, err := readFile(s.path(kind, id))
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s record %s: %w", kind, id, errdefs.ErrNotFound)
	}
	if err != nil {
		return fmt.Errorf("read %s record %s: %w", kind, id, err)
	}
	return decode(b, kind, id, v)
}

func readFile(path string) ([]byte, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() || st.Size() > maxRecord {
		return nil, fmt.Errorf("%s: not a record (mode %v, %d bytes): %w", path, st.Mode(), st.Size(), errdefs.ErrDataLoss)
	}
	b := make([]byte, st.Size())
	n, err := f.ReadAt(b, 0)
	if n == len(b) {
		err = nil
	}
	return b[:n], err
}

func decode(b []byte, kind, id string, v any) error {
	var e envelope
	if err := json.Unmarshal(b, &e); err != nil {
		return fmt.Errorf("%s record %s: %w: %w", kind, id, err, errdefs.ErrDataLoss)
	}
	if e.Version < 1 || e.Version > Version {
		return fmt.Errorf("%s record %s: version %d, this release knows 1 to %d: %w", kind, id, e.Version, Version, errdefs.ErrDataLoss)
	}
	if e.Kind != kind || e.ID != id {
		return fmt.Errorf("%s record %s: holds %s %s: %w", kind, id, e.Kind, e.ID, errdefs.ErrDataLoss)
	}
	if err := json.Unmarshal(e.Data, v); err != nil {
		return fmt.Errorf("%s record %s: %w: %w", kind, id, err, errdefs.ErrDataLoss)
	}
	return nil
}

// Delete removes a record; it succeeds when there is none.
func (s *Store) Delete(kind, id string) error {
	if err := validName(id); err != nil {
		return err
	}
	if err := os.Remove(s.path(kind, id)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("delete %s record: %w", kind, err)
	}
	return nil
}

// Load calls fn for every record of kind. A record that cannot be read, or
// that fn refuses, is quarantined and logged. Load itself fails when the
// directory cannot be listed, or when this process lacks what reading takes:
// that says nothing of the record, and its container must not go for it.
func Load[T any](s *Store, kind string, fn func(id string, v *T) error) error {
	entries, err := os.ReadDir(filepath.Join(s.dir, kind))
	if err != nil {
		return fmt.Errorf("list %s records: %w", kind, err)
	}
	for _, e := range entries {
		name := e.Name()
		if strings.HasPrefix(name, tempPrefix) {
			// A write that did not reach its rename.
			_ = os.Remove(filepath.Join(s.dir, kind, name))
			continue
		}
		id, ok := strings.CutSuffix(name, suffix)
		if !ok {
			s.Quarantine(kind, name, errors.New("no record's file name"))
			continue
		}
		v := new(T)
		err := s.Get(kind, id, v)
		if err == nil {
			err = fn(id, v)
		}
		for _, ours := range []error{unix.EMFILE, unix.ENFILE, unix.ENOMEM} {
			if errors.Is(err, ours) {
				return fmt.Errorf("read %s records: %w", kind, err)
			}
		}
		if err != nil {
			s.Quarantine(kind, name, err)
		}
	}
	return nil
}

// Quarantine moves a file out of the way and logs why.
func (s *Store) Quarantine(kind, file string, why error) {
	to := filepath.Join(s.dir, quarantineDir, fmt.Sprintf("%s-%s-%d", kind, file, time.Now().UnixNano()))
	err := os.Rename(filepath.Join(s.dir, kind, file), to)
	s.log.Error("record quarantined", "kind", kind, "file", file, "reason", why, "to", to, "move_error", err)
}
