package shim

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

func TestBuildID(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	got, err := BuildID(self)
	if err != nil {
		t.Fatal(err)
	}
	want, err := exec.Command("go", "tool", "buildid", self).Output()
	if err != nil {
		t.Fatal(err)
	}
	if got != strings.TrimSpace(string(want)) {
		t.Errorf("build id %q, want %q", got, want)
	}
	data, err := os.ReadFile(self)
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string][]byte{"script": []byte("#!/bin/sh\n"), "empty": nil, "cut off": data[:100], "header only": data[:64]} {
		path := filepath.Join(t.TempDir(), "program")
		if err := os.WriteFile(path, text, 0o755); err != nil {
			t.Fatal(err)
		}
		if id, err := BuildID(path); err == nil {
			t.Errorf("%s: build id %q", name, id)
		}
	}
}
