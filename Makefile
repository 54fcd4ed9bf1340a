# `make demo` and `make test` need nothing but Python >= 3.12: they make .venv, install into it once, and run.

VENV ?= .venv
CONSTRAINTS ?= constraints.txt
EXTRAS ?= dev
PYTEST ?=

PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed-$(notdir $(CONSTRAINTS))
export XDG_CACHE_HOME ?= $(CURDIR)/.cache

.PHONY: demo test lint types h200 compile-h200 peers clean

demo: $(INSTALLED)
	$(PY) -m jaxinfer.demo

test: $(INSTALLED)
	$(PY) -m pytest -n auto --maxprocesses 4 --dist loadfile $(PYTEST)

lint: $(INSTALLED)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(INSTALLED)
	$(PY) -m mypy

# Compiles the GPU kernels for an H200 on a machine without one, in an environment of its own.
h200:
	$(MAKE) compile-h200 VENV=.venv-h200 EXTRAS=h200

compile-h200: $(INSTALLED)
	$(PY) -m pallas_kernels._h200

# The environment of `python -m bench peers`: torch and transformers, nothing of ours.
peers: $(INSTALLED)
	test -x .venv-peers/bin/python || $(PY) -m venv .venv-peers
	.venv-peers/bin/pip install --quiet torch transformers
	$(PY) -m bench peers

$(INSTALLED): pyproject.toml $(CONSTRAINTS) find-python.sh
	@python=$$(sh find-python.sh) || exit 1; \
	test -x $(PY) || "$$python" -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) --editable '.[$(EXTRAS)]'
	@touch $@

clean:
	rm -rf .venv .venv-newest .venv-h200 .cache build *.egg-info
