# Lockgate: every developer's command. `make help` lists them.
# SPDX-License-Identifier: Apache-2.0
SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

EXAMPLE ?= examples/shop
SECONDS_TO_FUZZ := $(if $(filter command line environment,$(origin SECONDS)),$(SECONDS),60)
CLUSTER ?= 1
BENCH ?=
PYTEST ?=

PYTHON   := .venv/bin/python
CLANG    = $(shell command -v clang-19 clang-18 clang-17 clang-16 | head -n 1)
# clang -target bpf does not look where Debian keeps <asm/types.h>.
INCLUDES = -I/usr/include/$(shell uname -m)-linux-gnu

BPF_CFLAGS = -target bpf -mcpu=v3 -O2 -g -std=gnu11 -Wall -Wextra -Wno-unused-parameter -Werror $(INCLUDES) -Ibpf
POD_CFLAGS = -O2 -g -std=gnu11 -Wall -Wextra -static

CNI_CFLAGS = -Os -std=gnu11 -Wall -Wextra -Wno-missing-field-initializers -static -s

BPF_SOURCES := $(wildcard bpf/*.c bpf/*.h)

.PHONY: help run test conformance check format build bench fuzz wheel image manifests lock clean cluster test-cluster setup-build setup-run setup-test setup-bench setup-cluster artifacts test-artifacts bench-artifacts

##@ Using it

run: setup-run artifacts ## start the example cluster (EXAMPLE=folder; ONCE=1 leaves after the check)
	@.venv/bin/lockgate up $(EXAMPLE) $(if $(ONCE),--once)

cluster: setup-cluster image ## the same on a real Kubernetes cluster, on this machine (EXAMPLE, ONCE)
	@$(PYTHON) -m cluster build >/dev/null
	@$(PYTHON) -m cluster run $(EXAMPLE) $(if $(ONCE),--once)

##@ Developing

test: setup-test $(if $(filter 0,$(CLUSTER)),,setup-cluster) artifacts test-artifacts ## install what is missing, build, run every test (PYTEST='-k name' for some; CLUSTER=0: none on a real cluster)
	@$(PYTHON) -m pytest tests/unit tests/bytecode tests/system $(if $(filter 0,$(CLUSTER)),,tests/cluster) $(PYTEST)

test-cluster: setup-test setup-cluster artifacts ## the tests on a real Kubernetes cluster alone
	@$(PYTHON) -m pytest tests/cluster $(PYTEST)

conformance: setup-cluster image ## Kubernetes' own tests of networking on a real cluster (FOCUS=regex)
	@$(PYTHON) -m cluster build >/dev/null
	@$(PYTHON) -m cluster conformance $(if $(FOCUS),--focus '$(FOCUS)')

check: setup-build ## formatting, lint, types, import contracts
	@$(PYTHON) -m ruff format --check . || { echo "make format puts this right."; exit 1; }
	@$(PYTHON) -m ruff check . || { echo "ruff check --fix puts some of this right."; exit 1; }
	@$(PYTHON) -m mypy
	@.venv/bin/lint-imports --no-logo 2>/dev/null || .venv/bin/lint-imports || { echo "docs/architecture.md, Rooms, says which way imports point."; exit 1; }

format: setup-build ## put formatting and import order right
	@$(PYTHON) -m ruff format .
	@$(PYTHON) -m ruff check --fix --select I .

build: setup-build artifacts ## build/*.bpf.o, build/lockgate-pod and build/lockgate-cni

bench: setup-bench artifacts bench-artifacts ## the figures (BENCH='net verdict' for some, BENCH=--help for all)
	@$(PYTHON) -m bench.run $(BENCH)

fuzz: setup-test artifacts ## compare the kernel with the specifications for SECONDS=n (SEED=s repeats a run; ONLY=policies or services)
	@$(PYTHON) -m tests.fuzz --seconds $(SECONDS_TO_FUZZ) $(if $(SEED),--seed $(SEED)) $(if $(ONLY),--only $(ONLY))

wheel: setup-build artifacts ## dist/*.whl, with the kernel programs inside
	@$(PYTHON) -m hatchling build -t wheel

image: setup-build artifacts ## dist/lockgate-image.tar, for `ctr -n k8s.io images import`
	@$(PYTHON) -m scripts.image

manifests: setup-build ## deploy/lockgate.yaml anew from the chart deploy/chart
	@{ echo "# Made by 'make manifests' from deploy/chart. Install: kubectl apply -f deploy/lockgate.yaml (docs/install.md)."; \
	   $(PYTHON) -m cluster.helm template lockgate deploy/chart --namespace kube-system --kube-version 1.30; } > deploy/lockgate.yaml.part
	@mv deploy/lockgate.yaml.part deploy/lockgate.yaml

lock: setup-build ## write requirements.lock anew from what .venv has
	@{ head -n 1 requirements.lock; $(PYTHON) -m pip freeze --exclude-editable; } > build/lock && mv build/lock requirements.lock

clean: ## remove everything that was built, the virtual environment too
	rm -rf build dist .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

help: ## this list
	@awk 'BEGIN { FS = ":.*## " } \
	  /^##@ / { printf "\n%s\n", substr($$0, 5) } \
	  /^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# ---- set-up: runs each time, does only what is missing --------------------------------

setup-build setup-run setup-test setup-bench setup-cluster: setup-%:
	@scripts/setup.sh $*

# ---- what is built (a second make, so that clang is looked for after set-up) ----------

artifacts:
	@$(MAKE) --no-print-directory -s build/lockgate.bpf.o build/lockgate-xdp.bpf.o build/lockgate-pod build/lockgate-cni

build/lockgate.bpf.o build/lockgate-xdp.bpf.o: build/%.o: bpf/%.c $(BPF_SOURCES) Makefile
	@mkdir -p build
	@echo "  building $@"
	@$(CLANG) $(BPF_CFLAGS) -c $< -o $@

build/lockgate-pod: runtime/pod.c $(wildcard runtime/*.h) Makefile
	@mkdir -p build
	@echo "  building $@"
	@$(CLANG) $(POD_CFLAGS) $< -o $@

build/lockgate-cni: cni/lockgate-cni.c Makefile
	@mkdir -p build
	@echo "  building $@"
	@$(CLANG) $(CNI_CFLAGS) $< -o $@

test-artifacts:
	@$(MAKE) --no-print-directory -s build/frame.bpf.o

build/frame.bpf.o: tests/bytecode/frame.bpf.c $(BPF_SOURCES) Makefile
	@mkdir -p build
	@echo "  building $@"
	@$(CLANG) $(BPF_CFLAGS) -c $< -o $@

bench-artifacts:
	@$(MAKE) --no-print-directory -s build/bench-rr build/verdict.bpf.o build/balancer.bpf.o build/firewall.bpf.o

build/verdict.bpf.o build/balancer.bpf.o build/firewall.bpf.o: build/%.o: bench/%.c $(BPF_SOURCES) Makefile
	@mkdir -p build
	@echo "  building $@"
	@$(CLANG) $(BPF_CFLAGS) -Wno-unused-function -c $< -o $@

build/bench-rr: bench/rr.c Makefile
	@mkdir -p build
	@echo "  building $@"
	@$(CLANG) -O2 -std=gnu11 -Wall -Wextra -static $< -o $@
