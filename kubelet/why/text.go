package why

import (
	"fmt"
	"regexp"
	"strings"
	"time"

	v1 "k8s.io/api/core/v1"
)

// ago is when t was, as people say it.
func (x *explainer) ago(t time.Time) string {
	d := x.Now.Sub(t)
	if d < time.Second {
		return "just now"
	}
	return Duration(d) + " ago"
}

// in is when t will be.
func (x *explainer) in(t time.Time) string {
	d := t.Sub(x.Now)
	if d < time.Second {
		return "at once"
	}
	return fmt.Sprintf("at %s (in %s)", t.Local().Format("15:04:05"), Duration(d))
}

// Duration in at most two units.
func Duration(d time.Duration) string {
	switch d = d.Round(time.Second); {
	case d < 2*time.Minute:
		return fmt.Sprintf("%d s", d/time.Second)
	case d < 2*time.Hour:
		return fmt.Sprintf("%d min", d/time.Minute)
	case d < 48*time.Hour:
		return fmt.Sprintf("%d h", d/time.Hour)
	}
	return fmt.Sprintf("%d days", d/(24*time.Hour))
}

func times(n int) string {
	switch n {
	case 1:
		return "once"
	case 2:
		return "twice"
	}
	return fmt.Sprintf("%d times", n)
}

// size in binary units, as manifests give it.
func size(n uint64) string {
	for _, u := range []struct {
		name string
		n    uint64
	}{{"Gi", 1 << 30}, {"Mi", 1 << 20}, {"Ki", 1 << 10}} {
		if n >= u.n {
			if n%u.n == 0 {
				return fmt.Sprintf("%d%s", n/u.n, u.name)
			}
			return fmt.Sprintf("%.1f%s", float64(n)/float64(u.n), u.name)
		}
	}
	return fmt.Sprintf("%d bytes", n)
}

// sentence ends with one full stop, on one line.
func sentence(s string) string {
	s = strings.TrimRight(strings.Join(strings.Fields(s), " "), " .:;,")
	return s + "."
}

// noise is what errors carry for machines: ids, attempts, durations.
var noise = []struct {
	re *regexp.Regexp
	to string
}{
	{regexp.MustCompile(`(?:start|create) container [0-9a-f]{32,64}: `), ""},
	{regexp.MustCompile(`unable to start container process: `), ""},
	{regexp.MustCompile(`error during container init: `), ""},
	{regexp.MustCompile(`run pod sandbox \S+: `), ""},
	{regexp.MustCompile(` \(after [0-9.a-zµ]+\)`), ""},
	{regexp.MustCompile(`\b[0-9a-f]{64}\b`), "…"},
	{regexp.MustCompile(`(: (?:not found|already exists|unavailable|invalid argument|failed precondition|unauthorized|deadline exceeded))+$`), ""},
	{regexp.MustCompile(`(?:; )?runc init error\(s\): .*`), ""},
}

// plain is an error's text for people.
func plain(text string) string {
	text = strings.TrimSpace(text)
	for _, n := range noise {
		text = n.re.ReplaceAllString(text, n.to)
	}
	return strings.Join(strings.Fields(text), " ")
}

// last event of a kind about a container ("": about the pod or any part).
func (x *explainer) last(container string, reasons ...string) *v1.Event {
	return x.lastWith("", container, reasons...)
}

// lastWith is last with a beginning of the message.
func (x *explainer) lastWith(prefix, container string, reasons ...string) *v1.Event {
	for i := len(x.Events) - 1; i >= 0; i-- {
		e := &x.Events[i]
		if container != "" && !strings.HasSuffix(e.InvolvedObject.FieldPath, "{"+container+"}") {
			continue
		}
		for _, r := range reasons {
			if e.Reason == r && strings.HasPrefix(message(e), prefix) {
				return e
			}
		}
	}
	return nil
}

const combined = "(combined from similar events): "

func message(e *v1.Event) string { return strings.TrimPrefix(e.Message, combined) }

// remedyOf is what an error itself says in brackets or after its last
// semicolon, if it says something to do.
func remedyOf(text string) string {
	if i := strings.LastIndex(text, "("); i >= 0 && strings.HasSuffix(text, ")") && strings.Contains(text[i:], " ") {
		return strings.TrimSuffix(text[i+1:], ")")
	}
	return ""
}
