"""Every row's loss each time it was trained: rows.parquet.

One line for each row and visit, in the order of training: row_id, source (`file:line`), row (its number in the data),
epoch (from 0), step (from 1), loss (mean over its supervised tokens, by the weights before that step), tokens,
prompt_hash and answer_hash. The losses are those that training computes anyway.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from tuning.checkpoint.run_record import ROWS_FILE

_VISIT = np.dtype([("row", np.int32), ("step", np.int32), ("loss", np.float32)])


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

    def write(self, directory: Path) -> None:
        """Write what was gathered. On rank 0."""
        visits = np.concatenate([np.zeros(0, _VISIT), *self._all])
        visits = visits[np.lexsort((visits["row"], visits["step"]))]
        self._all = [visits]
        columns = self._describe(visits["row"].astype(np.int64))
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
        table = pq.read_table(directory / ROWS_FILE, columns=list(_VISIT.names or ()))
        visits = np.zeros(len(table), _VISIT)
        for name in table.column_names:
            visits[name] = np.asarray(table[name])
        self._all = [visits]
