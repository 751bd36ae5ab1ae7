# Everything a newcomer types. Each target makes .venv first, from requirements.lock, where it is not there yet.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.complete
OUTPUT ?= demo-output

# Where known vulnerabilities are asked for, and by what: a tool of its own, which nothing here imports.
AUDIT_SERVICE := api.osv.dev
AUDIT := pip-audit==2.10.0

PROOFS := size_conditioning crop_conditioning aspect_buckets refiner_range vae_batch

.PHONY: venv demo test check audit ui bench proofs lock clean

venv: $(STAMP)  ## the environment alone

demo: $(STAMP)  ## the whole pipeline on rendered pictures; ARGS="preset=gpu" for one GPU
	$(BIN)/python -m jobs.demo jobs/configs/demo.toml output=$(OUTPUT) $(ARGS)

test: $(STAMP)  ## the test suite, in two processes: the whole system on one Ray cluster, and all else
	$(BIN)/python -m pytest --numprocesses 2 --dist loadscope --no-loadscope-reorder $(ARGS)

check: $(STAMP)  ## lint, format, types; known vulnerabilities are told and do not fail it
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy model pipelines jobs
	@$(MAKE) --no-print-directory audit || echo "audit: see above; make audit fails on it, make check does not"

audit: $(STAMP)  ## known vulnerabilities of the locked packages; says so where the service does not answer
	@if $(BIN)/python -c 'import socket; socket.create_connection(("$(AUDIT_SERVICE)", 443), 20)' 2> /dev/null; then \
	  $(BIN)/uv tool run --quiet $(AUDIT) --vulnerability-service osv --disable-pip --require-hashes --requirement requirements.lock; \
	else echo "audit: $(AUDIT_SERVICE) does not answer: nothing was audited"; fi

ui: $(STAMP)  ## the MLflow page on the demo's runs
	$(BIN)/python -m mlflow ui --backend-store-uri sqlite:///$(abspath $(OUTPUT))/mlflow.db --port 5000

bench: $(STAMP)  ## the benchmarks behind docs/benchmarks.md, at full size
	$(BIN)/python -m pytest tests/benchmarks --benchmarks -s $(ARGS)

proofs: $(STAMP)  ## the small trainings behind docs/proofs.md; ARGS="--seeds 1" for fewer
	@for proof in $(PROOFS); do $(BIN)/python -m tests.proofs.$$proof $(ARGS) || exit 1; done

lock: $(STAMP)  ## requirements.lock anew from pyproject.toml
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-header \
	  --python-version 3.11 --extra demo --extra server --extra dev pyproject.toml --output-file requirements.lock

clean:  ## remove what the targets made
	rm -rf $(VENV) $(OUTPUT) .pytest_cache .mypy_cache .ruff_cache

$(STAMP): requirements.lock
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v not in ((3, 11), (3, 12)) and f"Python 3.11 or 3.12 is needed, and $(PYTHON) is {v}; set PYTHON=")'
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --require-hashes --python $(BIN)/python --requirement requirements.lock
	touch $@
