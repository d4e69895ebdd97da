package certs

import (
	"crypto/x509"
	"testing"
	"time"
)

func TestRenewal(t *testing.T) {
	start := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	for _, test := range []struct {
		name             string
		before, after    time.Duration
		signed           time.Time
		earliest, latest time.Duration
	}{
		{"a year", 0, 100 * time.Hour, time.Time{}, 70 * time.Hour, 90 * time.Hour},
		{"known when it was signed", 0, 100 * time.Hour, start.Add(-time.Hour), 70 * time.Hour, 90 * time.Hour},
		// kube-controller-manager dates back by five minutes.
		{"short", -5 * time.Minute, 100 * time.Second, start, 70 * time.Second, 90 * time.Second},
		{"found after it should have been", -time.Hour, time.Minute, time.Time{}, -time.Hour, 0},
	} {
		c := &x509.Certificate{NotBefore: start.Add(test.before), NotAfter: start.Add(test.after)}
		first, last := renewal(c, test.signed, 0).Sub(start), renewal(c, test.signed, 1).Sub(start)
		if first < test.earliest-time.Second || last > test.latest+time.Second {
			t.Errorf("%s: renewed between %v and %v, want %v and %v", test.name, first, last, test.earliest, test.latest)
		}
	}
}
