"""Planned memory of one GPU by method and length: python benchmarks/plan_table.py [--shape 7b]. Nothing is trained.

The shapes and the LoRA of train_table.py, one row of the full length in a micro-batch, half of its tokens supervised,
computing in bf16; GB (10^9 bytes), with activations kept and computed again.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.cells import LENGTHS, SHAPES, Cell
from benchmarks.random_models import plan_memory

KINDS = {"LoRA": "lora", "Q-LoRA, NF4": "qlora_nf4", "Q-LoRA, GPTQ Int4": "qlora_gptq"}


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    args = parser.parse_args(argv)
    print("| GB | " + " | ".join(map(str, LENGTHS)) + " |\n|---|" + "---|" * len(LENGTHS))
    for name, method in KINDS.items():
        for lean in (False, True):
            cells = [Cell(args.shape, method, length, lean=lean) for length in LENGTHS]
            planned = [plan_memory(cell, device_type="cuda").total / 1e9 for cell in cells]
            again = ", activations computed again" if lean else ""
            print(f"| {name}{again} | " + " | ".join(f"{total:.1f}" for total in planned) + " |", flush=True)


if __name__ == "__main__":
    main()
