PYTHON ?= python3
BIN := .venv/bin
DEMO := output/demo
DATA ?= ../shared/data/alpaca_en.json ../shared/data/alpaca_zh.json
TOKENIZER ?= ../shared/qwen_tokenizer/hf

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev demo test test-all lint check bench bench-data

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /  make \1\t/' | expand -t 18

setup: .venv/.installed ## make .venv and install requirements_finetune.txt, once
setup-dev: .venv/.installed-dev ## likewise, and requirements_dev.txt: serve.py, tests, linters, benchmarks

.venv/.installed: requirements_finetune.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements_finetune.txt
	touch $@

.venv/.installed-dev: .venv/.installed requirements_dev.txt requirements_serve.txt requirements_eval.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements_finetune.txt -r requirements_dev.txt
	touch $@

demo: setup ## fine-tune the tiny example model on examples/conversations.json, merge it, ask it three questions
	sh finetune/finetune_lora_single_gpu.sh -o $(DEMO) --overwrite_output_dir --num_train_epochs 30 \
		--per_device_train_batch_size 8 --gradient_accumulation_steps 1 --learning_rate 3e-3 --lora_alpha 64 \
		--logging_steps 30 --save_strategy no
	$(BIN)/python merge_lora.py $(DEMO) $(DEMO)-merged --overwrite
	$(BIN)/python examples/ask.py $(DEMO)-merged examples/conversations.json

test: setup-dev ## the tests that take minutes
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow and not gpu"

test-all: setup-dev ## every test this machine can run, with names and skips
	$(BIN)/python -m pytest -v -rs -n 2 --dist worksteal

lint: setup-dev ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test ## lint, then test

bench: setup-dev ## training speed on CPU, an hour; DATA="a.json b.json" (alpaca files) TOKENIZER=DIR
	$(BIN)/python benchmarks/bench_train.py $(DATA) --tokenizer $(TOKENIZER) --out benchmarks/results/train_cpu.json

bench-data: setup-dev ## tokenising speed, 15 minutes; DATA and TOKENIZER as above
	$(BIN)/python benchmarks/bench_data.py $(DATA) --tokenizer $(TOKENIZER)
