"""Planned memory of one GPU by method and length: python benchmarks/plan_table.py [--shape 7b]. Nothing is trained.

The shapes and the LoRA of train_table.py, one row of the full length in a micro-batch, half of its tokens supervised,
computing in bf16; GB (10^9 bytes), with activations kept and computed again.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from transformers import Qwen2ForCausalLM

from benchmarks.train_table import GROUP_SIZE, LENGTHS, LORA, SHAPES, SUPERVISED, build_config
from tuning.model.attention import NAME
from tuning.model.lora import add_lora
from tuning.model.quantization import Quantization, quantize_meta_model
from tuning.model.training_model import TrainingModel, enable_gradient_checkpointing
from tuning.planning.memory import Memory, MicroBatchShape, estimate_memory

KINDS = {
    "LoRA": None,
    "Q-LoRA, NF4": Quantization("bitsandbytes", 4, "nf4", double=True),
    "Q-LoRA, GPTQ Int4": Quantization("gptq", 4, group_size=GROUP_SIZE),
}


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    args = parser.parse_args(argv)
    print("| GB | " + " | ".join(map(str, LENGTHS)) + " |\n|---|" + "---|" * len(LENGTHS))
    for name, quantization in KINDS.items():
        for lean in (False, True):
            planned = [plan(args.shape, quantization, length, lean=lean).total / 1e9 for length in LENGTHS]
            again = ", activations computed again" if lean else ""
            print(f"| {name}{again} | " + " | ".join(f"{total:.1f}" for total in planned) + " |", flush=True)


def plan(shape: str, quantization: Quantization | None, length: int, *, lean: bool) -> Memory:
    """Memory of one step, of a model without storage."""
    with torch.device("meta"):
        model = Qwen2ForCausalLM._from_config(build_config(shape), dtype=torch.bfloat16)
    if quantization:
        quantize_meta_model(model, quantization, torch.bfloat16)
    if lean:
        enable_gradient_checkpointing(model)
    training_model = TrainingModel(*add_lora(model, **LORA))
    model.set_attn_implementation(NAME)
    return estimate_memory(
        training_model,
        MicroBatchShape((length,), round(SUPERVISED * length), packed=True),
        dtype=torch.bfloat16,
        engine="single",
        num_processes=1,
        optimizer="adamw_torch",
        device_type="cuda",
        process_bytes=0,
        accumulates=True,
    )


if __name__ == "__main__":
    main()
