# Everything is made in .venv; nothing needs root.
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
DEMO    = build/demo
WORKERS = -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder  # tests of a file stay together; one thread each
SLOW_WORKERS = -n auto --maxprocesses 4 --dist worksteal  # few files have most of the slow tests

.PHONY: demo test test-slow test-all fuzz kill sanitize races soak lint bench-tables bench-demo bench-vision bench-runtime bench-engine bench-language bench-cuts clean

demo: $(VENV)/demo.done  ## compress a real language model and print the receipt
	$(BIN)/rarefy compress smollm2-135m --recipe smollm2-demo --out $(DEMO) --force

test: $(VENV)/dev.done lint  ## lint, types and all quick tests, about 15 minutes on two idle cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" $(WORKERS)

test-slow: $(VENV)/slow.done  ## the slow tests; with SIXTH=0 to SIXTH=5 a sixth of them, with LIMIT=30 those that begin in 30 minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(if $(SIXTH),--sixth $(SIXTH),-m slow) $(if $(LIMIT),--minutes $(LIMIT)) $(SLOW_WORKERS)

test-all: test test-slow  ## every test

MINUTES ?= 30
fuzz: $(VENV)/dev.done  ## change files at random and read them, MINUTES=30 in all; findings are kept in build/fuzz
	cd tests && ../$(BIN)/python -m fuzz --minutes $(MINUTES)

sanitize: $(VENV)/dev.done  ## random calls of all kernels with ASan and UBSan, also emulated ones, and TSan, MINUTES=30 in all
	cd tests && ../$(BIN)/python -m stress sanitize --minutes $(MINUTES)

races: $(VENV)/dev.done  ## calls of compiled models from several threads with TSan, MINUTES=30 in all
	cd tests && ../$(BIN)/python -m stress races --minutes $(MINUTES)

CALLS ?= 100000
soak: $(VENV)/dev.done  ## CALLS=100000 of each of seven small models from 6 threads: equal outputs, flat memory
	cd tests && ../$(BIN)/python -m stress soak --calls $(CALLS)

KILLS ?= 200
kill: $(VENV)/dev.done  ## kill commands at KILLS=200 random moments, after runs with little space, memory and rights
	cd tests && ../$(BIN)/python -m interruption --machines --kills $(KILLS)

lint: $(VENV)/dev.done
	$(BIN)/ruff check src tests bench
	$(BIN)/ruff format --check src tests bench
	$(BIN)/pyright --pythonpath $(BIN)/python

PAGES ?= readme
bench-tables: $(VENV)/dev.done  ## measure the tables of README.md, or with PAGES=docs of all pages, and write them; goes on when it is interrupted
	$(BIN)/python -m pip install --quiet -e ".[vision]" onnx onnxscript onnxruntime openvino nncf xllamacpp scikit-learn
	-npm install --silent --prefix bench/build @node-llama-cpp/linux-x64@3.22.1  # kernels for AVX-512, and llama.cpp's quantizer; Linux on x86-64
	$(BIN)/python bench/tables.py --measure $(PAGES)

bench-demo: $(VENV)/demo.done  ## keep the demo's receipt as the one that README shows
	$(BIN)/python bench/demo.py
	$(BIN)/python bench/tables.py

bench-vision: $(VENV)/dev.done  ## pruning scores on Fashion-MNIST, 15 minutes on two idle cores
	cd bench && ../$(BIN)/python vision.py

bench-runtime: $(VENV)/dev.done  ## sparse kernels and whole models against dense ones, 15 minutes on two idle cores
	$(BIN)/python -m pip install --quiet -e ".[vision]" onnx onnxruntime openvino nncf
	cd bench && ../$(BIN)/python runtime.py && ../$(BIN)/python models.py && ../$(BIN)/python models.py --engines

bench-engine: $(VENV)/dev.done  ## compiled models against other engines, 30 minutes on two idle cores
	$(BIN)/python -m pip install --quiet -e ".[vision]" onnx onnxruntime openvino nncf
	cd bench && ../$(BIN)/python engine.py

bench-language: $(VENV)/dev.done  ## SmolLM2-135M on the engine and on llama.cpp, 25 minutes on two idle cores
	$(BIN)/python -m pip install --quiet xllamacpp
	-npm install --silent --prefix bench/build @node-llama-cpp/linux-x64@3.22.1  # for AVX-512 and AMX; Linux on x86-64
	cd bench && ../$(BIN)/python language.py

bench-cuts: $(VENV)/dev.done  ## structured pruning, and the comparison with Torch-Pruning, 90 minutes
	$(BIN)/python -m pip install --quiet onnx onnxscript onnxruntime torch-pruning==1.6.1
	cd bench && ../$(BIN)/python cuts.py && ../$(BIN)/python cut_zoo.py

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/demo.done: $(VENV)/bin/python pyproject.toml requirements-demo.txt CMakeLists.txt $(wildcard csrc/*)
	$(BIN)/python -m pip install --quiet -e ".[demo]"
	$(BIN)/python -m pip install --quiet --no-deps -r requirements-demo.txt
	touch $@

$(VENV)/dev.done: $(VENV)/demo.done pyproject.toml
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

$(VENV)/slow.done: $(VENV)/dev.done pyproject.toml requirements-slow.txt
	$(BIN)/python -m pip install --quiet -e ".[slow]"
	$(BIN)/python -m pip install --quiet --no-deps -r requirements-slow.txt
	touch $@

clean:
	rm -rf $(VENV) build
