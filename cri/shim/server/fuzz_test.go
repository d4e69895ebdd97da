package server

import (
	"bytes"
	"encoding/json"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/podd-runtime/podd/cri/shim"
)

// FuzzStore: whatever is in a record, the others load, and what is not
// understood is in quarantine.
func FuzzStore(f *testing.F) {
	good, _ := json.Marshal(record{Version: recordVersion, Process: shim.Process{ID: "a"}, CgroupPaths: map[string]string{"pids": "/x"}})
	f.Add([]byte(good))
	f.Add(good[:20])
	f.Add([]byte(`{"version":1,"process":{"id":"../a"}}`))
	f.Add([]byte(`null`))
	if files, _ := filepath.Glob("testdata/records/*/*/*.json"); len(files) > 0 {
		for _, p := range files {
			if raw, err := os.ReadFile(p); err == nil {
				f.Add(raw)
			}
		}
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		dir := t.TempDir()
		s := store{root: filepath.Join(dir, "containers"), quarantine: filepath.Join(dir, "quarantine"), log: slog.New(slog.DiscardHandler)}
		for _, d := range []string{s.quarantine, s.dir("a"), s.dir("kept")} {
			if err := os.MkdirAll(d, 0o700); err != nil {
				t.Fatal(err)
			}
		}
		if err := s.save(&record{Process: shim.Process{ID: "kept"}}); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(s.dir("a"), recordName), data, 0o600); err != nil {
			t.Fatal(err)
		}
		records, err := s.load()
		if err != nil {
			t.Fatal(err)
		}
		seen := map[string]int{}
		for _, r := range records {
			seen[r.Process.ID]++
		}
		aside, _ := os.ReadDir(s.quarantine)
		if seen["kept"] != 1 || seen["a"]+len(aside) != 1 || len(records) != 1+seen["a"] {
			t.Fatalf("loaded %v, %d in quarantine", seen, len(aside))
		}
	})
}

// FuzzLines: a log is what the container wrote, however it came in pieces:
// every record is whole, none is longer than it may be, and the contents add
// up to the output.
func FuzzLines(f *testing.F) {
	f.Add([]byte("one\ntwo\n\nthree"), uint16(3))
	f.Add(bytes.Repeat([]byte("x"), 3*maxLine+5), uint16(1000))
	f.Add(append(bytes.Repeat([]byte("y"), maxLine), '\n'), uint16(maxLine))
	f.Add([]byte("\r\n\x00\xff\n"), uint16(1))
	f.Fuzz(func(t *testing.T, data []byte, step uint16) {
		var log bytes.Buffer
		at := time.Date(2024, 1, 2, 3, 4, 5, 6, time.UTC)
		var fmtr formatter
		var rest []byte
		for left := data; ; {
			n := min(int(step)+1+len(data)/256, len(left)) // a few hundred pieces
			fmtr.begin(&log, at, "stdout")
			open := fmtr.lines(rest, left[:n], n == len(left))
			rest = append(append([]byte{}, open[0]...), open[1]...)
			if len(rest) > maxLine {
				t.Fatalf("%d bytes are kept", len(rest))
			}
			if left = left[n:]; len(left) == 0 {
				break
			}
		}
		if fmtr.err != nil || len(rest) > 0 {
			t.Fatalf("%v, %d bytes left", fmtr.err, len(rest))
		}
		var got []byte
		header := []byte("2024-01-02T03:04:05.000000006Z stdout ")
		for record := range bytes.Lines(log.Bytes()) {
			body, ok := bytes.CutPrefix(record, header)
			if !ok || len(body) < 3 || body[1] != ' ' || body[len(body)-1] != '\n' || len(body) > maxLine+3 {
				t.Fatalf("record %.100q", record)
			}
			got = append(got, body[2:len(body)-1]...)
			switch body[0] {
			case 'F':
				got = append(got, '\n')
			case 'P':
			default:
				t.Fatalf("tag of %.100q", record)
			}
		}
		if !bytes.Equal(got, data) {
			t.Fatalf("wrote %.200q, logged %.200q", data, got)
		}
	})
}
