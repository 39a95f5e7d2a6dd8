# One command sets everything up and runs it: `make demo` or `make test`.
# Needs Python >= 3.10, a C++ compiler and a package index; the rest goes into ./.venv.

PYTHON ?= python3
# The exact torch to build and test against; several requirements may be given,
# for example: make TORCH="torch==2.11.0 triton==3.6.0 numpy==2.2.*" test
TORCH  ?= torch==2.13.0
# Extra arguments for demo, bench, accuracy, mutants, test and test-full: make demo ARGS="--help"
ARGS   ?=
# Set LINT= to run the tests without checking style and types first.
LINT   ?= lint
# OUT is the folder for the results and logs of `make gpu`. STAGES limits it to some of its stages, and
# BACKEND limits the smoke test, the sanitizers and the benchmarks to one backend. Empty means all of them,
# except that an empty BACKEND means cuda for `make gpu-quick`.
OUT     ?= bench/results
STAGES  ?=
BACKEND ?=

# Tests run in two processes; tests that share a slow fixture run in the same process.
PARALLEL := -n 2 --dist loadgroup
VENV := .venv
PY   := $(VENV)/bin/python
PIP  := $(PY) -m pip install --quiet --disable-pip-version-check
CPP  := $(wildcard csrc/*.cpp $(foreach kind,cpp h inc cu cuh,csrc/*/*.$(kind)))
ON_GPU := PY="$(PY)" OUT="$(OUT)"
LINTED := $(CPP) tests/guard.cpp $(wildcard tests/backends/*/*.cpp tests/backends/*/*.cu tests/cuda_emulator/*.h tests/cuda_emulator/*.cpp tests/cuda_emulator/*.cu)

# Each stamp file records that a step of the set-up is done. The torch stamp carries the requirement in its
# name, so another TORCH= installs that torch and rebuilds what was compiled against the old one.
TORCH_STAMP := $(VENV)/.torch-$(shell printf %s '$(TORCH)' | tr -c 'A-Za-z0-9.+' '-')
DEPS_STAMP  := $(VENV)/.deps
EXT_STAMP   := $(VENV)/.ext
BENCH_STAMP := $(VENV)/.bench
DOCS_STAMP  := $(VENV)/.docs

.DEFAULT_GOAL := help
.PHONY: help install demo demo-transformer test test-full mutants lint format wheel bench guard accuracy gpu gpu-quick tables docs clean distclean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*  ## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

install: $(EXT_STAMP)  ## set up .venv, the dependencies and the C++ extension

demo: install  ## train on real data under six penalties and make a network smaller, in under 3 minutes
	$(PY) -m examples.demo $(ARGS)

demo-transformer: install  ## train a small transformer whose heads and hidden units die, and make it smaller
	$(PY) -m examples.transformer $(ARGS)

test: install $(LINT)  ## lint, then the tests that see a break within minutes
	$(PY) -m pytest $(PARALLEL) -m "not full" $(ARGS)

test-full: install  ## every test: products of options, sanitizers, all architectures, whole flows
	$(PY) -m pytest $(PARALLEL) $(ARGS)

mutants: install  ## break the code line by line and see which tests notice; resumes where it was stopped
	$(PY) tests/mutants/run.py $(ARGS)

lint: $(DEPS_STAMP)  ## check style, formatting and types, change nothing
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(LINTED)

format: $(DEPS_STAMP)  ## apply the formatters
	$(PY) -m ruff check --fix-only .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(LINTED)

# The wheel is built from the sdist, so that a file missing in the sdist makes the build fail. With PY=... it
# uses that Python and installs nothing.
wheel: $(if $(filter $(VENV)/%,$(PY)),$(DEPS_STAMP))  ## build a wheel, for this torch, and the sdist into dist/
	PATH="$(abspath $(VENV))/bin:$$PATH" $(PY) -m build --no-isolation --outdir dist .

bench: install $(BENCH_STAMP)  ## measure against other optimizers on the CPU, in 10 minutes
	$(PY) -m bench.run $(ARGS)

accuracy: install  ## repeat the thesis's experiments, in some minutes, and write docs/claims.md
	$(PY) -m examples.thesis all --out examples/thesis/results $(ARGS)

guard: install  ## count the CPU executor's instructions with valgrind, against budgets
	$(PY) tests/guard.py

# `make gpu PY=python3` takes that python as it is, with its torch and triton, and installs nothing.
gpu: $(if $(filter $(VENV)/%,$(PY)),install)  ## build, test, sanitize and measure on an NVIDIA GPU
	$(ON_GPU) STAGES="$(STAGES)" BACKEND="$(BACKEND)" ARGS="$(ARGS)" bash tests/gpu.sh

# For a GPU that is available for a few minutes only: it builds for that GPU alone.
gpu-quick: $(if $(filter $(VENV)/%,$(PY)),$(DEPS_STAMP))  ## on an NVIDIA GPU, build for it and measure what matters most
	$(ON_GPU) STAGES="quick-build quick-smoke quick-bench" BACKEND="$(or $(BACKEND),cuda)" bash tests/gpu.sh

docs: $(DOCS_STAMP)  ## build the site into build/site; a dead link or an undocumented public name fails
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build

tables: $(DEPS_STAMP)  ## write the tables of README.md and docs/speed.md from bench/results
	$(PY) -m bench.pages

clean:  ## remove what was built, keep .venv
	rm -rf build dist *.egg-info cges_kernels/backends/_C*.so .pytest_cache .ruff_cache .mypy_cache .hypothesis $(EXT_STAMP)

distclean: clean  ## remove .venv as well
	rm -rf $(VENV)

$(PY):
	$(PYTHON) -m venv $(VENV)

# torch comes first and pinned: left to the resolver it could be any version.
$(TORCH_STAMP): | $(PY)
	@echo "installing $(TORCH) into $(VENV)"
	$(PIP) $(TORCH)
	rm -rf build cges_kernels/backends/_C*.so $(VENV)/.torch-*
	@touch $@

# An editable install without the extension; pip would compile it afresh each time.
$(DEPS_STAMP): pyproject.toml $(TORCH_STAMP)
	@echo "installing the dependencies into $(VENV)"
	$(PIP) "setuptools>=77" wheel
	CGES_EXT=0 $(PIP) --no-build-isolation $(TORCH) -e ".[examples,triton,test,trainers,zoo,dev]"
	@touch $@

# The extra `bench` adds only torchao to what is installed already. --no-deps keeps it from replacing torch.
$(BENCH_STAMP): $(DEPS_STAMP)
	$(PIP) --no-deps torchao
	@touch $@

$(DOCS_STAMP): $(DEPS_STAMP)
	CGES_EXT=0 $(PIP) --no-build-isolation $(TORCH) -e ".[docs]"
	@touch $@

# Incremental: ninja compiles only what changed. Without a compiler, setup.py says so and goes on,
# and nothing is stamped: the next run looks again.
$(EXT_STAMP): setup.py $(CPP) $(DEPS_STAMP)
	PATH="$(abspath $(VENV))/bin:$$PATH" $(PY) setup.py --quiet build_ext --inplace
	@! ls cges_kernels/backends/_C*.so >/dev/null 2>&1 || touch $@
