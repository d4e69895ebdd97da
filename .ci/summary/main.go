// Command summary reads the output of `go test -json`, shows failures in full
// and passes in one line a package, and counts.
//
//	go test -json ./... | summary -log FILE    adds the counts to FILE
//	summary -total FILE                        prints "N passed, N failed, N skipped"
//
// It exits with 1 when a test failed.
package main

import (
	"bufio"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"strings"
)

// event of test2json (go doc test2json).
type event struct {
	Action, Package, ImportPath, Test, Output string
	Elapsed                                   float64
}

type counts struct{ passed, failed, skipped int }

func main() {
	log := flag.String("log", "", "file to add the counts to")
	total := flag.String("total", "", "file to sum up")
	flag.Parse()
	var c counts
	if *total != "" {
		c = sum(*total)
		fmt.Printf("%d passed, %d failed, %d skipped\n", c.passed, c.failed, c.skipped)
	} else {
		c = read()
		if err := add(*log, c); err != nil {
			fmt.Fprintln(os.Stderr, "summary:", err)
			os.Exit(1)
		}
	}
	if c.failed > 0 {
		os.Exit(1)
	}
}

func add(path string, c counts) error {
	f, err := os.OpenFile(path, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	fmt.Fprintln(f, c.passed, c.failed, c.skipped)
	return f.Close()
}

func sum(path string) (c counts) {
	f, err := os.Open(path)
	if err != nil {
		fmt.Fprintln(os.Stderr, "summary:", err)
		return counts{failed: 1}
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		var n counts
		if _, err := fmt.Sscan(s.Text(), &n.passed, &n.failed, &n.skipped); err == nil {
			c.passed, c.failed, c.skipped = c.passed+n.passed, c.failed+n.failed, c.skipped+n.skipped
		}
	}
	return c
}

// read counts tests without subtests of their own: a table counts by its rows.
// A package that fails without a failing test (build, panic, timeout) counts as one.
func read() (c counts) {
	type key struct{ pkg, test string }
	output := map[key][]string{}
	parents := map[key]bool{}
	results := map[key]string{}
	failedIn := map[string]int{}
	s := bufio.NewScanner(os.Stdin)
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
		case "skip":
			c.skipped++
		}
	}
	return c
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
