"""Time and memory of a step, by method and length: python benchmarks/train_table.py [--cells ...] [--out FILE].

The table of the original Qwen README, on the device at hand: random weights in the shapes of Qwen-1.8B, 7B and 14B,
made on the device; one row x 8 accumulated, every row of the full length, half of its tokens supervised. A cell is

    SHAPE/METHOD/LENGTH/MODE    7b/lora/2048/fast

Methods: lora, lora_emb (whole embedding and output layer train, too), lora_tokens (rows of 26 control tokens),
qlora_nf4, qlora_gptq (4 bits in groups of 128; ours only), full (bf16 weights and states). LoRA is r64 on every linear
layer. Modes: fast, lean (activations are computed again).
Arms: ours; plain (a loop around transformers and peft, with their own loss); trl (SFTTrainer). Each cell of each arm
is a process of its own. Seconds a step are the median of 8 after 3; GiB are allocated and reserved at the peak
(resident memory on a CPU).

The share of the device's own bf16 matrix product (fp32 on a CPU) is of 4 P_linear + 4 phi H V + attention + 6 P_lora
operations a token, phi the supervised share; nothing that is computed again counts.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import harness  # noqa: E402

SHAPES = {
    "1.8b": {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 24, "heads": 16, "vocab": 151_936},
    "7b": {"hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32, "heads": 32, "vocab": 151_936},
    "14b": {"hidden_size": 5120, "intermediate_size": 13_696, "num_hidden_layers": 40, "heads": 40, "vocab": 152_064},
    "small": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12, "heads": 8, "vocab": 32_000},
    "tiny": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "heads": 2, "vocab": 512},
}
METHODS = ("lora", "lora_emb", "lora_tokens", "qlora_nf4", "qlora_gptq", "full")
MODES = ("fast", "lean")
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
ACCUMULATED, WARM_UP, TIMED = 8, 3, 8
SUPERVISED = 0.5
GROUP_SIZE = 128
LORA = {"r": 64, "alpha": 16, "dropout": 0.0}
# GB of the original's README on an A100, by length.
ORIGINAL_GB = {
    ("7b", "lora"): dict(zip(LENGTHS, (20.1, 20.4, 21.5, 23.8, 29.7, 36.6), strict=True)),
    ("7b", "lora_emb"): dict(zip(LENGTHS, (33.7, 34.1, 35.2, 35.1, 39.2, 48.5), strict=True)),
    # Its Q-LoRA is GPTQ's Int4.
    ("7b", "qlora_gptq"): dict(zip(LENGTHS, (11.5, 11.5, 12.3, 13.9, 16.9, 23.5), strict=True)),
    ("7b", "qlora_nf4"): dict(zip(LENGTHS, (11.5, 11.5, 12.3, 13.9, 16.9, 23.5), strict=True)),
}
Figures = dict[str, Any]


def main(argv: list[str] | None = None) -> None:
    """Measure cells until the time is up, print the table, keep the figures after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    methods = ("lora", "lora_tokens", "qlora_nf4", "qlora_gptq")
    every = ["/".join(map(str, cell)) for cell in itertools.product(("7b",), methods, LENGTHS, MODES)]
    parser.add_argument("--cells", nargs="+", default=every, metavar="SHAPE/METHOD/LENGTH/MODE")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--minutes", type=float, default=60, help="no cell is begun after that")
    parser.add_argument("--out", type=Path, help="JSON file for the figures; the table goes beside it as .md")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    cells = [read_cell(cell, parser) for cell in args.cells]
    if args.arm:
        print(json.dumps(run_here(args.arm, *cells[0])))
        return
    deadline, measured = time.monotonic() + 60 * args.minutes, []
    for cell, arm in itertools.product(args.cells, args.arms):
        figures = run_cell(cell, arm) if time.monotonic() < deadline else {"not_measured": "the time was up"}
        measured.append({"cell": cell, "arm": arm, **figures})
        print(f"{cell} {arm}: {figures}", file=sys.stderr, flush=True)
        if args.out:
            keep(args.out, measured)
    print(draw_table(measured))


def read_cell(cell: str, parser: argparse.ArgumentParser) -> tuple[str, str, int, str]:
    """Its four parts."""
    parts = cell.split("/")
    known = len(parts) == 4 and parts[0] in SHAPES and parts[1] in METHODS and parts[2].isdecimal()
    if not known or parts[3] not in MODES:
        parser.error(f"{cell}: expected SHAPE/METHOD/LENGTH/MODE of {list(SHAPES)}, {list(METHODS)}, {list(MODES)}")
    return parts[0], parts[1], int(parts[2]), parts[3]


def run_cell(cell: str, arm: str) -> Figures:
    """One cell in a fresh process; a failure is a figure, too."""
    command = [sys.executable, __file__, "--cells", cell, "--arm", arm]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        memory = any("OutOfMemory" in line or "out of memory" in line for line in lines)
        return {"failed": "out of memory" if memory else lines[-1][:300]}
    figures: Figures = json.loads(done.stdout.strip().splitlines()[-1])
    return figures


def run_here(arm: str, shape: str, method: str, length: int, mode: str) -> Figures:
    """One cell in this process: seconds a step, memory, and the share of the device's matrix products."""
    import torch

    from tuning.planning.operations import measure_matmul_rate

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rate = measure_matmul_rate(device, dtype, size=8192 if device.type == "cuda" else 1024)
    model = build_model(shape, device, dtype)
    if method.startswith("qlora"):
        pack(model, method, ours=arm == "ours")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds, work = ARMS[arm](model, method, length, lean=mode == "lean")
    median = statistics.median(seconds[WARM_UP:])
    figures = {"s_per_step": round(median, 4), "matmul_share": round(work / median / rate, 4)}
    return figures | describe_memory(device) | {"matmul_tflops": round(rate / 1e12, 2)}


def build_model(shape: str, device: Any, dtype: Any) -> Any:
    """A random model, made where it is used."""
    import torch
    from transformers import Qwen2ForCausalLM

    config = build_config(shape)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return Qwen2ForCausalLM(config)
    finally:
        torch.set_default_dtype(before)


def build_config(shape: str) -> Any:
    """The configuration of a model."""
    from transformers import Qwen2Config

    sizes = dict(SHAPES[shape])
    heads, vocab = sizes.pop("heads"), sizes.pop("vocab")
    return Qwen2Config(
        **sizes, num_attention_heads=heads, num_key_value_heads=heads, vocab_size=vocab,
        max_position_embeddings=max(LENGTHS), tie_word_embeddings=False, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip


def pack(model: Any, method: str, *, ours: bool) -> None:
    """Quantise all linear layers but the output, where they are; with the library's layers, or ours."""
    import torch
    from torch import nn

    from tuning.model.quantization import Quantization, quantize_meta_model, replace_quantized_layers
    from tuning.model.quantized_linear import GptqLinear

    device, dtype = model.device, model.dtype
    if method == "qlora_gptq":
        if not ours:
            raise NotImplementedError("not measured: GPTQ with peft's own layers")
        quantize_meta_model(model, Quantization("gptq", 4, group_size=GROUP_SIZE), dtype)
        for module in (m for m in model.modules() if isinstance(m, GptqLinear)):
            packed = torch.empty_like(module.weight, device=device).random_()
            module.weight = nn.Parameter(packed, requires_grad=False)
            module.zeros = torch.full_like(module.zeros, 0x77777777, device=device)
            module.scales = torch.full_like(module.scales, 1e-3, device=device)
            module.group_index = (torch.arange(module.in_features, device=device) // GROUP_SIZE).int()
        return
    import bitsandbytes as bnb

    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module is not model.get_output_embeddings():
            layer = bnb.nn.Linear4bit(
                module.in_features, module.out_features, bias=module.bias is not None, compute_dtype=dtype,
                quant_type="nf4", device="meta",
            )  # fmt: skip
            layer.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4").to(device)
            layer.bias = module.bias
            model.set_submodule(name, layer)
    if ours:
        replace_quantized_layers(model)


def make_rows(vocabulary: int, length: int) -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of one step's rows: random tokens, the last half supervised."""
    import torch

    ids = torch.randint(30, vocabulary, (ACCUMULATED, length), generator=torch.Generator().manual_seed(0)).tolist()
    first = length - round(SUPERVISED * length)
    return [(row, [-100] * first + row[first:]) for row in ids]


def describe_memory(device: Any) -> Figures:
    """Peak GiB."""
    import torch

    from tuning.machine import peak_memory_gib

    figures = {"peak_gib": round(peak_memory_gib(device), 2)}
    if device.type == "cuda":
        figures["reserved_gib"] = round(torch.cuda.max_memory_reserved(device) / 2**30, 2)
    return figures


def adapt(model: Any, method: str) -> tuple[Any, Any]:
    """(model with what trains of it, trained rows or None), as finetune.py makes them."""
    from tuning.model.lora import add_lora

    if method == "full":
        return model, None
    embeddings = {"lora_emb": "full", "lora_tokens": "tokens"}.get(method, "off")
    return add_lora(model, **LORA, embeddings=embeddings, token_ids=list(range(26)))


def count_work(training_model: Any, length: int) -> int:
    """Operations of a step."""
    from tuning.planning.operations import count_operations

    flops = count_operations(training_model)
    assert flops is not None
    tokens = ACCUMULATED * length
    targets = round(SUPERVISED * tokens)
    return flops.of({"num_tokens": tokens, "num_targets": targets, "num_pairs": ACCUMULATED * length**2})


# ---- arms: each returns seconds of every step, and the operations of one ----


def run_ours(model: Any, method: str, length: int, *, lean: bool) -> tuple[list[float], int]:
    """StepTrainer."""
    import torch

    from data_utils.dataset import TokenizedRows
    from data_utils.steps import StepDataset
    from data_utils.template import Row
    from tuning.model.packing import enable_packing
    from tuning.model.training_model import TrainingModel, enable_gradient_checkpointing
    from tuning.settings.arguments import RunArguments
    from tuning.training.trainer import StepTrainer

    device, dtype = model.device, model.dtype
    if lean:
        enable_gradient_checkpointing(model)
    training_model = TrainingModel(*adapt(model, method)).to(device)
    work = count_work(training_model, length)
    assert enable_packing(training_model, max_length=length, dtype=dtype) is None
    pairs = make_rows(model.config.vocab_size, length)
    rows = [(str(number), Row(ids, labels, [length], [1.0])) for number, (ids, labels) in enumerate(pairs)]
    steps = StepDataset(
        TokenizedRows.from_rows(rows), rows_per_step=ACCUMULATED, max_tokens=length, packed=True, seed=0
    )
    with tempfile.TemporaryDirectory() as directory:
        settings = RunArguments(
            output_dir=directory, max_steps=WARM_UP + TIMED, per_device_train_batch_size=1,
            gradient_accumulation_steps=ACCUMULATED, save_strategy="no", report_to="none",
            logging_steps=1000, logging_first_step=False, use_cpu=device.type == "cpu",
            bf16=dtype == torch.bfloat16 and method != "full",
        )  # fmt: skip
        trainer = StepTrainer(training_model, settings, train_dataset=steps, writer=None)  # type: ignore[arg-type]
        return time_steps(trainer, device), work


def run_plain(model: Any, method: str, length: int, *, lean: bool) -> tuple[list[float], int]:
    """A loop around transformers and peft: one row at a time, their loss over all positions."""
    import torch
    from peft import LoraConfig, get_peft_model

    from tuning.model.training_model import TrainingModel, enable_gradient_checkpointing

    device, dtype = model.device, model.dtype
    if lean:
        enable_gradient_checkpointing(model)
    if method != "full":
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        extra: dict[str, Any] = {"lora_emb": {"modules_to_save": ["embed_tokens", "lm_head"]}}.get(method, {})
        if method == "lora_tokens":
            extra = {"trainable_token_indices": {"embed_tokens": list(range(26)), "lm_head": list(range(26))}}
        config = LoraConfig(
            r=LORA["r"], lora_alpha=LORA["alpha"], target_modules=targets, task_type="CAUSAL_LM", **extra
        )
        model = get_peft_model(model, config)
    model.train()
    work = count_work(TrainingModel(adapt(build_model_like(model), method)[0]), length)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-5, weight_decay=0.0, fused=True)
    rows = [torch.tensor(row, device=device) for row in make_rows(model.config.vocab_size, length)]
    num_targets = sum(int((labels != -100).sum()) for _, labels in rows)
    seconds = []
    for _ in range(WARM_UP + TIMED):
        began = time.perf_counter()
        for ids, labels in rows:
            with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32 and method != "full"):
                loss = model(input_ids=ids[None], labels=labels[None], num_items_in_batch=num_targets).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return seconds, work


def run_trl(model: Any, method: str, length: int, *, lean: bool) -> tuple[list[float], int]:
    """TRL's SFTTrainer on rows that are tokenised already."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    from examples.tiny_model import build_tokenizer, read_texts
    from tuning.model.training_model import TrainingModel

    if method == "lora_tokens" or method.startswith("qlora"):
        raise NotImplementedError(f"not measured with TRL: {method}")
    device, dtype = model.device, model.dtype
    work = count_work(TrainingModel(adapt(build_model_like(model), method)[0]), length)
    rows = Dataset.from_list([{"input_ids": i, "labels": j} for i, j in make_rows(model.config.vocab_size, length)])
    extra: dict[str, Any] = {"modules_to_save": ["embed_tokens", "lm_head"]} if method == "lora_emb" else {}
    config = LoraConfig(
        r=LORA["r"], lora_alpha=LORA["alpha"], target_modules="all-linear", task_type="CAUSAL_LM", **extra
    )
    with tempfile.TemporaryDirectory() as directory:
        settings = SFTConfig(
            output_dir=directory, max_steps=WARM_UP + TIMED, per_device_train_batch_size=1,
            gradient_accumulation_steps=ACCUMULATED, max_length=length, save_strategy="no", report_to="none",
            logging_steps=1000, use_cpu=device.type == "cpu", bf16=dtype == torch.bfloat16,
            gradient_checkpointing=lean,
        )  # fmt: skip
        trainer = SFTTrainer(
            model, settings, train_dataset=rows, peft_config=None if method == "full" else config,
            processing_class=build_tokenizer(read_texts(), vocabulary_size=500),
        )  # fmt: skip
        return time_steps(trainer, device), work


def build_model_like(model: Any) -> Any:
    """The same model without storage, to count on."""
    import torch
    from transformers import Qwen2ForCausalLM

    with torch.device("meta"):
        return Qwen2ForCausalLM(model.config)


def time_steps(trainer: Any, device: Any) -> list[float]:
    """Train. Returns: seconds of every step."""
    import torch
    from transformers import TrainerCallback

    seconds: list[float] = []
    began = 0.0

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            nonlocal began
            began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - began)

    trainer.add_callback(Clock())
    trainer.train()
    return seconds


ARMS: dict[str, Callable[..., tuple[list[float], int]]] = {"ours": run_ours, "plain": run_plain, "trl": run_trl}


# ---- results ----


def keep(out: Path, measured: list[Figures]) -> None:
    """Write JSON and table."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    packages = ("torch", "transformers", "peft", "accelerate", "trl")
    figures = {**harness.describe_machine(packages), "device": device, "supervised": SUPERVISED, "cells": measured}
    out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(draw_table(measured) + "\n", encoding="utf-8")


def draw_table(measured: list[Figures]) -> str:
    """Markdown; what was not measured stays empty."""
    lines = [
        "| shape | method | length | mode | arm | s/it | peak GiB | reserved GiB"
        " | share of matrix product | original GB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for entry in measured:
        shape, method, length, mode = entry["cell"].split("/")
        original = ORIGINAL_GB.get((shape, method), {}).get(int(length), "")
        share = f"{entry['matmul_share']:.0%}" if "matmul_share" in entry else entry.get("failed", "")
        values = [entry.get(name, "") for name in ("s_per_step", "peak_gib", "reserved_gib")]
        lines.append(
            "| " + " | ".join(map(str, [shape, method, length, mode, entry["arm"], *values, share, original])) + " |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
