"""What a receipt holds: its entries by stage, most valuable first. Nothing here needs torch.

A stage's entries are measured by jobs, each in a process of its own: those of environment and correctness together,
every cell alone, so that one which runs out of memory leaves nothing behind.
"""

import itertools
from dataclasses import replace

from benchmarks.cells import Cell

ENVIRONMENT = ("device", "matrix products", "memory")
CORRECTNESS = (
    *("packed, fp32", "packed, bf16", "packed, fp16", "attention, bf16", "attention, fp16"),
    *("windows, fp32", "windows, bf16", "windows, fp16", "attention in a window, bf16", "attention in a window, fp16"),
    *("experts, fp32", "experts, bf16", "experts, fp16", "merge", "NF4, bf16"),
)
PROFILE = "the slowest cell"
MICRO_BATCH = 8192  # tokens; a step is two
LENGTHS = (2048, 4096, 8192, 512)
# NVIDIA's own figure, of the work of the cell "nemo" on an H100.
NEMO_TOKENS_PER_S = 14_110
NEMO = Cell("7b", "lora", 4096, rank=16, rows=2, micro_batches=2, supervised=1.0, warm_up=2, timed=5)
# As a row of the table: a shape, a LoRA, its dropout.
WORK = {
    "7b-r16": ("7b", "lora", 16, 0.0),
    "8b-r64": ("8b", "lora", 64, 0.05),
    "7b-r64": ("7b", "lora", 64, 0.05),
    "8b-r16": ("8b", "lora", 16, 0.0),
}
QLORA_WORK = {
    "7b-nf4": ("7b", "qlora_nf4", 64, 0.0),
    "7b-gptq": ("7b", "qlora_gptq", 64, 0.0),
    "8b-nf4": ("8b", "qlora_nf4", 64, 0.0),
}
_REHEARSED = {"7b": "tiny", "8b": "tiny3"}


def list_cells(stage: str) -> dict[str, Cell]:
    """Cells by name, WORK-LENGTH/ARM, in the order in which they are run."""
    cells: dict[str, Cell] = {}
    if stage == "qlora":
        for arm, length, (name, work) in itertools.product(("ours", "plain"), (2048, 8192), QLORA_WORK.items()):
            if not (arm == "plain" and name == "7b-gptq"):
                cells[f"{name}-{length}/{arm}"] = _build(work, length)
        return cells
    cells = {"nemo/ours": NEMO, "nemo/plain": NEMO}
    for length, arm, (name, work) in itertools.product(LENGTHS, ("ours", "plain"), WORK.items()):
        cells[f"{name}-{length}/{arm}"] = _build(work, length)
    cells["nemo/compiled"] = NEMO
    cells["nemo/trl"] = NEMO
    for length, (name, work) in itertools.product(LENGTHS, WORK.items()):
        cells[f"{name}-{length}/trl"] = _build(work, length)
    return cells


def _build(work: tuple[str, str, int, float], length: int) -> Cell:
    shape, method, rank, dropout = work
    rows = MICRO_BATCH // length
    return Cell(shape, method, length, rank, dropout, rows, micro_batches=2, warm_up=2, timed=5)


def list_jobs(stage: str) -> list[tuple[str, ...]]:
    """The names of the entries that each process of a stage measures."""
    if stage in ("training", "qlora"):
        return [(name,) for name in list_cells(stage)]
    return [{"environment": ENVIRONMENT, "correctness": CORRECTNESS, "profile": (PROFILE,)}[stage]]


def list_libraries(stage: str, name: str) -> tuple[str, ...]:
    """What an entry needs beside transformers and peft."""
    if name.endswith("/trl"):
        return ("trl", "datasets")
    return ("bitsandbytes",) if name.startswith("NF4") or (stage == "qlora" and "-nf4" in name) else ()


def find_cell(stage: str, name: str, *, rehearsal: bool) -> Cell:
    """A cell; in a rehearsal at a tiny size."""
    cell = list_cells(stage)[name]
    if not rehearsal:
        return cell
    sizes = {"shape": _REHEARSED[cell.shape], "length": cell.length // 64, "rank": cell.rank // 8}
    return replace(cell, **sizes, warm_up=1, timed=2)
