package systemd

import (
	"encoding/binary"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// parse an entry of the native protocol.
func parse(t *testing.T, raw []byte) map[string][]string {
	t.Helper()
	out := map[string][]string{}
	for len(raw) > 0 {
		line, rest, _ := strings.Cut(string(raw), "\n")
		if name, value, ok := strings.Cut(line, "="); ok {
			out[name] = append(out[name], value)
			raw = []byte(rest)
			continue
		}
		n := binary.LittleEndian.Uint64([]byte(rest)[:8])
		out[line] = append(out[line], rest[8:8+n])
		raw = []byte(rest[8+n+1:])
	}
	return out
}

func TestJournal(t *testing.T) {
	path := filepath.Join(t.TempDir(), "socket")
	in, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	read := func() map[string][]string {
		t.Helper()
		buf, oob := make([]byte, 1<<20), make([]byte, 1024)
		n, oobn, _, _, err := in.ReadMsgUnix(buf, oob)
		if err != nil {
			t.Fatal(err)
		}
		if oobn == 0 {
			return parse(t, buf[:n])
		}
		msgs, err := syscall.ParseSocketControlMessage(oob[:oobn])
		if err != nil {
			t.Fatal(err)
		}
		fds, err := syscall.ParseUnixRights(&msgs[0])
		if err != nil {
			t.Fatal(err)
		}
		f := os.NewFile(uintptr(fds[0]), "entry")
		defer f.Close()
		st, _ := f.Stat()
		raw := make([]byte, st.Size())
		if _, err := f.ReadAt(raw, 0); err != nil {
			t.Fatal(err)
		}
		return parse(t, raw)
	}
	to, err := dialJournal(path)
	if err != nil {
		t.Fatal(err)
	}
	log := slog.New(&Journal{to: to, level: slog.LevelInfo, node: "n1"})
	id := strings.Repeat("0123456789abcdef", 4)
	large := strings.Repeat("x", 1<<20)
	for _, tt := range []struct {
		log  func()
		want map[string][]string
	}{
		{func() {
			log.With("part", "pods", "pod", "default/web-n1").Warn("it ends", "uid", "u1", "container", "main", "error", errors.New("a \"b\""))
		}, map[string][]string{
			"MESSAGE":  {`it ends part=pods pod=default/web-n1 uid=u1 container=main error="a \"b\""`},
			"PRIORITY": {"4"}, "SYSLOG_IDENTIFIER": {"podd"},
			"POD_NAMESPACE": {"default"}, "POD_NAME": {"web-n1", "web"}, "POD_UID": {"u1"},
			"CONTAINER_NAME": {"main"}, "PODD_PART": {"pods"}, "PODD_ERROR": {`a "b"`},
		}},
		{func() { log.Error("two\nlines", "container", id, "pod", "web", "namespace", "ns", "took-ms", 3) }, map[string][]string{
			"MESSAGE": {"two\nlines container=" + id + " pod=web namespace=ns took-ms=3"}, "PRIORITY": {"3"}, "SYSLOG_IDENTIFIER": {"podd"},
			"CONTAINER_ID": {id}, "POD_NAME": {"web"}, "POD_NAMESPACE": {"ns"}, "PODD_TOOK_MS": {"3"},
		}},
		{func() { log.Debug("unseen"); log.WithGroup("g").Info("grouped", "a", 1) }, map[string][]string{
			"MESSAGE": {"grouped g.a=1"}, "PRIORITY": {"6"}, "SYSLOG_IDENTIFIER": {"podd"}, "PODD_G_A": {"1"},
		}},
		{func() { log.Info(large) }, map[string][]string{"MESSAGE": {large}, "PRIORITY": {"6"}, "SYSLOG_IDENTIFIER": {"podd"}}},
	} {
		tt.log()
		got := read()
		for k, want := range tt.want {
			if !slices.Equal(got[k], want) {
				t.Errorf("%s: %.200q, want %.200q", k, got[k], want)
			}
			delete(got, k)
		}
		for k, v := range got {
			t.Errorf("%s=%.200q is too much", k, v)
		}
	}
}
