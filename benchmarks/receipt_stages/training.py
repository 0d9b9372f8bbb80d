"""A training cell of a receipt: planned, trained, and the plan held against what was measured."""

from dataclasses import replace

import torch

from benchmarks.arms import run_cell
from benchmarks.cells import Figures
from benchmarks.random_models import choose_device, plan_memory
from benchmarks.receipt_stages.jobs import find_cell
from tuning.machine import process_memory

_ROOM = 0.92  # of the device's memory that a plan may fill before activations are recomputed


def run(stage: str, name: str) -> Figures:
    """Plan a cell, train it, and hold the plan against what was measured."""
    device = choose_device()
    on_gpu = device.type == "cuda"
    cell = find_cell(stage, name, rehearsal=not on_gpu)
    before = 0 if on_gpu else process_memory()
    memory = plan_memory(cell, device_type=device.type, process_bytes=before)
    if on_gpu and memory.total > _ROOM * torch.cuda.get_device_properties(device).total_memory:
        cell = replace(cell, lean=True)
        memory = plan_memory(cell, device_type=device.type)
    figures: Figures = {
        "shape": cell.shape, "method": cell.method, "length": cell.length, "rank": cell.rank, "dropout": cell.dropout,
        "micro_batch_rows": cell.rows, "micro_batches": cell.micro_batches, "supervised": cell.supervised,
        "gradient_checkpointing": cell.lean, "steps": cell.timed,
    }  # fmt: skip
    figures |= run_cell(cell, name.rpartition("/")[2])
    if name.endswith("/ours"):
        figures["planned_gib"] = round(memory.total / 2**30, 2)
    return figures
