#!/bin/sh
# Builds podd-shim: cmd/podd-shim/build.sh OUTPUT
#
# Needs go, a C compiler and libseccomp's static library (Debian:
# libseccomp-dev). pause is compiled first, because podd-shim embeds it.
set -eu
out=${1:?usage: build.sh OUTPUT}
case $out in /*) ;; *) out=$PWD/$out ;; esac
cd "$(dirname "$0")/../.."
CC=${CC:-cc}

mkdir -p cmd/podd-shim/embed "$(dirname "$out")"
tmp=cmd/podd-shim/embed/.pause.$$
trap 'rm -f "$tmp"' EXIT
$CC -Os -Wall -Werror -nostdlib -static -no-pie -fno-pie -ffreestanding \
	-fno-stack-protector -fno-asynchronous-unwind-tables -fno-builtin \
	-Wl,--build-id=none,-z,noseparate-code,-z,norelro -s \
	-o "$tmp" cmd/pause/pause.c
# Replaced only when it differs, so that Go's build cache holds.
cmp -s "$tmp" cmd/podd-shim/embed/pause 2>/dev/null || mv "$tmp" cmd/podd-shim/embed/pause
rm -f "$tmp" # exec below leaves no trap

CGO_ENABLED=1 CC=$CC exec go build -trimpath -tags "seccomp,netgo,osusergo,runc_nocriu" \
	-ldflags "-s -w -linkmode external -extldflags '-static'" \
	-o "$out" ./cmd/podd-shim
