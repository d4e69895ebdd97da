package netns

import (
	"os"
	"testing"
)

// A start of the agent on a full disk finds its range as it left it: there is
// nothing to write, and so nothing to fail.
func TestRangeIsWrittenOnlyWhenItChanges(t *testing.T) {
	dir := t.TempDir()
	r := rangeRecord{CIDRs: []string{"10.86.0.0/20"}}
	if err := saveRange(dir, r); err != nil {
		t.Fatal(err)
	}
	// No write succeeds any more, not even root's.
	if err := os.Mkdir(dir+"/range.json.tmp", 0o700); err != nil {
		t.Fatal(err)
	}
	if err := saveRange(dir, r); err != nil {
		t.Errorf("the range is as before: %v", err)
	}
	r.CIDRs = append(r.CIDRs, "10.86.16.0/20")
	if err := saveRange(dir, r); err == nil {
		t.Error("a new range that is not written was taken for written")
	}
}
