"""What does LoRA on experts cost? python benchmarks/bench_experts.py --out FILE.

One decoder of Qwen3-MoE's shape, forward and backward, in turn: LoRA on attention alone, ours on the experts, too, and
peft's own on the experts with each of transformers' ways to compute them. Each arm in its own process, for the peak of
its memory.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.harness import describe_machine  # noqa: E402

SHAPE = dict(
    vocab_size=1024, hidden_size=512, intermediate_size=1024, moe_intermediate_size=768, num_hidden_layers=2,
    num_attention_heads=8, num_key_value_heads=2, head_dim=64, num_experts=64, num_experts_per_tok=4,
)  # fmt: skip
TOKENS, RANK = 512, 16
# name: (experts adapted, by our products, transformers' way to compute experts)
ARMS: dict[str, tuple[bool, bool, str]] = {
    "attention alone": (False, False, "grouped_mm"),
    "ours": (True, True, "grouped_mm"),
    "peft, grouped_mm": (True, False, "grouped_mm"),
    "peft, eager": (True, False, "eager"),
}


def measure(arm: str, repeats: int) -> dict[str, Any]:
    """Seconds of forward and backward, peak memory in MiB, and the loss of the first step."""
    import torch
    from peft.tuners.lora.layer import ParamWrapper
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from tuning.model.lora import add_lora

    adapted, ours, way = ARMS[arm]
    torch.manual_seed(0)
    base = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE))
    base.set_experts_implementation(way)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    experts = "on" if adapted else "off"
    model, _ = add_lora(base, r=RANK, alpha=16, dropout=0.0, target_modules=targets, experts=experts)
    for module in model.modules():
        if isinstance(module, ParamWrapper) and not ours:
            vars(module).pop("forward", None)  # peft's own
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02)
    ids = torch.randint(0, SHAPE["vocab_size"], (1, TOKENS))
    seconds, losses = [], []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        seconds.append(time.perf_counter() - began)
        losses.append(loss.item())
        model.zero_grad()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": seconds[1:], "peak_mib": peak, "loss": losses[0]}


def main() -> None:
    """Run all arms, in turn, several times."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arm", choices=ARMS)
    parser.add_argument("--repeats", type=int, default=3, help="steps in a process")
    parser.add_argument("--rounds", type=int, default=3, help="processes for each arm")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(measure(args.arm, args.repeats)))
        return
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    for _ in range(args.rounds):
        for arm, runs in found.items():
            words = [sys.executable, __file__, "--arm", arm, "--repeats", str(args.repeats)]
            done = subprocess.run(words, check=True, capture_output=True, text=True)
            runs.append(json.loads(done.stdout.splitlines()[-1]))
    arms = {
        arm: {
            "seconds": statistics.median(s for run in runs for s in run["seconds"]),
            "peak_mib": statistics.median(run["peak_mib"] for run in runs),
            "loss": runs[0]["loss"],
        }
        for arm, runs in found.items()
    }
    ours = arms["ours"]["seconds"]
    for arm, each in arms.items():
        each["times_ours"] = each["seconds"] / ours
        print(
            f"{arm}: {each['seconds']:.3f} s ({each['times_ours']:.2f} times ours), peak {each['peak_mib']:,.0f} MiB, "
            f"loss {each['loss']:.6f}"
        )
    if args.out:
        record = {"machine": describe_machine(["torch", "transformers", "peft"]), "shape": SHAPE | {"r": RANK}}
        args.out.write_text(json.dumps({**record, "tokens": TOKENS, "arms": arms}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
