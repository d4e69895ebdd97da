package netns

import (
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"k8s.io/apimachinery/pkg/api/resource"
)

// The pod's annotations for its bandwidth in bits per second, seen from the pod
// (kubernetes.io, "Support traffic shaping").
const (
	ingressAnnotation = "kubernetes.io/ingress-bandwidth"
	egressAnnotation  = "kubernetes.io/egress-bandwidth"
)

// rates in bits per second; 0: unlimited.
type rates struct{ ingress, egress uint64 }

func parseRates(annotations map[string]string) (r rates, err error) {
	for key, dst := range map[string]*uint64{ingressAnnotation: &r.ingress, egressAnnotation: &r.egress} {
		s, ok := annotations[key]
		if !ok {
			continue
		}
		q, err := resource.ParseQuantity(s)
		// Upstream's bounds: 1 kbit/s to 1 Pbit/s (pkg/util/bandwidth).
		if err == nil && (q.Value() < 1000 || q.Value() > 1e15) {
			err = fmt.Errorf("must be between 1k and 1P")
		}
		if err != nil {
			return rates{}, fmt.Errorf("annotation %s=%q: %w: %w", key, s, err, errdefs.ErrInvalidArgument)
		}
		*dst = uint64(q.Value())
	}
	return r, nil
}

// shape puts a token bucket on what the interface sends. Ingress is limited on
// the host's side of the pair, egress on the pod's: without CAP_NET_ADMIN the
// pod cannot change it.
func shape(h *netlink.Handle, index int, bits uint64) error {
	rate := bits / 8
	// 10 ms worth, and never less than one packet as large as segmentation
	// offload makes them.
	burst := max(rate/100, 64<<10)
	q := &netlink.Tbf{
		QdiscAttrs: netlink.QdiscAttrs{LinkIndex: index, Handle: netlink.MakeHandle(1, 0), Parent: netlink.HANDLE_ROOT},
		Rate:       rate,
		// 25 ms of queue, as CNI's bandwidth plugin has.
		Limit:  uint32(min(rate/40+burst, 1<<31)),
		Buffer: netlink.Xmittime(rate, uint32(min(burst, 1<<31))),
	}
	return h.QdiscAdd(q)
}
