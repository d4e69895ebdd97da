package pods

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"

	"github.com/podd-runtime/podd/kubelet/status"
)

var (
	t0      = time.Unix(1_000_000, 0)
	testPol = Policy{Backoff: BackoffPolicy{Initial: 10 * time.Second, Max: 300 * time.Second}, MinGrace: 2 * time.Second}
)

// view is an observation under construction.
type view struct{ Observed }

// up is a pod whose sandbox, cgroup, volumes and images are there.
func up() *view {
	return &view{Observed{
		Started: t0, Cgroup: StepDone, Volumes: StepDone,
		Sandboxes: []Sandbox{{ID: "s0", Ready: true}},
		Images: map[string]ImageState{
			"a": {Ref: "i"}, "b": {Ref: "i"}, "init1": {Ref: "i"}, "init2": {Ref: "i"}, "side": {Ref: "i"}, "side2": {Ref: "i"}, "dbg": {Ref: "i"},
		},
	}}
}

func (v *view) with(cs ...status.Container) *view {
	v.Containers = append(v.Containers, cs...)
	sortContainers(v.Containers)
	return v
}

func (v *view) set(f func(*Observed)) *view { f(&v.Observed); return v }

func (v *view) busy(keys ...string) *view {
	v.Busy = map[string]time.Time{}
	for _, k := range keys {
		v.Busy[k] = t0.Add(time.Hour)
	}
	return v
}

func running(name string) status.Container {
	return status.Container{ID: name + "0", Name: name, Sandbox: "s0", State: status.Running, StartedAt: t0, Started: true, Ready: true}
}

func exited(name string, code int32) status.Container {
	return status.Container{ID: name + "0", Name: name, Sandbox: "s0", State: status.Exited, ExitCode: code, FinishedAt: t0}
}

func kinds() map[Kind]string {
	return map[Kind]string{
		Observe: "observe", EnsureCgroup: "cgroup", SetupVolumes: "volumes", RunSandbox: "sandbox", EnsureImage: "image",
		Start: "start", PostStart: "post", Order: "order", Hook: "hook", StopContainer: "stop", RemoveContainer: "remove",
		StopSandbox: "stopsandbox", RemoveSandbox: "removesandbox", Teardown: "teardown", RemoveCgroup: "rmcgroup",
		Resize: "resize", Abort: "abort", Cancel: "cancel", Complete: "complete", Expire: "expire", Forget: "forget",
	}
}

// short writes a plan as "start a, stop b0 5s | a=CrashLoopBackOff | wake 10s":
// actions on an instance by its id, others by the container's name or the key.
func short(p Plan) string {
	var parts []string
	for _, a := range p.Actions {
		s := kinds()[a.Kind]
		switch {
		case a.ID != "":
			s += " " + a.ID
		case a.Container != "":
			s += " " + a.Container
		case a.Key != "":
			s += " " + a.Key
		}
		if a.Grace != 0 {
			s += " " + a.Grace.String()
		}
		parts = append(parts, s)
	}
	slices.Sort(parts)
	out := strings.Join(parts, ", ")
	for _, n := range slices.Sorted(maps.Keys(p.Waits)) {
		out += " | " + n + "=" + p.Waits[n].Reason
	}
	if !p.Wake.IsZero() {
		out += fmt.Sprintf(" | wake %s", p.Wake.Sub(t0))
	}
	return out
}

func withInit(names ...string) func(*v1.Pod) {
	return func(p *v1.Pod) {
		for _, n := range names {
			if strings.HasPrefix(n, "side") {
				p.Spec.InitContainers = append(p.Spec.InitContainers, sidecar(n))
			} else {
				p.Spec.InitContainers = append(p.Spec.InitContainers, container(n))
			}
		}
	}
}

func two(p *v1.Pod) { p.Spec.Containers = append(p.Spec.Containers, container("b")) }

func hooks(p *v1.Pod) {
	h := &v1.LifecycleHandler{Sleep: &v1.SleepAction{Seconds: 1}}
	p.Spec.Containers[0].Lifecycle = &v1.Lifecycle{PreStop: h, PostStart: h}
}

type planCase struct {
	name string
	mods []func(*v1.Pod)
	o    *view
	d    func(*Desired)
	at   time.Duration // since t0
	want string
}

func (tc planCase) run(t *testing.T) {
	d := Desired{Pod: mkpod("web", "u1", tc.mods...)}
	if tc.d != nil {
		tc.d(&d)
	}
	p := plan(&d, &tc.o.Observed, testPol, t0.Add(tc.at))
	if got := short(p); got != tc.want {
		t.Errorf("plan is  %q\nwant     %q", got, tc.want)
	}
	again := plan(&d, &tc.o.Observed, testPol, t0.Add(tc.at))
	if short(again) != short(p) {
		t.Error("the same values give another plan")
	}
}

func mods(f ...func(*v1.Pod)) []func(*v1.Pod) { return f }

func TestPlanStart(t *testing.T) {
	for _, tc := range []planCase{
		{name: "nothing yet: all that is independent at once", o: &view{}, want: "cgroup, image a, volumes"},
		{name: "with init containers only the first one's image", mods: mods(withInit("init1")), o: &view{}, want: "cgroup, image init1, volumes"},
		{name: "the sandbox needs the cgroup only", o: &view{Observed{Cgroup: StepDone}}, want: "image a, sandbox, volumes"},
		{name: "what is under way is not done twice", o: (&view{Observed{Cgroup: StepDone}}).busy("sandbox", "setup", "image/a"), want: ""},
		{name: "what failed waits", o: &view{Observed{Cgroup: StepDone, Volumes: StepDone, Images: map[string]ImageState{"a": {Ref: "i"}}, Retry: map[string]time.Time{"sandbox": t0.Add(4 * time.Second)}}}, want: " | wake 4s"},
		{name: "containers wait for volumes", o: up().set(func(o *Observed) { o.Volumes = StepUnknown }), want: "volumes"},
		{name: "containers start side by side", mods: mods(two), o: up(), want: "start a, start b"},
		{name: "a start under way", mods: mods(two), o: up().busy("start/a"), want: "start b"},
		{name: "all runs: nothing to do", o: up().with(running("a")), want: ""},
		{name: "created and never started", o: up().with(status.Container{ID: "a0", Name: "a", Sandbox: "s0"}), want: "remove a0"},
		{name: "stale: look first", o: up().set(func(o *Observed) { o.Stale = true }), want: "observe"},
		{name: "held: nothing", o: &view{}, d: func(d *Desired) { d.Held = true }, want: ""},
		{name: "postStart", mods: mods(hooks), o: up().with(func() status.Container { c := running("a"); c.Starting = true; return c }()), want: "post a0"},
		{name: "pull failed: first the error", o: up().set(func(o *Observed) {
			o.Images = map[string]ImageState{"a": {Failed: t0, Retry: t0.Add(10 * time.Second), Reason: "ErrImagePull", Error: "x"}}
		}), want: " | a=ErrImagePull | wake 5s"},
		{name: "pull failed: then the wait", at: 6 * time.Second, o: up().set(func(o *Observed) {
			o.Images = map[string]ImageState{"a": {Failed: t0, Retry: t0.Add(10 * time.Second), Reason: "ErrImagePull", Error: "x"}}
		}), want: " | a=ImagePullBackOff | wake 10s"},
		{name: "pull failed: then again", at: 10 * time.Second, o: up().set(func(o *Observed) {
			o.Images = map[string]ImageState{"a": {Failed: t0, Retry: t0.Add(10 * time.Second), Reason: "ErrImagePull"}}
		}), want: "image a"},
		{name: "ephemeral containers start once", mods: mods(func(p *v1.Pod) {
			p.Spec.EphemeralContainers = []v1.EphemeralContainer{{EphemeralContainerCommon: v1.EphemeralContainerCommon{Name: "dbg", Image: "img:1"}}}
		}), o: up().with(running("a")), want: "start dbg"},
		{name: "and never again", mods: mods(func(p *v1.Pod) {
			p.Spec.EphemeralContainers = []v1.EphemeralContainer{{EphemeralContainerCommon: v1.EphemeralContainerCommon{Name: "dbg", Image: "img:1"}}}
		}), o: up().with(running("a"), exited("dbg", 1)), want: ""},
	} {
		t.Run(tc.name, tc.run)
	}
}

func TestPlanInit(t *testing.T) {
	for _, tc := range []planCase{
		{name: "the first one only", mods: mods(withInit("init1", "init2")), o: up(), want: "start init1"},
		{name: "while it runs", mods: mods(withInit("init1", "init2")), o: up().with(running("init1")), want: ""},
		{name: "then the next", mods: mods(withInit("init1", "init2")), o: up().with(exited("init1", 0)), want: "start init2"},
		{name: "then the rest", mods: mods(withInit("init1", "init2")), o: up().with(exited("init1", 0), exited("init2", 0)), want: "start a"},
		{name: "a failure is tried again", mods: mods(withInit("init1")), o: up().with(exited("init1", 1)), want: "start init1"},
		{name: "after its back-off", mods: mods(withInit("init1")), o: up().with(exited("init1", 1)).set(func(o *Observed) {
			o.Backoffs = map[string]Backoff{"init1": {Delay: 20 * time.Second, Updated: t0}}
		}), want: " | init1=CrashLoopBackOff | wake 20s"},
		{name: "never: the pod is done", mods: mods(withInit("init1"), never), o: up().with(exited("init1", 1)), want: "complete"},
		{name: "an OOM kill is a failure whatever the code says", mods: mods(withInit("init1"), never), o: up().with(func() status.Container { c := exited("init1", 0); c.Reason = "OOMKilled"; return c }()), want: "complete"},
		{name: "a sidecar gates until it has started", mods: mods(withInit("side")), o: up().with(func() status.Container { c := running("side"); c.Started = false; return c }()), want: ""},
		{name: "and lets on then", mods: mods(withInit("side")), o: up().with(running("side")), want: "start a"},
		{name: "a sidecar that ends is started again beside the others", mods: mods(withInit("side")), o: up().with(exited("side", 0), running("a")), want: "start side"},
		{name: "one that ends before the others begin, too, whatever the policy", mods: mods(never, withInit("side", "init1")), o: up().with(exited("side", 1)), want: "start side"},
		{name: "one whose startup probe fails is ended, the next one waits", mods: mods(never, withInit("side", "init1")), o: up().with(func() status.Container { c := running("side"); c.Started = false; return c }()).set(func(o *Observed) {
			o.Verdicts = map[string]Verdict{"side0": {Startup: true}}
		}), want: "order side0 5s"},
		{name: "another image does not end an init container that runs", mods: mods(withInit("init1")), o: up().with(running("init1")).set(func(o *Observed) { o.Changed = map[string]bool{"init1": true} }), want: ""},
		{name: "it ends a sidecar that runs", mods: mods(withInit("side")), o: up().with(running("side"), running("a")).set(func(o *Observed) { o.Changed = map[string]bool{"side": true} }), want: "order side0 5s"},
		{name: "init containers do not run again", mods: mods(withInit("init1")), o: up().with(running("a")), want: ""},
		{name: "but they do in a new sandbox", mods: mods(withInit("init1")), o: up().with(exited("init1", 0), exited("a", 0)).set(func(o *Observed) {
			o.Sandboxes = []Sandbox{{ID: "s1", Attempt: 1, Ready: true}, {ID: "s0", Stopped: true}}
		}), want: "start init1"},
		{name: "a sidecar does not keep a finished pod", mods: mods(withInit("side"), never), o: up().with(running("side"), exited("a", 0)), want: "complete"},
		{name: "nor one that a probe ends: it is not restarted", mods: mods(withInit("side"), never), o: up().with(exited("side", 1), running("a")).set(func(o *Observed) {
			o.Kills = map[string]Kill{"a0": {Since: t0, Grace: 5 * time.Second, Unfit: true}}
		}), want: "stop a0 5s"},
		{name: "but beside another one that stays", mods: mods(withInit("side"), never, two), o: up().with(exited("side", 1), running("a"), running("b")).set(func(o *Observed) {
			o.Kills = map[string]Kill{"a0": {Since: t0, Grace: 5 * time.Second, Unfit: true}}
		}), want: "start side, stop a0 5s"},
		{name: "a failing sidecar is ended", mods: mods(withInit("side")), o: up().with(running("side"), running("a")).set(func(o *Observed) { o.Verdicts = map[string]Verdict{"side0": {Liveness: true}} }), want: "order side0 5s"},
	} {
		t.Run(tc.name, tc.run)
	}
}

// restartsAll makes a container ask for a restart of all when it ends with 42.
func restartsAll(c *v1.Container) {
	never := v1.ContainerRestartPolicyNever
	if c.RestartPolicy == nil {
		c.RestartPolicy = &never
	}
	c.RestartPolicyRules = []v1.ContainerRestartRule{{
		Action:    v1.ContainerRestartRuleActionRestartAllContainers,
		ExitCodes: &v1.ContainerRestartRuleOnExitCodes{Operator: v1.ContainerRestartRuleOnExitCodesOpIn, Values: []int32{42}},
	}}
}

func TestPlanRestartAllContainers(t *testing.T) {
	source := func(p *v1.Pod) { restartsAll(&p.Spec.Containers[0]) }
	killed := func(ids ...string) func(*Observed) {
		return func(o *Observed) {
			o.Kills = map[string]Kill{}
			for _, id := range ids {
				o.Kills[id] = Kill{Since: t0}
			}
		}
	}
	all := mods(never, withInit("init1", "side"), two, source)
	for _, tc := range []planCase{
		{name: "another code: the container's own policy", mods: all, o: up().with(exited("init1", 0), running("side"), exited("a", 41), running("b")), want: ""},
		{name: "the regular ones end first", mods: all, o: up().with(exited("init1", 0), running("side"), exited("a", 42), running("b")), want: "order b0"},
		{name: "with the least grace period", mods: all, o: up().with(exited("init1", 0), running("side"), exited("a", 42), running("b")).set(killed("b0")), want: "stop b0 2s"},
		{name: "and are removed", mods: all, o: up().with(exited("init1", 0), running("side"), exited("a", 42), exited("b", 137)), want: "remove b0"},
		{name: "then the init containers", mods: all, o: up().with(exited("init1", 0), running("side"), exited("a", 42)), want: "order side0, remove init10"},
		{name: "the one that asked goes last", mods: all, o: up().with(exited("a", 42)), want: "remove a0"},
		{name: "instances from before too", mods: all, o: up().with(exited("a", 42), status.Container{ID: "a-1", Name: "a", Sandbox: "s0", State: status.Exited, Attempt: -1}), want: "remove a-1"},
		{name: "then all begins anew", mods: all, o: up(), want: "start init1"},
		{name: "a start under way is cancelled first", mods: all, o: up().with(exited("init1", 0), running("side"), exited("a", 42)).busy("start/b"), want: "cancel start/b"},
		{name: "an init container can ask too", mods: mods(never, func(p *v1.Pod) {
			p.Spec.InitContainers = []v1.Container{sidecar("side"), container("init1")}
			restartsAll(&p.Spec.InitContainers[1])
		}), o: up().with(running("side"), exited("init1", 42)), want: "order side0"},
		{name: "so can a sidecar", mods: mods(never, func(p *v1.Pod) {
			p.Spec.InitContainers = []v1.Container{sidecar("side")}
			restartsAll(&p.Spec.InitContainers[0])
		}), o: up().with(exited("side", 42), running("a")), want: "order a0"},
		{name: "one that asks again waits", mods: mods(never, source), o: up().set(func(o *Observed) {
			o.Ended = map[string]time.Time{"a": t0}
			o.Backoffs = map[string]Backoff{"a": {Delay: 10 * time.Second, Updated: t0}}
		}), want: " | a=CrashLoopBackOff | wake 10s"},
		{name: "a pod that stops stops", mods: all, d: func(d *Desired) { d.Stop = &Stop{Since: t0, Grace: 5 * time.Second} },
			o: up().with(exited("a", 42), running("b")), want: "order b0 5s"},
	} {
		t.Run(tc.name, tc.run)
	}
}

// TestPlanRestartRules: the rules of a container come before its policy, which
// comes before the pod's (KEP-5307).
func TestPlanRestartRules(t *testing.T) {
	rule := func(op v1.ContainerRestartRuleOnExitCodesOperator, values ...int32) func(*v1.Pod) {
		return func(p *v1.Pod) {
			own := v1.ContainerRestartPolicyNever
			p.Spec.Containers[0].RestartPolicy = &own
			p.Spec.Containers[0].RestartPolicyRules = []v1.ContainerRestartRule{{
				Action: v1.ContainerRestartRuleActionRestart, ExitCodes: &v1.ContainerRestartRuleOnExitCodes{Operator: op, Values: values},
			}}
		}
	}
	in, notIn := v1.ContainerRestartRuleOnExitCodesOpIn, v1.ContainerRestartRuleOnExitCodesOpNotIn
	policy := func(own v1.ContainerRestartPolicy) func(*v1.Pod) {
		return func(p *v1.Pod) { p.Spec.Containers[0].RestartPolicy = &own }
	}
	for _, tc := range []planCase{
		{name: "in", mods: mods(never, rule(in, 42)), o: up().with(exited("a", 42)), want: "start a"},
		{name: "in, another", mods: mods(rule(in, 42)), o: up().with(exited("a", 1)), want: "complete"},
		{name: "not in", mods: mods(never, rule(notIn, 0, 1)), o: up().with(exited("a", 42)), want: "start a"},
		{name: "not in, another", mods: mods(never, rule(notIn, 0, 1)), o: up().with(exited("a", 1)), want: "complete"},
		{name: "its own Never in a pod with Always", mods: mods(policy(v1.ContainerRestartPolicyNever)), o: up().with(exited("a", 1)), want: "complete"},
		{name: "its own Always in a pod with Never", mods: mods(never, policy(v1.ContainerRestartPolicyAlways)), o: up().with(exited("a", 0)), want: "start a"},
		{name: "its own OnFailure", mods: mods(policy(v1.ContainerRestartPolicyOnFailure)), o: up().with(exited("a", 0)), want: "complete"},
		{name: "its own OnFailure, failed", mods: mods(never, policy(v1.ContainerRestartPolicyOnFailure)), o: up().with(exited("a", 3)), want: "start a"},
		{name: "the pod's without one", mods: mods(), o: up().with(exited("a", 0)), want: "start a"},
	} {
		t.Run(tc.name, tc.run)
	}
}

func TestPlanPostStartHoldsUpTheNext(t *testing.T) {
	hooked := mods(two, func(p *v1.Pod) {
		p.Spec.Containers[0].Lifecycle = &v1.Lifecycle{PostStart: &v1.LifecycleHandler{Sleep: &v1.SleepAction{Seconds: 1}}}
	})
	starting := func() status.Container { c := running("a"); c.Starting = true; return c }
	for _, tc := range []planCase{
		{name: "its start", mods: hooked, o: up(), want: "start a"},
		{name: "while it starts", mods: hooked, o: up().busy("start/a"), want: ""},
		{name: "while its image comes", mods: hooked, o: up().set(func(o *Observed) { delete(o.Images, "a") }), want: "image a"},
		{name: "while the hook runs", mods: hooked, o: up().with(starting()), want: "post a0"},
		{name: "then the next", mods: hooked, o: up().with(running("a")), want: "start b"},
		{name: "not while it backs off", mods: hooked, o: up().with(exited("a", 1)).set(func(o *Observed) {
			o.Backoffs = map[string]Backoff{"a": {Delay: 10 * time.Second, Updated: t0}}
		}), want: "start b | a=CrashLoopBackOff | wake 10s"},
	} {
		t.Run(tc.name, tc.run)
	}
}

func TestPlanResize(t *testing.T) {
	was := map[string]v1.ResourceRequirements{"a": sizes("1", "64Mi"), "b": sizes("1", "64Mi")}
	wants := func(policy v1.ResourceResizeRestartPolicy, memory string) func(*v1.Pod) {
		return func(p *v1.Pod) {
			two(p)
			p.Spec.Containers[0].Resources, p.Spec.Containers[1].Resources = sizes("1", memory), sizes("1", "64Mi")
			p.Spec.Containers[0].ResizePolicy = []v1.ContainerResizePolicy{{ResourceName: v1.ResourceMemory, RestartPolicy: policy}}
		}
	}
	in := func(s Step) func(*Observed) { return func(o *Observed) { o.Resize, o.Actual = s, was } }
	both := func() *view { return up().with(running("a"), running("b")) }
	kill := func(o *Observed) { o.Kills = map[string]Kill{"a0": {Since: t0, Grace: 5 * time.Second}} }
	for _, tc := range []planCase{
		{name: "none", mods: mods(wants(v1.NotRequired, "128Mi")), o: both().set(in(StepAbsent)), want: ""},
		{name: "the pod's group and what need not restart", mods: mods(wants(v1.NotRequired, "128Mi")), o: both().set(in(StepUnknown)), want: "resize"},
		{name: "what must restart waits for the group", mods: mods(wants(v1.RestartContainer, "128Mi")), o: both().set(in(StepUnknown)), want: "resize"},
		{name: "then it ends", mods: mods(wants(v1.RestartContainer, "128Mi")), o: both().set(in(StepDone)), want: "order a0 5s"},
		{name: "and comes back, even with Never", mods: mods(never, wants(v1.RestartContainer, "128Mi")), o: up().with(exited("a", 0), running("b")).set(in(StepDone)).set(kill), want: "start a"},
		{name: "one that had ended before does not", mods: mods(never, wants(v1.RestartContainer, "128Mi")), o: up().with(exited("a", 0), running("b")).set(in(StepDone)), want: "resize"},
		{name: "the group is narrowed last", mods: mods(wants(v1.RestartContainer, "64Mi")), o: both().set(in(StepDone)), want: "resize"},
		{name: "policy of another resource", mods: mods(wants(v1.RestartContainer, "64Mi"), func(p *v1.Pod) { p.Spec.Containers[0].Resources = sizes("2", "64Mi") }), o: both().set(in(StepUnknown)), want: "resize"},
		{name: "what failed waits", mods: mods(wants(v1.NotRequired, "128Mi")), o: both().set(in(StepUnknown)).set(func(o *Observed) {
			o.Retry = map[string]time.Time{"resize": t0.Add(time.Second)}
		}), want: " | wake 1s"},
	} {
		t.Run(tc.name, tc.run)
	}
}

func sizes(cpu, memory string) v1.ResourceRequirements {
	l := v1.ResourceList{v1.ResourceCPU: resource.MustParse(cpu), v1.ResourceMemory: resource.MustParse(memory)}
	return v1.ResourceRequirements{Limits: l, Requests: l}
}

func TestPlanRestart(t *testing.T) {
	back := func(o *Observed) { o.Backoffs = map[string]Backoff{"a": {Delay: 10 * time.Second, Updated: t0}} }
	unfit := func(o *Observed) { o.Kills = map[string]Kill{"a0": {Since: t0, Grace: 5 * time.Second, Unfit: true}} }
	for _, tc := range []planCase{
		{name: "the first time at once", o: up().with(exited("a", 1)), want: "start a"},
		{name: "then after the back-off", o: up().with(exited("a", 1)).set(back), want: " | a=CrashLoopBackOff | wake 10s"},
		{name: "which ends", at: 10 * time.Second, o: up().with(exited("a", 1)).set(back), want: "start a"},
		{name: "a user's restart does not wait", o: up().with(exited("a", 1)).set(back).set(func(o *Observed) { o.Forced = map[string]string{"a": "a0"} }), want: "start a"},
		{name: "a user's restart ends it first", o: up().with(running("a")).set(func(o *Observed) { o.Forced = map[string]string{"a": "a0"} }), want: "order a0 5s"},
		{name: "a changed one is ended", o: up().with(running("a")).set(func(o *Observed) { o.Changed = map[string]bool{"a": true} }), want: "order a0 5s"},
		{name: "and started again, even with never", mods: mods(never), o: up().with(exited("a", 0)).set(func(o *Observed) { o.Changed = map[string]bool{"a": true} }), want: "start a"},
		{name: "never, done", mods: mods(never), o: up().with(exited("a", 0)), want: "complete"},
		{name: "never, one still runs", mods: mods(never, two), o: up().with(exited("a", 0), running("b")), want: ""},
		{name: "on failure, done", mods: mods(onFailure), o: up().with(exited("a", 0)), want: "complete"},
		{name: "on failure, failed", mods: mods(onFailure), o: up().with(exited("a", 2)), want: "start a"},
		{name: "a container's own policy", mods: mods(never, func(p *v1.Pod) {
			always := v1.ContainerRestartPolicyAlways
			p.Spec.Containers[0].RestartPolicy = &always
		}), o: up().with(exited("a", 0)), want: "start a"},
		{name: "an exit code rule", mods: mods(never, func(p *v1.Pod) {
			policy := v1.ContainerRestartPolicyNever
			p.Spec.Containers[0].RestartPolicy = &policy
			p.Spec.Containers[0].RestartPolicyRules = []v1.ContainerRestartRule{{
				Action:    v1.ContainerRestartRuleActionRestart,
				ExitCodes: &v1.ContainerRestartRuleOnExitCodes{Operator: v1.ContainerRestartRuleOnExitCodesOpIn, Values: []int32{42}},
			}}
		}), o: up().with(exited("a", 42)), want: "start a"},
		{name: "liveness", o: up().with(running("a")).set(func(o *Observed) { o.Verdicts = map[string]Verdict{"a0": {Liveness: true}} }), want: "order a0 5s"},
		{name: "liveness with a grace period of its own", mods: mods(func(p *v1.Pod) {
			g := int64(1)
			p.Spec.Containers[0].LivenessProbe = &v1.Probe{TerminationGracePeriodSeconds: &g}
		}), o: up().with(running("a")).set(func(o *Observed) { o.Verdicts = map[string]Verdict{"a0": {Liveness: true}} }), want: "order a0 1s"},
		{name: "ended by a probe: on failure, whatever it exits with", mods: mods(onFailure), o: up().with(exited("a", 0)).set(unfit), want: "start a"},
		{name: "ended by a probe: never", mods: mods(never), o: up().with(exited("a", 1)).set(unfit), want: "complete"},
		{name: "ended by a probe: its own policy", mods: mods(func(p *v1.Pod) {
			never := v1.ContainerRestartPolicyNever
			p.Spec.Containers[0].RestartPolicy = &never
		}), o: up().with(exited("a", 1)).set(unfit), want: "complete"},
		{name: "ordered: stop with what is left", at: 2 * time.Second, o: up().with(running("a")).set(func(o *Observed) { o.Kills = map[string]Kill{"a0": {Since: t0, Grace: 5 * time.Second}} }), want: "stop a0 3s"},
		{name: "the state is not known: end it before a second one", o: up().with(func() status.Container { c := running("a"); c.State = status.Unknown; return c }()), want: "order a0 5s"},
		{name: "old instances go, the last one stays for its log", o: up().with(
			func() status.Container { c := running("a"); c.ID, c.Attempt = "a2", 2; return c }(),
			func() status.Container { c := exited("a", 1); c.ID, c.Attempt = "a1", 1; return c }(),
			exited("a", 1)), want: "remove a0"},
		{name: "deadline", mods: mods(func(p *v1.Pod) { s := int64(10); p.Spec.ActiveDeadlineSeconds = &s }), at: 10 * time.Second, o: up().with(running("a")), want: "expire"},
		{name: "deadline to come", mods: mods(func(p *v1.Pod) { s := int64(10); p.Spec.ActiveDeadlineSeconds = &s }), o: up().with(running("a")), want: " | wake 10s"},
	} {
		t.Run(tc.name, tc.run)
	}
}

func TestPlanSandboxLost(t *testing.T) {
	lost := func(o *Observed) { o.Sandboxes[0].Ready = false }
	for _, tc := range []planCase{
		{name: "what seems to run is ended first", o: up().set(lost).with(running("a")), want: "order a0 5s"},
		{name: "then the sandbox is stopped", o: up().set(lost).with(exited("a", 137)), want: "stopsandbox s0"},
		{name: "then there is a new one", o: up().set(lost).set(func(o *Observed) { o.Sandboxes[0].Stopped = true }).with(exited("a", 137)), want: "sandbox"},
		{name: "never: it is over", mods: mods(never), o: up().set(lost).with(exited("a", 137)), want: "complete"},
		{name: "never and not begun: it begins", mods: mods(never), o: up().set(lost).set(func(o *Observed) { o.Sandboxes[0].Stopped = true }), want: "sandbox"},
		{name: "made for another spec", o: up().set(func(o *Observed) { o.SandboxChanged = true }).with(running("a")), want: "order a0 5s"},
		{name: "old sandboxes without containers go", o: up().with(running("a")).set(func(o *Observed) {
			o.Sandboxes = append(o.Sandboxes, Sandbox{ID: "old", Stopped: true}, Sandbox{ID: "older"})
		}), want: "removesandbox old, stopsandbox older"},
	} {
		t.Run(tc.name, tc.run)
	}
}

func TestPlanStop(t *testing.T) {
	stop := func(grace time.Duration, forget bool) func(*Desired) {
		return func(d *Desired) { d.Stop = &Stop{Since: t0, Grace: grace, Forget: forget} }
	}
	kill := func(ids ...string) func(*Observed) {
		return func(o *Observed) {
			o.Kills = map[string]Kill{}
			for _, id := range ids {
				o.Kills[id] = Kill{Since: t0, Grace: 30 * time.Second}
			}
		}
	}
	gone := func(o *Observed) {
		o.Sandboxes[0].Ready, o.Sandboxes[0].Stopped, o.Cgroup, o.Volumes = false, true, StepAbsent, StepAbsent
	}
	g30 := stop(30*time.Second, true)
	for _, tc := range []planCase{
		{name: "order, all at once", d: g30, mods: mods(two), o: up().with(running("a"), running("b")), want: "order a0 30s, order b0 30s"},
		{name: "then stop", d: g30, o: up().with(running("a")).set(kill("a0")), want: "stop a0 30s"},
		{name: "with what is left", d: g30, at: 10 * time.Second, o: up().with(running("a")).set(kill("a0")), want: "stop a0 20s"},
		{name: "but at least two seconds", d: g30, at: 31 * time.Second, o: up().with(running("a")).set(kill("a0")), want: "stop a0 2s"},
		{name: "the hook comes first", d: g30, mods: mods(hooks), o: up().with(running("a")).set(kill("a0")), want: "hook a0 30s"},
		{name: "and is waited for", d: g30, mods: mods(hooks), at: time.Second, o: up().with(running("a")).set(kill("a0")).set(func(o *Observed) {
			o.Kills["a0"] = Kill{Since: t0, Grace: 30 * time.Second, HookDone: true}
		}).busy("hook/a0"), want: " | wake 30s"},
		{name: "until the grace period is over, and goes on with the container", d: g30, mods: mods(hooks), at: 30 * time.Second, o: up().with(running("a")).set(func(o *Observed) {
			o.Kills = map[string]Kill{"a0": {Since: t0, Grace: 30 * time.Second, HookDone: true}}
		}).busy("hook/a0"), want: "stop a0 2s"},
		{name: "a hook of one that has ended is cancelled", d: g30, mods: mods(hooks), o: up().with(exited("a", 0)).busy("hook/a0"), want: "cancel hook/a0, stopsandbox s0"},
		{name: "no hook without grace", d: stop(0, true), mods: mods(hooks), o: up().with(running("a")).set(func(o *Observed) { o.Kills = map[string]Kill{"a0": {Since: t0}} }), want: "stop a0 2s"},
		{name: "a shorter grace period comes in", d: stop(5*time.Second, true), o: up().with(running("a")).set(kill("a0")), want: "order a0 5s"},
		{name: "and cuts a stop short", d: stop(5*time.Second, true), o: up().with(running("a")).set(func(o *Observed) { o.Kills = map[string]Kill{"a0": {Since: t0, Grace: 5 * time.Second}} }).busy("stop/a0"), want: "cancel stop/a0"},
		{name: "one that SIGKILL does not end is looked at", d: stop(0, true), at: 11 * time.Second, o: up().with(running("a")).set(func(o *Observed) {
			o.Kills, o.Busy = map[string]Kill{"a0": {Since: t0}}, map[string]time.Time{"stop/a0": t0.Add(2 * time.Second)}
		}), want: " | wake 12s"},
		{name: "its volumes give it up", d: stop(0, true), at: 12 * time.Second, o: up().with(running("a")).set(func(o *Observed) {
			o.Kills, o.Busy = map[string]Kill{"a0": {Since: t0}}, map[string]time.Time{"stop/a0": t0.Add(2 * time.Second)}
		}), want: "abort"},
		{name: "sidecars wait for the regular ones", d: g30, mods: mods(withInit("side", "side2")), o: up().with(running("a"), running("side"), running("side2")).set(kill("a0", "side0", "side20")), want: "stop a0 30s | wake 30s"},
		{name: "the last sidecar goes first", d: g30, mods: mods(withInit("side", "side2")), o: up().with(exited("a", 0), running("side"), running("side2")).set(kill("side0", "side20")), want: "stop side20 30s | wake 30s"},
		{name: "nobody waits longer than the grace period", d: g30, at: 30 * time.Second, mods: mods(withInit("side", "side2")), o: up().with(running("a"), running("side"), running("side2")).set(kill("a0", "side0", "side20")), want: "stop a0 2s, stop side0 2s, stop side20 2s"},
		{name: "starts are cancelled", d: g30, o: (&view{Observed{Cgroup: StepDone}}).busy("sandbox", "setup", "image/a"), want: "cancel image/a, cancel sandbox, cancel setup"},
		{name: "and waited for", d: g30, o: up().busy("start/a"), want: "cancel start/a"},
		{name: "the sandbox after the containers", d: g30, o: up().with(exited("a", 0)), want: "stopsandbox s0"},
		{name: "volumes and cgroup after the sandbox", d: g30, o: up().with(exited("a", 0)).set(func(o *Observed) { o.Sandboxes[0].Stopped = true }), want: "rmcgroup, teardown"},
		{name: "what is kept for its logs", d: stop(30*time.Second, false), o: up().with(exited("a", 0)).set(gone), want: ""},
		{name: "containers are forgotten", d: g30, o: up().with(exited("a", 0)).set(gone), want: "remove a0"},
		{name: "then the sandbox", d: g30, o: up().set(gone), want: "removesandbox s0"},
		{name: "then the pod", d: g30, o: &view{}, want: "forget"},
		{name: "not while anything is under way", d: g30, o: (&view{}).busy("refresh/x"), want: ""},
		{name: "a held pod can be stopped", d: func(d *Desired) { d.Held = true; g30(d) }, o: up().with(running("a")), want: "order a0 30s"},
		{name: "completed: sidecars end", mods: mods(withInit("side")), o: up().with(running("side"), exited("a", 0)).set(func(o *Observed) { o.Completed = true }), want: "order side0 5s"},
		{name: "completed: all is given back", o: up().with(exited("a", 0)).set(func(o *Observed) { o.Completed = true }), want: "stopsandbox s0"},
		{name: "completed: and stays so", o: up().with(exited("a", 0)).set(gone).set(func(o *Observed) { o.Completed = true }), want: ""},
	} {
		t.Run(tc.name, tc.run)
	}
}

func TestRetryDelay(t *testing.T) {
	for n, want := range map[int]time.Duration{1: time.Second, 2: 2 * time.Second, 6: 32 * time.Second, 7: time.Minute, 1000: time.Minute} {
		if got := retryDelay(n); got != want {
			t.Errorf("after %d failures %s, want %s", n, got, want)
		}
	}
}

func TestNewestIsTheLastAttemptWhateverTheClock(t *testing.T) {
	at := time.Unix(1000, 0)
	// Each one as it came: the clock stood, then stepped back.
	l := &life{tries: tries{attempts: map[string]int32{}}}
	for i, c := range []status.Container{
		{Name: "a", Attempt: 0, CreatedAt: at}, {Name: "b", Attempt: 0, CreatedAt: at}, {Name: "b", Attempt: 1, CreatedAt: at},
		{Name: "a", Attempt: 1, CreatedAt: at}, {Name: "b", Attempt: 2, CreatedAt: at.Add(-time.Hour)},
	} {
		c.ID = fmt.Sprint(i)
		l.put(c)
		if n := l.o.newest(c.Name); n.ID != c.ID {
			t.Errorf("attempt %d of %s has come, the newest is %d", c.Attempt, c.Name, n.Attempt)
		}
	}
}
