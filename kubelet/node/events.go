package node

import (
	"fmt"

	v1 "k8s.io/api/core/v1"
)

// change of a Node that an event tells of, under upstream's reason.
type change struct{ eventType, reason, message string }

// statusReasons of a condition's change, by its new status; each says
// "Node NAME status is now: REASON", as upstream.
var statusReasons = map[v1.NodeConditionType]map[v1.ConditionStatus]string{
	v1.NodeReady:          {v1.ConditionTrue: "NodeReady", v1.ConditionFalse: "NodeNotReady"},
	v1.NodeMemoryPressure: {v1.ConditionTrue: "NodeHasInsufficientMemory", v1.ConditionFalse: "NodeHasSufficientMemory"},
	v1.NodeDiskPressure:   {v1.ConditionTrue: "NodeHasDiskPressure", v1.ConditionFalse: "NodeHasNoDiskPressure"},
	v1.NodePIDPressure:    {v1.ConditionTrue: "NodeHasInsufficientPID", v1.ConditionFalse: "NodeHasSufficientPID"},
}

// changes from what the apiserver had to what has been reported; was is nil for
// a Node that was registered.
func changes(name string, was, is *v1.NodeStatus) []change {
	var out []change
	if was != nil && was.NodeInfo.BootID != "" && was.NodeInfo.BootID != is.NodeInfo.BootID {
		out = append(out, change{v1.EventTypeWarning, "Rebooted", fmt.Sprintf("Node %s has been rebooted, boot id: %s", name, is.NodeInfo.BootID)})
	}
	for i := range is.Conditions {
		c := &is.Conditions[i]
		reason := statusReasons[c.Type][c.Status]
		if reason == "" || was != nil && status(was, c.Type) == c.Status {
			continue
		}
		out = append(out, change{v1.EventTypeNormal, reason, fmt.Sprintf("Node %s status is now: %s", name, reason)})
	}
	return out
}

func status(s *v1.NodeStatus, t v1.NodeConditionType) v1.ConditionStatus {
	for i := range s.Conditions {
		if s.Conditions[i].Type == t {
			return s.Conditions[i].Status
		}
	}
	return ""
}

// tell of changes by events.
func (n *Node) tell(all ...change) {
	for _, c := range all {
		n.cfg.Event(c.eventType, c.reason, c.message)
	}
}

// tellSchedulable of a Node that was cordoned or uncordoned.
func (n *Node) tellSchedulable(was, is *v1.Node) {
	if was.Spec.Unschedulable == is.Spec.Unschedulable {
		return
	}
	reason := "NodeSchedulable"
	if is.Spec.Unschedulable {
		reason = "NodeNotSchedulable"
	}
	n.tell(change{v1.EventTypeNormal, reason, fmt.Sprintf("Node %s status is now: %s", n.cfg.Name, reason)})
}
