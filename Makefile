# Works on a machine with Python 3.10 or later and nothing else: what is needed goes into .venv,
# once, at the versions in constraints.txt.

PYTHON ?= python3
# More arguments for pip: a mirror, or on Linux without a GPU the small build of torch,
#   make test PIP_ARGS='--extra-index-url https://download.pytorch.org/whl/cpu'
PIP_ARGS ?=
# Work is stolen, not dealt: what the tests of a file share is then made by one worker, mostly.
PYTEST_ARGS ?= -n 2 --dist worksteal
BENCH_ARGS ?=
SECONDS ?= 600
SEED ?= 0

PY := .venv/bin/python
PIP := $(PY) -m pip install --quiet --constraint constraints.txt $(PIP_ARGS)
INSTALLED := .venv/.installed
TYPED := fusedaccum benchmarks examples

.PHONY: help demo test fuzz deepspeed check bench gpu wheel-test clean
.DEFAULT_GOAL := help

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) setuptools
	$(PIP) --no-build-isolation --editable '.[dev]'
	@touch $@

# Without linters, tests and frameworks, unless they are there already.
.venv/.demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) setuptools
	$(PIP) --no-build-isolation --editable '.[demo]'
	@touch $@

demo: $(or $(wildcard $(INSTALLED)),.venv/.demo)  ## fine-tune a small model with and without fusedaccum
	$(PY) examples/finetune.py

test: $(INSTALLED)  ## all tests; those that need a GPU skip themselves where there is none
	$(PY) -m pytest -q $(PYTEST_ARGS)

# Each kind of failure is printed once, as a script that does the same again.
fuzz: $(INSTALLED)  ## random walks over the public API for SECONDS=600, beginning at SEED=0
	$(PY) -m tests.walk --seconds $(SECONDS) --seed $(SEED)

# Its packages lie beside those of .venv, which a .pth file adds; and without dependencies: pip would
# look for torch. DS_BUILD_OPS=0: nothing is compiled.
.venv-deepspeed/.installed: $(INSTALLED) tests/deepspeed.txt
	$(PYTHON) -m venv --clear --without-pip .venv-deepspeed
	$(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
	  "$$(.venv-deepspeed/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/main.pth"
	DS_BUILD_OPS=0 $(PY) -m pip --python .venv-deepspeed/bin/python install --quiet $(PIP_ARGS) \
	  --no-deps --no-build-isolation --requirement tests/deepspeed.txt
	@touch $@

deepspeed: .venv-deepspeed/.installed  ## tests beside the real DeepSpeed, in an environment of its own
	.venv-deepspeed/bin/python -m pytest -q tests/with_deepspeed.py

check: $(INSTALLED)  ## lint, format and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy $(TYPED)

bench: $(INSTALLED)  ## the benchmark rows that this machine's CPU can measure
	$(PY) -m benchmarks.run $(BENCH_ARGS)

# Takes the machine as it is (its own torch, Triton and pytest): no network, nothing installed.
gpu:  ## on a GPU machine: GPU tests, demo and benchmarks (PART=check, rows or train: a third of it)
	PYTHONPATH=. $(PYTHON) -m benchmarks.gpu

# torch comes from .venv, by a path that a .pth file adds: the editable install stays unseen.
wheel-test: $(INSTALLED)  ## build the wheel, install it elsewhere, use it there
	@set -e; tmp=$$(mktemp -d); trap 'rm -rf "$$tmp"' EXIT; set -x; \
	$(PY) -m build --no-isolation --outdir "$$tmp/dist" .; \
	$(PYTHON) -m venv "$$tmp/venv"; \
	"$$tmp/venv/bin/python" -m pip install --quiet --no-deps "$$tmp"/dist/*.whl; \
	site=$$("$$tmp/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	$(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$$site/torch.pth"; \
	cd "$$tmp"; venv/bin/python "$(CURDIR)/tests/wheel_check.py" "$$site"

clean:  ## remove what these commands made, .venv included; benchmark results stay
	rm -rf .venv .venv-deepspeed build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis out
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
