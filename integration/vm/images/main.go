// Command images writes the test images as tars, for a machine that can neither
// compile nor download: images CACHE DIR NAME…
// The name critest means all that critest wants, as an OCI layout, beside which
// the file critest.pinned holds the digest to compile into critest.
package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/podd-runtime/podd/integration/images"
)

func main() {
	if err := run(context.Background(), os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "images:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	if len(args) < 3 {
		return fmt.Errorf("usage: images CACHE DIR NAME…")
	}
	b := &images.Builder{Dir: args[0]}
	build := map[string]func(context.Context) (v1.Image, error){
		"busybox": b.Busybox, "testserver": b.Testserver, "nginx": b.Nginx, "redis": b.Redis,
	}
	if err := os.MkdirAll(args[1], 0o755); err != nil {
		return err
	}
	for _, name := range args[2:] {
		if name == "critest" {
			if err := critest(ctx, b, args[1]); err != nil {
				return fmt.Errorf("critest: %w", err)
			}
			continue
		}
		from, ok := build[name]
		if !ok {
			return fmt.Errorf("%s: no such image", name)
		}
		img, err := from(ctx)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if err := images.WriteTar(filepath.Join(args[1], name+".tar"), images.Tag{Ref: "podd.test/" + name + ":1", Image: img}); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}

func critest(ctx context.Context, b *images.Builder, dir string) error {
	all, err := b.Critest(ctx)
	if err != nil {
		return err
	}
	digest, err := all[images.CritestPinned].Digest()
	if err != nil {
		return err
	}
	if err := images.WriteLayout(filepath.Join(dir, "critest"), all); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "critest.pinned"), []byte(digest.String()), 0o644)
}
