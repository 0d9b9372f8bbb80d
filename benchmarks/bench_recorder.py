"""What does recording every row's loss cost a step? OMP_NUM_THREADS=1 python benchmarks/bench_recorder.py.

Forward and backward of one packed micro-batch, with and without, in turn; and the file of a million visits.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import pyarrow as pa
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.harness import describe_machine
from data_utils.micro_batch import pack_rows
from tuning.model.lora import add_lora
from tuning.model.packing import enable_packing
from tuning.model.training_model import TrainingModel
from tuning.training.row_recorder import ROWS_FILE, RowRecorder

SHAPE = dict(
    vocab_size=32_000, hidden_size=512, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=8,
    num_key_value_heads=4, head_dim=64,
)  # fmt: skip
ROWS, LENGTH, VISITS = 16, 64, 1_000_000


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40, help="of each arm")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = TrainingModel(*add_lora(Qwen3ForCausalLM(Qwen3Config(**SHAPE)), r=16, alpha=16, dropout=0.0))
    enable_packing(model, max_length=LENGTH, dtype=torch.float32)
    model.train()
    chance = np.random.default_rng(0)
    rows = []
    for _ in range(ROWS):
        ids = chance.integers(0, SHAPE["vocab_size"], LENGTH)
        rows.append((ids, np.where(np.arange(LENGTH) < LENGTH // 2, -100, ids), None))
    batch: Any = pack_rows(rows)
    recorder = RowRecorder(np.full(ROWS, LENGTH // 2, np.int32), lambda indices: {}, 1)
    seconds: dict[str, list[float]] = {"without": [], "with": []}
    for step in range(args.steps + 2):
        for arm, times in seconds.items():
            model.records_rows = arm == "with"
            began = time.perf_counter()
            model(**batch).backward()
            if model.records_rows:
                recorder.add(step + 1, list(range(ROWS)), model.row_losses)
            model.zero_grad()
            times.append(time.perf_counter() - began)
    medians = {arm: statistics.median(times[2:]) for arm, times in seconds.items()}
    ratios = [a / b - 1 for a, b in zip(seconds["with"][2:], seconds["without"][2:], strict=True)]
    began = time.perf_counter()
    recorder.collect()
    collect_s = (time.perf_counter() - began) / (args.steps + 2)
    print(f"step: without {medians['without']:.4f} s, with {medians['with']:.4f} s")
    share = collect_s / medians["without"]
    print(f"median of pairs: {statistics.median(ratios):+.2%}; to the host: {share:.3%} of a step")

    names = pa.array([f"data.json:{number}" for number in range(VISITS)])
    whole = RowRecorder(
        np.full(VISITS, 30, np.int32),
        lambda indices: {
            "row_id": names.take(pa.array(indices)), "source": names.take(pa.array(indices)),
            "prompt_hash": pa.array(indices), "answer_hash": pa.array(indices),
            "tokens": pa.array(np.full(len(indices), 30, np.int32)),
        },
        VISITS // 16,
    )  # fmt: skip
    for step in range(VISITS // 16):
        whole.add(step + 1, range(step * 16, step * 16 + 16), torch.rand(16))
    whole.gather()
    with tempfile.TemporaryDirectory() as directory:
        began = time.perf_counter()
        whole.write(Path(directory))
        write_s, size = time.perf_counter() - began, (Path(directory) / ROWS_FILE).stat().st_size
    print(f"a file of {VISITS:,} visits: {write_s:.2f} s, {size / 2**20:.1f} MiB")
    if args.out:
        result = {**describe_machine(["torch", "transformers", "pyarrow"]), "seconds": seconds, "write_s": write_s}
        args.out.write_text(json.dumps({**result, "collect_s": collect_s, "file_bytes": size}, indent=1) + "\n")


if __name__ == "__main__":
    main()
