"""The loss of one micro-batch: cross-entropy summed over its supervised tokens."""

import torch.nn.functional as F
from torch import Tensor, nn


def sum_cross_entropy(
    output_layer: nn.Module, hidden: Tensor, targets: Tensor, weights: Tensor | None = None
) -> Tensor:
    """Project the supervised positions' hidden states and sum their cross-entropy, in float32.

    A sum, not a mean: the division by the step's number of tokens (and fp16's loss scale) arrive through
    grad_output, where they lose no precision. The layer is called as a module, so LoRA on it, trained rows,
    ZeRO-3's gathering and FSDP's see it; its weight is never read from outside.

    Shapes: hidden [N, H], targets [N], weights [N] of the targets' losses or None; N may be 0, the sum is then 0 with
        zero gradients.
    """
    logits = output_layer(hidden).float()
    if weights is None:
        return F.cross_entropy(logits, targets, reduction="sum")
    return F.cross_entropy(logits, targets, reduction="none") @ weights
