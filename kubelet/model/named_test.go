package model

import (
	"testing"
	"testing/synctest"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podd-runtime/podd/kubelet/manifests"
)

// The histories that found a bug, each with what it was about.

// script is a history that is written down. Nothing fails in it but what it says.
type script struct {
	*world
	t *testing.T
}

// play a history and check all laws on what it comes to, and that nothing is left.
func play(t *testing.T, happens func(s *script)) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1)
		w.setCalm(true)
		w.begin()
		happens(&script{w, t})
		w.settle(bound)
		w.check()
		w.empty()
		w.end()
		if broken := w.breaches(); len(broken) > 0 {
			t.Logf("the story:\n%s", w.telling())
			for _, b := range broken {
				t.Error(b)
			}
		}
	})
}

// before the effect of the next call of that name f happens; with a ! behind it,
// before its answer.
func (s *script) before(call string, f func()) {
	s.mu.Lock()
	s.hooks[call] = f
	s.mu.Unlock()
}

// lose the answer of the next call of that name; with refuse before it, the call.
func (s *script) lose(call string) {
	s.mu.Lock()
	s.losses[call] = true
	s.mu.Unlock()
}

// slow makes events of watches late by d.
func (s *script) slow(d time.Duration) {
	s.mu.Lock()
	s.lag = d
	s.mu.Unlock()
}

func (s *script) wait(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

// pod bound to the node, with one container a.
func pod(change ...func(*v1.Pod)) *v1.Pod {
	grace := int64(2)
	p := &v1.Pod{Spec: v1.PodSpec{
		NodeName: nodeName, RestartPolicy: v1.RestartPolicyAlways, TerminationGracePeriodSeconds: &grace,
		DNSPolicy: v1.DNSDefault, Containers: []v1.Container{makeContainer("a")},
	}}
	p.Name, p.Namespace = "p", "default"
	for _, c := range change {
		c(p)
	}
	return p
}

func never(p *v1.Pod) { p.Spec.RestartPolicy = v1.RestartPolicyNever }
func deleted(p *v1.Pod) {
	now, grace := metav1.Now().Rfc3339Copy(), int64(1)
	p.DeletionTimestamp, p.DeletionGracePeriodSeconds = &now, &grace
	p.Generation++
}

func finalizer(p *v1.Pod) { p.Finalizers = []string{"example.com/wait"} }

func (s *script) make(p *v1.Pod) types.UID {
	is, err := s.api.create(p, "")
	if err != nil {
		s.t.Fatal(err)
	}
	return is.pod.UID
}

// running makes a pod and waits until it runs.
func (s *script) running(change ...func(*v1.Pod)) *v1.Pod {
	uid := s.make(pod(change...))
	s.wait(10 * time.Second)
	if p := s.api.byUID(uid); p.Status.Phase != v1.PodRunning {
		s.t.Fatalf("pod is %s: %s", p.Status.Phase, s.telling())
	}
	return s.api.byUID(uid)
}

func (s *script) static(revision string) *v1.Pod {
	p := pod()
	p.Name, p.UID = "s-"+nodeName, types.UID(revision)
	p.Annotations = map[string]string{manifests.ConfigSourceAnnotation: "file", manifests.ConfigHashAnnotation: revision}
	s.statics[p.Name] = p
	s.podd.static.SetPod("file", p)
	return p
}

func image(to string) func(*v1.Pod) {
	return func(p *v1.Pod) { p.Spec.Containers[0].Image = to }
}

// A spec that changes while a container is made of the one before reaches it,
// whatever becomes of the call that started it.
func TestImageChangesDuringAStart(t *testing.T) {
	for _, call := range []string{"CreateContainer", "StartContainer"} {
		for _, lost := range []bool{false, true} {
			play(t, func(s *script) {
				s.before(call, func() {
					s.api.change("p", true, image("img:2"))
					time.Sleep(time.Second)
				})
				if lost {
					s.lose("StartContainer")
				}
				s.make(pod())
			})
		}
	}
}

// An image that was looked for does not stand for the one that is wanted now.
func TestImageChangesBeforeItsContainerIsMade(t *testing.T) {
	play(t, func(s *script) {
		s.before("RunPodSandbox", func() {
			s.api.change("p", true, image("img:2"))
			time.Sleep(time.Second)
		})
		s.make(pod())
	})
}

// No pod is told to be over while a container of it is being started.
func TestPodIsDeletedDuringAStart(t *testing.T) {
	for _, lost := range []bool{false, true} {
		play(t, func(s *script) {
			s.running()
			s.before("StartContainer", func() {
				time.AfterFunc(time.Millisecond, func() { s.api.remove("p", nil, "") })
			})
			if lost {
				s.lose("StartContainer")
			}
			s.rt.exit(s.only(), 1, "Error")
			s.wait(time.Minute)
		})
	}
}

// A container whose start had no answer, and which was seen as created meanwhile,
// gets ready.
func TestReadinessAfterAStartWithoutAnAnswer(t *testing.T) {
	play(t, func(s *script) {
		// The runtime is looked at when the start of b has no answer, before that of a.
		s.before("StartContainer c-p-1-a-1", func() { time.Sleep(5 * time.Second) })
		s.lose("StartContainer c-p-1-a-1")
		s.lose("StartContainer c-p-1-b-1")
		s.make(pod(func(p *v1.Pod) {
			p.Spec.Containers = append(p.Spec.Containers, makeContainer("b"))
			p.Spec.Containers[0].ReadinessProbe = &v1.Probe{
				ProbeHandler:  v1.ProbeHandler{Exec: &v1.ExecAction{Command: []string{"x"}}},
				PeriodSeconds: 10, TimeoutSeconds: 1, SuccessThreshold: 1, FailureThreshold: 1,
			}
		}))
	})
}

// podd begins anew during a shutdown that is called off then: static pods run again.
func TestRestartInAShutdownThatIsCalledOff(t *testing.T) {
	for _, killed := range []bool{false, true} {
		play(t, func(s *script) {
			s.static("r1")
			s.wait(10 * time.Second)
			s.machine.set(true)
			s.wait(30 * time.Second)
			if killed {
				s.kill()
			} else {
				s.end()
			}
			s.begin()
			s.wait(30 * time.Second)
			s.machine.set(false)
		})
	}
}

// A static pod that waits for its turn in a shutdown is not ended by it later.
func TestManifestChangesInAShutdownThatIsCalledOff(t *testing.T) {
	play(t, func(s *script) {
		s.static("r1")
		s.wait(10 * time.Second)
		s.static("r2")
		s.machine.set(true)
		s.wait(time.Minute)
		s.machine.set(false)
	})
}

// What comes late of a mirror pod that is gone takes nothing from its successor.
func TestLateEventOfAMirrorPodThatIsGone(t *testing.T) {
	play(t, func(s *script) {
		s.static("r1")
		s.wait(10 * time.Second)
		s.slow(3 * time.Second) // events: answers overtake them
		s.api.change("s-"+nodeName, false, func(p *v1.Pod) { setLabel(p, "l", "1") })
		s.api.remove("s-"+nodeName, new(int64(1)), "")
		s.static("r2")
		s.wait(20 * time.Second)
		s.slow(0)
		s.rt.exit(s.only(), 1, "Error") // is told by the mirror pod
	})
}

// A status is told from what the runtime says, not from a record that is behind.
func TestKillBeforeTheRecordOfAnExitIsWritten(t *testing.T) {
	play(t, func(s *script) {
		s.running(func(p *v1.Pod) { p.Spec.Containers = append(p.Spec.Containers, makeContainer("b")) }, never)
		s.rt.exit(s.first("a"), 1, "Error")
		s.wait(100 * time.Millisecond)
		s.kill()
		s.before("ListPodSandbox", func() { time.Sleep(5 * time.Second) })
		s.begin()
		s.wait(time.Minute)
	})
}

// A pod that waits for a finalizer, whose deletion a backup takes back, is
// deleted once more.
func TestRestoredPodThatWaitedForAFinalizer(t *testing.T) {
	play(t, func(s *script) {
		s.running(finalizer)
		s.api.remove("p", nil, "")
		s.api.backUp()
		s.wait(time.Minute)
		s.api.restore(0)
		s.wait(time.Minute)
	})
}

// A resize under way leaves no cgroup of a pod that is over by then.
func TestPodIsOverDuringAResize(t *testing.T) {
	play(t, func(s *script) {
		s.running()
		s.before("EnsureCgroup", func() { time.Sleep(10 * time.Second) })
		s.api.change("p", true, func(p *v1.Pod) {
			p.Spec.Containers[0].Resources.Requests = v1.ResourceList{v1.ResourceCPU: resource.MustParse("200m")}
		})
		s.wait(time.Second)
		s.api.change("p", false, func(p *v1.Pod) { p.Status.Phase, p.Status.Reason = v1.PodFailed, lostByOthers })
		s.wait(time.Minute)
	})
}

// A terminal phase at the apiserver stays as it is, whatever podd makes of the pod.
func TestSucceededPodWithAnOldRecord(t *testing.T) {
	play(t, func(s *script) {
		p := s.running(never, finalizer)
		s.disk.age()
		s.rt.exit(s.only(), 0, "Completed")
		s.wait(time.Second)
		s.api.change("p", false, deleted)
		s.wait(time.Minute)
		s.kill()
		s.disk.revert(string(p.UID) + ".json")
		s.begin()
		s.wait(time.Minute)
		if p := s.api.get("p"); p.Status.Phase != v1.PodSucceeded {
			s.t.Errorf("phase %s", p.Status.Phase)
		}
	})
}

// Restart counts go on from the apiserver's when the record is lost.
func TestRestartCountOfAPodWithoutARecord(t *testing.T) {
	play(t, func(s *script) {
		s.make(pod())
		s.wait(10 * time.Second)
		s.api.change("p", false, func(p *v1.Pod) { p.Status.ContainerStatuses[0].RestartCount = 3 }) // of before
		s.kill()
		s.disk.lose(string(s.api.get("p").UID) + ".json")
		s.begin()
		s.wait(time.Minute)
		if n := s.api.get("p").Status.ContainerStatuses[0].RestartCount; n < 3 {
			s.t.Errorf("restarted %d times", n)
		}
	})
}

// The instance that a status names is never an older one, also as the pod is
// removed.
func TestStatusGoesNotBackAsThePodIsRemoved(t *testing.T) {
	play(t, func(s *script) {
		s.running(finalizer)
		s.rt.exit(s.only(), 1, "Error")
		s.wait(20 * time.Second)
		s.before("RemoveContainer c-p-1-a-1", func() { time.Sleep(3 * time.Second) })
		s.api.remove("p", nil, "")
		s.wait(time.Minute)
	})
}

// A mirror pod that is gone again before a list, which overtakes the answer to its
// POST, is made anew.
func TestListOvertakesAMirrorPodsAnswer(t *testing.T) {
	play(t, func(s *script) {
		s.before("POST!", func() {
			s.api.remove("s-"+nodeName, new(int64(0)), "")
			s.api.compact()
			s.api.cutWatches()
			time.Sleep(10 * time.Second)
		})
		s.slow(time.Second)
		s.static("r1")
		s.wait(time.Minute)
	})
}

// A pod that goes and comes back under its UID has its objects watched.
func TestObjectsOfAPodThatComesBack(t *testing.T) {
	play(t, func(s *script) {
		p := s.running()
		s.api.remove("p", new(int64(0)), "")
		s.machine.set(true)
		s.wait(100 * time.Millisecond)
		s.back(p)
		s.wait(30 * time.Second)
		s.machine.set(false)
	})
}

// back is a pod under the UID that it had.
func (s *script) back(p *v1.Pod) {
	if _, err := s.api.create(pod(), p.UID); err != nil {
		s.t.Error(err)
	}
}

// A pod that others say has failed is told to be when nothing of it runs.
func TestPodFailedByOthersDuringAStart(t *testing.T) {
	play(t, func(s *script) {
		p := s.running()
		s.before("StartContainer!", func() {
			s.api.change("p", false, func(p *v1.Pod) { p.Status.Phase, p.Status.Reason = v1.PodFailed, lostByOthers })
			time.Sleep(time.Second)
			s.api.remove("p", new(int64(0)), "")
			s.back(p)
			time.Sleep(time.Second)
		})
		s.rt.exit(s.only(), 1, "Error")
		s.wait(time.Minute)
	})
}

// A pod that others say has failed, while a container of it is being started, is
// not begun again as a shutdown is called off.
func TestPodFailedByOthersInAShutdownThatIsCalledOff(t *testing.T) {
	play(t, func(s *script) {
		s.running()
		s.before("StartContainer!", func() { time.Sleep(time.Minute) })
		s.before("ListPodSandbox p-1", func() { time.Sleep(time.Minute) })
		s.rt.exit(s.only(), 1, "Error")
		s.wait(time.Second)
		s.machine.set(true)
		s.wait(30 * time.Second) // nothing has come of it
		s.api.change("p", false, func(p *v1.Pod) { p.Status.Phase, p.Status.Reason = v1.PodFailed, lostByOthers })
		s.wait(time.Second)
		s.machine.set(false)
		s.wait(time.Minute)
	})
}

// A container whose successor could not be started is kept, for its log and its
// status.
func TestStatusGoesNotBackWhenAStartFails(t *testing.T) {
	play(t, func(s *script) {
		s.running()
		s.rt.exit(s.only(), 1, "Error")
		s.wait(20 * time.Second)
		s.lose("refuse StartContainer c-p-1-a-3")
		s.before("RemoveContainer c-p-1-a-1", func() { time.Sleep(20 * time.Second) })
		s.before("RemoveContainer c-p-1-a-3", func() { time.Sleep(5 * time.Second) })
		s.rt.exit(s.only(), 1, "Error")
		s.wait(time.Minute)
	})
}

// What podd was making for a pod as it was killed, before there was a record of
// it, goes when the pod is over by the time that podd begins again.
func TestPodIsOverAfterAKillDuringItsSetup(t *testing.T) {
	for call, back := range map[string]string{"Setup!": "Teardown", "EnsureCgroup!": "RemoveCgroup"} {
		play(t, func(s *script) {
			made := make(chan struct{})
			s.before(call, func() { close(made); time.Sleep(time.Second) })
			s.make(pod())
			<-made
			s.kill()
			s.mayForget()
			s.api.change("p", false, func(p *v1.Pod) { p.Status.Phase, p.Status.Reason = v1.PodFailed, lostByOthers })
			s.lose("refuse " + back + " p-1") // of who sweeps
			s.begin()
			s.wait(time.Minute)
		})
	}
}

// A generation that comes twice, as a backup is restored, is another spec.
func TestGenerationThatComesTwice(t *testing.T) {
	for _, killed := range []bool{false, true} {
		play(t, func(s *script) {
			s.running()
			s.api.backUp()
			s.api.change("p", true, image("img:2"))
			s.wait(time.Minute)
			if killed {
				s.kill()
			}
			s.api.goAway(10 * time.Second)
			s.api.restore(0)
			s.api.change("p", true, image("img:3"))
			if killed {
				s.begin()
			}
		})
	}
}

// only container that runs.
func (s *script) only() string { return s.first("a") }

// first container of that name that runs.
func (s *script) first(name string) string {
	s.rt.mu.Lock()
	defer s.rt.mu.Unlock()
	for id, k := range s.rt.containers {
		if k.state == runtimeapi.ContainerState_CONTAINER_RUNNING && k.cfg.Metadata.Name == name {
			return id
		}
	}
	s.t.Fatalf("no container %s runs", name)
	return ""
}
