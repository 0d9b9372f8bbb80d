"""Rows to tensors: one item is one rank's whole optimizer step."""

from collections.abc import Sequence
from typing import TypedDict

import torch
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
    """

    input_ids: Tensor
    target_index: Tensor
    targets: Tensor


class Step(TypedDict):
    """One rank's share of an optimizer step. num_targets and num_tokens count over all ranks, without padding."""

    micro_batches: list[MicroBatch]
    row_ids: list[list[str]]
    num_targets: int
    num_tokens: int


def collate_rows(rows: Sequence[tuple[list[int], list[int]]]) -> MicroBatch:
    """Pad rows of (input_ids, labels) to the longest one; no rows give one padding token without a target.

    Padding is token 0, which every model has: no token sees it and nothing of it is trained.

    Example: [([1, 2], [-100, 2]), ([3], [-100])] -> input_ids [[1, 2], [3, 0]], target_index [0], targets [2]
    """
    width = max((len(ids) for ids, _ in rows), default=1)
    input_ids = torch.zeros((max(len(rows), 1), width), dtype=torch.long)
    labels = torch.full((max(len(rows), 1), width + 1), IGNORE_INDEX, dtype=torch.long)
    for index, (ids, row_labels) in enumerate(rows):
        input_ids[index, : len(ids)] = torch.tensor(ids)
        labels[index, : len(ids)] = torch.tensor(row_labels)
    next_labels = labels[:, 1:].flatten()
    target_index = (next_labels != IGNORE_INDEX).nonzero().flatten()
    return {"input_ids": input_ids, "target_index": target_index, "targets": next_labels[target_index]}


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
        lengths = [self.rows.lengths[index] for index in indices]
        plan = plan_step(lengths, num_ranks=self.num_ranks, max_tokens=self.max_tokens)
        mine = [[indices[position] for position in micro_batch] for micro_batch in plan[self.rank]]
        return {
            "micro_batches": [collate_rows([self.rows[i] for i in micro_batch]) for micro_batch in mine],
            "row_ids": [[self.rows.ids[i] for i in micro_batch] for micro_batch in mine],
            "num_targets": sum(self.rows.num_targets(index) for index in indices),
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
