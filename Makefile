# Works on a machine with Python 3.11 or later and nothing else: what is needed goes into .venv,
# once, at the versions in constraints.txt.

PYTHON ?= python3
# More arguments for pip: a mirror, or on Linux without a GPU the small build of torch,
#   make test PIP_ARGS='--extra-index-url https://download.pytorch.org/whl/cpu'
PIP_ARGS ?=
# Work is stolen, not dealt: what the tests of a file share is then made by one worker, mostly.
PYTEST_ARGS ?= -n 2 --dist worksteal
BENCH_ARGS ?=
ADDRESS ?=
SECONDS ?= 600
SEED ?= 0

PY := .venv/bin/python
PIP := $(PY) -m pip install --quiet --constraint constraints.txt $(PIP_ARGS)
INSTALLED := .venv/.installed
TYPED := fusedaccum benchmarks examples
# pip would say of an older Python only that versions are in conflict.
NEW_ENOUGH := $(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("make needs Python 3.11 or later, for the versions in constraints.txt; name one: make PYTHON=python3.12 ...")'

.PHONY: help demo test fuzz deepspeed check docs gallery bench gpu wheel-test release-check clean
.DEFAULT_GOAL := help

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 22

$(INSTALLED): pyproject.toml constraints.txt
	@$(NEW_ENOUGH)
	$(PYTHON) -m venv .venv
	$(PIP) setuptools
	$(PIP) --no-build-isolation --editable '.[dev]'
	@touch $@

# What one command needs, without linters, tests and frameworks, unless they are there already.
.venv/.demo .venv/.docs .venv/.release: .venv/.%: pyproject.toml constraints.txt
	@$(NEW_ENOUGH)
	$(PYTHON) -m venv .venv
	$(PIP) setuptools
	$(PIP) --no-build-isolation --editable '.[$*]'
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

# The site takes seconds, but its packages are no part of `make test`: only who has them builds it here.
check: $(INSTALLED) $(if $(wildcard .venv/.docs),docs)  ## lint, format and types; the site, once `make docs` has run
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy $(TYPED)

# The variable keeps a notice of the theme's makers, about its end, out of the output.
docs: .venv/.docs  ## the documentation site, in site/; a broken link or a missing name is an error
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet
	@echo 'open site/index.html (its search needs: python -m http.server -d site)'

gallery: $(INSTALLED)  ## run all examples, some minutes, and write what they print and draw to docs/gallery.md
	$(PY) -m tests.gallery

bench: $(INSTALLED)  ## the benchmark rows that this machine's CPU can measure
	$(PY) -m benchmarks.run $(BENCH_ARGS)

# Takes the machine as it is (its own torch, Triton and pytest): no network, nothing installed.
gpu:  ## on a GPU machine: GPU tests, demo and benchmarks (PART=check, rows, train or choices: a part of it)
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

# Both are built from a copy of what git has, so that nothing else lying here can help them. PyPI needs
# the repository's address: make release-check ADDRESS=https://github.com/OWNER/NAME
release-check: .venv/.release  ## sdist and wheel in dist/, as a release uploads them, and checked
	@set -e; tmp=$$(mktemp -d); trap 'rm -rf "$$tmp"' EXIT; set -x; \
	git archive HEAD | tar -x -C "$$tmp"; rm -rf dist; \
	test -z '$(ADDRESS)' || $(PY) docs/address.py '$(ADDRESS)' "$$tmp"; \
	$(PY) -m build --no-isolation --outdir dist "$$tmp"
	$(PY) -m twine check --strict dist/*

clean:  ## remove what these commands made, .venv included; benchmark results stay
	rm -rf .venv .venv-deepspeed site build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis out
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
