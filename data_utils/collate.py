"""Rows to tensors: one item is one rank's whole optimizer step."""

from collections.abc import Sequence
from typing import NotRequired, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from data_utils.dataset import TokenizedRows
from data_utils.layout import count_steps, order_rows, plan_step
from data_utils.template import IGNORE_INDEX


class MicroBatch(TypedDict):
    """Inputs of one forward.

    input_ids: [B, T], padded on the right. No mask goes with them: in a causal model no token sees what is after it.
    target_index: [N], positions in the flattened [B * T] whose next token is supervised.
    targets: [N], those next tokens.
    weights: [N] float32, of the loss of each target; left out where all are 1.
    """

    input_ids: Tensor
    target_index: Tensor
    targets: Tensor
    weights: NotRequired[Tensor]


class Step(TypedDict):
    """One rank's share of an optimizer step. num_targets and num_tokens count over all ranks, without padding."""

    micro_batches: list[MicroBatch]
    row_ids: list[list[str]]
    num_targets: int
    num_tokens: int


TokenizedRow = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32] | None]


def collate_rows(rows: Sequence[TokenizedRow]) -> MicroBatch:
    """Pad rows of (input_ids, labels, weights) to the longest one; no rows give one padding token without a target.

    Padding is token 0, which every model has: no token sees it and nothing of it is trained.

    Example: [([1, 2], [-100, 2], None), ([3], [-100], None)] -> input_ids [[1, 2], [3, 0]], target_index [0],
        targets [2]
    """
    width = max((len(ids) for ids, *_ in rows), default=1)
    input_ids = torch.zeros((max(len(rows), 1), width), dtype=torch.long)
    labels = torch.full((max(len(rows), 1), width + 1), IGNORE_INDEX, dtype=torch.long)
    weights = torch.ones((max(len(rows), 1), width + 1))
    for index, (ids, row_labels, row_weights) in enumerate(rows):
        input_ids[index, : len(ids)] = torch.from_numpy(ids)
        labels[index, : len(ids)] = torch.from_numpy(row_labels)
        if row_weights is not None:
            weights[index, : len(ids)] = torch.from_numpy(row_weights)
    next_labels = labels[:, 1:].flatten()
    target_index = (next_labels != IGNORE_INDEX).nonzero().flatten()
    batch: MicroBatch = {"input_ids": input_ids, "target_index": target_index, "targets": next_labels[target_index]}
    if any(row_weights is not None for *_, row_weights in rows):
        batch["weights"] = weights[:, 1:].flatten()[target_index]
    return batch


class StepDataset(Dataset[Step]):
    """Item number s is optimizer step s of the whole run, counted over epochs: a pure function of s and the seed.

    len() is the steps of one epoch. Rows keep their order where seed is None (evaluation).
    max_tokens: token budget of a micro-batch, padding included.
    """

    def __init__(
        self,
        rows: TokenizedRows,
        *,
        rows_per_step: int,
        max_tokens: int,
        seed: int | None,
        rank: int = 0,
        num_ranks: int = 1,
    ):
        self.rows = rows
        self.rows_per_step = rows_per_step
        self.max_tokens = max_tokens
        self.seed = seed
        self.rank = rank
        self.num_ranks = num_ranks
        self._order: tuple[int, list[int]] | None = None

    def __len__(self) -> int:
        return count_steps(len(self.rows), self.rows_per_step)

    def __getitem__(self, step: int) -> Step:
        indices = self._step_rows(step)
        lengths = [int(self.rows.lengths[index]) for index in indices]
        plan = plan_step(lengths, num_ranks=self.num_ranks, max_tokens=self.max_tokens)
        mine = [[indices[position] for position in micro_batch] for micro_batch in plan[self.rank]]
        return {
            "micro_batches": [collate_rows([self.rows[i] for i in micro_batch]) for micro_batch in mine],
            "row_ids": [[self.rows.row_id(i) for i in micro_batch] for micro_batch in mine],
            "num_targets": int(self.rows.num_targets[indices].sum()),
            "num_tokens": sum(lengths),
        }

    def _step_rows(self, step: int) -> list[int]:
        epoch, position = divmod(step, len(self))
        start = position * self.rows_per_step
        stop = min(start + self.rows_per_step, len(self.rows))
        if self.seed is None:
            return list(range(start, stop))
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, order_rows(len(self.rows), self.seed, epoch))
        return self._order[1][start:stop]
