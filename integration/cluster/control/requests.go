package control

import (
	"bufio"
	"encoding/json"
	"os"
	"strconv"
)

// Requests that a user has sent to the apiserver, by verb and resource, and by
// the status of those that failed.
type Requests map[string]int

// Total of all.
func (r Requests) Total() int {
	n := 0
	for _, v := range r {
		n += v
	}
	return n
}

// Mark is a point in time in the audit log.
func (p *Plane) Mark() (int64, error) {
	st, err := os.Stat(p.AuditLog())
	if err != nil {
		return 0, err
	}
	return st.Size(), nil
}

// Requests of a user since the mark that have ended; a watch counts when it ends.
func (p *Plane) Requests(user string, since int64) (Requests, error) {
	f, err := os.Open(p.AuditLog())
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if _, err := f.Seek(since, 0); err != nil {
		return nil, err
	}
	found := Requests{}
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 4<<20)
	for lines.Scan() {
		var ev struct {
			Verb           string
			User           struct{ Username string }
			ObjectRef      struct{ Resource, Subresource string }
			ResponseStatus struct{ Code int }
		}
		if json.Unmarshal(lines.Bytes(), &ev) != nil || ev.User.Username != user {
			continue
		}
		what := ev.Verb + " " + ev.ObjectRef.Resource
		if ev.ObjectRef.Subresource != "" {
			what += "/" + ev.ObjectRef.Subresource
		}
		if code := ev.ResponseStatus.Code; code >= 400 {
			what += " (" + strconv.Itoa(code) + ")"
		}
		found[what]++
	}
	return found, lines.Err()
}
