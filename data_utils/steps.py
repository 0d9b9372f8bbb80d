"""Which rows make an optimizer step, and how they lie in micro-batches: one item is one rank's share of a step."""

from collections import Counter
from typing import Any, TypedDict

import numpy as np
from torch.utils.data import Dataset

from data_utils.layout import Layout
from data_utils.micro_batch import MicroBatch, pack_rows, pad_rows
from data_utils.rows import TokenizedRows


class Step(TypedDict):
    """One rank's share of an optimizer step.

    rows, row_ids: of each micro-batch, by their numbers in the data set and by their ids.

    Over all ranks: num_targets, num_tokens (without padding), num_positions (with it) and num_pairs, the sum of the
    rows' squared lengths, which the cost of attention goes by.
    """

    micro_batches: list[MicroBatch]
    rows: list[list[int]]
    row_ids: list[list[str]]
    num_targets: int
    num_tokens: int
    num_positions: int
    num_pairs: int


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
            groups=None if seed is None else rows.groups,
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
            "rows": plan[self.rank],
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
