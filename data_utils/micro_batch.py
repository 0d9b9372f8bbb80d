"""Rows to the tensors of a micro-batch: what a collator makes."""

from collections.abc import Sequence
from itertools import accumulate
from typing import NotRequired, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_utils.rows import IGNORE_INDEX


class MicroBatch(TypedDict):
    """Inputs of one forward.

    input_ids: [1, T], rows one behind the other; or [B, T], padded on the right. No mask goes with them: packed rows
        are kept apart by their lengths, and in a causal model no token sees the padding after it.
    target_index: [N], positions in the flattened input_ids whose next token is supervised.
    targets: [N], those next tokens. target_rows: [N] int32, the number of each one's row.
    weights: [N] float32, of the loss of each target; left out where all are 1.
    Packed only: position_ids [1, T], starting anew in every row; lengths, tokens of each of the R rows (on the host);
    row_starts [R + 1] int32, where each begins, and T.
    """

    input_ids: Tensor
    target_index: Tensor
    targets: Tensor
    target_rows: Tensor
    weights: NotRequired[Tensor]
    position_ids: NotRequired[Tensor]
    lengths: NotRequired[list[int]]
    row_starts: NotRequired[Tensor]


TokenizedRow = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32] | None]


def pad_rows(rows: Sequence[TokenizedRow]) -> MicroBatch:
    """Pad rows of (input_ids, labels, weights) to the longest one; no rows give one padding token without a target.

    Padding is token 0, which every model has: no token sees it and nothing of it is trained.

    Example: [([1, 2], [-100, 2], None), ([3], [-100], None)] -> input_ids [[1, 2], [3, 0]], target_index [0],
        targets [2]
    """
    width = max((len(ids) for ids, *_ in rows), default=1)
    return _collate(rows, shape=(max(len(rows), 1), width), starts=[index * width for index in range(len(rows))])


def pack_rows(rows: Sequence[TokenizedRow]) -> MicroBatch:
    """Lay rows of (input_ids, labels, weights) one behind the other; no rows give one token without a target.

    Example: [([1, 2], [-100, 2], None), ([3], [-100], None)] -> input_ids [[1, 2, 3]], position_ids [[0, 1, 0]],
        lengths [2, 1], row_starts [0, 2, 3], target_index [0], targets [2]
    """
    lengths = [len(ids) for ids, *_ in rows] or [1]
    starts = list(accumulate(lengths, initial=0))
    batch = _collate(rows, shape=(1, starts[-1]), starts=starts[:-1])
    batch["position_ids"] = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
    batch["lengths"] = lengths
    batch["row_starts"] = torch.tensor(starts, dtype=torch.int32)
    return batch


def _collate(rows: Sequence[TokenizedRow], *, shape: tuple[int, int], starts: list[int]) -> MicroBatch:
    input_ids = np.zeros(shape[0] * shape[1], dtype=np.int64)
    targets = np.full(len(input_ids), IGNORE_INDEX, dtype=np.int64)
    weights = np.ones(len(input_ids), dtype=np.float32)
    row_of_token = np.zeros(len(input_ids), dtype=np.int32)
    for number, ((ids, labels, row_weights), start) in enumerate(zip(rows, starts, strict=False)):
        end = start + len(ids)
        row_of_token[start:end] = number
        input_ids[start:end] = ids
        targets[start : end - 1] = labels[1:]  # of the next token; the first one of a row is predicted by nothing
        if row_weights is not None:
            weights[start : end - 1] = row_weights[1:]
    (index,) = np.nonzero(targets != IGNORE_INDEX)
    batch: MicroBatch = {
        "input_ids": torch.from_numpy(input_ids).view(shape),
        "target_index": torch.from_numpy(index),
        "targets": torch.from_numpy(targets[index]),
        "target_rows": torch.from_numpy(row_of_token[index]),
    }
    if any(row_weights is not None for *_, row_weights in rows):
        batch["weights"] = torch.from_numpy(weights[index])
    return batch
