# Everything here works from a fresh clone, on a machine with make, a C++ compiler, and Python 3.10
# or newer with its headers:
#
#   make run        generate with the stock cache and with ours, and compare; MODEL=path-or-hub-name
#                   takes another model than the one in examples/
#   make test       all tests; those that need a GPU are skipped, and counted, where there is none
#   make test-transformers  the tests of the transformers integration, with older versions of it
#   make test-families  small models of all families of transformers, enabled; minutes
#   make test-gpu   the tests that need a GPU; fails where there is none
#   make bench      the benchmarks
#   make check      formatting, lint and types
#   make format     apply the formatting
#   make wheel      build dist/*.whl and import it from outside the checkout
#   make clean      remove builds and caches; `make distclean` removes the environment too
#
# Which Python is used:
#
#   - By default a virtual environment in .venv, with the versions of constraints.txt and an
#     editable install of the project. Later calls install again only when something has changed.
#   - The same, where there is an NVIDIA GPU and the system's Python has a CUDA build of torch: then
#     .venv sees the system's packages, and that torch is used instead of another being fetched.
#   - `make test-gpu PYTHON=python3 VENV=` (an empty VENV) takes that interpreter as it is: only the
#     project is installed and nothing is fetched. It must have torch, and what pyproject.toml lists
#     under `dev` as far as the target uses it.
#
# pip's own settings apply. PIP_EXTRA_INDEX_URL, for one, can name an index of CPU-only builds of
# torch, which are smaller than the default ones by gigabytes. PYTEST_ARGS is passed to pytest,
# BENCH_ARGS to `python -m bench`.
# WERROR=OFF is for a compiler that warns where the ones in use here do not.

PYTHON ?= python3
VENV ?= .venv
WERROR ?= ON
TRANSFORMERS ?= 5.17.0 5.20.2
MODEL ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1
export PIP_RETRIES ?= 10

# $(PY) runs Python; $(DEPS) and $(INSTALLED) are stamps: the dependencies, the project itself.
ifeq ($(strip $(VENV)),)
PY := $(PYTHON)
BIN :=
DEPS :=
INSTALLED := build/installed-$(subst /,_,$(PYTHON))
PY_ABS := $(PYTHON)
else
PY := $(VENV)/bin/python
BIN := $(VENV)/bin/
DEPS := $(VENV)/.deps
INSTALLED := $(VENV)/.installed
PY_ABS := $(abspath $(PY))
endif

PYTHON_IS_NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 10) and "Python < 3.10")
HAS_CUDA_TORCH := import sys, torch; sys.exit(not torch.cuda.is_available())
CXX_SOURCES := $(shell find csrc -name '*.h' -o -name '*.cpp')
# Python modules are read in place: a change to one, or a new one, needs no new install.
PROJECT_SOURCES := $(CXX_SOURCES) CMakeLists.txt pyproject.toml

.PHONY: help run test test-gpu test-transformers test-families bench check format wheel clean distclean deps install
.DELETE_ON_ERROR:

help:
	@sed -n '4,16s/^#   //p' Makefile

run: $(INSTALLED)
	$(PY) examples/generate.py $(if $(MODEL),--model "$(MODEL)")

test: $(INSTALLED)
	$(PY) -m pytest $(PYTEST_ARGS)

test-gpu: $(INSTALLED)
	$(PY) -m pytest -m gpu --require-gpu $(PYTEST_ARGS)

# `make test` has the version of constraints.txt, the newest that is served.
test-transformers: $(INSTALLED) $(TRANSFORMERS:%=build/transformers-%)
	for version in $(TRANSFORMERS); do \
	  PYTHONPATH=$(CURDIR)/build/transformers-$$version $(PY) -m pytest \
	    tests/test_transformers_*.py tests/enable $(PYTEST_ARGS) || exit 1; \
	done

build/transformers-%: $(DEPS)
	@mkdir -p build
	$(PY) -m pip install -q --no-deps --no-compile --upgrade --target $@ transformers==$*
	@touch $@

test-families: $(INSTALLED)
	PYTHONPATH=tests $(PY) tests/enable/families.py

bench: $(INSTALLED)
	$(PY) -m bench $(BENCH_ARGS)

check: $(DEPS)
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(BIN)clang-format --dry-run -Werror $(CXX_SOURCES)
	$(PY) -m mypy

format: $(DEPS)
	$(PY) -m ruff check --select I --fix .
	$(PY) -m ruff format .
	$(BIN)clang-format -i $(CXX_SOURCES)

# The wheel is imported without the site module, hence without the editable install's import hook.
wheel: $(DEPS)
	$(PY) -m pip wheel -q --no-build-isolation --no-deps \
	  -C cmake.define.VATTENTION_WERROR=$(WERROR) -w dist .
	@rm -rf build/wheel && mkdir -p build/wheel
	$(PY) -m pip install -q --no-deps --no-index --find-links dist --target build/wheel vattention
	@cd build/wheel && \
	  PYTHONPATH="$$($(PY_ABS) -c 'import sys; print(*sys.path[1:], sep=":")')" \
	  $(PY_ABS) -S -c 'import vattention, vattention._core as c; print("imported", c.__file__)'

clean:
	rm -rf build dist out .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv

deps: $(DEPS)
install: $(INSTALLED)

# Whether the system's torch can be used is asked of the new environment, not of $(PYTHON): where
# that is itself in a virtual environment, its packages are not the ones that would be seen.
$(VENV)/.created:
	@echo "Making a Python environment in $(VENV)"
	@$(PYTHON) -c '$(PYTHON_IS_NEW_ENOUGH)'
	@if nvidia-smi -L >/dev/null 2>&1 && $(PYTHON) -m venv --clear --system-site-packages $(VENV) \
	    && $(VENV)/bin/python -c '$(HAS_CUDA_TORCH)' 2>/dev/null; then \
	  echo "Using the CUDA build of torch that is installed"; \
	else \
	  $(PYTHON) -m venv --clear $(VENV); \
	fi
	@touch $@

# constraints.txt is installed whole and in one call, and every other call has --no-deps, so that
# none can fetch another torch. Where the system's torch is used, its pin is left out: nothing else
# in the list depends on torch.
$(VENV)/.deps: constraints.txt $(VENV)/.created
	@echo "Installing the versions of constraints.txt (a minute or two)"
	@if grep -q 'include-system-site-packages = true' $(VENV)/pyvenv.cfg; \
	  then grep -v '^torch==' constraints.txt; else cat constraints.txt; fi >$(VENV)/pins.txt
	$(PY) -m pip install $(if $(CI),-q) -r $(VENV)/pins.txt
	@touch $@

$(INSTALLED): $(DEPS) $(PROJECT_SOURCES)
	@echo "Building the extension"
	$(PY) -m pip install -q --no-build-isolation --no-deps \
	  -C cmake.define.VATTENTION_WERROR=$(WERROR) --editable .
	@mkdir -p $(@D)
	@touch $@
