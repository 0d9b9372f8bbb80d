"""Planned against measured memory: python benchmarks/bench_memory.py [--out FILE].

Each cell is a run of finetune.py in a process of its own, three steps on rows of about 400 tokens, of a random model
made on the spot; what it planned before it loaded weights stands beside the peak that it measured (resident memory on a
CPU, allocated memory on a GPU).
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import harness  # noqa: E402

SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 4096},
    "256 x 8": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8, "vocab_size": 151_936},
    "512 x 12": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12, "vocab_size": 151_936},
    "1024 x 12": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 12, "vocab_size": 32_000},
}
MODES = {
    "LoRA": ["--use_lora", "--lora_r", "16"],
    "LoRA, lean": ["--use_lora", "--lora_r", "16", "--gradient_checkpointing", "True"],
    "full": [],
    "full, lean": ["--gradient_checkpointing", "True"],
    "LoRA, bf16": ["--use_lora", "--lora_r", "16", "--bf16", "True"],
}


def main(argv: list[str] | None = None) -> None:
    """Run the cells, print a table, keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=[shape for shape in SHAPES if shape != "tiny"])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--batch", type=int, default=8, help="rows of a micro-batch, of 512 tokens at most")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    args = parser.parse_args(argv)
    cells = []
    print("| shape | mode | planned GiB | measured GiB | planned / measured |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as directory:
        for shape in args.shapes:
            model = build_model(Path(directory) / shape.replace(" ", ""), SHAPES[shape])
            data = write_rows(Path(directory) / "data.json")
            for mode in args.modes:
                cell = {"shape": shape, "mode": mode, **measure(model, data, MODES[mode], args.batch, directory)}
                cells.append(cell)
                planned, measured = cell["planned_gib"], cell["measured_gib"]
                print(f"| {shape} | {mode} | {planned:.2f} | {measured:.2f} | {planned / measured:.2f} |", flush=True)
    if args.out:
        figures = {**harness.describe_machine(("torch", "transformers", "peft")), "cells": cells}
        args.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def build_model(directory: Path, shape: dict[str, int]) -> Path:
    """A random Qwen3 with the example's tokenizer."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from examples.tiny_model import build_tokenizer, read_texts

    tokenizer = build_tokenizer(read_texts(), vocabulary_size=1024)
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": shape["hidden_size"] // 8}
    torch.manual_seed(0)
    config = Qwen3Config(**shape, **heads, tie_word_embeddings=False, eos_token_id=tokenizer.eos_token_id)
    Qwen3ForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def write_rows(path: Path) -> Path:
    """Conversations of about 400 tokens."""
    chance = random.Random(0)
    examples = json.loads((ROOT / "examples" / "conversations.json").read_text(encoding="utf-8"))
    texts = [turn["value"] for row in examples for turn in row["conversations"]]
    rows = []
    for _ in range(96):
        question, answer = (" ".join(chance.choices(texts, k=number)) for number in (6, 8))
        rows.append({"conversations": [{"from": "user", "value": question}, {"from": "assistant", "value": answer}]})
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return path


def measure(model: Path, data: Path, mode: list[str], batch: int, directory: str) -> dict[str, Any]:
    """One run. Returns: planned and measured GiB, and the plan's parts."""
    out = Path(directory) / "out"
    words = ["--model_name_or_path", model, "--data_path", data, "--output_dir", out, "--overwrite_output_dir"]
    words += ["--max_steps", 3, "--per_device_train_batch_size", batch, "--model_max_length", 512]
    words += ["--save_strategy", "no", "--report_to", "none", "--on_long", "drop", *mode]
    done = subprocess.run(
        [sys.executable, ROOT / "finetune.py", *map(str, words)], capture_output=True, text=True, cwd=ROOT
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    run = json.loads((out / "run.json").read_text())
    memory = run["plan"]["memory"]
    return {
        "planned_gib": memory["total"] / 2**30,
        "measured_gib": run["peak_gib"],
        "parts_gib": {name: round(size / 2**30, 3) for name, size in memory.items()},
    }


if __name__ == "__main__":
    main()
