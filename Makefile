# One environment, .venv, installed in steps: `demo` needs only what a device needs, the rest needs torch.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SHELL := /bin/sh
.DELETE_ON_ERROR:
.PHONY: help demo test kernels check format export mini wheel servers triton-env mlserver-env clean

help:
	@echo "make demo     tune the embedded model on real handwritten digits (no torch needed)"
	@echo "make test     all tests, in the full environment"
	@echo "make kernels  the numeric tests, computed as an old processor would"
	@echo "make check    style and types, as continuous integration runs them"
	@echo "make export   download ViT-B-32 and export it to bundles/ViT-B-32, and for Triton to repository"
	@echo "make export   MODEL=NAME [PRETRAINED=TAG|FILE] OUT=FOLDER    another model (ztune export --list)"
	@echo "make export   BUNDLE=models/mini TRITON=repository    a Triton model repository of a bundle"
	@echo "make mini     train the embedded model and export it to models/mini"
	@echo "make servers  triton-env and mlserver-env: inference servers for the tests that talk to them"

$(VENV)/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "ztune needs Python 3.10 or newer (set PYTHON=python3.11, say)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "this Python cannot make environments: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# A stamp per step: a second run does nothing until pyproject.toml changes.
$(VENV)/.device: $(VENV)/pyvenv.cfg pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[cpu]'
	@touch $@

$(VENV)/.full: $(VENV)/.device
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[cpu,export,dev,triton]'
	@touch $@

demo: $(VENV)/.device
	rm -rf runs/demo runs/demo-compare
	$(BIN)/ztune tune models/mini --data examples/digits --template "a photo of the digit {}." --shots 16 --seed 1 --out runs/demo
	$(BIN)/ztune eval runs/demo
	$(BIN)/ztune pack models/mini --prompt runs/demo/prompt.safetensors --out runs/demo/classifier.onnx
	$(BIN)/ztune eval runs/demo/classifier.onnx --split-file runs/demo/split.json
	$(BIN)/ztune predict runs/demo/classifier.onnx examples/digits/seven --limit 5
	$(BIN)/ztune compare models/mini --data examples/digits --template "a photo of the digit {}." --methods zero-shot,zip,auto --shots 16 --seeds 1 --out runs/demo-compare
	@echo "Look at runs/demo/confusion.png and at ZIP's curve in runs/demo-compare/accuracy-queries.png."

# A file's tests share fixtures and run in one process; several files at once, the slow ones of export first.
# Processes that tests start would compile the library again without its bytecode.
PYTEST = PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
test: $(VENV)/.full
	$(PYTEST)

# Results must not depend on the last bits of one processor: the tests of maps, optimizers, heads and runtimes
# with the most basic kernels of torch, OpenBLAS and numpy, on one thread. ONNX Runtime chooses its own.
DISPATCHED = import numpy._core._multiarray_umath as m; print(*m.__cpu_dispatch__)
kernels: $(VENV)/.full
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 OPENBLAS_CORETYPE=Prescott OMP_NUM_THREADS=1 \
		OPENBLAS_NUM_THREADS=1 NPY_DISABLE_CPU_FEATURES="$$($(BIN)/python -c '$(DISPATCHED)')" \
		$(PYTEST) tests/ztune tests/runtimes --ignore=tests/ztune/experiments --ignore=tests/runtimes/remote

check: $(VENV)/.full
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.full
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# With nothing set: a named default, as a bundle and for Triton.
ifeq ($(MODEL)$(PRETRAINED)$(OUT)$(BUNDLE),)
export: MODEL = ViT-B-32
export: PRETRAINED = laion2b_s34b_b79k
export: OUT = bundles/ViT-B-32
export: TRITON = repository
export: HINT = || { echo "with weights of your own: make export MODEL=ViT-B-32 PRETRAINED=FILE OUT=FOLDER" >&2; exit 1; }
endif
export: $(VENV)/.full
	@test -n "$(MODEL)" -a -n "$(OUT)" -a -z "$(BUNDLE)" || \
		test -n "$(BUNDLE)" -a -n "$(TRITON)" -a -z "$(MODEL)$(OUT)" || \
		{ echo "usage: make export MODEL=NAME [PRETRAINED=TAG|FILE] OUT=FOLDER [TRITON=REPOSITORY]"; \
		  echo "       make export BUNDLE=FOLDER TRITON=REPOSITORY"; exit 2; }
	$(if $(MODEL),$(BIN)/ztune export --model '$(MODEL)' $(if $(PRETRAINED),--pretrained '$(PRETRAINED)') --out '$(OUT)' $(HINT))
	$(if $(TRITON),$(BIN)/ztune export-triton '$(if $(BUNDLE),$(BUNDLE),$(OUT))' --out '$(TRITON)')

mini: $(VENV)/.full
	rm -rf build/mini
	$(BIN)/python -m examples.mini_clip --out build/mini/checkpoint
	$(BIN)/ztune export --model local-dir:build/mini/checkpoint --tokenizer build/mini/checkpoint/tokenizer.json --licence Apache-2.0 --image-tokens --out build/mini/bundle
	cp build/mini/checkpoint/figures.json build/mini/bundle/training.json
	rm -rf models/mini
	mkdir -p models
	mv build/mini/bundle models/mini

wheel: $(VENV)/.full
	$(BIN)/python -m build --wheel --outdir dist .

# Environments of the servers in tests: separate, as for a real server. Models there run on the same
# ONNX Runtime, so answers can be compared exactly.
TRITON_ENV := .venv-triton
MLSERVER_ENV := .venv-mlserver
SAME_ORT = "onnxruntime==$$($(BIN)/python -c 'import onnxruntime; print(onnxruntime.__version__)')"

servers: triton-env mlserver-env
triton-env: $(TRITON_ENV)/.ready
mlserver-env: $(MLSERVER_ENV)/.ready

# Triton's Python backend returns empty tensors with numpy 2. Its stub, one per Python version, must
# be next to the backend's library, so both are copied.
$(TRITON_ENV)/.ready: $(VENV)/.device
	$(BIN)/python -m venv $(TRITON_ENV)
	$(TRITON_ENV)/bin/python -m pip install --quiet --disable-pip-version-check 'nvidia-pytriton==0.7.*' 'numpy<2' $(SAME_ORT)
	rm -rf $(TRITON_ENV)/backends
	set -e; set -- $$($(TRITON_ENV)/bin/python -c 'import sysconfig as s; print(s.get_path("purelib"), s.get_python_version())'); \
		cp -R "$$1/pytriton/tritonserver/backends" $(TRITON_ENV)/backends; \
		cp "$$1/pytriton/tritonserver/python_backend_stubs/$$2/triton_python_backend_stub" $(TRITON_ENV)/backends/python/
	@touch $@

$(MLSERVER_ENV)/.ready: $(VENV)/.device
	$(BIN)/python -m venv $(MLSERVER_ENV)
	$(MLSERVER_ENV)/bin/python -m pip install --quiet --disable-pip-version-check 'mlserver==1.7.*' $(SAME_ORT)
	@touch $@

clean:
	rm -rf build dist runs .mypy_cache .ruff_cache .pytest_cache .hypothesis
