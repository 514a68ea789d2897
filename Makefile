# `make` without a target lists the targets. Everything is installed into .venv, nothing outside of this folder.

PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11,$(shell $(p) -c 'import sys; print("$(p)" if sys.version_info >= (3, 11) else "")' 2>/dev/null)) python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
AUDIT := .audit

# Without bytecode files, each of the many processes of a sweep or of the tests compiles the package again: 1 s of CPU.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install quickstart test slow docs audit ui schema clean

help: ## list the targets
	@echo "raydistill: make TARGET"
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 14
	@echo "Start with: make quickstart"

install: $(STAMP) ## create .venv with the pinned versions; repeated if pyproject.toml or constraints.txt changes

# pip compiles the 25,000 modules one after the other; compileall uses all cores. Its status is 1 because some packages
# contain templates that are no valid Python.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "error: Python 3.11 or newer is needed; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || true)." >&2; \
	  echo "Install one, or name it: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "error: $(PYTHON) cannot make virtual environments (on Debian and Ubuntu: apt install python3-venv)." >&2; exit 1; }
	@echo "[install] $$($(PYTHON) --version): creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@echo "[install] installing the versions of constraints.txt: a few minutes, longer if torch must be downloaded"
	@$(BIN)/python -m pip install -qq --no-compile --disable-pip-version-check -c constraints.txt -e '.[dev,docs]'
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
	@touch $(STAMP)
	@echo "[install] done"

quickstart: $(STAMP) ## install, train the demo's teacher, and run the demo's sweep
	@echo "[1/2] training the demo's teacher: python -m raydistill.train demo"
	@$(BIN)/python -m raydistill.train demo
	@echo "[2/2] running the sweep: python -m raydistill.sweep search_spaces/quickstart.yaml"
	@$(BIN)/python -m raydistill.sweep search_spaces/quickstart.yaml

test: $(STAMP) docs ## install, then run ruff, mypy, the documentation checks and the tests without GPU, root or browser
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy --num-workers 2
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

slow: $(STAMP) ## run the tests that take minutes
	$(BIN)/python -m pytest -m slow

docs: $(STAMP) ## check the documents and build the documentation site strictly into build/site
	@$(BIN)/python -m docs_build
	@$(BIN)/zensical build --strict --clean
	@echo "build/site/index.html"

# pip-audit has a separate venv. Without access to the advisories it would report no vulnerabilities. Therefore the
# connection is checked first, and --strict makes a package that could not be looked up an error.
audit: ## check the pinned versions for known vulnerabilities (pip-audit); needs access to pypi.org
	@if ! $(PYTHON) -c 'import urllib.request as r; r.urlopen("https://pypi.org/pypi/pip/25.0/json", timeout=10)' 2>/dev/null; then \
	  echo "audit: NOT DONE, the advisories of pypi.org cannot be reached from here"; \
	else \
	  { test -x $(AUDIT)/bin/pip-audit || { $(PYTHON) -m venv $(AUDIT) && \
	    $(AUDIT)/bin/python -m pip install -qq --disable-pip-version-check pip-audit==2.10.1; }; } && \
	  $(AUDIT)/bin/pip-audit --strict --no-deps --disable-pip --progress-spinner off -r constraints.txt; \
	fi

ui: $(STAMP) ## start the MLflow UI of the local store on http://127.0.0.1:5000
	@command=$$($(BIN)/python -c 'from raydistill.tracking.mlflow_store import ui_command; print(ui_command())') && \
	  echo "$$command" && exec $(BIN)/$$command

schema: $(STAMP) ## write schema.json and run_schema.json in search_spaces/, with which editors check space and run files
	@$(BIN)/python -m raydistill.config.schema > search_spaces/.schema.tmp
	@mv search_spaces/.schema.tmp search_spaces/schema.json
	@$(BIN)/python -m raydistill.config.schema run > search_spaces/.schema.tmp
	@mv search_spaces/.schema.tmp search_spaces/run_schema.json
	@echo "search_spaces/schema.json search_spaces/run_schema.json"

clean: ## delete .venv, builds and caches, but not outputs/
	rm -rf $(VENV) $(AUDIT) build dist .cache docs/reference/*.md docs/reference/*.svg *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find raydistill tests -name __pycache__ -type d -prune -exec rm -rf {} +
