#!/bin/sh
# Builds the peers that the benchmarks and suites compare with, from the Go
# module proxy: upstream's kubelet, containerd with its runc shim, and runc; and
# the control plane that the cluster tests run podd under.
#
#   build.sh DIR [NAME…]    NAME: kubelet containerd runc cni critest ginkgo crictl
#                           etcd kube-apiserver kube-controller-manager kube-scheduler kubectl
#                           kube-proxy metrics-server e2e.test e2e_node.test agnhost
#                           (default: the first four)
#
# critest pulls one image by a digest compiled into it; $CRITEST_PINNED, if set,
# is the digest to compile in instead, that of the stand-in.
#
# What is there already is kept. What was built is also kept by its version in
# $XDG_CACHE_HOME/podd/peers (~/.cache/podd/peers), where the next checkout finds
# it. Nothing of it is part of podd.
set -eu
out=$(mkdir -p "$1" && cd "$1" && pwd); shift
exec 9>"$out/.lock"
flock 9 # two builds of one program would write the same module
store=${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/podd/peers
[ $# -gt 0 ] || set -- kubelet containerd runc cni
K8S=v1.36.3 STAGING=v0.36.3 CONTAINERD=v2.4.2 RUNC=v1.5.2 CRITOOLS=v1.36.0 ETCD=v3.6.8 CNI=v1.9.0 METRICS=v0.9.0
# -trimpath: what podd depends on too is compiled once for both.
export GOFLAGS="-mod=mod -trimpath"

# module NAME REQUIRE… : a scratch module in $out/src/NAME
module() {
	name=$1; shift
	mkdir -p "$out/src/$name" && cd "$out/src/$name"
	{ echo "module peer/$name"; echo "go 1.26"; for r; do echo "require $r"; done; } > go.mod
}

# sources PATH VERSION : a writable copy of a module, so that its own go.mod decides the versions
sources() {
	dir=$(cd / && go mod download -json "$1@$2" | sed -n 's/^\t"Dir": "\(.*\)",$/\1/p')
	name=$(basename "${1%/v2}"); mkdir -p "$out/src"
	rm -rf "$out/src/$name" && cp -r "$dir" "$out/src/$name" && chmod -R u+w "$out/src/$name" && cd "$out/src/$name"
}

# copy FROM TO FILE… ; each is whole or not there
copy() {
	from=$1 to=$2; shift 2
	for f; do [ -x "$from/$f" ] || return 1; done
	mkdir -p "$to" 2>/dev/null || return 1
	for f; do cp "$from/$f" "$to/.$f.$$" 2>/dev/null && mv "$to/.$f.$$" "$to/$f" || return 1; done
}

VERSIONED="-s -w -X k8s.io/component-base/version.gitVersion=$K8S"
# kubernetes NAME : a scratch module that builds parts of Kubernetes
kubernetes() {
	module "$1" "k8s.io/kubernetes $K8S"
	dir=$(go mod download -json "k8s.io/kubernetes@$K8S" | sed -n 's/^\t"Dir": "\(.*\)",$/\1/p')
	sed -n 's/^\t\(k8s.io\/[a-z-]*\) => .*/\1/p' "$dir/go.mod" | while read -r m; do
		echo "replace $m => $m $STAGING" >> go.mod
	done
}

for peer; do
	files=$peer
	case $peer in
	kubelet | kube-* | kubectl | e2e.test | e2e_node.test) version=$K8S ;;
	agnhost) version=$K8S files="agnhost localhost.crt localhost.key" ;;
	etcd) version=$ETCD ;;
	metrics-server) version=$METRICS ;;
	containerd) version=$CONTAINERD files="containerd containerd-shim-runc-v2" ;;
	runc) version=$RUNC ;;
	critest) version=$CRITOOLS-${CRITEST_PINNED:-as-is} ;;
	ginkgo | crictl) version=$CRITOOLS ;;
	cni) version=$CNI files="bridge loopback host-local portmap" ;;
	esac
	kept=$store/$peer-${version:-}-$(uname -m)
	# shellcheck disable=SC2086
	[ "$peer" = critest ] || for f in $files; do [ -x "$out/$f" ] || { copy "$kept" "$out" $files && echo "$peer was built before"; break; }; done
	case $peer in
	kubelet | kube-apiserver | kube-controller-manager | kube-scheduler | kube-proxy | kubectl)
		[ -x "$out/$peer" ] && continue
		kubernetes "$peer"
		CGO_ENABLED=0 go build -ldflags "$VERSIONED" -o "$out/$peer" "k8s.io/kubernetes/cmd/$peer" ;;
	agnhost) # upstream's image of the end-to-end tests is little else
		[ -x "$out/$peer" ] && continue
		kubernetes "$peer"
		CGO_ENABLED=0 go build -ldflags "$VERSIONED" -o "$out/$peer" "k8s.io/kubernetes/test/images/agnhost"
		for f in localhost.crt localhost.key; do # it serves with these
			install -m 755 "$dir/test/images/agnhost/porter/$f" "$out/"
		done ;;
	e2e.test | e2e_node.test)
		[ -x "$out/$peer" ] && continue
		kubernetes "$peer"
		CGO_ENABLED=0 go test -vet=off -c -ldflags "$VERSIONED" -o "$out/$peer" "k8s.io/kubernetes/test/${peer%.test}" ;;
	metrics-server)
		[ -x "$out/$peer" ] && continue
		kubernetes "$peer" # for the same versions of the libraries
		echo "require sigs.k8s.io/metrics-server $METRICS" >> go.mod
		CGO_ENABLED=0 go build -ldflags "-s -w" -o "$out/$peer" sigs.k8s.io/metrics-server/cmd/metrics-server ;;
	etcd)
		[ -x "$out/etcd" ] && continue
		module etcd "go.etcd.io/etcd/server/v3 $ETCD"
		printf 'package main\n\nimport (\n\t"os"\n\n\t"go.etcd.io/etcd/server/v3/etcdmain"\n)\n\nfunc main() { etcdmain.Main(os.Args) }\n' > main.go
		CGO_ENABLED=0 go build -ldflags "-s -w" -o "$out/etcd" . ;;
	containerd)
		[ -x "$out/containerd-shim-runc-v2" ] && continue
		sources github.com/containerd/containerd/v2 $CONTAINERD
		CGO_ENABLED=0 go build -ldflags "-s -w" -tags "no_btrfs" -o "$out/" ./cmd/containerd ./cmd/containerd-shim-runc-v2 ;;
	runc)
		[ -x "$out/runc" ] && continue
		sources github.com/opencontainers/runc $RUNC
		CGO_ENABLED=1 go build -ldflags "-s -w" -tags seccomp -o "$out/runc" . ;;
	critest)
		[ -x "$out/critest" ] && grep -q "${CRITEST_PINNED:-sha256:}" "$out/critest" && continue
		copy "$kept" "$out" critest && continue
		sources sigs.k8s.io/cri-tools $CRITOOLS
		[ -z "${CRITEST_PINNED:-}" ] || sed -i "s/\(test-image-digest@\)sha256:[0-9a-f]*/\1$CRITEST_PINNED/" pkg/validate/consts.go
		CGO_ENABLED=0 go test -vet=off -c -ldflags "-s -w" -o "$out/critest" ./cmd/critest ;;
	ginkgo) # runs critest's specs in parallel; of the version that critest is linked with
		[ -x "$out/ginkgo" ] && continue
		sources sigs.k8s.io/cri-tools $CRITOOLS
		CGO_ENABLED=0 go build -ldflags "-s -w" -o "$out/ginkgo" github.com/onsi/ginkgo/v2/ginkgo ;;
	crictl)
		[ -x "$out/crictl" ] && continue
		sources sigs.k8s.io/cri-tools $CRITOOLS
		CGO_ENABLED=0 go build -ldflags "-s -w" -o "$out/crictl" ./cmd/crictl ;;
	cni)
		[ -x "$out/portmap" ] && continue
		sources github.com/containernetworking/plugins $CNI
		CGO_ENABLED=0 go build -ldflags "-s -w" -o "$out/" ./plugins/main/bridge ./plugins/main/loopback ./plugins/ipam/host-local ./plugins/meta/portmap ;;
	*) echo "build.sh: unknown peer $peer" >&2; exit 2 ;;
	esac
	echo "built $peer"
	# shellcheck disable=SC2086
	copy "$out" "$kept" $files || true # a cache
done
