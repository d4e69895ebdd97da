package integration

import (
	"io"
	"net/http"
	"regexp"
	"strconv"
	"testing"

	"github.com/podd-runtime/podd/integration/node"
)

func readAll(resp *http.Response) string {
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return ""
	}
	return string(b)
}

var lineNumber = regexp.MustCompile(`(?m)^line ([0-9]+)$`)

// numbers of the lines that a container wrote.
func numbers(text string) []int {
	var out []int
	for _, m := range lineNumber.FindAllStringSubmatch(text, -1) {
		n, _ := strconv.Atoi(m[1])
		out = append(out, n)
	}
	return out
}

// unbroken checks that numbers go on one by one; doubles says whether a number
// may come twice.
func unbroken(t *testing.T, what string, got []int, doubles bool) {
	t.Helper()
	if len(got) == 0 {
		t.Errorf("%s: no lines", what)
		return
	}
	if got[0] != 0 {
		t.Errorf("%s: begins with line %d", what, got[0])
	}
	for i := 1; i < len(got); i++ {
		switch {
		case got[i] == got[i-1]+1:
		case doubles && got[i] <= got[i-1]:
		default:
			t.Errorf("%s: line %d comes after line %d", what, got[i], got[i-1])
			return
		}
	}
}

// lines of a pod's log by the CLI.
func lines(t *testing.T, n *node.Node, pod string) []int {
	t.Helper()
	return numbers(n.OK("logs", node.PodName(pod)))
}
