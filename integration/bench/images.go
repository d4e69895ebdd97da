package main

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// imageServer is a registry on 127.0.0.1 that holds the payload.
type imageServer struct {
	host   string
	server *http.Server
	root   string // the payload's root file system, unpacked
}

func (s *imageServer) payload() string { return s.host + "/payload:1" }
func (s *imageServer) close()          { s.server.Close() }

// serveImages compiles the C programs of this folder and serves the payload's image.
func serveImages(work string) (*imageServer, error) {
	root := filepath.Join(work, "payload-root")
	for _, dir := range []string{"out", "proc", "dev", "sys", "etc"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			return nil, err
		}
	}
	src, err := sourceDir()
	if err != nil {
		return nil, err
	}
	payload := filepath.Join(root, "payload")
	for _, args := range [][]string{
		{"-nostdlib", "-static", "-Os", "-s", "-fno-builtin", "-o", payload, filepath.Join(src, "programs", "payload.c")},
		{"-O2", "-o", filepath.Join(work, "floor"), filepath.Join(src, "programs", "floor.c")},
	} {
		if out, err := exec.Command("cc", args...).CombinedOutput(); err != nil {
			return nil, fmt.Errorf("cc %v: %w: %s", args, err, out)
		}
	}
	program, err := os.ReadFile(payload)
	if err != nil {
		return nil, err
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	s := &imageServer{
		host:   listener.Addr().String(),
		root:   root,
		server: &http.Server{Handler: registry.New(registry.Logger(log.New(io.Discard, "", 0)))},
	}
	go s.server.Serve(listener)
	for _, entry := range [][]string{{"payload"}, {"pause", "sandbox"}} {
		image, err := imageOf(entry, program)
		if err != nil {
			return nil, err
		}
		ref, err := name.ParseReference(s.host+"/"+entry[0]+":1", name.Insecure)
		if err != nil {
			return nil, err
		}
		if err := remote.Write(ref, image); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// imageOf one program, run with the entry point's words.
func imageOf(entry []string, program []byte) (v1.Image, error) {
	var layer bytes.Buffer
	t := tar.NewWriter(&layer)
	t.WriteHeader(&tar.Header{Name: "out/", Typeflag: tar.TypeDir, Mode: 0o755})
	t.WriteHeader(&tar.Header{Name: entry[0], Mode: 0o755, Size: int64(len(program))})
	t.Write(program)
	if err := t.Close(); err != nil {
		return nil, err
	}
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(layer.Bytes())), nil })
	if err != nil {
		return nil, err
	}
	image, err := mutate.AppendLayers(empty.Image, l)
	if err != nil {
		return nil, err
	}
	config, err := image.ConfigFile()
	if err != nil {
		return nil, err
	}
	config = config.DeepCopy()
	config.OS, config.Architecture = "linux", "amd64"
	config.Config = v1.Config{Entrypoint: append([]string{"/" + entry[0]}, entry[1:]...), Env: []string{"PATH=/"}}
	return mutate.ConfigFile(image, config)
}

// sourceDir is the folder of this program's sources in the checkout it is run from.
func sourceDir() (string, error) {
	for _, dir := range []string{"integration/bench", "."} {
		if _, err := os.Stat(filepath.Join(dir, "programs", "payload.c")); err == nil {
			return dir, nil
		}
	}
	return "", fmt.Errorf("integration/bench/programs/payload.c: not found; run bench from the root of the checkout")
}
