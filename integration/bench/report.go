package main

import (
	"fmt"
	"io"
	"slices"
	"text/tabwriter"
	"time"
)

// report gathers a figure per subject and prints them side by side.
type report struct {
	rows     []string
	subjects []string
	cells    map[[2]string]string
	values   map[[2]string]float64
}

func (r *report) set(row, subject, text string, value float64) {
	if r.cells == nil {
		r.cells, r.values = map[[2]string]string{}, map[[2]string]float64{}
	}
	if !slices.Contains(r.rows, row) {
		r.rows = append(r.rows, row)
	}
	if !slices.Contains(r.subjects, subject) {
		r.subjects = append(r.subjects, subject)
	}
	r.cells[[2]string{row, subject}] = text
	r.values[[2]string{row, subject}] = value
}

// durations records median and p99 of a sample.
func (r *report) durations(row, subject string, sample []time.Duration) {
	if len(sample) == 0 {
		return
	}
	p50, p99 := percentile(sample, 50), percentile(sample, 99)
	r.set(row, subject, fmt.Sprintf("%s / %s", ms(p50), ms(p99)), float64(p50))
}

func percentile(sample []time.Duration, p int) time.Duration {
	s := slices.Clone(sample)
	slices.Sort(s)
	return s[min(len(s)-1, len(s)*p/100)]
}

func ms(d time.Duration) string { return fmt.Sprintf("%.1f ms", float64(d.Microseconds())/1000) }

func (r *report) print(w io.Writer) {
	t := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	fmt.Fprint(t, "median / p99 where two figures stand")
	for _, s := range r.subjects {
		fmt.Fprint(t, "\t", s)
	}
	fmt.Fprintln(t, "\tpeer : podd")
	for _, row := range r.rows {
		fmt.Fprint(t, row)
		for _, s := range r.subjects {
			fmt.Fprint(t, "\t", r.cells[[2]string{row, s}])
		}
		ours, theirs := r.values[[2]string{row, "podd"}], r.values[[2]string{row, peerName}]
		if ours > 0 && theirs > 0 {
			fmt.Fprintf(t, "\t%.1f", theirs/ours)
		}
		fmt.Fprintln(t)
	}
	t.Flush()
}
