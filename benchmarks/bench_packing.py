"""Does packing beat padding on ragged real rows? python benchmarks/bench_packing.py DATA... --tokenizer DIR --out FILE.

For each architecture whose layers once kept rows from being packed: the same model, data and settings, packed and
padded (by a field that means nothing to the model, but has it padded), in turn. Ratios of tokens/s.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.harness import describe_machine  # noqa: E402

SHAPE = dict(
    hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    head_dim=64, max_position_embeddings=4096,
)  # fmt: skip
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3.5 (3 of 4 layers Gated DeltaNet)": (
        "qwen3_5_text",
        dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=64, linear_value_head_dim=64),
    ),
    "mistral, window of 128": ("mistral", dict(sliding_window=128)),
    "gemma-2 (capped scores and logits)": ("gemma2", dict(sliding_window=128)),
}


def build(kind: str, out: Path, tokenizer: Path, *, padded: bool) -> None:
    """Write a model of a kind, with the tokenizer's files."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    name, fields = KINDS[kind]
    vocabulary = len(AutoTokenizer.from_pretrained(tokenizer))
    more = {"attn_temperature_tuning": True} if padded else {}
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **SHAPE, **fields, **more, vocab_size=vocabulary, pad_token_id=None)
    AutoModelForCausalLM.from_config(config).save_pretrained(out)
    for path in tokenizer.iterdir():
        shutil.copy(path, out)


def run(model: Path, out: Path, data: list[str], steps: int) -> dict[str, Any]:
    """Train a few steps. Returns: run.json."""
    words = [
        *("--model_name_or_path", model, "--data_path", *data, "--output_dir", out, "--max_steps", steps, "--use_cpu"),
        *("--per_device_train_batch_size", 8, "--model_max_length", 1024, "--save_strategy", "no", "--use_lora"),
        *(
            "--lora_r",
            16,
            "--lora_dropout",
            0,
            "--train_embeddings",
            "off",
            "--ignore_memory_plan",
            "--chat_template",
            "chatml-tools",
        ),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
    subprocess.run(
        [sys.executable, ROOT / "finetune.py", *map(str, words)], env=environment, check=True, stdout=subprocess.DEVNULL
    )
    record: dict[str, Any] = json.loads((out / "run.json").read_text(encoding="utf-8"))
    shutil.rmtree(out)
    return record


def main() -> None:
    """Run all kinds, both ways, in turn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="+")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    results: dict[str, Any] = {"machine": describe_machine(["torch", "transformers", "peft"]), "kinds": {}}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for number, kind in enumerate(KINDS):
            speeds: dict[str, list[float]] = {"packed": [], "padded": []}
            losses = {}
            for way in speeds:
                build(kind, root / f"{number}-{way}", args.tokenizer, padded=way == "padded")
            for _ in range(args.repeats):
                for way, found in speeds.items():
                    record = run(root / f"{number}-{way}", root / "out", args.data, args.steps)
                    assert record["layout"]["packed"] == (way == "packed"), record["layout"]
                    found.append(record["tokens_per_s"])
                    losses[way] = record["loss"]["last"]
            medians = {way: statistics.median(found) for way, found in speeds.items()}
            ratio = medians["packed"] / medians["padded"]
            results["kinds"][kind] = {"tokens_per_s": speeds, "ratio": ratio, "last_loss": losses}
            print(
                f"{kind}: packed {medians['packed']:,.0f}, padded {medians['padded']:,.0f} tokens/s: {ratio:.2f} times"
            )
    args.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
