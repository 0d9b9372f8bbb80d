"""A training cell of a receipt: planned, trained, and the plan held against what was measured."""

import gc
from dataclasses import replace

import torch

from benchmarks.arms import run_cell
from benchmarks.cells import Figures
from benchmarks.random_models import choose_device, plan_memory
from benchmarks.receipt_stages.jobs import find_cell
from tuning.machine import process_memory

_ROOM = 0.92  # of the device's memory that a plan may fill before activations are recomputed


def run(stage: str, name: str) -> Figures:
    """Plan a cell, train it, and hold the plan against what was measured.

    Activations are recomputed where the plan says they do not fit, and where it was wrong or the arm takes more.
    """
    device = choose_device()
    on_gpu = device.type == "cuda"
    cell, arm = find_cell(stage, name, rehearsal=not on_gpu), name.rpartition("/")[2]
    before = 0 if on_gpu else process_memory()
    planned = plan_memory(cell, device_type=device.type, process_bytes=before).total
    if on_gpu and planned > _ROOM * torch.cuda.get_device_properties(device).total_memory:
        cell = replace(cell, lean=True)
    figures: Figures = {"ran_out_of_memory": False}
    try:
        figures |= run_cell(cell, arm)
    except torch.OutOfMemoryError:
        if cell.lean:
            raise
        figures["ran_out_of_memory"] = True
    if figures["ran_out_of_memory"]:  # not above, where the error still holds the tensors
        gc.collect()
        torch.cuda.empty_cache()
        cell = replace(cell, lean=True)
        figures |= run_cell(cell, arm)
    if arm == "ours":
        if cell.lean:
            planned = plan_memory(cell, device_type=device.type, process_bytes=before).total
        figures["planned_gib"] = round(planned / 2**30, 2)
    sizes = {
        "shape": cell.shape, "method": cell.method, "length": cell.length, "rank": cell.rank, "dropout": cell.dropout,
        "micro_batch_rows": cell.rows, "micro_batches": cell.micro_batches, "supervised": cell.supervised,
        "gradient_checkpointing": cell.lean, "steps": cell.timed,
    }  # fmt: skip
    return sizes | figures
