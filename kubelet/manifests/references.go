package manifests

import (
	"fmt"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/validation/field"
	"k8s.io/kubernetes/pkg/util/parsers"

	"github.com/podd-runtime/podd/kubelet/manifests/document"
)

// wrongReferences are images of a pod that no runtime can pull, because they are
// no names of images. Upstream takes such a pod all the same, and its container
// waits with InvalidImageName for ever; whoever checks a manifest is told.
func wrongReferences(doc document.Document, at string, pod *v1.Pod) (found []Problem) {
	look := func(ref string, path *field.Path) {
		if ref == "" {
			return
		}
		if _, _, _, err := parsers.ParseImageName(ref); err != nil {
			f := document.Join(at, path.String())
			found = append(found, Problem{Line: doc.Locate(f), Field: f,
				Message: fmt.Sprintf("%q is not the name of an image: no runtime can pull it", ref), Remedy: "write registry/name:tag or registry/name@sha256:DIGEST, with one tag at most"})
		}
	}
	spec := field.NewPath("spec")
	for i := range pod.Spec.InitContainers {
		look(pod.Spec.InitContainers[i].Image, spec.Child("initContainers").Index(i).Child("image"))
	}
	for i := range pod.Spec.Containers {
		look(pod.Spec.Containers[i].Image, spec.Child("containers").Index(i).Child("image"))
	}
	for i := range pod.Spec.Volumes {
		if v := pod.Spec.Volumes[i].Image; v != nil {
			look(v.Reference, spec.Child("volumes").Index(i).Child("image", "reference"))
		}
	}
	return found
}
