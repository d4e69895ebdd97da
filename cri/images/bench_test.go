package images

import (
	"context"
	"crypto/rand"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

func noise(n int) string {
	b := make([]byte, n)
	rand.Read(b)
	return string(b)
}

// smallImage is 1 MB in 3 layers.
func smallImage(t testing.TB) v1.Image {
	var layers []v1.Layer
	for i := range 3 {
		layers = append(layers, layerOf(t, dir("bin/"), file(fmt.Sprintf("bin/app%d", i), noise(340<<10)), file(fmt.Sprintf("etc/conf%d", i), "x")))
	}
	return imageOf(t, layers...)
}

// bigImage is 15 MB in 4,000 files and 3 layers.
func bigImage(t testing.TB) v1.Image {
	var layers []v1.Layer
	for l := range 3 {
		var list []entry
		for i := range 1334 {
			if i%50 == 0 {
				list = append(list, dir(fmt.Sprintf("l%d/d%d/", l, i/50)))
			}
			list = append(list, file(fmt.Sprintf("l%d/d%d/f%d", l, i/50, i), noise(3750)))
		}
		layers = append(layers, layerOf(t, list...))
	}
	return imageOf(t, layers...)
}

// The figures of docs: pull and unpack from a registry on 127.0.0.1 into an
// empty store, sync to disk included.
func benchPull(b *testing.B, img v1.Image) {
	needRoot(b)
	host := registryServer(b, nil)
	ref := host + "/bench/app:v1"
	push(b, ref, img)
	b.ResetTimer()
	for range b.N {
		b.StopTimer()
		dir := b.TempDir()
		s := openStore(b, dir, nil)
		b.StartTimer()
		if _, err := s.Pull(context.Background(), ref, nil, nil); err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		s.Close()
		os.RemoveAll(dir)
		b.StartTimer()
	}
}

func BenchmarkPullSmall(b *testing.B) { benchPull(b, smallImage(b)) }
func BenchmarkPullBig(b *testing.B)   { benchPull(b, bigImage(b)) }

// BenchmarkMountRootfs mounts as many root file systems at once as the
// sub-benchmark says, and reports the slowest of them.
func BenchmarkMountRootfs(b *testing.B) {
	needRoot(b)
	host := registryServer(b, nil)
	ref := host + "/bench/app:v1"
	push(b, ref, smallImage(b))
	s := openStore(b, b.TempDir(), nil)
	img := mustPull(b, s, ref)
	for _, n := range []int{1, 100} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			targets := b.TempDir()
			var slowest time.Duration
			for range b.N {
				took := make([]time.Duration, n)
				var wg sync.WaitGroup
				for i := range n {
					wg.Go(func() {
						began := time.Now()
						key := fmt.Sprintf("c%d", i)
						if err := s.MountRootfs(context.Background(), key, img.ID, filepath.Join(targets, key), nil, nil); err != nil {
							b.Error(err)
						}
						took[i] = time.Since(began)
					})
				}
				wg.Wait()
				b.StopTimer()
				slowest = max(slowest, slices.Max(took))
				for i := range n {
					key := fmt.Sprintf("c%d", i)
					if err := s.UnmountRootfs(context.Background(), key, filepath.Join(targets, key)); err != nil {
						b.Error(err)
					}
				}
				b.StartTimer()
			}
			b.ReportMetric(float64(slowest.Microseconds()), "slowest-µs")
		})
	}
}
