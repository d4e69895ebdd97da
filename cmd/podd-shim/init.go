package main

// libcontainer runs this program again as the init of each container.
import _ "github.com/podd-runtime/podd/cri/shim/hook"
