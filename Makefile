# make demo   set up .venv and run the main job on the embedded model and data: build/demo/report.html, answer.json
# make test   set up .venv and run the tests            make test-all   with the slow ones
# make check  format, lint, types                       make bench      measure everything; results in benchmarks/results
# make docs   write the measured figures into README.md and BENCHMARKS.md
# make kernels  compile what has changed in csrc/; demo, test and bench do it by themselves

PYTHON ?= python3
BIN := .venv/bin
# Where there is a C++ compiler, kernels that do not build are an error; elsewhere fewbit is installed without them.
KERNELS := $(if $(shell command -v $(CXX)),1,0)
PIP := FEWBIT_KERNELS=$(KERNELS) SKBUILD_BUILD_DIR=build/kernels \
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt

.NOTPARALLEL:
.PHONY: demo test test-all check format bench docs kernels clean

demo: .venv/kernels
	$(BIN)/fewbit auto examples/fashion_mnist/task.py --max-drop 0.01 --out build/demo

test: .venv/dev .venv/kernels
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow"

test-all: .venv/dev .venv/kernels
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

check: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: .venv/bench .venv/kernels
	for script in accuracy footprint checkpoint ablation cnn qat llm; do $(BIN)/python benchmarks/$$script.py || exit 1; done
	for script in linear recurrent encoder "decode --compile"; do \
	  set -- $$script; name=$$1; shift; \
	  $(BIN)/python benchmarks/$$name.py $$@ && $(BIN)/python benchmarks/$$name.py $$@ --isa avx2 || exit 1; \
	done

docs: .venv/base
	$(BIN)/python benchmarks/tables.py

kernels: .venv/kernels

clean:
	rm -rf build .venv

# torch goes first and alone: an installed torch satisfies every range that follows.
.venv/base: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) scikit-build-core
	cmake --version >/dev/null 2>&1 || $(PIP) cmake ninja
	$(PIP) --no-build-isolation -e .
	touch $@

.venv/dev: .venv/base
	$(PIP) --no-build-isolation -e ".[dev]"
	touch $@

.venv/bench: .venv/base
	$(PIP) --no-build-isolation -e ".[examples,bench]"
	touch $@

# pip builds on what build/kernels has.
.venv/kernels: .venv/base $(wildcard csrc/*)
	$(PIP) --no-build-isolation --no-deps -e .
	touch $@
