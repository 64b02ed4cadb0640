# make demo   set up, then compress the bundled model (offline)
# make test   set up, then lint, type-check and test
# make gguf   set up, with llama.cpp, then run the tests that need it
# make bench  the ratios quoted in the README
VENV   := .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --constraint constraints.txt
OFFLINE := HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1

.PHONY: demo test matrix gguf bench format clean
.DELETE_ON_ERROR:

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) --editable '.[dev]'
	@touch $@

demo: $(VENV)/installed
	$(OFFLINE) $(BIN)/llm-streamline demo -o demo-run

test: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal

matrix: $(VENV)/installed-dev
	$(OFFLINE) OMP_NUM_THREADS=1 STREAMLINE_MATRIX=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal \
		tests/test_families.py tests/test_linear.py tests/test_above.py tests/test_forward.py tests/test_analyze.py \
		tests/test_replacement.py tests/test_train.py tests/test_upper.py tests/test_offload.py tests/test_onnx.py

LLAMA_CPP_PYTHON := llama-cpp-python==0.3.36

# llama.cpp's converter lies in the source package of its Python bindings; those are built here, in about ten minutes
.llama.cpp/done: $(VENV)/installed-dev
	rm -rf .llama.cpp && mkdir .llama.cpp
	$(BIN)/python -m pip download --quiet --no-deps --no-binary llama-cpp-python --dest .llama.cpp $(LLAMA_CPP_PYTHON)
	tar -xzf .llama.cpp/llama_cpp_python-*.tar.gz -C .llama.cpp --strip-components 1
	$(PIP) .llama.cpp/llama_cpp_python-*.tar.gz sentencepiece torchao
	@touch $@

gguf: .llama.cpp/done
	$(OFFLINE) LLAMA_CPP=.llama.cpp/vendor/llama.cpp $(BIN)/python -m pytest tests/test_gguf.py tests/test_chain.py

bench: $(VENV)/installed-dev
	$(OFFLINE) $(BIN)/python -m bench

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .llama.cpp demo-run
