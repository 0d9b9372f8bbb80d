"""How fast does a merge go through a checkpoint, and in how much memory? python benchmarks/bench_merge.py --work DIR.

A generated bf16 checkpoint of 8 GB and an adapter on all its linear layers, in turn: cp of its files and fsync, ours
without and with verification, and peft's merge_and_unload with save_pretrained. Each arm in its own process, for the
peak of its memory. DIR needs 17 GB.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.harness import describe_machine  # noqa: E402

# Qwen3-4B's shape: 36 layers, a vocabulary of 151,936, tied.
SHAPE = dict(
    vocab_size=151_936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
)  # fmt: skip
SHARD_BYTES, RANK = 2_000_000_000, 16
ARMS = ("cp and fsync", "ours, not verified", "ours, verified", "peft")


def build(work: Path, shape: dict[str, Any] = SHAPE, shard_bytes: int = SHARD_BYTES) -> None:
    """Write WORK/base and WORK/adapter, a layer at a time."""
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import save_file
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from examples.tiny_model import build_tokenizer, read_texts

    base = work / "base"
    base.mkdir(parents=True)
    config = Qwen3Config(**shape, dtype="bfloat16", architectures=["Qwen3ForCausalLM"])
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config)
    config.save_pretrained(base)
    tokenizer = build_tokenizer(read_texts(), vocabulary_size=1024)
    tokenizer.save_pretrained(base)
    torch.manual_seed(0)
    groups: list[dict[str, Any]] = [{}]
    tied = {"lm_head.weight"} if shape["tie_word_embeddings"] else set()
    for name, value in model.state_dict().items():
        if name not in tied:
            if sum(each.numel() * 2 for each in groups[-1].values()) > shard_bytes:
                groups.append({})
            groups[-1][name] = value
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        tensors = {
            name: torch.ones(value.shape, dtype=torch.bfloat16)
            if "norm" in name
            else torch.empty(value.shape, dtype=torch.bfloat16).normal_(std=0.02)
            for name, value in group.items()
        }
        save_file(tensors, base / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(group, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    peft_model = get_peft_model(
        model, LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM"), low_cpu_mem_usage=True
    )
    state = {
        name.replace(".default", ""): torch.empty(value.shape).normal_(std=0.02)
        for name, value in peft_model.state_dict().items()
        if "lora_" in name
    }
    peft_config: Any = peft_model.peft_config["default"]
    peft_config.base_model_name_or_path = str(base)
    peft_config.save_pretrained(work / "adapter")
    save_file(state, work / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})


def run_arm(arm: str, work: Path) -> None:
    """Make WORK/out."""
    base, adapter, out = work / "base", work / "adapter", work / "out"
    if arm == "cp and fsync":
        out.mkdir()
        subprocess.run(["cp", *map(str, base.glob("*.safetensors")), str(out)], check=True)
        for file in out.iterdir():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    elif arm == "peft":
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
        os.sync()
    else:
        import merge_lora

        more = ["--no-verify"] if arm == "ours, not verified" else []
        merge_lora.main([str(adapter), str(out), *more])


def main() -> None:
    """Run all arms, in turn, several times."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="directory; the checkpoint in it is kept")
    parser.add_argument("--arm", choices=ARMS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.arm:
        run_arm(args.arm, args.work)
        kind = resource.RUSAGE_CHILDREN if args.arm == "cp and fsync" else resource.RUSAGE_SELF
        print(json.dumps({"peak_mib": resource.getrusage(kind).ru_maxrss / 1024}))
        return
    if not (args.work / "adapter").is_dir():
        build(args.work)
    size = sum(file.stat().st_size for file in (args.work / "base").glob("*.safetensors"))
    measured: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for _ in range(args.rounds):
        for arm in ARMS:
            shutil.rmtree(args.work / "out", ignore_errors=True)
            os.sync()
            command = [sys.executable, __file__, "--work", str(args.work), "--arm", arm]
            began = time.perf_counter()
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            seconds = time.perf_counter() - began
            measured[arm].append({"seconds": seconds, **json.loads(done.stdout.splitlines()[-1])})
            print(f"{arm}: {seconds:.1f} s, {measured[arm][-1]['peak_mib']:.0f} MiB", flush=True)
    copied = statistics.median(run["seconds"] for run in measured["cp and fsync"])
    for arm, runs in measured.items():
        seconds = statistics.median(run["seconds"] for run in runs)
        peak = max(run["peak_mib"] for run in runs)
        print(f"| {arm} | {seconds:.1f} | {100 * copied / seconds:.0f} % | {peak:,.0f} |")
    if args.out:
        args.out.write_text(
            json.dumps(
                {
                    "machine": describe_machine(["torch", "transformers", "peft", "safetensors"]),
                    "bytes": size,
                    "arms": measured,
                },
                indent=2,
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
