package server

import (
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// fdStore keeps descriptors of a pod's containers alive while no shim is
// there: they lie as unread messages in a socket pair of which the pause
// process has both ends. We take the ends from it by pidfd_getfd whenever we
// need them. Pipes, terminals and pidfds in flight are ordinary references;
// no unix socket may be stored (the kernel's collector of cycles would look
// at it).
//
// One message holds the descriptors of one container, tagged with their names;
// a later one of the same container and name wins. Nothing is ever taken out
// without a copy having been put in first.
type fdStore struct {
	pidfd      int // of the pause process
	send, recv int // its descriptors

	mu   sync.Mutex
	gone map[[2]string]bool // dropped, by container and name or "", and maybe still there
}

func newFDStore(pidfd int) *fdStore {
	return &fdStore{pidfd: pidfd, send: pauseStoreSend, recv: pauseStoreRecv}
}

// The ends in the pause process, see cmd/pause.
const (
	pauseStatus    = 3
	pauseStoreSend = 4
	pauseStoreRecv = 5
	pauseRoot      = 6
)

type storedMessage struct {
	ID    string   `json:"id"`
	Names []string `json:"names"`
	Mark  uint64   `json:"mark,omitempty"` // separates old from new when rewriting
}

// stored is a descriptor with its name.
type stored struct {
	id, name string
	fd       int
}

func (s *fdStore) end(n int) (int, error) {
	fd, err := unix.PidfdGetfd(s.pidfd, n, 0)
	if err != nil {
		return -1, fmt.Errorf("get the pod's descriptor store from pause: %w", err)
	}
	return fd, nil
}

// put stores descriptors of a container; they remain the caller's.
func (s *fdStore) put(id string, fds ...stored) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	fd, err := s.end(s.send)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	for _, f := range fds {
		delete(s.gone, [2]string{id, f.name})
	}
	return send(fd, id, fds, 0)
}

// storeBuffer is asked for at the sending end: each message is accounted with
// about 1 KiB, so this is room for thousands.
const storeBuffer = 4 << 20

func send(sock int, id string, fds []stored, mark uint64) error {
	m := storedMessage{ID: id, Mark: mark}
	raw := make([]int, len(fds))
	for i, f := range fds {
		m.Names = append(m.Names, f.name)
		raw[i] = f.fd
	}
	body, err := json.Marshal(m)
	if err != nil {
		return err
	}
	var oob []byte
	if len(raw) > 0 {
		oob = unix.UnixRights(raw...)
	}
	for {
		_, err = unix.SendmsgN(sock, body, oob, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
		switch err {
		case nil:
			return nil
		case unix.EINTR:
		case unix.EAGAIN:
			if unix.SetsockoptInt(sock, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, storeBuffer) != nil {
				return fmt.Errorf("descriptor store is full: %w", err)
			}
			_, err = unix.SendmsgN(sock, body, oob, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
			if err != nil {
				return fmt.Errorf("descriptor store is full: %w", err)
			}
			return nil
		default:
			return fmt.Errorf("store descriptors of %s: %w", id, err)
		}
	}
}

// scmMaxFD is the most descriptors that a message may have (SCM_MAX_FD): with
// room for as many, one is cut off only where this process may have no more.
const scmMaxFD = 253

// receive takes the next message; ok is false when there is none. Descriptors
// that this process has no room for are an error: nobody may take what is left
// for all there is.
func receive(sock, flags int) (m storedMessage, fds []int, n int, ok bool, err error) {
	buf := make([]byte, 4096)
	oob := make([]byte, unix.CmsgSpace(scmMaxFD*4))
	for {
		var oobn, got int
		n, oobn, got, _, err = unix.Recvmsg(sock, buf, oob, unix.MSG_DONTWAIT|unix.MSG_CMSG_CLOEXEC|flags)
		if err == unix.EINTR {
			continue
		}
		if err == unix.EAGAIN || err == nil && n == 0 {
			return m, nil, 0, false, nil
		}
		if err != nil {
			return m, nil, 0, false, fmt.Errorf("read descriptor store: %w", err)
		}
		msgs, perr := syscall.ParseSocketControlMessage(oob[:oobn])
		if perr == nil {
			for i := range msgs {
				if got, e := syscall.ParseUnixRights(&msgs[i]); e == nil {
					fds = append(fds, got...)
				}
			}
		}
		if got&unix.MSG_CTRUNC != 0 {
			closeAll(fds)
			return m, nil, n, true, fmt.Errorf("read descriptor store: %w", unix.EMFILE)
		}
		if e := json.Unmarshal(buf[:n], &m); e != nil || len(m.Names) != len(fds) {
			closeAll(fds)
			return m, nil, n, true, nil // not ours: no names
		}
		return m, fds, n, true, nil
	}
}

func closeAll(fds []int) {
	for _, fd := range fds {
		unix.Close(fd)
	}
}

// load returns copies of all stored descriptors; the store keeps its own. With
// an error some are missing.
func (s *fdStore) load() ([]stored, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.copies()
}

func (s *fdStore) copies() (all []stored, err error) {
	sock, err := s.end(s.recv)
	if err != nil {
		return nil, err
	}
	defer unix.Close(sock)
	defer func() { // a receive without a peek, as drop's, begins at the first one
		if e := unix.SetsockoptInt(sock, unix.SOL_SOCKET, unix.SO_PEEK_OFF, -1); err == nil && e != nil {
			err = fmt.Errorf("seek in descriptor store: %w", e)
		}
	}()
	latest := map[[2]string]int{}
	var order [][2]string
	for off := 0; ; {
		// A peek at an offset skips the messages before it (socket(7), SO_PEEK_OFF).
		if e := unix.SetsockoptInt(sock, unix.SOL_SOCKET, unix.SO_PEEK_OFF, off); e != nil {
			err = fmt.Errorf("seek in descriptor store: %w", e)
			break
		}
		m, fds, n, ok, e := receive(sock, unix.MSG_PEEK)
		if e != nil || !ok {
			err = e
			break
		}
		off += n
		for i, fd := range fds {
			key := [2]string{m.ID, m.Names[i]}
			if old, seen := latest[key]; seen {
				unix.Close(old)
			} else {
				order = append(order, key)
			}
			latest[key] = fd
		}
	}
	for _, key := range order {
		all = append(all, stored{id: key[0], name: key[1], fd: latest[key]})
	}
	return all, err
}

// drop removes what is stored of a container: everything, or the named one. On
// error all is still there, and goes with the next drop.
func (s *fdStore) drop(id, name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.gone == nil {
		s.gone = map[[2]string]bool{}
	}
	s.gone[[2]string{id, name}] = true
	all, err := s.copies()
	defer func() {
		for _, f := range all {
			unix.Close(f.fd)
		}
	}()
	if err != nil {
		return err
	}
	tx, err := s.end(s.send)
	if err != nil {
		return err
	}
	defer unix.Close(tx)
	rx, err := s.end(s.recv)
	if err != nil {
		return err
	}
	defer unix.Close(rx)
	// First a mark of its own, then copies of what stays, then the old ones go
	// up to the mark: whoever looks in between finds each descriptor at least once.
	mark := uint64(time.Now().UnixNano())
	if err := send(tx, "", nil, mark); err != nil {
		return err
	}
	var keep []stored
	flush := func() error {
		if len(keep) == 0 {
			return nil
		}
		err := send(tx, keep[0].id, keep, 0)
		keep = keep[:0]
		return err
	}
	var failed error
	for _, f := range all {
		if s.gone[[2]string{f.id, ""}] || s.gone[[2]string{f.id, f.name}] {
			continue
		}
		if len(keep) > 0 && (keep[0].id != f.id || len(keep) == 8) {
			failed = errors.Join(failed, flush())
		}
		keep = append(keep, f)
	}
	if failed = errors.Join(failed, flush()); failed != nil {
		return failed // the old ones are still there
	}
	for {
		m, fds, _, ok, err := receive(rx, 0)
		closeAll(fds)
		if !ok || m.Mark == mark { // what was cut off is in its copy
			clear(s.gone)
			return err
		}
	}
}
