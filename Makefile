# make run   a chat with a real language model
# make test  everything the project promises, checked
# Each makes its own environment in .venv, touches nothing else, and can be run again.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
QUESTION ?= What is the capital of France?
MODEL ?= smollm2
comma := ,
PROJECT := pyproject.toml constraints.txt CMakeLists.txt $(wildcard native/*)

.PHONY: run test lint format docs claims bench playground-check fuzz native-check arm-check ray-check clean help

help:
	@sed -n 's/^# \(make\)/\1/p' Makefile

run: $(VENV)/run.stamp
	@$(BIN)/plait chat --model $(MODEL) "$(QUESTION)"

test: $(VENV)/test.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)
	PLAIT_NATIVE=0 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not model" --ignore tests/engine/test_composition.py tests/engine tests/nn/test_load.py
	$(BIN)/lint-imports

lint: $(VENV)/lint.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/lint.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/docs.stamp
	$(BIN)/sphinx-build -W -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

claims: $(VENV)/test.stamp
	-$(BIN)/plait claims run --all --results docs/claims
	$(BIN)/plait claims page --results docs/claims --output docs/claims.md
	$(BIN)/plait claims page --short --results docs/claims --output README.md

# Peers are compiled and installed into build/peers, and questions are asked one after the other; about an hour.
QUESTIONS := decode speculation prefill shared_prefix ragged_batch first_token peak_memory roofline invariance
bench: $(VENV)/test.stamp
	$(BIN)/python bench/peers.py install
	@for question in $(QUESTIONS); do echo "== $$question"; $(BIN)/python bench/$$question.py || exit 1; done

# Drives the playground in a Chromium (CHROMIUM=...), with axe-core from npm; screenshots in build/playground.
CHROMIUM ?= /usr/bin/chromium
playground-check: $(VENV)/test.stamp
	@$(PIP) install "playwright>=1.50"
	@npm install --silent --no-save --prefix build/playground axe-core@4.14.1
	$(BIN)/python tests/playground_check.py --chromium $(CHROMIUM) --axe build/playground/node_modules/axe-core/axe.min.js

# Five minutes of requests that schemathesis makes from the OpenAPI document.
fuzz: $(VENV)/test.stamp
	PLAIT_FUZZ_SECONDS=300 $(BIN)/python -m pytest tests/serve/test_clients.py -k schemathesis --timeout 1200 -s

# Random trials of the C++ operations under sanitizers: every instruction set of this machine must give the same bits.
TRIALS ?= 200
native-check:
	cmake -S . -B build/native-check -DPLAIT_SANITIZE=ON
	cmake --build build/native-check --target plait_fuzz
	build/native-check/plait_fuzz $(TRIALS) > build/native-check/result
	@cat build/native-check/result

# The same trials for 64-bit ARM, in emulation, on a processor with dot products of bytes and on one without: they must give
# the bits that this machine gives. Takes Debian's g++-aarch64-linux-gnu and qemu-user. Leaks cannot be looked for in QEMU.
arm-check: native-check
	cmake -S . -B build/arm-check -DPLAIT_SANITIZE=ON --toolchain native/aarch64.cmake
	cmake --build build/arm-check --target plait_fuzz
	@for cpu in max cortex-a53; do \
		ASAN_OPTIONS=detect_leaks=0 qemu-aarch64 -cpu $$cpu -L /usr/aarch64-linux-gnu \
			build/arm-check/plait_fuzz $(TRIALS) > build/arm-check/result || exit 1; \
		cat build/arm-check/result; \
		[ "$$(grep digest build/arm-check/result)" = "$$(grep digest build/native-check/result)" ] \
			|| { echo "$$cpu gives other bits than this machine" >&2; exit 1; }; \
	done

# What cannot share an environment with the tests: the server in Ray Serve, and LangChain's client.
ray-check: $(VENV)/test.stamp
	@$(PIP) install --no-compile --constraint constraints.txt --editable ".[ray]" "langchain-openai>=1"
	$(BIN)/python tests/ray_check.py

clean:
	rm -rf $(VENV) build docs/_build

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Plait needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

# $(1): the stamp, $(2): the extras, $(3): stamps of environments that this one holds too
define environment
$(VENV)/$(1).stamp: $(PROJECT) | $(VENV)/bin/python
	@echo "Making the environment in $(VENV) (once) ..." >&2
	@$(PIP) install --no-compile --constraint constraints.txt --editable ".$(2)"
	@touch $$@ $(patsubst %,$(VENV)/%.stamp,$(3))
endef
$(eval $(call environment,run,))
$(eval $(call environment,test,[test],run))
$(eval $(call environment,lint,[test$(comma)lint],run test))
$(eval $(call environment,docs,[test$(comma)docs],run test))
