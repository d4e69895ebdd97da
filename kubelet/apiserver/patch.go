package apiserver

import (
	"encoding/json"
	"fmt"
	"reflect"

	v1 "k8s.io/api/core/v1"
)

// own are the conditions that only the node sets; when the table has one no
// more it is taken away.
var own = map[v1.PodConditionType]bool{
	v1.PodResizePending: true, v1.PodResizeInProgress: true,
}

// statusPatch is the strategic merge patch that brings the status of base, the
// apiserver's version, to what the table shows; nil when they agree. Fields
// and conditions of others are left alone. It holds base's UID, so that it
// cannot hit a later pod of the same name.
func statusPatch(base, shown *v1.Pod) ([]byte, error) {
	want := wanted(&base.Status, shown)
	if want == nil {
		return nil, nil
	}
	was, err := object(&base.Status)
	if err != nil {
		return nil, err
	}
	is, err := object(want)
	if err != nil {
		return nil, err
	}
	changed := mergePatch(was, is)
	if _, have := changed["conditions"]; have {
		changed["conditions"] = conditionsPatch(was["conditions"], is["conditions"])
	}
	// These lists are merged by their addresses otherwise.
	for _, k := range []string{"podIPs", "hostIPs"} {
		if list, have := changed[k].([]any); have {
			changed[k] = append(list, map[string]any{"$patch": "replace"})
		}
	}
	if len(changed) == 0 {
		return nil, nil
	}
	return json.Marshal(map[string]any{"metadata": map[string]any{"uid": base.UID}, "status": changed})
}

// mergePatch makes is of was: objects key by key, all else as a whole (RFC 7386).
func mergePatch(was, is map[string]any) map[string]any {
	out := map[string]any{}
	for k, v := range is {
		if reflect.DeepEqual(was[k], v) {
			continue
		}
		out[k] = v
		if a, ok := was[k].(map[string]any); ok {
			if b, ok := v.(map[string]any); ok {
				out[k] = mergePatch(a, b)
			}
		}
	}
	for k := range was {
		if _, have := is[k]; !have {
			out[k] = nil
		}
	}
	return out
}

// conditionsPatch has those that differ and deletes those that are gone.
func conditionsPatch(was, is any) []any {
	old, now := byType(was), byType(is)
	out := []any{}
	for t, c := range now {
		if reflect.DeepEqual(old[t], c) {
			continue
		}
		one := mergePatch(old[t], c)
		one["type"] = t
		out = append(out, one)
	}
	for t := range old {
		if now[t] == nil {
			out = append(out, map[string]any{"$patch": "delete", "type": t})
		}
	}
	return out
}

func byType(list any) map[string]map[string]any {
	out := map[string]map[string]any{}
	all, _ := list.([]any)
	for _, c := range all {
		if m, ok := c.(map[string]any); ok {
			if t, ok := m["type"].(string); ok {
				out[t] = m
			}
		}
	}
	return out
}

// object is v as its JSON has it.
func object(v any) (map[string]any, error) {
	raw, err := json.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("encode a pod's status: %w", err)
	}
	out := map[string]any{}
	return out, json.Unmarshal(raw, &out)
}

// wanted is the whole status that the pod should have at the apiserver; nil
// when nothing may be said.
func wanted(base *v1.PodStatus, shown *v1.Pod) *v1.PodStatus {
	st := &shown.Status
	if over(base.Phase) && !over(st.Phase) {
		return nil // a pod never leaves its terminal phase
	}
	w := base.DeepCopy()
	if !over(base.Phase) { // the first that was told is the last
		w.Phase, w.Reason, w.Message = st.Phase, st.Reason, st.Message
	}
	if over(st.Phase) && !over(base.Phase) && running(st) {
		// A pod is over when its containers are: others take its place, its
		// ports and its volumes as soon as they are told.
		w.Phase = base.Phase
	}
	w.ObservedGeneration = st.ObservedGeneration
	w.HostIP, w.HostIPs, w.PodIP, w.PodIPs = st.HostIP, st.HostIPs, st.PodIP, st.PodIPs
	if st.StartTime != nil {
		w.StartTime = st.StartTime
	}
	if w.QOSClass == "" {
		w.QOSClass = st.QOSClass
	}
	w.InitContainerStatuses, w.ContainerStatuses, w.EphemeralContainerStatuses = st.InitContainerStatuses, st.ContainerStatuses, st.EphemeralContainerStatuses
	w.Resources, w.AllocatedResources = st.Resources, st.AllocatedResources
	w.Conditions = mergeConditions(base.Conditions, st.Conditions)
	return w
}

func over(p v1.PodPhase) bool { return p == v1.PodSucceeded || p == v1.PodFailed }

func running(st *v1.PodStatus) bool {
	for _, list := range [][]v1.ContainerStatus{st.InitContainerStatuses, st.ContainerStatuses, st.EphemeralContainerStatuses} {
		for i := range list {
			if list[i].State.Running != nil {
				return true
			}
		}
	}
	return false
}

// mergeConditions keeps those of others, and the time of a transition that has
// been reported.
func mergeConditions(base, ours []v1.PodCondition) []v1.PodCondition {
	var out []v1.PodCondition
	find := func(list []v1.PodCondition, t v1.PodConditionType) *v1.PodCondition {
		for i := range list {
			if list[i].Type == t {
				return &list[i]
			}
		}
		return nil
	}
	for i := range base {
		b := base[i]
		c := find(ours, b.Type)
		switch {
		case c == nil && own[b.Type]:
		case c == nil || foreign(b.Type):
			out = append(out, b)
		default:
			n := *c
			n.LastProbeTime = b.LastProbeTime
			if n.Status == b.Status {
				n.LastTransitionTime = b.LastTransitionTime
			}
			out = append(out, n)
		}
	}
	for i := range ours {
		if find(base, ours[i].Type) == nil && !foreign(ours[i].Type) {
			out = append(out, ours[i])
		}
	}
	return out
}

// foreign says that a condition is not the node's to set.
func foreign(t v1.PodConditionType) bool {
	switch t {
	case v1.PodScheduled, v1.PodReady, v1.PodInitialized, v1.ContainersReady, v1.PodReadyToStartContainers, v1.DisruptionTarget:
		return false
	}
	return !own[t]
}
