"""What trains a cell: ours, compiled, plain and trl.

ours is StepTrainer, compiled the same with --compile_layers, plain a loop around transformers and peft with their own
loss. All train the same rows, which fill their micro-batches: no arm has padding to save.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from benchmarks.cells import Cell, Figures
from benchmarks.random_models import QUANTIZATIONS, adapt, build_model, choose_device, count_work, make_rows, quantize
from data_utils.steps import StepDataset
from tuning.machine import peak_memory_gib
from tuning.model.packing import enable_packing
from tuning.model.training_model import TrainingModel, compile_layers, enable_gradient_checkpointing
from tuning.planning.operations import measure_matmul_rate
from tuning.settings.arguments import RunArguments
from tuning.training.trainer import StepTrainer

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def run_cell(cell: Cell, arm: str, profiler: Any = None) -> Figures:
    """Train a cell in this process. profiler: of torch; started and stopped around the first timed step.

    Returns: seconds a step (median, mean, min, max), tokens/s, share of the device's own rate, GiB at the peak.
    """
    device = choose_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rate = measure_matmul_rate(device, dtype, size=8192 if device.type == "cuda" else 1024)
    work = count_work(cell)
    model = build_model(cell.shape, device, dtype)
    if cell.method in QUANTIZATIONS:
        quantize(model, cell.method, ours=arm in ("ours", "compiled"))
    if cell.lean:
        enable_gradient_checkpointing(model)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = _RUN[arm](model, cell, Clock(device, cell.warm_up, profiler))[cell.warm_up :]
    median = statistics.median(seconds)
    figures = {
        "s_per_step": round(median, 4),
        "s_per_step_mean": round(statistics.mean(seconds), 4),
        "s_per_step_min": round(min(seconds), 4),
        "s_per_step_max": round(max(seconds), 4),
        "tokens_per_s": round(cell.tokens_per_step / median, 1),
        "matmul_share": round(work / median / rate, 4),
        "matmul_tflops": round(rate / 1e12, 2),
        "peak_gib": round(peak_memory_gib(device), 2),
    }
    if device.type == "cuda":
        figures["reserved_gib"] = round(torch.cuda.max_memory_reserved(device) / 2**30, 2)
    return figures


# ---- arms: each trains warm_up + timed steps and returns the seconds of every one ----


class Clock:
    """Seconds of every step, with the device's work done. profiler: watches the step after warm_up steps."""

    def __init__(self, device: torch.device, warm_up: int, profiler: Any = None):
        self.seconds: list[float] = []
        self._device, self._warm_up, self._profiler = device, warm_up, profiler
        self._began = 0.0

    def begin(self) -> None:
        """Before a step."""
        if self._profiler is not None and len(self.seconds) == self._warm_up:
            self._profiler.start()
        self._began = time.perf_counter()

    def end(self) -> None:
        """After it."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.seconds.append(time.perf_counter() - self._began)
        if self._profiler is not None and len(self.seconds) == self._warm_up + 1:
            self._profiler.stop()


class RowsInMemory:
    """What StepDataset asks of TokenizedRows, without its files, which need pyarrow."""

    groups = None

    def __init__(self, rows: list[tuple[list[int], list[int]]]):
        self._rows = [(np.array(ids), np.array(labels)) for ids, labels in rows]
        self.lengths = np.array([len(ids) for ids, _ in self._rows], dtype=np.int32)
        self.num_targets = np.array([(labels[1:] != -100).sum() for _, labels in self._rows], dtype=np.int32)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:
        return *self._rows[index], None

    def row_id(self, index: int) -> str:
        """Of a row: its number."""
        return str(index)


def run_ours(model: Any, cell: Cell, clock: Clock, *, compiles: bool = False) -> list[float]:
    """StepTrainer."""
    device, dtype = model.device, model.dtype
    training_model = TrainingModel(*adapt(model, cell)).to(device)
    obstacle = enable_packing(training_model, max_length=cell.length, dtype=dtype)
    assert obstacle is None, obstacle
    if compiles:
        compile_layers(training_model)
    steps = StepDataset(
        RowsInMemory(make_rows(cell, model.config.vocab_size)),  # type: ignore[arg-type]
        rows_per_step=cell.rows_per_step, max_tokens=cell.rows * cell.length, packed=True, seed=0,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        settings = RunArguments(
            output_dir=directory, max_steps=cell.warm_up + cell.timed, per_device_train_batch_size=cell.rows,
            gradient_accumulation_steps=cell.micro_batches, save_strategy="no", report_to="none",
            logging_steps=1000, logging_first_step=False, use_cpu=device.type == "cpu",
            bf16=dtype == torch.bfloat16 and cell.method != "full",
        )  # fmt: skip
        trainer = StepTrainer(training_model, settings, train_dataset=steps, writer=None)  # type: ignore[arg-type]
        return time_steps(trainer, clock)


def run_compiled(model: Any, cell: Cell, clock: Clock) -> list[float]:
    """StepTrainer with --compile_layers."""
    return run_ours(model, cell, clock, compiles=True)


def run_plain(model: Any, cell: Cell, clock: Clock) -> list[float]:
    """A loop around transformers and peft: their loss over all positions."""
    device, dtype = model.device, model.dtype
    if cell.method != "full":
        model = get_peft_model(model, build_lora_config(cell, TARGETS))
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-5, weight_decay=0.0, fused=True)
    rows = torch.tensor(make_rows(cell, model.config.vocab_size), device=device)  # [rows, 2, length]
    num_targets = int((rows[:, 1] != -100).sum())
    autocast = dtype != torch.float32 and cell.method != "full"
    for _ in range(cell.warm_up + cell.timed):
        clock.begin()
        for part in rows.split(cell.rows):
            with torch.autocast(device.type, dtype=dtype, enabled=autocast):
                loss = model(input_ids=part[:, 0], labels=part[:, 1], num_items_in_batch=num_targets).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.end()
    return clock.seconds


def run_trl(model: Any, cell: Cell, clock: Clock) -> list[float]:
    """TRL's SFTTrainer on rows that are tokenised already."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from examples.tiny_model import build_tokenizer, read_texts

    if cell.method == "lora_tokens" or cell.method.startswith("qlora"):
        raise NotImplementedError(f"not measured with TRL: {cell.method}")
    device, dtype = model.device, model.dtype
    rows = Dataset.from_list([{"input_ids": i, "labels": j} for i, j in make_rows(cell, model.config.vocab_size)])
    with tempfile.TemporaryDirectory() as directory:
        settings = SFTConfig(
            output_dir=directory, max_steps=cell.warm_up + cell.timed, per_device_train_batch_size=cell.rows,
            gradient_accumulation_steps=cell.micro_batches, max_length=cell.length, save_strategy="no",
            report_to="none", logging_steps=1000, use_cpu=device.type == "cpu", bf16=dtype == torch.bfloat16,
            gradient_checkpointing=cell.lean,
        )  # fmt: skip
        trainer = SFTTrainer(
            model, settings, train_dataset=rows,
            peft_config=None if cell.method == "full" else build_lora_config(cell, "all-linear"),
            processing_class=build_tokenizer(read_texts(), vocabulary_size=500),
        )  # fmt: skip
        return time_steps(trainer, clock)


def build_lora_config(cell: Cell, targets: Any) -> LoraConfig:
    """A cell's LoRA in peft's own terms."""
    extra: dict[str, Any] = {}
    if cell.method == "lora_emb":
        extra = {"modules_to_save": ["embed_tokens", "lm_head"]}
    if cell.method == "lora_tokens":
        extra = {"trainable_token_indices": {"embed_tokens": list(range(26)), "lm_head": list(range(26))}}
    return LoraConfig(
        r=cell.rank, lora_alpha=16, lora_dropout=cell.dropout, target_modules=targets, task_type="CAUSAL_LM", **extra
    )


def time_steps(trainer: Any, clock: Clock) -> list[float]:
    """Train. Returns: seconds of every step."""

    class Watch(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.end()

    trainer.add_callback(Watch())
    trainer.train()
    return clock.seconds


_RUN: dict[str, Callable[[Any, Cell, Clock], list[float]]] = {
    "ours": run_ours,
    "compiled": run_compiled,
    "plain": run_plain,
    "trl": run_trl,
}
