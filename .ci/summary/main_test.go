package main

import (
	"path/filepath"
	"strings"
	"testing"
)

const stream = `
{"Action":"run","Package":"p","Test":"TestA"}
{"Action":"run","Package":"p","Test":"TestA/one"}
{"Action":"fail","Package":"p","Test":"TestA/one"}
{"Action":"run","Package":"p","Test":"TestA/two"}
{"Action":"pass","Package":"p","Test":"TestA/two"}
{"Action":"fail","Package":"p","Test":"TestA"}
{"Action":"run","Package":"p","Test":"TestB"}
{"Action":"skip","Package":"p","Test":"TestB"}
{"Action":"fail","Package":"p"}
{"Action":"fail","Package":"q"}
`

func TestCountsRowsAndNamesWhatFailed(t *testing.T) {
	c, failures := read(strings.NewReader(stream))
	if want := (counts{passed: 1, failed: 2, skipped: 1}); c != want {
		t.Errorf("%+v, want %+v", c, want)
	}
	// q failed without a test: it can't be run again by name.
	if len(failures) != 1 || failures[0] != (failure{"p", "TestA", 1}) {
		t.Errorf("%+v", failures)
	}
}

func TestSecondTryIsNamed(t *testing.T) {
	log := filepath.Join(t.TempDir(), "log")
	for _, l := range []string{"1 2 1\n", "1 -1 0 p:TestA\n"} {
		if err := appendLine(log, l); err != nil {
			t.Fatal(err)
		}
	}
	c, retried := sum(log)
	if want := (counts{passed: 2, failed: 1, skipped: 1}); c != want || len(retried) != 1 || retried[0] != "p:TestA" {
		t.Errorf("%+v %v", c, retried)
	}
}
