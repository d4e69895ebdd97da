package pods

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podd-runtime/podd/kubelet/pods/spec"
)

// Upstream's limits of termination messages: what a container writes into its
// file, and what is taken of its log instead.
const (
	maxTerminationMessage = 4096
	maxTerminationLog     = 2048
	maxTerminationLines   = 80
)

// terminationMessage of a container that has exited: the runtime's message
// and what the container left in its file or, when the policy says so and it
// failed, the end of its log.
func terminationMessage(cs *runtimeapi.ContainerStatus) string {
	fallback := cs.Annotations[spec.AnnTerminationMessagePolicy] == string(v1.TerminationMessageFallbackToLogsOnError) &&
		cs.ExitCode != 0 && cs.Reason != "ContainerCannotRun"
	text := ""
	if path := cs.Annotations[spec.AnnTerminationMessagePath]; path != "" {
		for _, m := range cs.Mounts {
			if m.ContainerPath != path {
				continue
			}
			data, err := readEnd(m.HostPath, maxTerminationMessage)
			switch {
			case err != nil && !errors.Is(err, fs.ErrNotExist):
				text, fallback = fmt.Sprintf("Error on reading termination log %s: %v", m.HostPath, err), false
			case len(data) > 0:
				text, fallback = string(data), false
			}
			break
		}
	}
	if fallback {
		if data, err := readEnd(cs.LogPath, 64<<10); err != nil {
			text = fmt.Sprintf("Error on reading termination message from logs: %v", err)
		} else {
			text = lastLines(data)
		}
	}
	if cs.Message != "" && text != "" {
		return cs.Message + ": " + text
	}
	return cs.Message + text
}

// readEnd reads the last n bytes of a regular file, never through a link: the
// container may have had a hand in it.
func readEnd(path string, n int64) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a regular file", path)
	}
	return io.ReadAll(io.NewSectionReader(f, max(st.Size()-n, 0), n))
}

// lastLines takes the messages out of the end of a CRI log, whose lines are
// "<time> <stream> <tags> <message>" with tag P for a line that goes on.
func lastLines(log []byte) string {
	lines := bytes.Split(bytes.TrimSuffix(log, []byte("\n")), []byte("\n"))
	var out []byte
	n := 0
	for i := len(lines) - 1; i >= 0; i-- {
		f := bytes.SplitN(lines[i], []byte(" "), 4)
		if len(f) < 4 {
			break // the cut beginning of what was read
		}
		text := f[3]
		if !bytes.HasPrefix(f[2], []byte("P")) {
			if n++; n > maxTerminationLines {
				break
			}
			text = append(text[:len(text):len(text)], '\n')
		}
		out = append(text[:len(text):len(text)], out...)
		if len(out) >= maxTerminationLog {
			out = out[len(out)-maxTerminationLog:]
			break
		}
	}
	return string(out)
}
