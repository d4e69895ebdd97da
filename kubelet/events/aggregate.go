package events

import (
	"fmt"
	"strconv"
	"time"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// Upstream's client-go/tools/record puts events together when as many as
// similarMax of one kind with different messages come within similarWindow.
const (
	similarMax     = 10
	similarWindow  = 10 * time.Minute
	combinedPrefix = "(combined from similar events): "
	// maxMessage is what validation of events.v1 allows.
	maxMessage = 1024
)

// entry is one event in the compact form in which it is kept and written.
type entry struct {
	Name    string    `json:"n"`
	RV      uint64    `json:"rv"`
	Object  object    `json:"o"`
	Type    string    `json:"t"`
	Reason  string    `json:"r"`
	Message string    `json:"m"`
	Count   int32     `json:"c"`
	First   time.Time `json:"f"`
	Last    time.Time `json:"l"`
}

// object names what the event is about.
type object struct {
	Kind      string    `json:"k,omitempty"`
	API       string    `json:"a,omitempty"`
	Namespace string    `json:"ns,omitempty"`
	Name      string    `json:"n"`
	UID       types.UID `json:"u,omitempty"`
	Field     string    `json:"f,omitempty"`
}

func newObject(ref *v1.ObjectReference) object {
	return object{Kind: ref.Kind, API: ref.APIVersion, Namespace: ref.Namespace, Name: ref.Name, UID: ref.UID, Field: ref.FieldPath}
}

// kind is what similar events have in common.
type kind struct {
	object      object
	typ, reason string
}

// same is what equal events have in common.
type same struct {
	kind
	message string
}

// similar counts the distinct messages of one kind in the current window.
type similar struct {
	since    time.Time
	messages int
	combined *entry // stands for those beyond the window's; nil: none yet
}

// truncate cuts m to what the API allows, at a rune's start.
func truncate(m string) string {
	if len(m) <= maxMessage {
		return m
	}
	const tail = "..."
	cut := maxMessage - len(tail)
	for cut > 0 && m[cut]&0xC0 == 0x80 {
		cut--
	}
	return m[:cut] + tail
}

// api is the v1.Event of e as upstream's recorder shapes it.
func (e *entry) api(component, host string) *v1.Event {
	ns := e.Object.Namespace
	if ns == "" {
		ns = metav1.NamespaceDefault
	}
	return &v1.Event{
		TypeMeta: metav1.TypeMeta{Kind: "Event", APIVersion: "v1"},
		ObjectMeta: metav1.ObjectMeta{
			Name: e.Name, Namespace: ns, ResourceVersion: strconv.FormatUint(e.RV, 10),
			CreationTimestamp: metav1.NewTime(e.First),
		},
		InvolvedObject: v1.ObjectReference{
			Kind: e.Object.Kind, APIVersion: e.Object.API, Namespace: e.Object.Namespace,
			Name: e.Object.Name, UID: e.Object.UID, FieldPath: e.Object.Field,
		},
		Reason: e.Reason, Message: e.Message, Type: e.Type, Count: e.Count,
		FirstTimestamp: metav1.NewTime(e.First), LastTimestamp: metav1.NewTime(e.Last),
		Source:              v1.EventSource{Component: component, Host: host},
		ReportingController: component, ReportingInstance: host,
	}
}

// eventName is unique as long as the clock moves; upstream builds it so.
func eventName(o object, t time.Time) string {
	return fmt.Sprintf("%s.%x", o.Name, t.UnixNano())
}
