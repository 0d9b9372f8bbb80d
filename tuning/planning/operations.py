"""How many floating-point operations a step is, and how many the device can do."""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tuning.distributed.sharding import shape_of
from tuning.model.quantized_linear import QuantizedLinear
from tuning.model.training_model import TrainingModel


@dataclass(frozen=True)
class StepOperations:
    """FLOPs of forward and backward, by what they are proportional to; recomputation is not counted.

    per_token: the decoder's linear layers. per_target: the output layer, which sees supervised tokens only.
    per_pair: causal attention; a row of L tokens counts L**2 pairs.
    """

    per_token: int
    per_target: int
    per_pair: int

    def of(self, step: dict[str, Any]) -> int:
        """Operations of a step (see steps.Step), over all ranks."""
        tokens, targets, pairs = step["num_tokens"], step["num_targets"], step["num_pairs"]
        return int(self.per_token * tokens + self.per_target * targets + self.per_pair * pairs)


def count_operations(training_model: TrainingModel) -> StepOperations | None:
    """Two operations a weight forward, two for the gradient of its input, two more where it trains.

    None where that is not the cost: a mixture of experts, where a token sees only some of the weights, and models
    without attention heads.
    """
    causal_lm = training_model.causal_lm
    config = causal_lm.config.get_text_config()
    heads, layers = getattr(config, "num_attention_heads", None), getattr(config, "num_hidden_layers", None)
    if not heads or not layers or any("expert" in name for name, _ in causal_lm.named_parameters()):
        return None
    inside = {id(module) for module in causal_lm.get_output_embeddings().modules()}
    # Beside a matrix that trains peft keeps the original, which computes nothing.
    linear = [
        module
        for name, module in causal_lm.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and not name.endswith("original_module")
    ]
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return StepOperations(
        per_token=sum(_per_input(module) for module in linear if id(module) not in inside),
        per_target=sum(_per_input(module) for module in linear if id(module) in inside),
        # Two products forward and four backward, two operations each, of which causality needs half.
        per_pair=6 * layers * heads * head_size,
    )


def _per_input(linear: nn.Linear | Conv1D) -> int:
    if isinstance(linear, QuantizedLinear):
        return linear.in_features * linear.out_features * 4
    return shape_of(linear.weight).numel() * (6 if linear.weight.requires_grad else 4)


def measure_matmul_rate(device: torch.device, dtype: torch.dtype, *, size: int, seconds: float = 0.2) -> float:
    """Operations per second of the device's own product of two square matrices: best of several, after a warm-up."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def run(repeats: int) -> float:
        started = time.perf_counter()
        for _ in range(repeats):
            left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - started) / repeats

    run(1)
    repeats = max(1, round(seconds / 3 / run(1)))
    return 2 * size**3 / min(run(repeats) for _ in range(3))
