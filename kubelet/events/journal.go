package events

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// The file is a line that names the version and then one JSON entry a line;
// a later line of the same name replaces an earlier one. Lines are appended;
// the file is written anew, beside and renamed, when most of it is history.
// There is no fsync: a power cut may cost the last events, never more.
const header = `{"podd":"events","version":1}`

type journal struct {
	path  string
	mu    sync.Mutex // held over writes, which a disk may keep for long
	lines atomic.Int64
}

// load returns the entries of the file. One that is not ours is renamed away.
func (j *journal) load() ([]*entry, error) {
	data, err := os.ReadFile(j.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	first, rest, _ := bytes.Cut(data, []byte("\n"))
	if string(first) != header {
		aside := fmt.Sprintf("%s.broken-%d", j.path, time.Now().Unix())
		return nil, os.Rename(j.path, aside)
	}
	byName := map[string]*entry{}
	var order []*entry
	sc := bufio.NewScanner(bytes.NewReader(rest))
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		j.lines.Add(1)
		e := &entry{}
		// A torn or damaged line costs itself only.
		if json.Unmarshal(sc.Bytes(), e) != nil || e.Name == "" {
			continue
		}
		if old := byName[e.Name]; old != nil {
			*old = *e
			continue
		}
		byName[e.Name] = e
		order = append(order, e)
	}
	return order, nil
}

// full says whether appending n entries leaves more history than events. It
// waits for no write.
func (j *journal) full(n, max int) bool { return int(j.lines.Load())+n > 2*max }

func (j *journal) append(batch []entry) error {
	if len(batch) == 0 {
		return nil
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	f, err := os.OpenFile(j.path, os.O_WRONLY|os.O_CREATE|os.O_APPEND|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	var buf bytes.Buffer
	if st, err := f.Stat(); err == nil && st.Size() == 0 {
		buf.WriteString(header + "\n")
	} else if j.torn() {
		buf.WriteByte('\n')
	}
	encode(&buf, batch)
	j.lines.Add(int64(len(batch)))
	_, err = f.Write(buf.Bytes())
	return err
}

// torn says whether the last write was cut: the next one starts a new line.
func (j *journal) torn() bool {
	r, err := os.Open(j.path)
	if err != nil {
		return false
	}
	defer r.Close()
	st, err := r.Stat()
	if err != nil || st.Size() == 0 {
		return false
	}
	var last [1]byte
	_, err = r.ReadAt(last[:], st.Size()-1)
	return err == nil && last[0] != '\n'
}

func (j *journal) rewrite(all []entry) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	var buf bytes.Buffer
	buf.WriteString(header + "\n")
	encode(&buf, all)
	tmp := j.path + ".tmp"
	if err := os.WriteFile(tmp, buf.Bytes(), 0o600); err != nil {
		return err
	}
	if err := os.Rename(tmp, j.path); err != nil {
		return err
	}
	j.lines.Store(int64(len(all)))
	return nil
}

func encode(buf *bytes.Buffer, batch []entry) {
	enc := json.NewEncoder(buf)
	for i := range batch {
		_ = enc.Encode(&batch[i]) // plain strings, numbers and times: cannot fail
	}
}
