// Command summary reads the output of `go test -json`, shows failures in full
// and passes in one line a package, and counts.
//
//	go test -json ./... | summary -log FILE    adds the counts to FILE, the tests that failed to FILE.failed
//	go test -json -run ^TestX$ PKG | summary -again N -log FILE
//	                                           the same tests once more, of which N had failed
//	summary -total FILE                        prints "N passed, N failed, N skipped"
//
// It exits with 1 when a test failed. Tests that passed only at a second try
// count as passed; the closing line names them, so that nobody overlooks them.
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"
)

// event of test2json (go doc test2json).
type event struct {
	Action, Package, ImportPath, Test, Output string
	Elapsed                                   float64
}

type counts struct{ passed, failed, skipped int }

// failure is a test of a package (not of another test) that failed, with how
// many of its rows did.
type failure struct {
	pkg, test string
	rows      int
}

func main() {
	log := flag.String("log", "", "file to add the counts to")
	total := flag.String("total", "", "file to sum up")
	again := flag.Int("again", 0, "these tests failed before; when they pass, count so many failures less")
	flag.Parse()
	if *total != "" {
		c, retried := sum(*total)
		fmt.Printf("%d passed, %d failed, %d skipped", c.passed, c.failed, c.skipped)
		if len(retried) > 0 {
			fmt.Printf(", %d of them only at the second try: %s", len(retried), strings.Join(retried, ", "))
		}
		fmt.Println()
		exit(c.failed > 0, nil)
	}
	c, failures := read(os.Stdin)
	if *again > 0 {
		if c.failed > 0 || c.passed == 0 {
			exit(true, nil)
		}
		exit(false, appendLine(*log, fmt.Sprintln(*again, -*again, 0, flag.Arg(0))))
	}
	var lines strings.Builder
	for _, f := range failures {
		fmt.Fprintln(&lines, f.pkg, f.test, f.rows)
	}
	err := appendLine(*log, fmt.Sprintln(c.passed, c.failed, c.skipped))
	exit(c.failed > 0, errors.Join(err, appendLine(*log+".failed", lines.String())))
}

func exit(failed bool, err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "summary:", err)
	}
	if failed || err != nil {
		os.Exit(1)
	}
	os.Exit(0)
}

func appendLine(path, line string) error {
	f, err := os.OpenFile(path, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteString(line)
	return errors.Join(err, f.Close())
}

// sum adds a log's lines up; a fourth word names a test that passed at its
// second try.
func sum(path string) (c counts, retried []string) {
	f, err := os.Open(path)
	if err != nil {
		fmt.Fprintln(os.Stderr, "summary:", err)
		return counts{failed: 1}, nil
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		var n counts
		if _, err := fmt.Sscan(s.Text(), &n.passed, &n.failed, &n.skipped); err == nil {
			c.passed, c.failed, c.skipped = c.passed+n.passed, c.failed+n.failed, c.skipped+n.skipped
		}
		if words := strings.Fields(s.Text()); len(words) == 4 {
			retried = append(retried, words[3])
		}
	}
	return c, retried
}

// read counts tests without subtests of their own: a table counts by its rows.
// A package that fails without a failing test (build, panic, timeout) counts as one.
func read(from io.Reader) (c counts, failures []failure) {
	type key struct{ pkg, test string }
	output := map[key][]string{}
	parents := map[key]bool{}
	results := map[key]string{}
	failedIn := map[string]int{}
	s := bufio.NewScanner(from)
	s.Buffer(make([]byte, 1<<20), 64<<20)
	any := false
	for s.Scan() {
		var e event
		if err := json.Unmarshal(s.Bytes(), &e); err != nil || e.Action == "" {
			fmt.Println(s.Text())
			continue
		}
		any = true
		if e.Package == "" {
			e.Package = e.ImportPath // of a build
		}
		k := key{e.Package, e.Test}
		switch e.Action {
		case "run":
			for t := e.Test; strings.Contains(t, "/"); {
				t = t[:strings.LastIndex(t, "/")]
				parents[key{e.Package, t}] = true
			}
		case "output", "build-output":
			if l := len(output[k]); l < 5000 {
				output[k] = append(output[k], e.Output)
			}
		case "build-fail":
			fmt.Print(strings.Join(output[k], ""))
		case "pass", "fail", "skip":
			if e.Test != "" {
				results[k] = e.Action
				if e.Action == "fail" {
					failedIn[e.Package]++
					fmt.Print(strings.Join(output[k], ""))
				}
				if e.Action == "skip" && !parents[k] {
					fmt.Printf("skip %s %s: %s\n", short(e.Package), e.Test, reason(output[k]))
				}
				delete(output, k)
				continue
			}
			switch {
			case e.Action == "skip": // no test files
			case e.Action == "fail" && failedIn[e.Package] == 0:
				c.failed++
				for ok, o := range output { // a panic prints where it happens
					if ok.pkg == e.Package {
						fmt.Print(strings.Join(o, ""))
					}
				}
				fallthrough
			default:
				fmt.Printf("%-4s %s (%.1fs)\n", e.Action, short(e.Package), e.Elapsed)
			}
		}
	}
	if err := s.Err(); err != nil {
		fmt.Fprintln(os.Stderr, "summary:", err)
		c.failed++
	}
	if !any {
		c.failed++
	}
	rows := map[key]int{}
	for k, r := range results {
		if parents[k] {
			// A parent that fails by itself still counts.
			child := false
			for o, or := range results {
				child = child || (or == "fail" && o.pkg == k.pkg && strings.HasPrefix(o.test, k.test+"/"))
			}
			if r != "fail" || child {
				continue
			}
		}
		switch r {
		case "pass":
			c.passed++
		case "fail":
			c.failed++
			top, _, _ := strings.Cut(k.test, "/")
			rows[key{k.pkg, top}]++
		case "skip":
			c.skipped++
		}
	}
	for k, n := range rows {
		failures = append(failures, failure{k.pkg, k.test, n})
	}
	return c, failures
}

func short(pkg string) string {
	return strings.TrimPrefix(pkg, "github.com/podd-runtime/podd/")
}

// reason is what a test said when it skipped itself.
func reason(output []string) string {
	for i := len(output) - 1; i >= 0; i-- {
		l := strings.TrimSpace(output[i])
		if l != "" && !strings.HasPrefix(l, "---") && !strings.HasPrefix(l, "===") {
			if _, after, ok := strings.Cut(l, ".go:"); ok {
				if _, msg, ok := strings.Cut(after, ": "); ok {
					return msg
				}
			}
			return l
		}
	}
	return "no reason given"
}
