PYTHON ?= python3
BIN := .venv/bin
DEMO := output/demo
DATA ?= ../shared/data/alpaca_en.json ../shared/data/alpaca_zh.json
TOKENIZER ?= ../shared/qwen_tokenizer/hf
# Of llama-cpp-python, whose source holds llama.cpp and its converter.
LLAMA_CPP_VERSION := 0.3.36

MINUTES ?= 10

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev setup-browser setup-llama-cpp demo test test-all test-image lint check bench bench-data gpu-receipt

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /  make \1\t/' | expand -t 24

setup: .venv/.installed ## make .venv and install requirements_finetune.txt, once
setup-dev: .venv/.installed-dev ## likewise, and requirements_dev.txt: serve.py, tests, linters, benchmarks

setup-browser: ## Debian's Chromium and its driver, for the tests of the chat page (as root)
	apt-get install -y --no-install-recommends chromium chromium-driver

.venv/.installed: requirements_finetune.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements_finetune.txt
	touch $@

.venv/.installed-dev: .venv/.installed requirements_dev.txt requirements_serve.txt requirements_export.txt requirements_eval.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements_finetune.txt -r requirements_dev.txt
	touch $@

setup-llama-cpp: .venv/.installed-llama-cpp ## llama.cpp from PyPI, for python -m inference.export; needs cmake and a C++ compiler

.venv/.installed-llama-cpp: .venv/.installed requirements_export.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements_export.txt
	$(BIN)/pip download --quiet --disable-pip-version-check --no-deps --no-binary llama-cpp-python \
		--dest .venv llama-cpp-python==$(LLAMA_CPP_VERSION)
	mkdir -p .venv/llama.cpp
	tar xzf .venv/llama_cpp_python-$(LLAMA_CPP_VERSION).tar.gz -C .venv/llama.cpp --strip-components=3 \
		llama_cpp_python-$(LLAMA_CPP_VERSION)/vendor/llama.cpp
	cmake -S .venv/llama.cpp -B .venv/llama.cpp/build -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF \
		-DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF
	cmake --build .venv/llama.cpp/build -j2 --target llama-completion llama-tokenize llama-quantize
	touch $@

demo: setup ## fine-tune the tiny example model on examples/conversations.json, merge it, ask it three questions
	sh finetune/finetune_lora_single_gpu.sh -o $(DEMO) --overwrite_output_dir --num_train_epochs 30 \
		--per_device_train_batch_size 8 --gradient_accumulation_steps 1 --learning_rate 3e-3 --lora_alpha 64 \
		--logging_steps 30 --save_strategy no
	$(BIN)/python merge_lora.py $(DEMO) $(DEMO)-merged --overwrite
	$(BIN)/python examples/ask.py $(DEMO)-merged examples/conversations.json

test: setup-dev ## the tests that take minutes
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow and not gpu"

test-image: .venv-image/.installed ## the fast tests under torch 2.11 and transformers 5.17, as GPU images have them; 6 GB
	.venv-image/bin/python -m pytest -q -rs -n 2 --dist worksteal -m "not slow and not gpu"

.venv-image/.installed: requirements_image.txt
	$(PYTHON) -m venv .venv-image
	.venv-image/bin/pip install --quiet --disable-pip-version-check -r requirements_image.txt
	.venv-image/bin/pip uninstall --quiet --yes rich
	touch $@

test-all: setup-dev ## every test this machine can run, with names and skips
	$(BIN)/python -m pytest -v -rs -n 2 --dist worksteal

lint: setup-dev ## ruff, mypy, shellcheck and hadolint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck finetune/*.sh docker/*.sh
	$(BIN)/hadolint docker/Dockerfile docker/Dockerfile.cpu

check: lint test ## lint, then test

bench: setup-dev ## training speed on CPU, an hour; DATA="a.json b.json" (alpaca files) TOKENIZER=DIR
	$(BIN)/python benchmarks/bench_train.py $(DATA) --tokenizer $(TOKENIZER) --out benchmarks/results/train_cpu.json

gpu-receipt: ## what this machine's GPU shows, in MINUTES=10; without .venv by PYTHON=python3: docs/receipts/README.md
	$(or $(wildcard $(BIN)/python),$(PYTHON)) benchmarks/gpu_receipt.py --minutes $(MINUTES)

bench-data: setup-dev ## tokenising speed, 15 minutes; DATA and TOKENIZER as above
	$(BIN)/python benchmarks/bench_data.py $(DATA) --tokenizer $(TOKENIZER)
