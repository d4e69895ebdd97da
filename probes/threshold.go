package probes

// run counts equal outcomes in a row.
type run struct {
	ok bool
	n  int32
}

// next adds an outcome and says whether it has come often enough in a row to
// count. Thresholds below 1 count as 1.
func (r run) next(ok bool, successThreshold, failureThreshold int32) (run, bool) {
	if r.n == 0 || r.ok != ok {
		r = run{ok: ok}
	}
	r.n++
	limit := successThreshold
	if !ok {
		limit = failureThreshold
	}
	return r, r.n >= max(limit, 1)
}
