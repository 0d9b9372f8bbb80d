"""Do two versions of this toolkit train alike, bit for bit? python benchmarks/same_bits.py BEFORE AFTER [--cells ...].

BEFORE and AFTER are source trees. Each cell is a run of six steps of each tree's finetune.py on the CPU, on the same
random model and the same conversations, with dropout: {lora, full, rows (LoRA and rows of the vocabulary), nf4} x
{packed, padded} x {1 process, 2 processes with DDP}. A cell is the same if loss, gradient norm and learning rate of
every step are, and every tensor of the result and of its checkpoints, with name, dtype, shape and bytes. Some cells are
also resumed: AFTER goes on from BEFORE's checkpoint, and must end as BEFORE's run that was never stopped.
Nothing of either tree is imported. Exit code: 1 where anything differs.
All cells take about twenty minutes on two busy cores.
"""

import argparse
import importlib.metadata
import itertools
import json
import os
import platform
import shutil
import struct
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

METHODS = {
    "lora": ["--use_lora", "--train_embeddings", "off", "--lora_dropout", "0.05"],
    "full": [],
    "rows": ["--use_lora", "--train_embeddings", "tokens", "--lora_dropout", "0.05"],
    "nf4": ["--q_lora", "--lora_dropout", "0.05"],
}
CELLS = ["-".join(names) for names in itertools.product(METHODS, ("packed", "padded"), ("1", "2"))]
RESUMED = ("lora-packed-1", "full-packed-2", "nf4-packed-1")
STEPS, SAVED_STEP = 6, 3
FLAGS = (
    "--seed 42 --learning_rate 3e-3 --per_device_train_batch_size 2 --gradient_accumulation_steps 2 "
    f"--max_steps {STEPS} --logging_steps 1 --save_strategy steps --save_steps {SAVED_STEP} --model_max_length 256 "
    "--no_cache --use_cpu True --report_to none"
).split()
MEASURED = ("loss", "grad_norm", "learning_rate")
PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "safetensors")
TIMEOUT_S = 600


@dataclass
class Comparison:
    """What was compared of two output directories. difference: the first one; None: they are the same."""

    num_steps: int
    num_tensors: int
    megabytes: float
    difference: str | None


class RunError(Exception):
    """A run failed, or was not the run that the cell wants."""


# ---- comparison ----


def compare(before: Path, after: Path, *, first_step: int = 1) -> Comparison:
    """Hold two output directories against each other: measured values from first_step on, and all tensors."""
    steps = [{step: v for step, v in read_steps(path).items() if step >= first_step} for path in (before, after)]
    tensors = [read_tensors(path) for path in (before, after)]
    num_bytes = sum(len(content) for _, _, content in tensors[0].values())
    difference = find_difference(*steps) or find_difference(*tensors)
    if set(steps[0]) != set(range(first_step, STEPS + 1)):
        difference = difference or f"steps {sorted(steps[0])} instead of {first_step} to {STEPS}"
    if not tensors[0]:
        difference = difference or "no tensors"
    return Comparison(len(steps[0]), len(tensors[0]), num_bytes / 1e6, difference)


def read_steps(directory: Path) -> dict[int, tuple[str, ...]]:
    """By step what was measured, written so that equal texts are equal floats (NaN included)."""
    entries = map(json.loads, (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return {
        entry["step"]: tuple(f"{name} {entry[name]!r}" for name in MEASURED) for entry in entries if "loss" in entry
    }


def read_tensors(directory: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """dtype, shape and bytes of each tensor in the safetensors files of a directory and its checkpoints."""
    tensors = {}
    for path in sorted(directory.rglob("*.safetensors")):
        content = path.read_bytes()
        (header_bytes,) = struct.unpack("<Q", content[:8])
        data = memoryview(content)[8 + header_bytes :]
        for name, entry in json.loads(content[8 : 8 + header_bytes]).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                key = f"{path.relative_to(directory)}: {name}"
                tensors[key] = entry["dtype"], entry["shape"], bytes(data[begin:end])
    return tensors


def find_difference(before: dict[Any, tuple], after: dict[Any, tuple]) -> str | None:
    """Describe the first difference between two tables of what was measured, or of tensors."""
    for name in [*before, *(name for name in after if name not in before)]:
        said = name if isinstance(name, str) else f"step {name}"
        if name not in before or name not in after:
            return f"{said}: only in {'AFTER' if name in after else 'BEFORE'}"
        for was, now in zip(before[name], after[name], strict=True):
            if was != now:
                return f"{said}: {'bytes differ' if isinstance(was, bytes) else f'{was}, then {now}'}"
    return None


# ---- runs ----


def build_models(root: Path, after: Path) -> None:
    """Write root/packed and root/padded: random models that can be packed and cannot, with the example's tokenizer."""
    import torch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    example = root / "example"
    words = [sys.executable, str(after / "examples" / "tiny_model.py"), str(example)]
    subprocess.run(words, cwd=after, env=make_environment(root), check=True, stdout=subprocess.DEVNULL)
    tokenizer = AutoTokenizer.from_pretrained(example)
    unpackable = {"attn_temperature_tuning": True}  # means nothing to Qwen3, but such models are padded
    for name, settings in (("packed", {}), ("padded", unpackable)):
        torch.manual_seed(0)
        config = Qwen3Config(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, head_dim=16,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False,
            initializer_range=0.1,  # sharper than usual, so that attention matters
            bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
            **settings,
        )  # fmt: skip
        Qwen3ForCausalLM(config).save_pretrained(root / name)
        for path in example.iterdir():
            if path.name.startswith(("tokenizer", "special_tokens")):
                shutil.copy(path, root / name)


def make_environment(root: Path) -> dict[str, str]:
    """One thread, a cache of our own, and no way to another tree's modules."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return environment | {
        "OMP_NUM_THREADS": "1",
        "XDG_CACHE_HOME": str(root / "cache"),
        "PYTHONDONTWRITEBYTECODE": "1",  # leaves the trees as they are
    }


def train(tree: Path, root: Path, cell: str, output: Path, data: Path, *more: str) -> None:
    """Run a tree's finetune.py. Raises: RunError: it failed, or rows did not lie as the cell says."""
    method, layout, processes = cell.split("-")
    launch = [] if processes == "1" else f"-m torch.distributed.run --standalone --nproc_per_node {processes}".split()
    paths = ["--model_name_or_path", str(root / layout), "--data_path", str(data), "--output_dir", str(output)]
    done = subprocess.run(
        [sys.executable, *launch, str(tree / "finetune.py"), *paths, *METHODS[method], *FLAGS, *more],
        cwd=tree,
        env=make_environment(root),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "rror" in line] or done.stderr.splitlines() or ["?"]
        raise RunError(f"{tree}: exit code {done.returncode}: {lines[0].strip()}")
    run = json.loads((output / "run.json").read_text(encoding="utf-8"))
    found = (run["layout"]["packed"], run["processes"], run["resumed_from"] is not None)
    if found != (layout == "packed", int(processes), bool(more)):
        raise RunError(f"{tree}: not the run of this cell: (packed, processes, resumed) is {found}")
    if not list((output / f"checkpoint-{SAVED_STEP}").glob("training_state*.safetensors")):
        raise RunError(f"{tree}: no training state in checkpoint-{SAVED_STEP}")


def run_cell(cell: str, trees: tuple[Path, Path], root: Path) -> Comparison:
    """Train with both trees at once and compare. Leaves the output directories in root/CELL."""
    data = trees[1] / "examples" / "conversations.json"
    outputs = [root / cell / name for name in ("before", "after")]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda tree, output: train(tree, root, cell, output, data), trees, outputs))
    return compare(*outputs)


def run_resumed(cell: str, trees: tuple[Path, Path], root: Path) -> Comparison:
    """Go on with AFTER from BEFORE's checkpoint, as if BEFORE had been stopped there."""
    before, resumed = root / cell / "before", root / cell / "resumed"
    resumed.mkdir()
    for name in ("run.json", "metrics.jsonl"):
        shutil.copy(before / name, resumed)
    saved = f"checkpoint-{SAVED_STEP}"
    shutil.copytree(before / saved, resumed / saved)
    data = trees[1] / "examples" / "conversations.json"
    train(trees[1], root, cell, resumed, data, "--resume_from_checkpoint", "auto")
    return compare(before, resumed, first_step=SAVED_STEP + 1)


def describe_versions(trees: tuple[Path, Path]) -> dict[str, Any]:
    """Versions, date, and the commit of each tree ("-dirty" where files differ from it)."""

    def find_commit(tree: Path) -> str | None:
        words = ["git", "-C", str(tree), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
        done = subprocess.run(words, capture_output=True, text=True)
        return done.stdout.strip() or None

    return {
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "before": find_commit(trees[0]),
        "after": find_commit(trees[1]),
    }


def main(argv: list[str] | None = None) -> int:
    """Compare and print a line per cell. Returns: exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--cells", help=f"some of {','.join(CELLS)}")
    args = parser.parse_args(argv)
    cells = args.cells.split(",") if args.cells else CELLS
    if unknown := set(cells) - set(CELLS):
        parser.error(f"no such cell: {', '.join(sorted(unknown))}")
    trees = (args.before.resolve(), args.after.resolve())
    all_same = True
    with tempfile.TemporaryDirectory(prefix="same-bits-") as name:
        root = Path(name)
        build_models(root, trees[1])
        for cell in cells:
            for title, run in ((cell, run_cell), (f"{cell} resumed", run_resumed)):
                if run is run_resumed and (cell not in RESUMED or not (root / cell / "before" / "run.json").exists()):
                    continue
                try:
                    found = run(cell, trees, root)
                except (RunError, subprocess.TimeoutExpired) as error:
                    found = Comparison(0, 0, 0.0, str(error))
                verdict = f"DIFFERENT: {found.difference}" if found.difference else "same"
                all_same &= found.difference is None
                line = f"{title:22}  {found.num_steps} steps  {found.num_tensors:4} tensors  {found.megabytes:6.2f} MB"
                print(f"{line}  {verdict}", flush=True)
            shutil.rmtree(root / cell, ignore_errors=True)
    print(json.dumps(describe_versions(trees)))
    return 0 if all_same else 1


if __name__ == "__main__":
    sys.exit(main())
