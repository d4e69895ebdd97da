package server

import (
	"bytes"
	"time"
)

// maxLine is where a line is cut into P records, as containerd does
// (max_container_log_line_size).
const maxLine = 16 << 10

// logWriter receives formatted records in pieces.
type logWriter interface {
	Write(p []byte) (int, error)
}

// formatter turns a container's output into CRI log records:
//
//	2006-01-02T15:04:05.999999999Z07:00 stdout F line
//
// A record ends with its line (F) or, when a line is longer than maxLine or
// the stream ends, without (P).
type formatter struct {
	out    []byte // gathered records
	w      logWriter
	err    error
	header []byte // time and stream name
}

// flushAt bounds the buffer: short lines grow forty-fold.
const flushAt = 256 << 10

func (f *formatter) begin(w logWriter, at time.Time, stream string) {
	f.w, f.err, f.out = w, nil, f.out[:0]
	f.header = at.AppendFormat(f.header[:0], time.RFC3339Nano)
	f.header = append(f.header, ' ')
	f.header = append(f.header, stream...)
	f.header = append(f.header, ' ')
}

func (f *formatter) record(tag byte, parts ...[]byte) {
	f.out = append(f.out, f.header...)
	f.out = append(f.out, tag, ' ')
	for _, p := range parts {
		f.out = append(f.out, p...)
	}
	f.out = append(f.out, '\n')
	if len(f.out) >= flushAt {
		f.flush()
	}
}

func (f *formatter) flush() {
	if f.err == nil && len(f.out) > 0 {
		_, f.err = f.w.Write(f.out)
	}
	f.out = f.out[:0]
}

// recordOverhead is what a record has besides its text, at most: a time of 35
// bytes, a stream's name of 6, a tag, three blanks and the end of the line.
const recordOverhead = 46

// fits returns how many bytes of data, which follow rest, become records of at
// most room bytes; at least one record's.
func fits(rest int, data []byte, room int64) int {
	most := bytes.Count(data, []byte{'\n'}) + (rest+len(data))/maxLine + 1
	if int64(rest+len(data)+most*recordOverhead) <= room {
		return len(data)
	}
	n, used := 0, int64(rest)
	for n < len(data) {
		step := min(len(data)-n, maxLine)
		if i := bytes.IndexByte(data[n:n+step], '\n'); i >= 0 {
			step = i + 1
		}
		used += int64(step + recordOverhead)
		if n > 0 && used > room {
			break
		}
		n += step
	}
	return n
}

// lines formats rest (an unfinished line of before, at most maxLine) followed
// by data and returns the new unfinished line, again at most maxLine, as what
// remains of rest and of data. At the end of the stream all is written.
func (f *formatter) lines(rest, data []byte, end bool) (unfinished [2][]byte) {
	for len(data) > 0 {
		i := bytes.IndexByte(data, '\n')
		length := i
		if i < 0 {
			length = len(data)
		}
		if len(rest)+length > maxLine {
			n := maxLine - len(rest)
			f.record('P', rest, data[:n])
			rest, data = nil, data[n:]
			continue
		}
		if i < 0 {
			break
		}
		f.record('F', rest, data[:i])
		rest, data = nil, data[i+1:]
	}
	if end && len(rest)+len(data) > 0 {
		f.record('P', rest, data)
		rest, data = nil, nil
	}
	f.flush()
	return [2][]byte{rest, data}
}
