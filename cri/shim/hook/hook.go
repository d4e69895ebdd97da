// Package hook makes podd-shim the init of a container when libcontainer
// re-executes it as one. Importing it is enough; where that happens, the
// process never gets to main. It depends on little, so that it runs before
// most other packages are initialised.
package hook

import (
	_ "github.com/opencontainers/runc/libcontainer/nsenter" // joins namespaces before Go starts

	"github.com/podd-runtime/podd/cri/shim/internal/confine"
)

func init() { confine.Enter() }
