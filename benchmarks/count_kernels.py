"""What a training step of the Qwen-7B shape starts on a GPU, counted without one: python benchmarks/count_kernels.py.

One micro-batch (one row of 8,192 tokens, bf16, LoRA r16) runs on tensors that have shapes and no values. Every
operation that would be a kernel is counted with the bytes that it reads and writes, for ours and for transformers with
peft. The decoder layer is the difference of a model with two layers and one with one. Our norms, attention and dropout
count as the one kernel each way that torch has for them on GPUs.

On paper: products at --rate, all else (attention, too) by its memory traffic at --bandwidth. Nothing is measured.
"""

import argparse
import contextlib
import json
import math
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.arms import TARGETS, build_lora_config
from benchmarks.cells import Cell
from benchmarks.harness import describe_machine
from benchmarks.random_models import adapt, build_config
from tuning.model import norm_rotary
from tuning.model.loading import hide_gptqmodel
from tuning.model.training_model import TrainingModel
from tuning.planning.memory import with_storage

_PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm")
_ATTENTION = "_scaled_dot_product"
# Allocations, and operations that only look at a tensor in another way.
_NO_KERNEL = ("empty", "empty_like", "new_empty", "empty_strided", "_unsafe_view", "detach", "alias", "device")
Table = dict[str, dict[str, float]]


class Tally(TorchDispatchMode):
    """Kernels, bytes and operations of products by (part, name)."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels, self.bytes, self.flops = Counter[Any](), Counter[Any](), Counter[Any]()
        self.part, self._inside = "forward", False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if not (self._inside or function.is_view or name in _NO_KERNEL):
            self.add(name, [args, kwargs], result)
        return result

    def add(self, name: str, inputs: Any, outputs: Any) -> None:
        """Count one kernel."""
        kind = "products" if name in _PRODUCTS else "attention" if name.startswith(_ATTENTION) else name
        read, written = ([t for t in tree_leaves(each) if isinstance(t, Tensor)] for each in (inputs, outputs))
        self.kernels[self.part, kind] += 1
        self.bytes[self.part, kind] += sum(map(_count_bytes, (*read, *written)))
        if kind == "products":
            a, b = read[1:3] if name.startswith(("addmm", "baddbmm")) else read[:2]
            self.flops[self.part, kind] += 2 * a.numel() * b.shape[-1]

    @contextlib.contextmanager
    def one_kernel(self, name: str, inputs: Any) -> Iterator[list[Any]]:
        """What runs inside is one kernel on a GPU; its results go into the list."""
        results: list[Any] = []
        self._inside = True
        try:
            yield results
        finally:
            self._inside = False
        self.add(name, inputs, results)


def _count_bytes(tensor: Tensor) -> int:
    """Of a tensor in memory: what is broadcast counts once."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return math.prod(sizes, start=tensor.element_size())


@contextlib.contextmanager
def as_on_a_gpu(tally: Tally) -> Iterator[None]:
    """Inside, our norms and everybody's dropout are the kernels that torch has for them on GPUs."""
    kind, dropout = norm_rotary._RmsNorm, F.dropout
    forward, backward = kind.forward, kind.backward

    def count_forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        with tally.one_kernel("rms_norm", (x, weight)) as results:
            results.append(forward(ctx, x, weight, eps, offset))
        return results[0]

    def count_backward(ctx: Any, d_output: Tensor) -> Any:
        with tally.one_kernel("rms_norm", (d_output, ctx.saved_tensors)) as results:
            results.append(backward(ctx, d_output))
        return results[0]

    kind.forward, kind.backward = staticmethod(count_forward), staticmethod(count_backward)
    F.dropout = lambda x, p, training, inplace: torch.native_dropout(x, p, training)[0]
    try:
        yield
    finally:
        F.dropout = dropout
        kind.forward, kind.backward = staticmethod(forward), staticmethod(backward)


def count_step(arm: str, cell: Cell, num_layers: int) -> Tally:
    """One micro-batch of an arm, of a model with so many layers."""
    config = build_config(cell.shape)
    config.num_hidden_layers, config.layer_types = num_layers, config.layer_types[:num_layers]
    hide_gptqmodel()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        trained: Any = get_peft_model(model, build_lora_config(cell, TARGETS)) if arm == "plain" else None
    if arm == "ours":
        trained = TrainingModel(*adapt(model, cell))
        model.set_attn_implementation("packed_rows")
    tally = Tally()
    with FakeTensorMode(), with_storage(trained, None):
        ids = torch.empty(1, cell.length, dtype=torch.long)
        batch: dict[str, Any] = {"input_ids": ids, "labels": ids}
        if arm == "ours":
            index = torch.empty(cell.targets_per_row, dtype=torch.long)
            batch = {"input_ids": ids, "target_index": index, "targets": index, "position_ids": ids}
            batch |= {"lengths": [cell.length], "row_starts": torch.empty(2, dtype=torch.int32)}
        with as_on_a_gpu(tally), tally:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                result = trained.train()(**batch)
            loss = result if arm == "ours" else result.loss
            tally.part = "backward"
            loss.backward()
    return tally


def count_layer(arm: str, cell: Cell) -> Tally:
    """A decoder layer: what a second one adds."""
    more, layer = count_step(arm, cell, 2), count_step(arm, cell, 1)
    for counts, others in ((layer.kernels, more.kernels), (layer.bytes, more.bytes), (layer.flops, more.flops)):
        differences = {key: others[key] - counts[key] for key in others}
        counts.clear()
        counts.update({key: count for key, count in differences.items() if count})
    return layer


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="7b")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--bandwidth", type=float, default=3.35, help="TB/s (default: an H100's)")
    parser.add_argument("--rate", type=float, default=700, help="TFLOP/s of products (default: about an H100's)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    cell = Cell(args.shape, "lora", args.length, rank=16, dropout=args.dropout)
    result: dict[str, Any] = describe_machine(["torch", "transformers", "peft"])
    for arm in ("plain", "ours"):
        tally = count_layer(arm, cell)
        table: Table = {}
        for part, kind in sorted(tally.kernels, key=lambda key: -tally.bytes[key]):
            row = table.setdefault(kind, {"kernels": 0, "gb": 0.0, "ms": 0.0})
            moved, flops = tally.bytes[part, kind], tally.flops[part, kind]
            row["kernels"] += tally.kernels[part, kind]
            row["gb"] += moved / 1e9
            row["ms"] += 1e3 * (flops / (args.rate * 1e12) if kind == "products" else moved / (args.bandwidth * 1e12))
        result[arm] = table
        print(f"\n{arm}: a decoder layer, forward and backward\n\n| | kernels | GB | ms on paper |\n|---|---|---|---|")
        for kind, row in table.items():
            print(f"| {kind} | {row['kernels']:,} | {row['gb']:.2f} | {row['ms']:.2f} |")
        total = {name: sum(row[name] for row in table.values()) for name in ("kernels", "gb", "ms")}
        print(f"| all | {total['kernels']:,} | {total['gb']:.2f} | {total['ms']:.2f} |")
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
