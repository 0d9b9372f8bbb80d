"""Attention for packed rows: rows lie one behind the other, and none attends to another.

Registered with transformers under one name, so that every model that goes through its attention interface can use it.
"""

import contextlib
import functools
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "packed_rows"

# What some models ask of attention beside causality; here it would be ignored.
_UNSUPPORTED = ("sinks", "position_bias", "head_mask", "indices", "block_indices")
_QUERIES = 256  # of a block, where attention is written out: its scores are 256 x T a head

# Windows that attention was asked for, while somebody looks (packing.py).
windows_seen: list[int | None] | None = None


@contextlib.contextmanager
def rows_lie_apart() -> Iterator[None]:
    """Inside, transformers does not look for packed rows in position ids that count on: its look waits for the GPU."""
    looks = getattr(masking_utils, "find_packed_sequence_indices", None)
    if looks is None:  # another version
        yield
        return
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = looks


class RowLengths(Sequence[int]):
    """Tokens of packed rows. Not a list, for which torch.compile would compile anew whenever its length changes."""

    def __init__(self, lengths: Sequence[int]):
        self._lengths = tuple(lengths)

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, index: Any) -> Any:
        return self._lengths[index]


def describe_packing(
    input_ids: Tensor, position_ids: Tensor | None, lengths: Sequence[int], row_starts: Tensor | None
) -> dict[str, Any]:
    """Arguments of a decoder's forward that say where rows begin."""
    return {
        "position_ids": position_ids,
        "packed_lengths": RowLengths(lengths),
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
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each packed sequence; padded batches go to transformers' sdpa.

    sliding_window: keys that a query sees, itself included. softcap: scores become softcap * tanh(scores / softcap).
    s_aux: sinks (gpt-oss): a score of each head that takes its share of the softmax and gives nothing.

    Shapes: query [1, heads, T, D], key [1, key heads, T, D], value [1, key heads, T, D']; packed_lengths of the R rows;
        packed_starts [R + 1] int32, where each begins, and T; s_aux [heads]. Returns: [1, T, heads, D'].
    Raises: NotImplementedError: the model asks for what would be ignored.
    """
    if packed_lengths is None:
        if softcap is not None or s_aux is not None:  # sdpa would leave them out
            return _attend_masked(query, key, value, attention_mask, dropout, scaling, softcap, s_aux), None
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    if windows_seen is not None:
        windows_seen.append(sliding_window)
    if asked := [name for name in _UNSUPPORTED if options.get(name) is not None]:
        raise NotImplementedError(f"its attention uses {asked[0]}")
    if attention_mask is not None and attention_mask.shape != (1, 1, 1, 1):
        raise NotImplementedError("its layers change the attention mask")
    if not getattr(module, "is_causal", True) or options.get("is_causal") is False:
        raise NotImplementedError("its attention is not causal")
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    window = sliding_window if sliding_window is not None and sliding_window < max(packed_lengths) else None
    plain = softcap is None and s_aux is None
    if packed_starts is not None and plain and _kernel_takes(query, value, dropout, window):
        return _attend_varlen(query, key, value, packed_starts, max(packed_lengths), scaling, window), None
    shares_keys = key.shape[1] != query.shape[1]
    if shares_keys and query.is_cuda:  # only the kernel that was just turned down shares keys without a T x T matrix
        key, value, shares_keys = *_repeat_heads(query, key, value), False
    lengths = list(packed_lengths)
    outputs = []
    for row in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True):
        if not plain:
            output = _attend_written_out(*row, dropout, scaling, window, softcap, s_aux)
        elif window is None or row[0].shape[2] <= window:
            output = F.scaled_dot_product_attention(
                *row, dropout_p=dropout, scale=scaling, is_causal=True, enable_gqa=shares_keys
            )
        else:
            output = _attend_window(*row, dropout, scaling, window, shares_keys=shares_keys)
        outputs.append(output.transpose(1, 2))
    return torch.cat(outputs, 1), None


def _attend_window(
    query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float | None, window: int, *, shares_keys: bool
) -> Tensor:
    """Causal attention of one sequence within a window, in blocks, so that far keys cost nothing."""
    length, block = query.shape[2], max(window, _QUERIES)
    outputs = []
    for start in range(0, length, block):
        end, first = min(start + block, length), max(0, start - window + 1)
        mask = _band(start, end, first, window, query.device)
        outputs.append(
            F.scaled_dot_product_attention(
                query[:, :, start:end],
                key[:, :, first:end],
                value[:, :, first:end],
                attn_mask=mask,
                dropout_p=dropout,
                scale=scaling,
                enable_gqa=shares_keys,
            )
        )
    return torch.cat(outputs, 2)


def _band(start: int, end: int, first: int, window: int | None, device: torch.device) -> Tensor:
    """Which keys from `first` on the queries from start to end see: [end - start, end - first], bool."""
    distance = torch.arange(start, end, device=device)[:, None] - torch.arange(first, end, device=device)
    return (distance >= 0) & (distance < window) if window is not None else distance >= 0


def _attend_written_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Causal attention of one sequence with what no kernel has, in blocks of queries. Shapes as attend's."""
    outputs = []
    for start in range(0, query.shape[2], _QUERIES):
        end = min(start + _QUERIES, query.shape[2])
        first = 0 if window is None else max(0, start - window + 1)
        mask = _band(start, end, first, window, query.device)
        part = query[:, :, start:end], key[:, :, first:end], value[:, :, first:end]
        outputs.append(_softmax_attention(*part, mask, dropout, scaling, softcap, sinks))
    return torch.cat(outputs, 2)


def _attend_masked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention of a padded batch, by a mask (bool or additive; None: causal). Returns: [B, T, heads, D]."""
    if mask is None:
        queries, keys = query.shape[2], key.shape[2]
        mask = _band(keys - queries, keys, 0, None, query.device)
    return _softmax_attention(query, key, value, mask, dropout, scaling, softcap, sinks).transpose(1, 2)


def _softmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    if key.shape[1] != query.shape[1]:
        key, value = _repeat_heads(query, key, value)
    scores = (query @ key.transpose(2, 3)).float() * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    # Not -inf: a padded query that sees nothing must not become NaN.
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        sink = sinks.float().reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], -1)
        scores = torch.cat([scores, sink], -1)
    weights = F.dropout(torch.softmax(scores, -1)[..., : key.shape[2]], dropout, training=dropout > 0)
    return weights.to(value.dtype) @ value


def _repeat_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    repeats = query.shape[1] // key.shape[1]
    return key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)


def _kernel_takes(query: Tensor, value: Tensor, dropout: float, window: int | None) -> bool:
    """Whether torch's kernel for rows of different lengths can be used: half precision on recent NVIDIA GPUs."""
    return (
        query.is_cuda
        and (window is None or "window_size" in _load_kernel()[1])
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
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int, scaling: float | None, window: int | None
) -> Tensor:
    varlen_attn, parameters = _load_kernel()
    back = -1 if window is None else window - 1
    options: dict[str, Any] = {"window_size": (back, 0)} if "window_size" in parameters else {"is_causal": True}
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
