package systemd

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/coreos/go-systemd/v22/journal"
	"golang.org/x/sys/unix"
)

// Journaled says that what this process writes to standard error goes to the
// journal: what it logs had better go there with its fields ($JOURNAL_STREAM,
// systemd.exec(5)).
func Journaled() bool {
	yes, err := journal.StderrIsJournalStream()
	return err == nil && yes
}

// Journal is a slog.Handler that writes to the journal by its native protocol
// (systemd.io/JOURNAL_NATIVE_PROTOCOL). Messages have the attributes in their
// text, for who reads, and as fields, for who looks for them:
//
//	pod=default/web-node  POD_NAMESPACE=default POD_NAME=web-node POD_NAME=web
//	uid                   POD_UID
//	container             CONTAINER_NAME, or CONTAINER_ID if it looks like one
//
// and every other by its name in capitals after PODD_. A static pod is found by
// its name with and without the node's.
type Journal struct {
	to    *journalSocket
	level slog.Leveler
	node  string
	attrs []slog.Attr
	group string
}

// NewJournal connects to the journal. node is what static pods' names end with.
func NewJournal(node string, level slog.Leveler) (*Journal, error) {
	to, err := dialJournal("/run/systemd/journal/socket")
	if err != nil {
		return nil, err
	}
	return &Journal{to: to, level: level, node: node}, nil
}

// Enabled is slog.Handler's.
func (j *Journal) Enabled(_ context.Context, l slog.Level) bool { return l >= j.level.Level() }

// WithAttrs is slog.Handler's.
func (j *Journal) WithAttrs(attrs []slog.Attr) slog.Handler {
	c := *j
	c.attrs = append(c.attrs[:len(c.attrs):len(c.attrs)], grouped(j.group, attrs)...)
	return &c
}

// WithGroup is slog.Handler's.
func (j *Journal) WithGroup(name string) slog.Handler {
	c := *j
	c.group = j.group + name + "."
	return &c
}

func grouped(group string, attrs []slog.Attr) []slog.Attr {
	if group == "" {
		return attrs
	}
	out := make([]slog.Attr, len(attrs))
	for i, a := range attrs {
		out[i] = slog.Attr{Key: group + a.Key, Value: a.Value}
	}
	return out
}

// Handle is slog.Handler's.
func (j *Journal) Handle(_ context.Context, r slog.Record) error {
	attrs := append([]slog.Attr(nil), j.attrs...)
	r.Attrs(func(a slog.Attr) bool {
		attrs = append(attrs, grouped(j.group, []slog.Attr{a})...)
		return true
	})
	var text strings.Builder
	text.WriteString(r.Message)
	e := &entry{}
	for _, a := range attrs {
		value := a.Value.Resolve().String()
		if value == "" {
			continue
		}
		fmt.Fprintf(&text, " %s=%s", a.Key, quoted(value))
		j.field(e, a.Key, value)
	}
	e.add("MESSAGE", text.String())
	e.add("PRIORITY", strconv.Itoa(int(priority(r.Level))))
	e.add("SYSLOG_IDENTIFIER", "podd")
	return j.to.send(e.raw)
}

// field of an attribute.
func (j *Journal) field(e *entry, key, value string) {
	switch key {
	case "pod":
		name := value
		if namespace, after, ok := strings.Cut(value, "/"); ok {
			name = after
			e.add("POD_NAMESPACE", namespace)
		}
		e.add("POD_NAME", name)
		if static, is := strings.CutSuffix(name, "-"+j.node); is && static != "" && j.node != "" {
			e.add("POD_NAME", static)
		}
	case "namespace":
		e.add("POD_NAMESPACE", value)
	case "uid":
		e.add("POD_UID", value)
	case "container":
		if isID(value) {
			e.add("CONTAINER_ID", value)
		} else {
			e.add("CONTAINER_NAME", value)
		}
	case "containerID":
		e.add("CONTAINER_ID", value)
	default:
		e.add("PODD_"+fieldName(key), value)
	}
}

// isID says that a name is the runtime's: 64 hexadecimal digits. No container
// of a pod has such a name, which a DNS label of 63 cannot hold.
func isID(s string) bool { return len(s) == 64 && strings.Trim(s, "0123456789abcdef") == "" }

// fieldName is key as the journal allows it: capitals, digits and underscores.
func fieldName(key string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z':
			return r - 'a' + 'A'
		case r >= 'A' && r <= 'Z' || r >= '0' && r <= '9':
			return r
		}
		return '_'
	}, key)
}

func quoted(s string) string {
	if strings.ContainsAny(s, " \"=\n\t") {
		return strconv.Quote(s)
	}
	return s
}

func priority(l slog.Level) journal.Priority {
	switch {
	case l >= slog.LevelError:
		return journal.PriErr
	case l >= slog.LevelWarn:
		return journal.PriWarning
	case l >= slog.LevelInfo:
		return journal.PriInfo
	}
	return journal.PriDebug
}

// entry of the journal, as it goes over the socket. go-systemd's Send takes a
// map, in which no field can have two values.
type entry struct{ raw []byte }

func (e *entry) add(name, value string) {
	e.raw = append(e.raw, name...)
	if strings.ContainsRune(value, '\n') {
		e.raw = append(e.raw, '\n')
		e.raw = binary.LittleEndian.AppendUint64(e.raw, uint64(len(value)))
	} else {
		e.raw = append(e.raw, '=')
	}
	e.raw = append(append(e.raw, value...), '\n')
}

// journalSocket is journald's end. Datagrams need no reconnection after its
// restart: systemd keeps the socket.
type journalSocket struct {
	conn *net.UnixConn
	addr *net.UnixAddr
}

// journalPatience bounds the wait for a journal that does not read.
const journalPatience = time.Second

func dialJournal(path string) (*journalSocket, error) {
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Net: "unixgram"})
	if err != nil {
		return nil, fmt.Errorf("socket to the journal: %w", err)
	}
	s := &journalSocket{conn: conn, addr: &net.UnixAddr{Name: path, Net: "unixgram"}}
	if _, err := os.Stat(path); err != nil {
		conn.Close()
		return nil, fmt.Errorf("journal: %w", err)
	}
	return s, nil
}

// send one entry; one too large for a datagram goes in a sealed memfd.
func (s *journalSocket) send(raw []byte) error {
	if err := s.conn.SetWriteDeadline(time.Now().Add(journalPatience)); err != nil {
		return err
	}
	_, err := s.conn.WriteToUnix(raw, s.addr)
	if !errors.Is(err, unix.EMSGSIZE) && !errors.Is(err, unix.ENOBUFS) {
		return err
	}
	fd, err := unix.MemfdCreate("journal-entry", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), "journal-entry")
	defer f.Close()
	if _, err := f.Write(raw); err != nil {
		return err
	}
	if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_WRITE|unix.F_SEAL_SEAL); err != nil {
		return err
	}
	_, _, err = s.conn.WriteMsgUnix(nil, unix.UnixRights(int(f.Fd())), s.addr)
	return err
}
