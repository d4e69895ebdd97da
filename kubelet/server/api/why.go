package api

import (
	"fmt"
	"strings"
	"time"
)

// Level of a Finding.
type Level string

const (
	// Failed: something does not work, and will not without a change.
	Failed Level = "Failed"
	// Waiting: something is not done yet.
	Waiting Level = "Waiting"
	// Notice: the pod is fine; this is worth knowing all the same.
	Notice Level = "Notice"
)

// Finding is one thing that keeps a pod from being what it should be.
type Finding struct {
	Level Level `json:"level"`
	// Reason is one word for programs, such as PortInUse.
	Reason string `json:"reason"`
	// Subject is what it is about: "container web", "volume data", "pod".
	Subject   string `json:"subject,omitempty"`
	Container string `json:"container,omitempty"`
	// Message says it in plain words.
	Message string `json:"message"`
	// Evidence are lines that show it, such as the end of a log.
	Evidence []string `json:"evidence,omitempty"`
	// Remedy says what to do.
	Remedy string     `json:"remedy,omitempty"`
	Since  *time.Time `json:"since,omitempty"`
	// Next is when podd tries again, or when the next thing happens.
	Next *time.Time `json:"next,omitempty"`
}

// Diagnosis of one pod.
type Diagnosis struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	UID       string `json:"uid,omitempty"`
	Phase     string `json:"phase,omitempty"`
	// Fine: there are no findings but notices.
	Fine bool `json:"fine"`
	// Summary is the most important sentence.
	Summary  string    `json:"summary"`
	Findings []Finding `json:"findings,omitempty"`
}

// Diagnoses answers GET /podd/v1/why.
type Diagnoses struct {
	Items []Diagnosis `json:"items"`
	// Node are troubles of the node itself.
	Node []Finding `json:"node,omitempty"`
	// Problems of manifests that gave no pod.
	Problems []Diagnosis `json:"problems,omitempty"`
}

// Text of the diagnosis for people; pad begins each line.
func (d *Diagnosis) Text(pad string) string {
	var b strings.Builder
	if len(d.Findings) == 0 {
		fmt.Fprintf(&b, "%s%s\n", pad, d.Summary)
	}
	for i, f := range d.Findings {
		if i == 0 && d.Fine && f.Level == Notice {
			fmt.Fprintf(&b, "%s%s\n", pad, d.Summary)
		}
		if i > 0 {
			b.WriteByte('\n')
		}
		fmt.Fprintf(&b, "%s%s\n", pad, f.Message)
		for _, l := range f.Evidence {
			fmt.Fprintf(&b, "%s    %s\n", pad, l)
		}
		if f.Remedy != "" {
			fmt.Fprintf(&b, "%s  To do: %s\n", pad, f.Remedy)
		}
	}
	return b.String()
}

// Finding that the problem is.
func (p Problem) Finding() Finding {
	where := p.File
	if p.Line > 0 {
		where += fmt.Sprintf(":%d", p.Line)
	}
	if p.Field != "" {
		where += ", field " + p.Field
	}
	if p.Warning {
		return Finding{Level: Notice, Reason: "ManifestWarning", Subject: "manifest", Remedy: p.Remedy,
			Message: fmt.Sprintf("The manifest has a warning: %s: %s.", where, strings.TrimRight(p.Message, "."))}
	}
	f := Finding{Level: Failed, Reason: "InvalidManifest", Subject: "manifest", Remedy: p.Remedy}
	f.Message = fmt.Sprintf("The manifest is not in force: %s: %s.", where, strings.TrimRight(p.Message, "."))
	if p.Kept {
		f.Message = fmt.Sprintf("The changed manifest is not in force, the last good version runs on: %s: %s.", where, strings.TrimRight(p.Message, "."))
	}
	if !p.Since.IsZero() {
		f.Since = &p.Since
	}
	if f.Remedy == "" {
		f.Remedy = "correct the file; podd check FILE tests it without a daemon"
	}
	return f
}
