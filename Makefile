# Everything runs in a virtual environment of its own; nothing outside it and the data cache is touched.
PYTHON ?= python3
VENV ?= .venv
# The version that is tested by default; any torch from 2.11 on works.
TORCH ?= torch==2.13.0
SEEDS ?= 1
OUT ?= demo-report
# of vision8, text8, vit8 and vision4
SUITES ?= vision8 text8

BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml CMakeLists.txt $(shell find csrc -type f)

.PHONY: demo test native-test bench results studies cuda-check clean

demo: $(VENV)/.demo  ## merge two task suites by every method; print the tables, write the report
	$(BIN)/statsmerge demo $(SUITES) --seeds $(SEEDS) --out $(OUT)

test: $(VENV)/.test  ## run the tests
	$(BIN)/python -m pytest -q

native-test: $(VENV)/.torch  ## test the kernels without torch, plainly and under sanitizers
	PATH="$(abspath $(BIN)):$$PATH" tests/native/run.sh

BENCH := $(BIN)/python -m pytest -q benchmarks --benchmark-columns=median,iqr,rounds

bench: $(VENV)/.bench  ## benchmark operators and whole merges beside their peers; write docs/benchmarks.md
	$(BENCH) --benchmark-json=benchmarks/results/operators.json
	STATSMERGE_BENCH_TARGET=avx2 $(BENCH) -m "not long" --benchmark-json=benchmarks/results/operators_avx2.json
	$(BIN)/python benchmarks/page.py

cuda-check: $(VENV)/.torch  ## compile the CUDA kernels for every architecture; needs nvcc, not a GPU
	PYTHON=$(abspath $(BIN))/python csrc/cuda/compile_check.sh

results: $(VENV)/.demo  ## measure docs/results.md again: three seeds
	$(BIN)/python benchmarks/results.py
	$(BIN)/python benchmarks/costs.py

studies: $(VENV)/.demo  ## measure what is missing of docs/studies.md: hours
	$(BIN)/python benchmarks/studies.py
	$(BIN)/python benchmarks/segmentation.py

clean:
	rm -rf $(VENV) build demo-report studies *.egg-info statsmerge_ext/_C*.so

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "setuptools>=77" wheel cmake ninja "pybind11>=2.13" numpy
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	touch $@

# Built against the torch above, not against one that an isolated build would fetch.
$(VENV)/.demo: $(VENV)/.torch $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[demo]"
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[test]"
	touch $@

$(VENV)/.bench: $(VENV)/.test
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[bench]"
	touch $@
