"""Recurrent layers (Gated DeltaNet, with the convolution before it) for packed rows: each row goes through alone.

transformers hands the borders of packed rows to kernels that may be installed; without them it lets state and
convolution run on from one row into the next, without a word (transformers issue 46093).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_KIND = "GatedDeltaNet"  # how the classes' names end: Qwen3-Next, Qwen3.5 and what follows them


def find_recurrent_layers(model: nn.Module) -> list[nn.Module]:
    """The modules that carry a state from token to token and are known here."""
    return [module for module in model.modules() if type(module).__name__.endswith(_KIND)]


def separate_rows(model: nn.Module) -> None:
    """Let recurrent layers see each packed row alone; what is not packed goes through as ever."""
    for module in find_recurrent_layers(model):
        own: Callable[..., Tensor] = type(module).forward
        module.forward = functools.partial(_forward_by_row, functools.partial(own, module))


def _forward_by_row(
    forward: Callable[..., Tensor],
    hidden_states: Tensor,
    *args: Any,
    packed_lengths: Sequence[int] | None = None,
    packed_starts: Tensor | None = None,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Shapes: hidden_states [1, T, H] of the packed rows, whose lengths add up to T. Returns: the same shape."""
    if packed_lengths is None:
        return forward(hidden_states, *args, attention_mask=attention_mask, **options)
    rows = hidden_states.split(list(packed_lengths), 1)
    return torch.cat([forward(row, *args, attention_mask=None, **options) for row in rows], 1)
