# make lab     open the notebooks in JupyterLab          make test       every test: unit, oracle, notebook, browser
# make quick   the tests that take seconds               make check-all  also the long ones, re-scoring and benchmarks
# make lint    ruff and types                            make env        only build or update .venv
# make clean   remove .venv and caches
#
# All that is needed is make and Python 3.11+ with venv and pip. Settings, given after the target:
#   PYTHON=/path/to/python  which Python .venv is made from (default: the first of python3, python3.13, ... that will do)
#   TORCH="torch --index-url https://..."  which PyTorch build a new .venv gets; an existing one is kept, so `make clean`
#                           first to change it. The default is one fixed release, from the index pip is configured for.
#   ARGS="--no-browser"     passed on to `workbench lab` or to pytest

PYTHON ?=
TORCH ?= torch==2.13.0
ARGS ?=
# The implementation that tests compare V4.1 with; what it asks for beside itself is not needed and is left out.
ORACLE := nemo-automodel==0.7.0

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# What an installation was made for; kept in its stamp. A changed pyproject.toml or a moved checkout installs again.
STATE = $(CURDIR) $(shell cksum < pyproject.toml)

.PHONY: help lab test quick lint check-all env env-test clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

lab: env
	@$(BIN)/python -m workbench lab $(ARGS)

test: env-test
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

quick: env-test
	$(BIN)/python -m pytest -m "not (oracle or notebook or browser or slow)" $(ARGS)

lint: env-test
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

check-all: lint
	$(BIN)/python -m pytest $(ARGS)
	$(BIN)/python -m workbench bench --all

env:
	@$(call install,runtime,.[sweep])

env-test: env
	@$(call install,test,.[test])
	@$(call install,oracle,,--no-deps $(ORACLE))

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Install $(3), or else this checkout as $(2), unless the stamp .venv/$(1).stamp says so already. The stamp is removed first and
# written last: a half-finished installation is never taken for a finished one.
define install
	set -e; \
	if [ "$$(cat .venv/$(1).stamp 2>/dev/null)" != "$(STATE) $(3)" ]; then \
	    rm -f .venv/$(1).stamp; \
	    $(make_venv); \
	    $(PIP) show --quiet torch 2>/dev/null || $(PIP) install $(TORCH); \
	    $(PIP) install $(if $(3),$(3),-e "$(2)"); \
	    echo "$(STATE) $(3)" > .venv/$(1).stamp; \
	fi
endef

# Make .venv, or make it anew when it has no working pip, from the first Python that is new enough and has venv.
define make_venv
	if ! $(PIP) --version >/dev/null 2>&1; then \
	    for python in $(if $(PYTHON),"$(PYTHON)",python3 python3.13 python3.12 python3.11) ""; do \
	        "$$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break; \
	    done; \
	    if [ -z "$$python" ] ; then \
	        echo "workbench needs Python 3.11 or newer with venv ($(or $(PYTHON),python3) is not): on Debian apt-get install" \
	            "python3 python3-venv, or give one with make PYTHON=/path/to/python" >&2; \
	        exit 1; \
	    fi; \
	    "$$python" -m venv --clear .venv; \
	fi
endef
