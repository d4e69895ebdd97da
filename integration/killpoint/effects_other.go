//go:build !amd64

package killpoint

var older map[int]kind
