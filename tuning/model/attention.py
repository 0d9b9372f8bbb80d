"""Attention for packed rows: rows lie one behind the other, and none attends to another.

Registered with transformers under one name, so that every model that goes through its attention interface can use it.
"""

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "packed_rows"

# What some models ask of attention beside causality; here it would be ignored.
_UNSUPPORTED = ("softcap", "s_aux", "sinks", "position_bias", "head_mask", "indices", "block_indices")


def describe_packing(
    input_ids: Tensor, position_ids: Tensor | None, lengths: Sequence[int], row_starts: Tensor | None
) -> dict[str, Any]:
    """Arguments of a decoder's forward that say where rows begin."""
    return {
        "position_ids": position_ids,
        "packed_lengths": lengths,
        "packed_starts": row_starts,
        # transformers leaves a mask of four dimensions as it is. Without one it would look for packed rows in
        # position_ids, which waits for the GPU, and build a T x T mask that packed attention does not look at.
        "attention_mask": input_ids.new_zeros((1, 1, 1, 1), dtype=torch.bool),
    }


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packed_lengths: Sequence[int] | None = None,
    packed_starts: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each packed sequence; padded batches go to transformers' sdpa.

    Shapes: query [1, heads, T, D], key [1, key heads, T, D], value [1, key heads, T, D']; packed_lengths of the R rows;
        packed_starts [R + 1] int32, where each begins, and T. Returns: [1, T, heads, D'].
    Raises: NotImplementedError: the model asks for what would be ignored.
    """
    if packed_lengths is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    if asked := [name for name in _UNSUPPORTED if options.get(name) is not None]:
        raise NotImplementedError(f"its attention uses {asked[0]}")
    if attention_mask is not None and attention_mask.shape != (1, 1, 1, 1):
        raise NotImplementedError("its layers change the attention mask")
    if not getattr(module, "is_causal", True) or options.get("is_causal") is False:
        raise NotImplementedError("its attention is not causal")
    window = options.get("sliding_window")
    if window is not None and max(packed_lengths) > window:
        raise NotImplementedError(f"its attention reaches back {window} tokens")
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if packed_starts is not None and _kernel_takes(query, value, dropout):
        return _attend_varlen(query, key, value, packed_starts, max(packed_lengths), scaling), None
    shares_keys = key.shape[1] != query.shape[1]
    if shares_keys and query.is_cuda:  # only the kernel that was just turned down shares keys without a T x T matrix
        key, value, shares_keys = *_repeat_heads(query, key, value), False
    lengths = list(packed_lengths)
    outputs = [
        F.scaled_dot_product_attention(
            *row, dropout_p=dropout, scale=scaling, is_causal=True, enable_gqa=shares_keys
        ).transpose(1, 2)
        for row in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    ]
    return torch.cat(outputs, 1), None


def _repeat_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    repeats = query.shape[1] // key.shape[1]
    return key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)


def _kernel_takes(query: Tensor, value: Tensor, dropout: float) -> bool:
    """Whether torch's kernel for rows of different lengths can be used: half precision on recent NVIDIA GPUs."""
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and dropout == 0.0
        and query.shape[-1] == value.shape[-1] <= 256
        and query.shape[-1] % 8 == 0
        and _has_kernel(query.device)
    )


@functools.cache
def _has_kernel(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def _load_kernel() -> tuple[Any, frozenset[str]]:
    """Torch's kernel, and the names of its arguments, which differ between torch 2.10 and 2.13."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, frozenset(inspect.signature(varlen_attn).parameters)


def _attend_varlen(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int, scaling: float | None
) -> Tensor:
    varlen_attn, parameters = _load_kernel()
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in parameters else {"is_causal": True}
    if "scale" in parameters:
        options["scale"] = scaling
    elif scaling is not None:
        query = query * (scaling * query.shape[-1] ** 0.5)
    if key.shape[1] != query.shape[1]:
        if "enable_gqa" in parameters:
            options["enable_gqa"] = True
        else:
            key, value = _repeat_heads(query, key, value)
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
    output = varlen_attn(query, key, value, starts, starts, longest, longest, **options)
    assert isinstance(output, Tensor)
    return output.unsqueeze(0)


AttentionInterface.register(NAME, attend)


AttentionMaskInterface.register(NAME, sdpa_mask)  # for rows that are not packed: generating samples, say
