# Everything runs in .venv, which the first target that needs it creates from PYTHON (3.10 or later).
# Paths are relative, so the checkout may lie anywhere, in a folder with spaces too.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := -m pip install --disable-pip-version-check -c constraints.txt
READY := $(VENV)/ready
TEST_READY := $(VENV)/test-ready
TORCH := $(shell grep '^torch==' constraints.txt)
PEERS := .venv-peers
PEERS_READY := $(PEERS)/ready
CONVERTER := llama-cpp-python==0.3.36
DEMO := quantized/demo-w2g128-gptq

.PHONY: help demo test test-slow test-gpu test-peers lint clean

help:
	@echo "make demo        quantize the embedded model to 2 bits and measure the file"
	@echo "make test        the tests that need neither network nor GPU"
	@echo "make test-slow   the tests that take minutes"
	@echo "make test-gpu    the tests that need a CUDA device"
	@echo "make test-peers  the files loaded by GPTQModel and transformers, and beside those of llama.cpp's converter"
	@echo "make lint        ruff"
	@echo "make clean       remove the environments, caches and the demo's output"

demo: $(READY)
	rm -rf $(DEMO) $(DEMO).ptq-work
	$(PY) -m ptq.quantize --bits 2 --group 128 --samples 64 --seqlen 512 --out $(DEMO)
	$(PY) -m ptq.evaluate $(DEMO) --corpus stdlib --seqlen 512 --max-tokens 60928

# A process for each processor, so one thread each; what shares a fixture stays together.
test: $(TEST_READY)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --maxprocesses 4 --dist loadfile

test-slow: $(TEST_READY)
	$(PY) -m pytest -m slow --timeout 3600

test-gpu: $(TEST_READY)
	$(PY) -m pytest -m gpu --timeout 3600

test-peers: $(TEST_READY) $(PEERS_READY)
	$(PY) -m pytest -m peers --timeout 3600

lint: $(TEST_READY)
	$(PY) -m ruff check .

clean:
	rm -rf $(VENV) $(PEERS) build *.egg-info .pytest_cache .ruff_cache $(DEMO) $(DEMO).ptq-work
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes in alone and first: where a CPU build of it is at hand, nothing later replaces it.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "ptq needs Python 3.10 or later: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(PY) $(PIP) torch
	$(PY) $(PIP) --quiet -e .
	@touch $@

$(TEST_READY): $(READY)
	$(PY) $(PIP) --quiet -e '.[test,eval,notebooks,llamacpp]'
	@touch $@

# The programs that load our files, in an environment apart: they pin a numpy of their own. Beside them llama.cpp's
# source tree, for its converter, which only the source package of llama-cpp-python brings.
$(PEERS_READY): constraints.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --disable-pip-version-check '$(TORCH)'
	$(PEERS)/bin/python -m pip install --disable-pip-version-check '$(TORCH)' transformers==5.23.0 gptqmodel==7.6.0 optimum==2.3.0 sentencepiece
	$(PEERS)/bin/python -m pip download --disable-pip-version-check --no-deps --no-binary llama-cpp-python --dest $(PEERS) $(CONVERTER)
	rm -rf $(PEERS)/llama.cpp
	cd $(PEERS) && bin/python -m tarfile -e llama_cpp_python-*.tar.gz . && mv llama_cpp_python-*/vendor/llama.cpp llama.cpp
	@touch $@
