#!/bin/sh
# Builds podd-shim: cmd/podd-shim/build.sh OUTPUT
#
# Needs go, a C compiler and libseccomp's static library (Debian:
# libseccomp-dev). pause and enter are compiled first, because podd-shim
# embeds them. $EXTRA_LDFLAGS are added.
set -eu
out=${1:?usage: build.sh OUTPUT}
case $out in /*) ;; *) out=$PWD/$out ;; esac
cd "$(dirname "$0")/../.."
CC=${CC:-cc}

embed=cmd/podd-shim/embed
mkdir -p $embed "$(dirname "$out")"
# Not in embed: another build that runs now would embed it, or miss it.
tmp=cmd/podd-shim/.program.$$
trap 'rm -f "$tmp"' EXIT
for program in pause enter; do
	$CC -Os -Wall -Werror -nostdlib -static -no-pie -fno-pie -ffreestanding \
		-fno-stack-protector -fno-asynchronous-unwind-tables -fno-builtin \
		-Wl,--build-id=none,-z,noseparate-code,-z,norelro -s \
		-Icmd/pause -o "$tmp" cmd/$program/$program.c
	# Replaced only when it differs, so that Go's build cache holds.
	cmp -s "$tmp" $embed/$program 2>/dev/null || mv "$tmp" $embed/$program
done
rm -f "$tmp" # exec below leaves no trap

CGO_ENABLED=1 CC=$CC exec go build -trimpath -tags "seccomp,netgo,osusergo,runc_nocriu" \
	-ldflags "-s -w -linkmode external -extldflags '-static' ${EXTRA_LDFLAGS:-}" \
	-o "$out" ./cmd/podd-shim
