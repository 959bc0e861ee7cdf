# A fresh clone needs Python 3.11 or newer, make and a C++ compiler; everything else is installed into .venv.
# Another interpreter: make demo PYTHON=/path/to/python3.12
SHELL := /bin/bash

VENV := .venv
BIN := $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --constraint constraints.txt
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	"$$p" -c "$(NEW_ENOUGH)" 2>/dev/null && { echo "$$p"; break; }; done)
SAY_WHAT_IS_MISSING = $(BIN)/python -c "import cfengine._C" 2>/dev/null \
	|| echo "note: the compiled kernels were not built, so everything runs slower; .venv/bin/cfengine doctor says why"
BUILT_FROM := setup.py pyproject.toml CMakeLists.txt constraints.txt $(wildcard csrc/*.* csrc/*/* csrc/client/include/* kernels/*/*.h kernels/*/*.c*)

.PHONY: help demo test test-hosts test-all replay lint clean

help:
	@echo "make demo      install into .venv, turn a prompt into out.mp4"
	@echo "make test      install the test extra, run the tests, replay the recorded traces"
	@echo "make test-all  the same with the slow tests"
	@echo "make test-hosts  test the sample programs in C and C#, and the client for Windows; needs packages of the system, see .ci/run"
	@echo "make replay    replay the recorded traces with every implementation present"
	@echo "make lint      check the style of the sources"
	@echo "make clean     remove build output; .venv stays"

demo: $(VENV)/.installed
	$(BIN)/cfengine generate "pan right over a meadow, clear day" --seconds 8 --output out.mp4

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m "(cpu and not slow or embed) and not hosts and not gpu"
	$(MAKE) --no-print-directory replay

test-hosts: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m hosts

test-all: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m "(cpu or embed) and not hosts"
	$(MAKE) --no-print-directory replay

replay: $(VENV)/.installed
	@set -e; for name in $$($(BIN)/python -c "from cfengine import ops; print(*ops.implementations())"); do \
		echo "replay tests/data with implementation $$name"; \
		$(BIN)/python -m cfengine.testing.replay tests/data --impl $$name > $(VENV)/replay.log \
			|| { cat $(VENV)/replay.log; exit 1; }; \
		head -n 1 $(VENV)/replay.log; tail -n 1 $(VENV)/replay.log; \
	done

lint: $(BIN)/ruff
	$(BIN)/ruff check .

$(BIN)/ruff: constraints.txt | $(BIN)/python
	$(INSTALL) ruff
	@touch $@

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer was found; install one, or name it: make PYTHON=..."; exit 1; }
	@"$(PYTHON)" -c "$(NEW_ENOUGH)" || { echo "$(PYTHON) is older than 3.11; name another: make PYTHON=..."; exit 1; }
	"$(PYTHON)" -m venv $(VENV) || { rm -rf $(VENV); \
		echo "venv failed; on Debian and Ubuntu: apt install python3-venv"; exit 1; }

$(VENV)/.installed: $(BUILT_FROM) | $(BIN)/python
	$(INSTALL) --editable .
	@$(SAY_WHAT_IS_MISSING)
	@touch $@

$(VENV)/.installed-test: $(BUILT_FROM) | $(BIN)/python
	$(INSTALL) --editable ".[test]"
	@$(SAY_WHAT_IS_MISSING)
	@touch $@ $(VENV)/.installed

clean:
	rm -rf build/bdist.* build/lib.* build/temp.* dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis cfengine/_C.*.so
	rm -f $(VENV)/.installed $(VENV)/.installed-test
	find cfengine kernels export bench tests -name __pycache__ -type d -prune -exec rm -rf {} +
