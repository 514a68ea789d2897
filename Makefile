# `make` alone lists the targets. Everything is installed into .venv and nothing outside this folder is touched.

PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11,$(shell $(p) -c 'import sys; print("$(p)" if sys.version_info >= (3, 11) else "")' 2>/dev/null)) python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
AUDIT := .audit

.DEFAULT_GOAL := help
.PHONY: help install quickstart test slow docs audit ui schema clean

help: ## list the targets
	@echo "raydistill: make TARGET"
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 14
	@echo "Start with: make quickstart"

install: $(STAMP) ## make .venv and install the pinned versions (once; again when pyproject.toml or constraints.txt change)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "error: Python 3.11 or newer is needed; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || true)." >&2; \
	  echo "Install one, or name it: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "error: $(PYTHON) cannot make virtual environments (on Debian and Ubuntu: apt install python3-venv)." >&2; exit 1; }
	@echo "[install] $$($(PYTHON) --version): making $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@echo "[install] installing the versions of constraints.txt: a few minutes, longer where torch must be downloaded"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev,docs]'
	@touch $(STAMP)
	@echo "[install] done"

quickstart: $(STAMP) ## install, train the demo's teacher, and sweep its students (the main job, on the embedded demo)
	@echo "[1/2] training the demo's teacher: python -m raydistill.train demo"
	@$(BIN)/python -m raydistill.train demo
	@echo "[2/2] the sweep: python -m raydistill.sweep search_spaces/quickstart.yaml"
	@$(BIN)/python -m raydistill.sweep search_spaces/quickstart.yaml

test: $(STAMP) docs ## install, then ruff, mypy, the documentation and the tests that need no GPU, root or browser
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m pytest

slow: $(STAMP) ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

docs: $(STAMP) ## check the documents and build the documentation site strictly into build/site
	@$(BIN)/python -m docs_build
	@$(BIN)/zensical build --strict --clean
	@echo "build/site/index.html"

# pip-audit has a venv of its own. Without its advisories it would find nothing and say so: hence the question first,
# for a page that every package has, and --strict, by which a package that was not looked up is an error.
audit: ## look the pinned versions up in PyPI's advisories (pip-audit); says so where they cannot be reached
	@if ! $(PYTHON) -c 'import urllib.request as r; r.urlopen("https://pypi.org/pypi/pip/25.0/json", timeout=10)' 2>/dev/null; then \
	  echo "audit: NOT DONE, the advisories of pypi.org cannot be reached from here"; \
	else \
	  { test -x $(AUDIT)/bin/pip-audit || { $(PYTHON) -m venv $(AUDIT) && \
	    $(AUDIT)/bin/python -m pip install -qq --disable-pip-version-check pip-audit==2.10.1; }; } && \
	  $(AUDIT)/bin/pip-audit --strict --no-deps --disable-pip --progress-spinner off -r constraints.txt; \
	fi

ui: $(STAMP) ## the MLflow UI of the local store, on http://127.0.0.1:5000
	@command=$$($(BIN)/python -c 'from raydistill.tracking.mlflow_store import ui_command; print(ui_command())') && \
	  echo "$$command" && exec $(BIN)/$$command

schema: $(STAMP) ## write search_spaces/schema.json, which editors check space files with
	@$(BIN)/python -m raydistill.config.schema > search_spaces/.schema.tmp
	@mv search_spaces/.schema.tmp search_spaces/schema.json
	@echo "search_spaces/schema.json"

clean: ## delete .venv, builds and caches; outputs/ stays
	rm -rf $(VENV) $(AUDIT) build dist .cache docs/reference/*.md docs/reference/*.svg *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find raydistill tests -name __pycache__ -type d -prune -exec rm -rf {} +
