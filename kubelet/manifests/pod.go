package manifests

import (
	"fmt"
	"regexp"
	"strings"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/validation/field"
	podutil "k8s.io/kubernetes/pkg/api/pod"
	"k8s.io/kubernetes/pkg/apis/core"
	"k8s.io/kubernetes/pkg/apis/core/helper"
	corev1 "k8s.io/kubernetes/pkg/apis/core/v1"
	"k8s.io/kubernetes/pkg/apis/core/validation"
	"k8s.io/kubernetes/pkg/capabilities"

	"github.com/podd-runtime/podd/kubelet/manifests/document"
)

// SourceName is the name under which pods of a directory are known.
const SourceName = "file"

// Annotations that static pods carry (k8s.io/kubernetes/pkg/kubelet/types).
const (
	ConfigSourceAnnotation = "kubernetes.io/config.source"
	ConfigSeenAnnotation   = "kubernetes.io/config.seen"
	// ConfigHashAnnotation names the content of the manifest. Unlike upstream's
	// it changes with the content also when the manifest fixes metadata.uid.
	ConfigHashAnnotation = "kubernetes.io/config.hash"
	// UnseenAnnotation is on a pod of podd's last run until the runtime has told
	// how it is: its status is the one in its record.
	UnseenAnnotation = "io.podd.unseen"
)

// Priorities of the classes that exist on every node
// (k8s.io/kubernetes/pkg/apis/scheduling).
var systemPriorities = map[string]int32{
	"system-cluster-critical": 2000000000,
	"system-node-critical":    2000001000,
}

func uidOf(given types.UID, hash string) types.UID {
	if given != "" {
		return given
	}
	return types.UID(hash)
}

// uidName is what a given UID may be: it becomes the name of a directory.
var uidName = regexp.MustCompile(`^([A-Za-z0-9][A-Za-z0-9._-]{0,127})?$`)

// finishPod gives a decoded pod its identity, defaults and validates it, as
// upstream does in pkg/kubelet/config/common.go.
//
// The UID is a hash of node name and content, not of the file's path: a rename
// restarts nothing, a change of content replaces the pod.
//
// warned is what an apiserver would warn of.
func (d *decoder) finishPod(doc document.Document, at string, pod *v1.Pod, hash string) (_ *v1.Pod, warned []string, _ []Problem) {
	if pod.Name == "" {
		return nil, nil, []Problem{{Line: doc.Locate(document.Join(at, "metadata.name")), Field: document.Join(at, "metadata.name"),
			Message: "is missing", Remedy: "static pods need a name; generateName is not used"}}
	}
	if !uidName.MatchString(string(pod.UID)) {
		return nil, nil, []Problem{{Line: doc.Locate(document.Join(at, "metadata.uid")), Field: document.Join(at, "metadata.uid"),
			Message: fmt.Sprintf("%q is no UID", pod.UID), Remedy: "remove the field, or use letters, digits and dashes"}}
	}
	corev1.SetObjectDefaults_Pod(pod)
	var internal core.Pod
	if err := corev1.Convert_v1_Pod_To_core_Pod(pod, &internal, nil); err != nil {
		return nil, nil, []Problem{{Line: doc.Line, Field: at, Message: err.Error()}}
	}

	internal.UID = uidOf(internal.UID, hash)
	internal.Name = internal.Name + "-" + strings.ToLower(d.nodeName)
	if internal.Namespace == "" {
		internal.Namespace = metav1.NamespaceDefault
	}
	internal.Spec.NodeName = d.nodeName
	if internal.Annotations == nil {
		internal.Annotations = map[string]string{}
	}
	internal.Annotations[ConfigHashAnnotation] = hash
	internal.Annotations[ConfigSourceAnnotation] = SourceName
	helper.AddOrUpdateTolerationInPod(&internal, &core.Toleration{Operator: core.TolerationOpExists, Effect: core.TaintEffectNoExecute})
	// A manifest taken from `kubectl get -o yaml` brings along what is the
	// node's to say.
	internal.Status = core.PodStatus{Phase: core.PodPending}
	internal.ResourceVersion, internal.Generation = "", 0
	internal.DeletionTimestamp, internal.DeletionGracePeriodSeconds = nil, nil
	internal.ManagedFields, internal.OwnerReferences = nil, nil
	// An admission plug-in of the apiserver does this for other pods.
	if internal.Spec.Priority == nil {
		if p, ok := systemPriorities[internal.Spec.PriorityClassName]; ok {
			internal.Spec.Priority = &p
		}
	}

	if os := internal.Spec.OS; os != nil && os.Name != core.Linux {
		f := document.Join(at, "spec.os.name")
		return nil, nil, []Problem{{Line: doc.Locate(f), Field: f, Message: fmt.Sprintf("%s: this node runs linux", os.Name), Remedy: "run the pod elsewhere"}}
	}

	// Whoever writes this directory is root of the node already: privileged
	// containers are allowed, as upstream's kubelet allows them. Upstream keeps
	// that for the whole process; only the first call counts.
	capabilities.Setup(true, 0)
	opts := podutil.GetValidationOptionsFromPodSpecAndMeta(&internal.Spec, nil, &internal.ObjectMeta, nil)
	if probs := invalid(doc, at, validation.ValidatePodCreate(&internal, opts)); probs != nil {
		return nil, nil, probs
	}
	if probs := d.references(doc, at, &internal); probs != nil {
		return nil, nil, probs
	}

	warned = podWarnings(&internal)
	out := &v1.Pod{}
	if err := corev1.Convert_core_Pod_To_v1_Pod(&internal, out, nil); err != nil {
		return nil, nil, []Problem{{Line: doc.Line, Field: at, Message: err.Error()}}
	}
	out.TypeMeta = metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"}
	return out, warned, nil
}

// references finds what a static pod may not refer to because only an apiserver
// has it (upstream: podutil.HasAPIObjectReference). ConfigMaps, Secrets and
// claims are documents of the same directory, unless the node has an apiserver.
func (d *decoder) references(doc document.Document, at string, pod *core.Pod) []Problem {
	var problems []Problem
	forbid := func(path *field.Path, what, remedy string) {
		problems = append(problems, Problem{
			Line: doc.Locate(document.Join(at, path.String())), Field: document.Join(at, path.String()),
			Message: fmt.Sprintf("static pods may not refer to %s", what), Remedy: remedy,
		})
	}
	spec := field.NewPath("spec")
	if pod.Spec.ServiceAccountName != "" {
		forbid(spec.Child("serviceAccountName"), "service accounts", "remove the field: there is no apiserver behind a static pod")
	}
	if len(pod.Spec.ResourceClaims) > 0 {
		forbid(spec.Child("resourceClaims"), "resource claims", "remove the field")
	}
	const inCluster = "use a persistentVolumeClaim, hostPath, nfs, emptyDir, configMap or secret volume, or run the pod through a cluster"
	for i, v := range pod.Spec.Volumes {
		p := spec.Child("volumes").Index(i)
		switch {
		case v.PersistentVolumeClaim != nil && d.noObjects:
			forbid(p.Child("persistentVolumeClaim"), "persistent volume claims", inCluster)
		case v.Ephemeral != nil:
			forbid(p.Child("ephemeral"), "claims that a cluster makes", inCluster)
		case v.CSI != nil:
			forbid(p.Child("csi"), "CSI drivers", inCluster)
		case v.Glusterfs != nil:
			forbid(p.Child("glusterfs"), "endpoints", inCluster)
		case v.AzureFile != nil:
			forbid(p.Child("azureFile"), "azureFile secrets", inCluster)
		case v.ConfigMap != nil && d.noObjects:
			forbid(p.Child("configMap"), "ConfigMaps", "the node is part of a cluster: run the pod through the apiserver")
		case v.Secret != nil && d.noObjects:
			forbid(p.Child("secret"), "Secrets", "the node is part of a cluster: run the pod through the apiserver")
		case v.Projected != nil:
			for j, s := range v.Projected.Sources {
				p := p.Child("projected", "sources").Index(j)
				switch {
				case s.ServiceAccountToken != nil:
					forbid(p.Child("serviceAccountToken"), "service account tokens", "remove the source: a token needs a cluster")
				case s.ClusterTrustBundle != nil:
					forbid(p.Child("clusterTrustBundle"), "cluster trust bundles", "remove the source")
				case s.PodCertificate != nil:
					forbid(p.Child("podCertificate"), "pod certificates", "remove the source")
				case s.ConfigMap != nil && d.noObjects:
					forbid(p.Child("configMap"), "ConfigMaps", "run the pod through the apiserver")
				case s.Secret != nil && d.noObjects:
					forbid(p.Child("secret"), "Secrets", "run the pod through the apiserver")
				}
			}
		}
	}
	if d.noObjects && problems == nil {
		if found, what, err := podutil.HasAPIObjectReference(pod); err != nil {
			forbid(spec, err.Error(), "remove the reference")
		} else if found {
			forbid(spec, what, "run the pod through the apiserver")
		}
	}
	return problems
}
