package manifests

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
)

// lastGood keeps the last good version of every manifest, so that a file that
// is broken when podd starts does not stop the pod that runs from its earlier
// content. A record is the content behind one line of header:
//
//	podd-manifest/v1 <sha256 of the content, hex>
//
// It is written without fsync: a torn record is dropped by its checksum.
type lastGood struct {
	dir string // "": nothing is kept
}

const lastGoodHeader = "podd-manifest/v1 "

// path is the record of a file, by the name it has in the directory.
func (l lastGood) path(name string) string {
	return filepath.Join(l.dir, url.PathEscape(name))
}

// save keeps a version.
func (l lastGood) save(name string, content []byte) error {
	if l.dir == "" {
		return nil
	}
	sum := sha256.Sum256(content)
	record := append([]byte(lastGoodHeader+hex.EncodeToString(sum[:])+"\n"), content...)
	tmp := filepath.Join(l.dir, ".tmp")
	err := os.WriteFile(tmp, record, 0o600)
	if errors.Is(err, fs.ErrNotExist) {
		if err := os.MkdirAll(l.dir, 0o700); err != nil {
			return err
		}
		err = os.WriteFile(tmp, record, 0o600)
	}
	if err != nil {
		return err
	}
	return os.Rename(tmp, l.path(name))
}

// load returns a version that was kept; fs.ErrNotExist when there is none.
func (l lastGood) load(name string) ([]byte, error) {
	if l.dir == "" {
		return nil, fs.ErrNotExist
	}
	record, err := os.ReadFile(l.path(name))
	if err != nil {
		return nil, err
	}
	header, content, ok := bytes.Cut(record, []byte("\n"))
	sum := sha256.Sum256(content)
	if !ok || string(header) != lastGoodHeader+hex.EncodeToString(sum[:]) {
		l.forget(name)
		return nil, fmt.Errorf("%s: is torn, dropped", l.path(name))
	}
	return content, nil
}

func (l lastGood) forget(name string) {
	if l.dir != "" {
		os.Remove(l.path(name))
	}
}

// tidy drops the records of files that are gone.
func (l lastGood) tidy(present func(name string) bool) {
	if l.dir == "" {
		return
	}
	entries, err := os.ReadDir(l.dir)
	if err != nil {
		return
	}
	for _, e := range entries {
		name, err := url.PathUnescape(e.Name())
		if err != nil || !present(name) {
			os.Remove(filepath.Join(l.dir, e.Name()))
		}
	}
}
