package why

import (
	"fmt"
	"regexp"
	"strings"

	v1 "k8s.io/api/core/v1"

	"github.com/podd-runtime/podd/kubelet/server/api"
)

// refusal is one way in which an image cannot be had.
type refusal struct {
	reason string
	words  []string // any of them, in small letters
	say    string
	remedy string
}

// noSpace is the reason of an image for which there is no room.
const noSpace = "ImageNoSpace"

// refusals, the more telling first: a registry that answers has more to say
// than the network.
var refusals = []refusal{
	{noSpace, []string{"no space left on device"}, "there is no space left for it", "make room: podd rmi --all removes images that no pod uses"},
	{"ImageUnauthorized", []string{"401 unauthorized", "403 forbidden", "denied", "authentication required"}, "the registry does not let this node have it", "name a Secret with its credentials in spec.imagePullSecrets, or give podd --registry-credentials; registries answer the same for images that do not exist: check the name too"},
	{"ImageRateLimit", []string{"429 too many requests", "toomanyrequests"}, "the registry limits how much this node may pull", "wait, pull with credentials, or set up a mirror in certs.d"},
	{"ImageTLS", []string{"x509", "tls:", "certificate", "server gave http response to https client"}, "the registry cannot be trusted or does not speak TLS", "put its CA into certs.d/HOST/hosts.toml (ca = …); a registry without TLS is named there with http://"},
	{"ImageRegistryDown", []string{"connection refused", "no route to host", "network is unreachable", "connection reset"}, "the registry does not answer", "see that the registry runs and can be reached from this node; certs.d/HOST/hosts.toml can name a mirror"},
	{"ImageNotFound", []string{"404 not found", "manifest unknown", "name unknown", "no such image"}, "the registry does not have it", "check the image's name and tag"},
	{"ImageRegistryUnknown", []string{"no such host", "server misbehaving", "name resolution"}, "the registry's name cannot be resolved", "check the registry's name and this node's DNS (/etc/resolv.conf)"},
	{"ImageTimeout", []string{"deadline exceeded", "i/o timeout", "timeout awaiting", "handshake timeout"}, "the registry does not answer in time", "see that the registry can be reached from this node, and its proxy settings"},
	{"ImageCorrupt", []string{"does not have its digest", "digest mismatch", "unexpected commit digest", "data loss"}, "what the registry sent is not what its digest promises", "pull it again; if that does not help, push the image anew"},
	{"ImagePlatform", []string{"no match for platform", "not available for", "has no image for"}, "it is not there for this machine's architecture", "use a tag that is built for this architecture"},
}

// image explains an image that is not there.
func (x *explainer) image(c *v1.Container, subject string, w *v1.ContainerStateWaiting) {
	f := api.Finding{Level: api.Failed, Reason: w.Reason, Subject: subject, Container: c.Name}
	name := c.Image
	if m := imageIn.FindStringSubmatch(w.Message); m != nil {
		name = m[1]
	} else if m := pulled.FindStringSubmatch(w.Message); m != nil && !sameImage(m[1], name) {
		name = m[1] // of a volume
	}
	head := fmt.Sprintf("%s has no image: %s", capital(subject), name)
	switch w.Reason {
	case "InvalidImageName":
		f.Message = sentence(head + " is not the name of an image: " + last(plain(w.Message), ": invalid reference format: "))
		f.Remedy = "correct the field image: registry/repository:tag, in small letters"
	case "ErrImageNeverPull":
		f.Message = sentence(head + " is not on this node, and imagePullPolicy: Never forbids to pull it")
		f.Remedy = fmt.Sprintf("podd load FILE or podd pull %s, or another imagePullPolicy", name)
	default:
		answer := answerOf(w.Message)
		low := strings.ToLower(w.Message)
		say := ""
		for _, r := range refusals {
			for _, word := range r.words {
				if say == "" && strings.Contains(low, word) {
					f.Reason, say, f.Remedy = r.reason, r.say, r.remedy
					if r.reason == noSpace {
						f.Evidence = x.Filling
					}
				}
			}
		}
		if say == "" {
			say = "it cannot be pulled"
			f.Remedy = "podd pull " + name + " tries it by hand"
		}
		f.Message = sentence(fmt.Sprintf("%s cannot be pulled: %s", head, say)) + " The answer was: " + sentence(answer)
	}
	f.Message += x.next(&f, c.Name)
	x.add(f)
}

var imageIn = regexp.MustCompile(`(?:pull image|pulling image|[Ii]mage|image tag|image name) "([^"]+)"`)

// pulled is the whole reference in the image store's own words.
var pulled = regexp.MustCompile(`(?:^|: )pull (\S+): `)

func last(s, sep string) string {
	if i := strings.LastIndex(s, sep); i >= 0 {
		return s[i+len(sep):]
	}
	return s
}

var pullSteps = regexp.MustCompile(`^(?:Back-off pulling image "[^"]*": [A-Za-z]+: )?(?:pull image "[^"]*": )?(?:pull \S+: )?(?:(?:resolve|fetch|unpack): )?`)

// answerOf a registry within the text of a failed pull.
func answerOf(text string) string {
	text = pullSteps.ReplaceAllString(plain(text), "")
	answer, _, _ := strings.Cut(text, "; ")
	return answer
}

// pulling tells how far the pull of the container's image is.
func (x *explainer) pulling(c *v1.Container) string {
	e := x.last(c.Name, "Pulling", "Pulled", "Failed", "BackOff", "Started")
	if e == nil || e.Reason != "Pulling" {
		return ""
	}
	text := fmt.Sprintf("%s is being pulled since %s", c.Image, strings.TrimSuffix(x.ago(e.LastTimestamp.Time), " ago"))
	for _, p := range x.Pulls {
		if !sameImage(p.Ref, c.Image) {
			continue
		}
		if p.Total > 0 {
			text += fmt.Sprintf(", %s: %s of %s, %d of %d layers", p.Stage, size(uint64(p.Bytes)), size(uint64(p.Total)), p.LayersDone, p.Layers)
		} else if p.Stage != "" {
			text += ", " + p.Stage
		}
	}
	return text
}

// sameImage: one of the two may lack its default registry, path and tag.
func sameImage(full, short string) bool {
	return full == short || strings.HasSuffix(full, "/"+short) || full == short+":latest" || strings.HasSuffix(full, "/"+short+":latest")
}
