package pods

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/distribution/reference"
	v1 "k8s.io/api/core/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"
	"k8s.io/kubernetes/pkg/credentialprovider"
	"k8s.io/kubernetes/pkg/credentialprovider/secrets"
	"k8s.io/kubernetes/pkg/util/parsers"

	"github.com/podd-runtime/podd/kubelet/pods/spec"
)

// imageError is why an image is not there: upstream's reason and its text.
type imageError struct{ reason, text string }

func (e *imageError) Error() string { return e.text }

// withTag adds the default tag to an image without tag and digest.
func withTag(image string) (string, error) {
	_, tag, digest, err := parsers.ParseImageName(image)
	if err != nil {
		return "", err
	}
	if digest == "" && tag != "" && !strings.HasSuffix(image, ":"+tag) {
		image += ":" + tag
	}
	return image, nil
}

// ensureImage finds or pulls the image of a container.
func (w *worker) ensureImage(l *life, a Action) {
	pod, c := l.d.Pod, spec.Container(l.d.Pod, a.Container)
	w.async(l, a, 0, func(ctx context.Context) (func(), error) {
		id, err := w.image(ctx, pod, c.Name, c.Image, c.ImagePullPolicy)
		for _, v := range imageVolumes(pod, c) {
			if err == nil {
				_, err = w.image(ctx, pod, c.Name, v.Reference, v.PullPolicy)
			}
		}
		if err == nil {
			return func() {
				if l.wants(c) {
					l.o.Images[c.Name] = ImageState{Ref: id}
					delete(l.pulls, c.Name)
				}
			}, nil
		}
		if ctx.Err() != nil {
			return nil, err
		}
		var e *imageError
		if !errors.As(err, &e) {
			e = &imageError{"ErrImagePull", message(err)}
		}
		w.t.deps.Events.Eventf(spec.Ref(pod, c.Name), v1.EventTypeWarning, "Failed", "Error: %s", e.reason)
		return func() {
			if !l.wants(c) {
				return
			}
			now := time.Now()
			b := w.t.cfg.ImageBackoff.Next(l.pulls[c.Name], now, now)
			l.pulls[c.Name] = b
			l.o.Images[c.Name] = ImageState{Failed: now, Retry: now.Add(b.Delay), Reason: e.reason, Error: e.text}
		}, nil // the image's own back-off decides, not the step's
	})
}

// wants says that a container still is to be made of c's image.
func (l *life) wants(c *v1.Container) bool {
	now := spec.Container(l.d.Pod, c.Name)
	return now != nil && now.Image == c.Image
}

// replaceImages forgets those that containers were to be made of before.
func (w *worker) replaceImages(l *life, before *v1.Pod) {
	for c := range podutil.ContainerIter(&l.d.Pod.Spec, podutil.AllContainers) {
		was := spec.Container(before, c.Name)
		if was == nil || was.Image == c.Image {
			continue
		}
		delete(l.o.Images, c.Name)
		delete(l.pulls, c.Name)
		delete(l.failures, c.Name)
		w.cancel(l, Action{Kind: EnsureImage, Container: c.Name}.key())
	}
}

// ImagePresent tells that an image has come to the node, by whatever way, under
// these names (whole references, as "docker.io/library/nginx:1", and its id).
// Containers that wait to try it again do so at once.
func (t *Table) ImagePresent(names []string) {
	for _, w := range t.all() {
		w.post(func() {
			for _, l := range w.lives {
				l.retryImages(func(image string) bool { return slices.Contains(names, wholeName(image)) })
			}
		})
	}
}

// retryImages makes containers that failed to get an image try it now, where
// matches says so of one that they need.
func (l *life) retryImages(matches func(image string) bool) {
	now := time.Now()
	for name, st := range l.o.Images {
		c := spec.Container(l.d.Pod, name)
		if st.Ref != "" || !st.Retry.After(now) || c == nil {
			continue
		}
		if matches(c.Image) || slices.ContainsFunc(imageVolumes(l.d.Pod, c), func(v *v1.ImageVolumeSource) bool { return matches(v.Reference) }) {
			st.Retry = now
			l.o.Images[name] = st
		}
	}
}

// wholeName of an image as the store has it: with registry and tag, or digest.
func wholeName(image string) string {
	named, err := reference.ParseDockerRef(image)
	if err != nil {
		return image
	}
	return named.String()
}

// imageVolumes are the images that a container has mounted as volumes.
func imageVolumes(pod *v1.Pod, c *v1.Container) []*v1.ImageVolumeSource {
	var out []*v1.ImageVolumeSource
	for i := range pod.Spec.Volumes {
		v := &pod.Spec.Volumes[i]
		if v.Image == nil || v.Image.Reference == "" {
			continue
		}
		if slices.ContainsFunc(c.VolumeMounts, func(m v1.VolumeMount) bool { return m.Name == v.Name }) {
			out = append(out, v.Image)
		}
	}
	return out
}

// image resolves an image that a container needs to its id, by pull policy.
func (w *worker) image(ctx context.Context, pod *v1.Pod, container, image string, policy v1.PullPolicy) (string, error) {
	event := func(t, reason, format string, args ...any) {
		w.t.deps.Events.Eventf(spec.Ref(pod, container), t, reason, format, args...)
	}
	name, err := withTag(image)
	if err != nil {
		text := fmt.Sprintf("Failed to apply default image tag %q: %v", image, err)
		event(v1.EventTypeWarning, "InspectFailed", "%s", text)
		return "", &imageError{"InvalidImageName", text}
	}
	if policy != v1.PullAlways {
		img, err := w.inspectImage(ctx, name)
		if err != nil {
			text := fmt.Sprintf("Failed to inspect image %q: %s", name, message(err))
			event(v1.EventTypeWarning, "InspectFailed", "%s", text)
			return "", &imageError{"ImageInspectError", text}
		}
		if img != nil {
			event(v1.EventTypeNormal, "Pulled", "Container image %q already present on machine and can be accessed by the pod", image)
			return img.Id, nil
		}
		if policy == v1.PullNever {
			text := fmt.Sprintf("Container image %q is not present with pull policy of Never", image)
			event(v1.EventTypeWarning, "ErrImageNeverPull", "%s", text)
			return "", &imageError{"ErrImageNeverPull", text}
		}
	}
	asked := time.Now()
	leave, err := w.t.limits.pulls.enter(ctx, critical(pod))
	if err != nil {
		return "", err
	}
	defer leave()
	event(v1.EventTypeNormal, "Pulling", "Pulling image %q", name)
	began := time.Now()
	id, err := w.pull(ctx, pod, name)
	if err != nil {
		if policy == v1.PullIfNotPresent && ctx.Err() == nil {
			// It may have come meanwhile by another way.
			if img, ierr := w.inspectImage(ctx, name); ierr == nil && img != nil {
				event(v1.EventTypeNormal, "Pulled", "Container image %q already present on machine and can be accessed by the pod", image)
				return img.Id, nil
			}
		}
		if ctx.Err() == nil {
			event(v1.EventTypeWarning, "Failed", "Failed to pull image %q: %s", name, message(err))
		}
		return "", err
	}
	size := uint64(0)
	if img, err := w.inspectImage(ctx, id); err == nil && img != nil {
		size = img.Size
	}
	event(v1.EventTypeNormal, "Pulled", "Successfully pulled image %q in %v (%v including waiting). Image size: %v bytes.",
		name, time.Since(began).Truncate(time.Millisecond), time.Since(asked).Truncate(time.Millisecond), size)
	return id, nil
}

// inspectImage returns nil for an image that is not there.
func (w *worker) inspectImage(ctx context.Context, name string) (*runtimeapi.Image, error) {
	ctx, cancel := context.WithTimeout(ctx, w.t.cfg.CallTimeout)
	defer cancel()
	resp, err := w.t.deps.Images.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: name}})
	if err != nil {
		if notFound(err) {
			return nil, nil
		}
		return nil, err
	}
	return resp.Image, nil
}

// pull with each of the pod's credentials for the registry, or with none.
func (w *worker) pull(ctx context.Context, pod *v1.Pod, name string) (string, error) {
	req := &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: name}}
	auths, err := w.credentials(ctx, pod, name)
	if err != nil {
		return "", err
	}
	if len(auths) == 0 {
		resp, err := w.t.deps.Images.PullImage(ctx, req)
		if err != nil {
			return "", err
		}
		return resp.ImageRef, nil
	}
	var errs []error
	for _, a := range auths {
		req.Auth = a
		resp, err := w.t.deps.Images.PullImage(ctx, req)
		if err == nil {
			return resp.ImageRef, nil
		}
		errs = append(errs, errors.New(message(err)))
	}
	return "", errors.Join(errs...)
}

// credentials that fit the image's registry: of the pod's imagePullSecrets, then
// of plugins. A secret that is not there is reported and passed over, as
// upstream does.
func (w *worker) credentials(ctx context.Context, pod *v1.Pod, name string) ([]*runtimeapi.AuthConfig, error) {
	plugins := &credentialprovider.BasicDockerKeyring{}
	if len(pod.Spec.ImagePullSecrets) == 0 && w.t.deps.Credentials == nil {
		return nil, nil
	}
	repo, _, _, err := parsers.ParseImageName(name)
	if err != nil {
		return nil, err
	}
	if w.t.deps.Credentials != nil {
		plugins.Add(nil, w.t.deps.Credentials.Config(ctx, pod, repo))
	}
	var found []v1.Secret
	for _, r := range pod.Spec.ImagePullSecrets {
		s, err := w.t.deps.Objects.Secret(pod.Namespace, r.Name)
		if err != nil {
			w.t.deps.Events.Eventf(ref(pod), v1.EventTypeWarning, "FailedToRetrieveImagePullSecret",
				"Unable to retrieve some image pull secrets (%s); attempting to pull the image may not succeed.", r.Name)
			continue
		}
		found = append(found, *s)
	}
	ring, err := secrets.MakeDockerKeyring(found, plugins)
	if err != nil {
		return nil, fmt.Errorf("read the image pull secrets of pod %s: %w", spec.Desc(pod), err)
	}
	configs, _ := ring.Lookup(repo)
	var out []*runtimeapi.AuthConfig
	for i := range configs {
		a := &configs[i].AuthConfig
		out = append(out, &runtimeapi.AuthConfig{
			Username: a.Username, Password: a.Password, Auth: a.Auth, ServerAddress: a.ServerAddress,
			IdentityToken: a.IdentityToken, RegistryToken: a.RegistryToken,
		})
	}
	return out, nil
}
