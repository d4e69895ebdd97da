//go:build !cgo || !seccomp

package server

import (
	"fmt"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

const seccompBuiltIn = false

func compile(*specs.LinuxSeccomp) ([]byte, error) {
	return nil, fmt.Errorf("this podd-shim was built without seccomp: %w", errdefs.ErrNotImplemented)
}
