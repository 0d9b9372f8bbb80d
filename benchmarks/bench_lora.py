"""What does it gain that layers of one input take their first low-rank products together?

python benchmarks/bench_lora.py. Forward and backward of one packed micro-batch of the large shape of bench_train.py,
with and without, in turn, in one process.
"""

import argparse
import copy
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.bench_train import SHAPES
from benchmarks.harness import describe_machine
from data_utils.micro_batch import pack_rows
from tuning.model import lora_linear
from tuning.model.lora import add_lora
from tuning.model.packing import enable_packing
from tuning.model.training_model import TrainingModel

ROWS, LENGTH = 8, 165  # the mean row of bench_train.py's data


def build(base: Qwen3ForCausalLM, rank: int, *, together: bool) -> TrainingModel:
    """The model with LoRA on every linear layer, packed."""
    names = lora_linear._TOGETHER
    lora_linear._TOGETHER = names if together else ()
    model = TrainingModel(*add_lora(copy.deepcopy(base), r=rank, alpha=32, dropout=0.0))
    lora_linear._TOGETHER = names
    enable_packing(model, max_length=LENGTH, dtype=torch.float32)
    return model.train()


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    shape = {"intermediate_size": 3 * SHAPES["large"]["hidden_size"], "head_dim": 64, **SHAPES["large"]}
    torch.manual_seed(0)
    base = Qwen3ForCausalLM(Qwen3Config(vocab_size=args.vocabulary, tie_word_embeddings=False, **shape))
    chance = np.random.default_rng(0)
    rows = []
    for _ in range(ROWS):
        ids = chance.integers(0, args.vocabulary, LENGTH)
        rows.append((ids, np.where(np.arange(LENGTH) < LENGTH // 7, -100, ids), None))
    batch: Any = pack_rows(rows)
    result: dict[str, Any] = describe_machine(["torch", "transformers", "peft"])
    for rank in args.ranks:
        models = {name: build(base, rank, together=name == "together") for name in ("apart", "together")}
        seconds: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(args.rounds + 1):
            for name, model in models.items():
                began = time.perf_counter()
                model(**batch).backward()
                model.zero_grad()
                seconds[name].append(time.perf_counter() - began)
        medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
        gain = medians["apart"] / medians["together"] - 1
        print(f"rank {rank}: apart {medians['apart']:.3f} s, together {medians['together']:.3f} s: {gain:+.1%}")
        result[f"rank {rank}"] = seconds
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
