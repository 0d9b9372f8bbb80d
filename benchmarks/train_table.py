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
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import harness  # noqa: E402
from benchmarks.cells import ARMS, LENGTHS, METHODS, SHAPES, Cell, Figures  # noqa: E402

MODES = ("fast", "lean")
# GB of the original's README on an A100, by length.
ORIGINAL_GB = {
    ("7b", "lora"): dict(zip(LENGTHS, (20.1, 20.4, 21.5, 23.8, 29.7, 36.6), strict=True)),
    ("7b", "lora_emb"): dict(zip(LENGTHS, (33.7, 34.1, 35.2, 35.1, 39.2, 48.5), strict=True)),
    # Its Q-LoRA is GPTQ's Int4.
    ("7b", "qlora_gptq"): dict(zip(LENGTHS, (11.5, 11.5, 12.3, 13.9, 16.9, 23.5), strict=True)),
    ("7b", "qlora_nf4"): dict(zip(LENGTHS, (11.5, 11.5, 12.3, 13.9, 16.9, 23.5), strict=True)),
}


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
        from benchmarks.arms import run_cell as run_here

        print(json.dumps(run_here(cells[0], args.arm)))
        return
    deadline, measured = time.monotonic() + 60 * args.minutes, []
    for cell, arm in itertools.product(args.cells, args.arms):
        figures = run_cell(cell, arm) if time.monotonic() < deadline else {"not_measured": "the time was up"}
        measured.append({"cell": cell, "arm": arm, **figures})
        print(f"{cell} {arm}: {figures}", file=sys.stderr, flush=True)
        if args.out:
            keep(args.out, measured)
    print(draw_table(measured))


def read_cell(cell: str, parser: argparse.ArgumentParser) -> Cell:
    """A cell by its four parts."""
    parts = cell.split("/")
    known = len(parts) == 4 and parts[0] in SHAPES and parts[1] in METHODS and parts[2].isdecimal()
    if not known or parts[3] not in MODES:
        parser.error(f"{cell}: expected SHAPE/METHOD/LENGTH/MODE of {list(SHAPES)}, {list(METHODS)}, {list(MODES)}")
    return Cell(parts[0], parts[1], int(parts[2]), lean=parts[3] == "lean")


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


# ---- results ----


def keep(out: Path, measured: list[Figures]) -> None:
    """Write JSON and table."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    packages = ("torch", "transformers", "peft", "accelerate", "trl")
    figures = {**harness.describe_machine(packages), "device": device, "supervised": Cell.supervised, "cells": measured}
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
