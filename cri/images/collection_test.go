package images

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// paused is a content store whose walks stop once at a stage: before the first
// blob, at each, or after the last.
type paused struct {
	content.Store
	stage   string
	once    sync.Once
	reached chan struct{}
	resume  chan struct{}
	walk    error // of every walk
	walks   chan struct{}
}

func (p *paused) at(stage string) {
	if stage == p.stage {
		p.once.Do(func() {
			close(p.reached)
			<-p.resume
		})
	}
}

func (p *paused) Walk(ctx context.Context, fn content.WalkFunc, f ...string) error {
	if p.walks != nil {
		p.walks <- struct{}{}
		return p.walk
	}
	p.at("before")
	defer p.at("after")
	return p.Store.Walk(ctx, func(i content.Info) error {
		p.at("within")
		return fn(i)
	}, f...)
}

// pause has the next collection stop at stage.
func (s *Store) pause(stage string) *paused {
	p := &paused{Store: s.content, stage: stage, reached: make(chan struct{}), resume: make(chan struct{})}
	s.mu.Lock()
	s.content = p
	s.mu.Unlock()
	return p
}

// whole fails unless the image can be mounted and has its blobs.
func whole(t *testing.T, s *Store, img *Image) {
	t.Helper()
	if err := s.GarbageCollect(t.Context()); err != nil {
		t.Errorf("collection: %v", err)
	}
	if p, err := s.Verify(t.Context()); err != nil || len(p) > 0 {
		t.Errorf("verify: %v, %v", p, err)
	}
	root := mountOf(t, s, "c", img.ID)
	if read(t, root+"/a") != "1" || read(t, root+"/b") != "2" {
		t.Error("the image lacks files")
	}
}

// TestAnImageThatComesDuringACollectionIsWhole: everything of it is there
// already, as garbage of which the collection knows.
func TestAnImageThatComesDuringACollectionIsWhole(t *testing.T) {
	img := imageOf(t, layerOf(t, file("a", "1")), layerOf(t, file("b", "2")))
	host := registryServer(t, nil)
	ref := host + "/x/y:1"
	push(t, ref, img)
	comes := map[string]func(s *Store) (*Image, error){
		"pull": func(s *Store) (*Image, error) { return s.Pull(t.Context(), ref, nil, nil) },
	}
	for kind, raw := range map[string][]byte{"oci": ociTar(t, []v1.Image{img}, nil), "docker": dockerTar(t, ref, img)} {
		comes[kind] = func(s *Store) (*Image, error) {
			list, err := s.Load(t.Context(), bytes.NewReader(raw), LoadOptions{Name: ref})
			if err != nil {
				return nil, err
			}
			return list[0], nil
		}
	}
	for kind, come := range comes {
		for _, stage := range []string{"before", "within", "after"} {
			t.Run(kind+" "+stage, func(t *testing.T) {
				t.Parallel()
				s := openStore(t, t.TempDir(), func(c *Config) { c.NoSync = true })
				if _, err := come(s); err != nil {
					t.Fatal(err)
				}
				p := s.pause(stage)
				if err := s.Remove(t.Context(), ref); err != nil {
					t.Fatal(err)
				}
				<-p.reached
				back, err := come(s)
				close(p.resume)
				if err != nil {
					t.Fatal(err)
				}
				whole(t, s, back)
			})
		}
	}
}

// collecting collects everything at each read.
type collecting struct {
	io.Reader
	collect func()
}

func (c collecting) Read(b []byte) (int, error) {
	c.collect()
	return c.Reader.Read(b[:min(len(b), 700)])
}

// TestACollectionDuringAnImportTakesNothingOfIt, wherever in the archive it is.
func TestACollectionDuringAnImportTakesNothingOfIt(t *testing.T) {
	img := imageOf(t, layerOf(t, file("a", "1")), layerOf(t, file("b", "2")))
	for kind, raw := range map[string][]byte{"oci": ociTar(t, []v1.Image{img}, nil), "docker": dockerTar(t, "x.io/y/z:1", img)} {
		t.Run(kind, func(t *testing.T) {
			s := openStore(t, t.TempDir(), func(c *Config) { c.NoSync = true })
			n := 0
			r := collecting{bytes.NewReader(raw), func() {
				n++
				if err := s.GarbageCollect(t.Context()); err != nil {
					t.Errorf("collection: %v", err)
				}
			}}
			list, err := s.Load(t.Context(), r, LoadOptions{Name: "x.io/y/z:1"})
			if err != nil {
				t.Fatal(err)
			}
			if n < 5 {
				t.Errorf("%d collections", n)
			}
			whole(t, s, list[0])
		})
	}
}

// TestAnIngestThatEndsDuringACollectionIsNoError: the collection has listed it.
// A FIFO stops the collection at the first ingest.
func TestAnIngestThatEndsDuringACollectionIsNoError(t *testing.T) {
	s := openStore(t, t.TempDir(), func(c *Config) { c.NoSync = true })
	first := filepath.Join(s.ingestDir(), "0")
	if err := os.Mkdir(first, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mkfifo(filepath.Join(first, "ref"), 0o600); err != nil {
		t.Fatal(err)
	}
	raw := ociTar(t, []v1.Image{imageOf(t, layerOf(t, file("a", noise(100<<10))), layerOf(t, file("b", "2")))}, nil)
	in, out := io.Pipe()
	loaded := make(chan error, 1)
	go func() {
		_, err := s.Load(t.Context(), in, LoadOptions{Name: "x.io/y/z:1"})
		loaded <- err
	}()
	ingests := func() int { e, _ := os.ReadDir(s.ingestDir()); return len(e) }
	for ; len(raw) > 0 && ingests() < 2; raw = raw[1:] {
		if _, err := out.Write(raw[:1]); err != nil {
			t.Fatal(err)
		}
	}
	if len(raw) == 0 {
		t.Fatal("the whole archive is read and no ingest was seen")
	}
	collected := make(chan error, 1)
	go func() { collected <- s.GarbageCollect(t.Context()) }()
	// Opened for writing when a reader is there: the list has been made.
	var ref int
	waitFor(t, func() bool {
		var err error
		ref, err = unix.Open(filepath.Join(first, "ref"), unix.O_WRONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		return err == nil
	})
	if _, err := out.Write(raw); err != nil {
		t.Fatal(err)
	}
	out.Close()
	if err := <-loaded; err != nil {
		t.Errorf("load: %v", err)
	}
	unix.Close(ref)
	if err := <-collected; err != nil {
		t.Errorf("collection: %v", err)
	}
}

// TestACollectionThatFailsIsTriedAgain, though nobody asks for one.
func TestACollectionThatFailsIsTriedAgain(t *testing.T) {
	s := openStore(t, t.TempDir(), nil)
	p := &paused{Store: s.content, walk: errors.New("boom"), walks: make(chan struct{})}
	s.mu.Lock()
	s.content, s.gcRetry = p, time.Millisecond
	s.mu.Unlock()
	s.kickGC()
	for range 3 {
		select {
		case <-p.walks:
		case <-time.After(10 * time.Second):
			t.Fatal("no collection within 10 s")
		}
	}
	go func() { // until the store has closed
		for range p.walks {
		}
	}()
	s.Close()
	close(p.walks)
}

// TestALayerThatIsUnpackedAgainIsSyncedAgain: a sync that began before says
// nothing of it.
func TestALayerThatIsUnpackedAgainIsSyncedAgain(t *testing.T) {
	s := openStore(t, t.TempDir(), nil)
	c := digest.FromString("layer")
	key := unpackKey{chain: c}
	unpack := func() { s.endUnpacking(key, &unpacking{done: make(chan struct{}), info: layer{Chain: c}}) }
	unpack()
	pending := s.toSync([]digest.Digest{c})
	if err := s.GarbageCollect(t.Context()); err != nil { // nobody wants it
		t.Fatal(err)
	}
	if len(s.toSync([]digest.Digest{c})) != 0 {
		t.Fatal("a collected layer is to be synced")
	}
	unpack()
	s.synced(pending)
	if len(s.toSync([]digest.Digest{c})) != 1 {
		t.Error("the new layer counts as synced")
	}
}
