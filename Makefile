# podd's build. `make` alone explains itself.

GO       ?= go
BIN      := bin
RUN_ROOT ?= _run
VERSION  := $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
LDFLAGS  := -s -w -X main.version=$(VERSION)

# What a build needs from Debian; nothing is installed when all is there.
DEPS := gcc libc6-dev libseccomp-dev pkg-config
# And the tests: containers of the unit tests run busybox. nginx and redis are
# unpacked from their packages, not installed, so that nothing is started.
# dbus-daemon carries a private bus with a logind of the tests' own.
TESTDEPS := $(DEPS) busybox-static iproute2 nftables dbus-daemon

.DEFAULT_GOAL := help
.PHONY: help build podd podd-shim podd-cli examples-tool run test test-all unit fuzz integration soak kills points critest cluster-test e2e node-test node-shell bench check deb install uninstall deps test-deps clean

help: ## Show this
	@echo "podd: pods on this machine, without a cluster. Targets:"
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: podd podd-shim podd-cli ## Build bin/podd, bin/podd-shim and bin/podd-cli

# go build is incremental by itself, so these targets always ask it.
podd:
	@CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o $(BIN)/podd ./cmd/podd

podd-shim:
	@GO='$(GO)' cmd/podd-shim/build.sh $(BIN)/podd-shim

podd-cli:
	@CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o $(BIN)/podd-cli ./cmd/podd-cli

examples-tool:
	@CGO_ENABLED=0 $(GO) build -trimpath -o $(BIN)/run-examples ./examples/run

deb: deps build ## Make the Debian package, bin/podd_VERSION_ARCH.deb
	@VERSION='$(VERSION)' systemd/package/deb $(BIN)

PREFIX     ?= /usr/local
SYSCONFDIR ?= /etc
UNITDIR    ?= $(PREFIX)/lib/systemd
INSTALL    := PREFIX='$(PREFIX)' DESTDIR='$(DESTDIR)' SYSCONFDIR='$(SYSCONFDIR)' UNITDIR='$(UNITDIR)' BIN='$(BIN)' systemd/package/install

install: ## Install bin/ with units, manual pages and completions: PREFIX=/usr/local DESTDIR= SYSCONFDIR=/etc
	@$(INSTALL)

uninstall: ## Remove what install installed; configuration, images and records stay
	@$(INSTALL) -u

run: deps ## Build, then run the example pods in ./_run until Ctrl-C (as root)
	@echo "==> build"
	@$(MAKE) --no-print-directory build examples-tool
	@$(BIN)/run-examples -bin $(BIN) -root $(RUN_ROOT) -manifests examples/manifests

test: test-deps ## Install what the tests need, run all tests (as root), sum up in one line
	@GO='$(GO)' .ci/tests all

test-all: test-deps ## The same in long: critest serially too, crictl, upstream's kubelet (builds for minutes), fuzzing
	@GO='$(GO)' PODD_TEST_ALL=1 .ci/tests all

unit: test-deps ## Run the unit tests only
	@GO='$(GO)' .ci/tests unit

fuzz: test-deps ## Run each fuzz target for a minute, or PODD_FUZZ_TIME=10m (as root)
	@GO='$(GO)' .ci/tests fuzz

integration: test-deps ## Run the integration tests only (as root)
	@GO='$(GO)' .ci/tests integration

soak: test-deps build ## 200 pods for ten minutes, podd killed every 20 s: nothing may start twice or be left (as root)
	@PODD_TEST_SOAK=10m $(GO) test -count=1 -timeout 40m -run '^TestSoak$$' -v ./integration

kills: test-deps build ## podd and podd-shim killed 1,000 times under churn, on a run directory that is full now and then (as root)
	@PODD_TEST_KILLS=1000 $(GO) test -count=1 -timeout 60m -run '^TestKills$$' -v ./integration

points: test-deps build ## podd and podd-shim killed at each system call with an effect, one after the other, for an hour (as root)
	@PODD_TEST_ALL=1 $(GO) test -count=1 -timeout 3h -run '^TestNothingIsLostAtAnyPoint$$' -v ./integration

node-test: test-deps ## Run the short suite on a stock Debian 12 machine in QEMU: systemd, cgroup v2, AppArmor (as root)
	@GO='$(GO)' .ci/tests node

node-shell: test-deps build ## A root shell on that machine, with the package in /payload
	@GO='$(GO)' integration/vm/payload .cache/vm/payload integration/service
	@$(GO) build -o $(BIN)/vm ./integration/vm && $(BIN)/vm shell .cache/vm/payload

critest: test-deps ## Run upstream's validation suite of the CRI against bin/podd only (as root)
	@GO='$(GO)' .ci/tests critest

cluster-test: test-deps ## Run podd as a node of upstream's control plane (as root; builds that at first, for minutes)
	@GO='$(GO)' PODD_TEST_ALL=1 .ci/tests cluster

e2e: test-deps ## Run Kubernetes' own end-to-end tests with podd as the node: PODD_E2E_FOCUS=… (as root; builds them at first, for many minutes)
	@GO='$(GO)' PODD_TEST_ALL=1 .ci/tests e2e

bench: deps build ## Measure podd next to upstream's kubelet and containerd (as root; builds those at first, for minutes)
	@integration/peer/build.sh .cache/peers kubelet containerd runc cni etcd kube-apiserver kube-controller-manager kube-scheduler
	@CGO_ENABLED=0 $(GO) build -trimpath -o $(BIN)/bench ./integration/bench
	@$(BIN)/bench -bin $(BIN) -peers .cache/peers $(BENCH_FLAGS)

# The tags that podd-shim is built with.
TAGS := seccomp,netgo,osusergo

check: deps ## Look for mistakes: gofmt, vet, staticcheck and, where installed, golangci-lint
	@out=$$(gofmt -l $$(git ls-files '*.go')); test -z "$$out" || { echo "gofmt these:"; echo "$$out"; exit 1; }
	@$(GO) vet -tags $(TAGS) ./...
	@cd .ci/tools && $(GO) build -o ../../$(BIN)/staticcheck honnef.co/go/tools/cmd/staticcheck
	@$(BIN)/staticcheck -tags $(TAGS) ./...
	@if command -v golangci-lint >/dev/null; then golangci-lint run; fi

deps: ## Install what the build needs from Debian
	@.ci/deps $(DEPS)

test-deps:
	@.ci/deps $(TESTDEPS)

clean: ## Remove what was built (./_run stays: its pods may be running)
	@rm -rf $(BIN)
