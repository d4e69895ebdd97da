package cri

import (
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// sigRTMax is the last real-time signal on Linux; glibc keeps two of the
// first for itself, so that its SIGRTMIN is 34.
const (
	sigRTMin = 34
	sigRTMax = 64
)

// stopSignal is what StopContainer sends: the container's, else the image's,
// else SIGTERM.
func stopSignal(c *runtimeapi.ContainerConfig, image string) int {
	if n, ok := signalNumber(c.GetStopSignal()); ok && n != 0 {
		return n
	}
	if n := parseSignal(image); n != 0 {
		return n
	}
	return int(unix.SIGTERM)
}

// signalNumber converts the CRI's enumeration; 0 is the runtime's default.
func signalNumber(s runtimeapi.Signal) (int, bool) {
	name, ok := runtimeapi.Signal_name[int32(s)]
	if !ok {
		return 0, false
	}
	if s == runtimeapi.Signal_RUNTIME_DEFAULT {
		return 0, true
	}
	n := parseSignal(name)
	return n, n != 0
}

// parseSignal reads what images write: a number, or a name with or without
// SIG, real-time signals as SIGRTMIN+3 or in the CRI's spelling SIGRTMINPLUS3.
// 0: not a signal.
func parseSignal(s string) int {
	s = strings.ToUpper(strings.TrimSpace(s))
	if n, err := strconv.Atoi(s); err == nil {
		if n < 1 || n > sigRTMax {
			return 0
		}
		return n
	}
	s = strings.TrimPrefix(s, "SIG")
	for _, rt := range []struct {
		prefix string
		base   int
		sign   int
	}{{"RTMIN", sigRTMin, 1}, {"RTMAX", sigRTMax, -1}} {
		rest, ok := strings.CutPrefix(s, rt.prefix)
		if !ok {
			continue
		}
		if rest == "" {
			return rt.base
		}
		for _, op := range []string{"PLUS", "MINUS", "+", "-"} {
			if digits, ok := strings.CutPrefix(rest, op); ok {
				rest = digits
				break
			}
		}
		n, err := strconv.Atoi(rest)
		if err != nil || n < 0 || n > sigRTMax-sigRTMin {
			return 0
		}
		return rt.base + rt.sign*n
	}
	switch s {
	case "CLD":
		s = "CHLD"
	case "IOT":
		s = "ABRT"
	case "POLL":
		s = "IO"
	}
	return int(unix.SignalNum("SIG" + s))
}

// criSignal is the CRI's name of a signal, for ContainerStatus.
func criSignal(n int) runtimeapi.Signal {
	for v := range runtimeapi.Signal_name {
		if v == 0 {
			continue
		}
		if got, ok := signalNumber(runtimeapi.Signal(v)); ok && got == n && !alias(runtimeapi.Signal(v)) {
			return runtimeapi.Signal(v)
		}
	}
	return runtimeapi.Signal_RUNTIME_DEFAULT
}

// alias says that another name of the enumeration is the usual one.
func alias(s runtimeapi.Signal) bool {
	switch s {
	case runtimeapi.Signal_SIGCLD, runtimeapi.Signal_SIGIOT, runtimeapi.Signal_SIGPOLL:
		return true
	}
	return false
}
