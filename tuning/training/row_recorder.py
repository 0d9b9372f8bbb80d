"""Every row's loss each time it was trained: rows.parquet.

One line for each row and visit, in the order of training: row_id, source (`file:line`), row (its number in the data),
epoch (from 0), step (from 1), loss (mean over its supervised tokens, by the weights before that step), tokens,
prompt_hash and answer_hash. The losses are those that training computes anyway.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from tuning.checkpoint.run_record import ROWS_FILE

_NAMED = 3  # rows
_VISIT = np.dtype([("row", np.int32), ("step", np.int32), ("loss", np.float32)])


@dataclass(frozen=True)
class EpochRows:
    """What an epoch's rows learnt.

    loss: mean over the tokens; before: of the epoch before, None in the first. fell, compared: how many rows' losses
    fell since then. highest: (`file:line`, loss) of the rows with the highest losses. A row that an epoch has twice
    (`FILE*2`) counts once, with its mean.
    """

    loss: float
    before: float | None
    fell: int
    compared: int
    highest: list[tuple[str, float]]


class RowRecorder:
    """Collects row losses on each rank; rank 0 writes them.

    num_targets: supervised tokens of each row. describe: columns of rows by their numbers: row_id, source, tokens,
    prompt_hash, answer_hash.
    """

    def __init__(
        self,
        num_targets: NDArray[np.int32],
        describe: Callable[[NDArray[np.int64]], dict[str, Any]],
        steps_per_epoch: int,
    ):
        self._num_targets, self._describe, self._steps_per_epoch = num_targets, describe, steps_per_epoch
        self._pending: list[tuple[int, Sequence[int], Tensor]] = []
        self._mine: list[NDArray[Any]] = []  # of this rank, on the host, since the last gather
        self._all: list[NDArray[Any]] = []  # on rank 0, of all ranks

    def add(self, step: int, rows: Sequence[int], losses: Tensor) -> None:
        """Note a micro-batch: losses [R] are sums over the supervised tokens of its rows. Nothing waits for it."""
        if rows:
            self._pending.append((step, rows, losses[: len(rows)]))

    def collect(self) -> None:
        """Take what is on the device to the host, where the caller waits for the device anyway."""
        for step, rows, losses in self._pending:
            visits = np.zeros(len(rows), _VISIT)
            visits["row"], visits["step"] = rows, step
            visits["loss"] = losses.cpu().numpy() / self._num_targets[visits["row"]]
            self._mine.append(visits)
        self._pending.clear()

    def gather(self) -> None:
        """Bring all ranks' visits to rank 0. All ranks must call it."""
        self.collect()
        mine = np.concatenate([np.zeros(0, _VISIT), *self._mine])
        self._mine.clear()
        if not dist.is_initialized():
            self._all.append(mine)
            return
        found: list[Any] = [None] * dist.get_world_size() if dist.get_rank() == 0 else []
        dist.gather_object(mine, found or None)
        self._all += found

    def summarize(self, epoch: int) -> EpochRows | None:
        """What an epoch's rows learnt, of all that was gathered. On rank 0. None: nothing of it is known."""
        visits = self._sorted()
        epochs = (visits["step"] - 1) // self._steps_per_epoch
        now, before = visits[epochs == epoch], visits[epochs == epoch - 1]
        if not len(now):
            return None
        losses, earlier = _mean_by_row(now), _mean_by_row(before)
        pairs = [(loss, earlier[row]) for row, loss in losses.items() if row in earlier]
        highest = sorted(losses, key=lambda row: -losses[row])[:_NAMED]
        sources = self._describe(np.array(highest, np.int64))["source"].to_pylist()
        return EpochRows(
            self._mean(now),
            self._mean(before) if len(before) else None,
            sum(loss < old for loss, old in pairs),
            len(pairs),
            [(source, losses[row]) for source, row in zip(sources, highest, strict=True)],
        )

    def _mean(self, visits: NDArray[Any]) -> float:
        return float(np.average(visits["loss"], weights=self._num_targets[visits["row"]]))

    def _sorted(self) -> NDArray[Any]:
        visits = np.concatenate([np.zeros(0, _VISIT), *self._all])
        self._all = [visits[np.lexsort((visits["row"], visits["step"]))]]
        return self._all[0]

    def write(self, directory: Path) -> None:
        """Write what was gathered. On rank 0."""
        visits = self._sorted()
        columns = self._describe(visits["row"].astype(np.int64))
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.table(
            {
                "row_id": columns.pop("row_id"),
                "source": columns.pop("source"),
                "row": visits["row"],
                "epoch": (visits["step"] - 1) // self._steps_per_epoch,
                "step": visits["step"],
                "loss": visits["loss"],
                **columns,  # tokens and hashes
            }
        )
        pq.write_table(table, directory / ROWS_FILE, compression="zstd")

    def restore(self, directory: Path) -> None:
        """Go on from a checkpoint's file, if it has one. On rank 0."""
        if not (directory / ROWS_FILE).is_file():
            return
        import pyarrow.parquet as pq

        table = pq.read_table(directory / ROWS_FILE, columns=list(_VISIT.names or ()))
        visits = np.zeros(len(table), _VISIT)
        for name in table.column_names:
            visits[name] = np.asarray(table[name])
        self._all = [visits]


def _mean_by_row(visits: NDArray[Any]) -> dict[int, float]:
    rows, inverse, counts = np.unique(visits["row"], return_inverse=True, return_counts=True)
    sums = np.bincount(inverse, visits["loss"].astype(np.float64), len(rows))
    return dict(zip(rows.tolist(), (sums / counts).tolist(), strict=True))
