"""Rows to tensors: one item is one rank's whole optimizer step."""

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NotRequired, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from data_utils.dataset import TokenizedRows
from data_utils.layout import Layout
from data_utils.template import IGNORE_INDEX


class MicroBatch(TypedDict):
    """Inputs of one forward.

    input_ids: [1, T], rows one behind the other; or [B, T], padded on the right. No mask goes with them: packed rows
        are kept apart by their lengths, and in a causal model no token sees the padding after it.
    target_index: [N], positions in the flattened input_ids whose next token is supervised.
    targets: [N], those next tokens.
    weights: [N] float32, of the loss of each target; left out where all are 1.
    Packed only: position_ids [1, T], starting anew in every row; lengths, tokens of each of the R rows (on the host);
    row_starts [R + 1] int32, where each begins, and T.
    """

    input_ids: Tensor
    target_index: Tensor
    targets: Tensor
    weights: NotRequired[Tensor]
    position_ids: NotRequired[Tensor]
    lengths: NotRequired[list[int]]
    row_starts: NotRequired[Tensor]


class Step(TypedDict):
    """One rank's share of an optimizer step.

    Over all ranks: num_targets, num_tokens (without padding), num_positions (with it) and num_pairs, the sum of the
    rows' squared lengths, which the cost of attention goes by.
    """

    micro_batches: list[MicroBatch]
    row_ids: list[list[str]]
    num_targets: int
    num_tokens: int
    num_positions: int
    num_pairs: int


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
    for (ids, labels, row_weights), start in zip(rows, starts, strict=False):
        end = start + len(ids)
        input_ids[start:end] = ids
        targets[start : end - 1] = labels[1:]  # of the next token; the first one of a row is predicted by nothing
        if row_weights is not None:
            weights[start : end - 1] = row_weights[1:]
    (index,) = np.nonzero(targets != IGNORE_INDEX)
    batch: MicroBatch = {
        "input_ids": torch.from_numpy(input_ids).view(shape),
        "target_index": torch.from_numpy(index),
        "targets": torch.from_numpy(targets[index]),
    }
    if any(row_weights is not None for *_, row_weights in rows):
        batch["weights"] = torch.from_numpy(weights[index])
    return batch


class StepDataset(Dataset[Step]):
    """Item number s is optimizer step s of the whole run, counted over epochs: a pure function of s and the seed.

    len() is the steps of one epoch. rows_per_step, num_ranks, max_tokens, packed, seed: as in Layout.
    """

    def __init__(
        self,
        rows: TokenizedRows,
        *,
        rows_per_step: int,
        max_tokens: int,
        packed: bool,
        seed: int | None,
        rank: int = 0,
        num_ranks: int = 1,
    ):
        self.rows = rows
        self.rows_per_step = rows_per_step
        self.rank = rank
        self.layout = Layout(
            rows.lengths,
            rows_per_step=rows_per_step,
            num_ranks=num_ranks,
            max_tokens=max_tokens,
            packed=packed,
            seed=seed,
        )

    def __len__(self) -> int:
        return self.layout.steps_per_epoch

    def __getitem__(self, step: int) -> Step:
        plan = self.layout.plan(step)
        collate = pack_rows if self.layout.packed else pad_rows
        indices = [index for rank in plan for micro_batch in rank for index in micro_batch]
        lengths = self.rows.lengths[indices].astype(np.int64)
        return {
            "micro_batches": [collate([self.rows[index] for index in micro_batch]) for micro_batch in plan[self.rank]],
            "row_ids": [[self.rows.row_id(index) for index in micro_batch] for micro_batch in plan[self.rank]],
            "num_targets": int(self.rows.num_targets[indices].sum()),
            "num_tokens": int(lengths.sum()),
            "num_positions": sum(self._count_positions(micro_batch) for rank in plan for micro_batch in rank),
            "num_pairs": int((lengths**2).sum()),
        }

    def survey(self, num_steps: int) -> dict[str, Any]:
        """How rows lie in the first steps of the run, over all ranks, without reading them.

        Returns: micro_batches (of a rank), positions, num_tokens, num_targets, num_pairs of a step on average, and the
            largest micro-batch as (lengths, number of targets).
        """
        num_steps = min(num_steps, len(self))
        sums: Counter[str] = Counter()
        largest: list[int] = []
        for step in range(num_steps):
            plan = self.layout.plan(step)
            sums["micro_batches"] += len(plan[0])
            for micro_batch in (micro_batch for rank in plan for micro_batch in rank):
                positions = self._count_positions(micro_batch)
                if not largest or positions > self._count_positions(largest):
                    largest = micro_batch
                lengths = self.rows.lengths[micro_batch].astype(np.int64)
                sums["positions"] += positions
                sums["num_tokens"] += int(lengths.sum())
                sums["num_pairs"] += int((lengths**2).sum())
                sums["num_targets"] += int(self.rows.num_targets[micro_batch].sum())
        means = {name: value / num_steps for name, value in sums.items()}
        lengths_of_largest = [int(self.rows.lengths[index]) for index in largest] or [1]
        return {**means, "largest": (lengths_of_largest, int(self.rows.num_targets[largest].sum()))}

    def _count_positions(self, micro_batch: list[int]) -> int:
        lengths = [int(self.rows.lengths[index]) for index in micro_batch] or [1]
        return sum(lengths) if self.layout.packed else len(lengths) * max(lengths)
