package images

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"golang.org/x/sync/semaphore"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// drip answers a GET of the blob with a byte now and then, until the client
// has gone; asked is closed at the first one.
func drip(blob v1.Hash, asked chan struct{}) hook {
	return func(w http.ResponseWriter, r *http.Request) bool {
		if !isBlob(r, blob) {
			return false
		}
		w.Header().Set("Content-Length", fmt.Sprint(1<<20))
		w.Write([]byte{0})
		w.(http.Flusher).Flush()
		select {
		case <-asked:
		default:
			close(asked)
		}
		<-r.Context().Done()
		return true
	}
}

// pullBeside pulls evil until good, which is pulled when begun has closed, is
// there.
func pullBeside(t *testing.T, s *Store, evil string, begun <-chan struct{}, good string) *Image {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	over := make(chan struct{})
	go func() {
		defer close(over)
		s.Pull(ctx, evil, nil, nil)
	}()
	select {
	case <-begun:
	case <-ctx.Done():
		t.Fatal("the other pull did not begin")
	}
	img, err := s.Pull(ctx, good, nil, nil)
	if err != nil {
		t.Fatalf("the pull waited for another registry: %v", err)
	}
	cancel()
	<-over
	return img
}

// TestSlowRegistryHoldsUpNoOther: a registry names layers of a popular image
// and sends them drop by drop. Pulls of the image from its own registry go on.
func TestSlowRegistryHoldsUpNoOther(t *testing.T) {
	layers := []v1.Layer{layerOf(t, file("a", noise(100<<10))), layerOf(t, file("b", noise(1000)))}
	popular := imageOf(t, layers...)
	raw := archiveOf(t, file("a", noise(50<<10)))
	said, _ := layers[0].DiffID()
	forged := liar{rawLayer{raw, raw, types.OCIUncompressedLayer}, said}
	for _, tt := range []struct {
		name string
		evil v1.Image
		slow v1.Layer
	}{
		{"the lowest layer", popular, layers[0]},
		{"the uppermost layer", popular, layers[1]},
		{"of a chain, with other bytes", imageOf(t, forged, layers[1]), forged},
	} {
		t.Run(tt.name, func(t *testing.T) {
			evil, good := newHooked(t), newHooked(t)
			push(t, evil.host+"/x/y:1", tt.evil)
			push(t, good.host+"/x/y:1", popular)
			asked := make(chan struct{})
			evil.set(drip(layerDigest(t, tt.slow), asked))
			s := openStore(t, t.TempDir(), func(c *Config) { c.StallTimeout = time.Minute })
			img := pullBeside(t, s, evil.host+"/x/y:1", asked, good.host+"/x/y:1")
			if got := read(t, mountOf(t, s, "c", img.ID)+"/b"); len(got) != 1000 {
				t.Errorf("b has %d bytes", len(got))
			}
		})
	}
}

// liar is a layer that says it unpacks to what another one does.
type liar struct {
	rawLayer
	says v1.Hash
}

func (l liar) DiffID() (v1.Hash, error) { return l.says, nil }

// TestForgedChainIsNoOthersTrouble: an image whose config names the chain of a
// popular one, with bytes of its own, fails by itself.
func TestForgedChainIsNoOthersTrouble(t *testing.T) {
	base, upper := layerOf(t, file("a", noise(1000))), layerOf(t, file("b", noise(1000)))
	popular := imageOf(t, base, upper)
	said, _ := base.DiffID()
	raw := archiveOf(t, file("evil", "evil"))
	forged := liar{rawLayer{raw, raw, types.OCIUncompressedLayer}, said}
	evil, good := newHooked(t), newHooked(t)
	push(t, evil.host+"/x/y:1", imageOf(t, forged, upper))
	push(t, good.host+"/x/y:1", popular)
	s := openStore(t, t.TempDir(), nil)
	for range 8 {
		failed := make(chan error, 1)
		go func() {
			_, err := s.Pull(t.Context(), evil.host+"/x/y:1", nil, nil)
			failed <- err
		}()
		img, err := s.Pull(t.Context(), good.host+"/x/y:1", nil, nil)
		if err != nil {
			t.Fatalf("inherited: %v", err)
		}
		if err := <-failed; err == nil {
			// Its layer was there by the other pull: the chain is what counts.
			t.Log("the forged image has the popular one's layers")
		} else if !errdefs.IsDataLoss(err) {
			t.Errorf("forged image: %v", err)
		}
		if _, err := os.Stat(mountOf(t, s, fmt.Sprint("c", time.Now().UnixNano()), img.ID) + "/evil"); err == nil {
			t.Fatal("the popular image has the forged layer")
		}
	}
}

// TestErrorsOfOthersAreNotInherited: who waits for a layer or a blob that
// another pull is bringing does it by itself when that one fails.
func TestErrorsOfOthersAreNotInherited(t *testing.T) {
	h := newHooked(t)
	l := layerOf(t, file("a", noise(1000)))
	push(t, h.host+"/x/y:1", imageOf(t, l))
	s := openStore(t, t.TempDir(), nil)
	diff, _ := l.DiffID()
	key := unpackKey{digestOf(diff), digestOf(layerDigest(t, l))}
	other, ok := s.beginUnpacking(key, false)
	if !ok {
		t.Fatal("not entered")
	}
	fetching := s.beginFetch(key.blob, origin{host: h.host}, nil, func(error) {})
	done := make(chan error, 1)
	go func() {
		_, err := s.Pull(t.Context(), h.host+"/x/y:1", nil, nil)
		done <- err
	}()
	waitFor(t, func() bool { return len(s.Pulling()) == 1 && s.Pulling()[0].Stage == stageDownloading })
	s.endFetch(key.blob, fetching, errors.New("no such repository"))
	waitFor(t, func() bool { return s.Pulling()[0].Stage == stageUnpacking })
	other.err = fmt.Errorf("the image is damaged or forged: %w", errdefs.ErrDataLoss)
	s.endUnpacking(key, other)
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestStuckTransferOfTheSameHostIsRaced: one connection of a registry hangs.
func TestStuckTransferOfTheSameHostIsRaced(t *testing.T) {
	h := newHooked(t)
	l := layerOf(t, file("a", noise(100<<10)))
	push(t, h.host+"/x/y:1", imageOf(t, l))
	push(t, h.host+"/x/z:1", imageOf(t, l))
	s := openStore(t, t.TempDir(), func(c *Config) { c.StallTimeout = time.Minute })
	s.raceAfter = 50 * time.Millisecond
	asked := make(chan struct{})
	slow := drip(layerDigest(t, l), asked)
	h.set(func(w http.ResponseWriter, r *http.Request) bool {
		select {
		case <-asked:
			return false
		default:
			return slow(w, r)
		}
	})
	first := make(chan error, 1)
	go func() {
		_, err := s.Pull(t.Context(), h.host+"/x/y:1", nil, nil)
		first <- err
	}()
	<-asked
	if _, err := s.Pull(t.Context(), h.host+"/x/z:1", nil, nil); err != nil {
		t.Fatal(err)
	}
	// What has come ends the transfer that hangs, and nothing of it stays.
	select {
	case err := <-first:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("the first pull waits for bytes that are there")
	}
	if left, _ := os.ReadDir(s.cfg.Dir + "/content/ingest"); len(left) != 0 {
		t.Errorf("ingests left: %v", left)
	}
}

// TestHugeLayersTakeTurns: more huge layers than may be unpacked at once are
// under way; a small one is done long before them.
func TestHugeLayersTakeTurns(t *testing.T) {
	h := newHooked(t)
	push(t, h.host+"/x/small:1", imageOf(t, layerOf(t, file("a", "a"))))
	s := openStore(t, t.TempDir(), func(c *Config) { c.MaxConcurrentUnpacks = 1 })
	// A layer without end holds the only place.
	ctx, cancel := context.WithCancel(t.Context())
	over := make(chan struct{})
	hold := &turn{pull: semaphore.NewWeighted(1), store: s.unpackSlots}
	if err := hold.take(ctx); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(over)
		x := &extractor{turn: hold}
		for x.pause(ctx) == nil {
		}
		hold.leave()
	}()
	if _, err := s.Pull(t.Context(), h.host+"/x/small:1", nil, nil); err != nil {
		t.Error(err)
	}
	cancel()
	<-over
	if !s.unpackSlots.TryAcquire(1) {
		t.Error("the place is lost")
	}
}

// TestPullsAreToldApartByEveryField: a pull with other credentials is another
// pull, whatever a library prints of them.
func TestPullsAreToldApartByEveryField(t *testing.T) {
	seen := map[authKey]int{}
	for i, a := range []*runtimeapi.AuthConfig{
		nil, {Username: "x"}, {Password: "x"}, {Auth: "x"}, {ServerAddress: "x"}, {IdentityToken: "x"}, {RegistryToken: "x"},
		{Username: "x", Password: "y"}, {Username: "x", Password: "z"},
	} {
		if j, ok := seen[authKeyOf(a)]; ok {
			t.Errorf("%d and %d are the same", i, j)
		}
		seen[authKeyOf(a)] = i
	}
}
