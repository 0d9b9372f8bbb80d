"""rows.parquet read, and what the losses of rows say: which are worst, never fell, rose again, were known."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tuning.errors import SettingsError, explain_bad_files

NEIGHBOURS = 51  # rows of like length that a row is compared with
EARLY_EPOCHS = 3  # later a model that trains long enough knows bad answers by heart
_MAX_CELLS = 2**28  # rows x epochs
_CHUNK = 2**16
_NO_PROMPT = int.from_bytes(hashlib.blake2b(b"", digest_size=8).digest(), "little", signed=True)  # of plain text
_COLUMNS = {"row_id": str, "source": str, "row": int, "epoch": int, "loss": float, "tokens": int}
_HASHES = {"prompt_hash": int, "answer_hash": int}

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass
class RowLosses:
    """Losses of R rows over E epochs.

    losses [R, E]: mean of the row's losses in the epoch; NaN where it was not trained in it, infinite where a loss was
    not finite. epochs [E]: their numbers, ascending. tokens [R]: supervised ones. row_ids, sources [R]: of objects.
    hashes: prompts' and answers', [R] each, or None where the file has none.
    """

    row_ids: NDArray[Any]
    sources: NDArray[Any]
    tokens: NDArray[np.int64]
    epochs: NDArray[np.int64]
    losses: Floats
    hashes: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None

    @cached_property
    def first(self) -> Floats:
        """Loss of each row in the first epoch that had it [R]."""
        return self.losses[np.arange(len(self.losses)), np.argmax(~np.isnan(self.losses), axis=1)]

    @cached_property
    def last(self) -> Floats:
        """Loss of each row in the last epoch that had it [R]."""
        backwards = self.losses[:, ::-1]
        return backwards[np.arange(len(self.losses)), np.argmax(~np.isnan(backwards), axis=1)]

    @cached_property
    def excess(self) -> Floats:
        """How far each row is above rows of like length [R]; see rank_excess."""
        return rank_excess(self.early, self.tokens)

    @cached_property
    def early(self) -> Floats:
        """Mean loss of each row over the first EARLY_EPOCHS epochs that had it [R]: before bad answers are learnt."""
        known = ~np.isnan(self.losses)
        counted = known & (np.cumsum(known, axis=1) <= EARLY_EPOCHS)
        return np.where(counted, self.losses, 0).sum(axis=1) / counted.sum(axis=1)

    @cached_property
    def verdicts(self) -> dict[str, Mask]:
        """By name, as VERDICTS has them: which rows [R]."""
        found = judge(self.losses, self.first, self.last)
        disagrees = np.zeros(len(self.losses), bool) if self.hashes is None else find_disagreeing(*self.hashes)
        return {**found, "disagrees": disagrees}

    def until(self, epoch: int) -> "RowLosses":
        """The rows as they were after an epoch. Raises: SettingsError: the file has no such epoch."""
        if epoch not in self.epochs:
            raise SettingsError(f"epoch {epoch}: the rows were trained in epochs {self.epochs[0]} to {self.epochs[-1]}")
        losses = self.losses[:, self.epochs <= epoch]
        seen = ~np.isnan(losses).all(axis=1)
        hashes = None if self.hashes is None else (self.hashes[0][seen], self.hashes[1][seen])
        epochs = self.epochs[self.epochs <= epoch]
        return RowLosses(self.row_ids[seen], self.sources[seen], self.tokens[seen], epochs, losses[seen], hashes)

    def place(self, row: int) -> tuple[str, str]:
        """(`file:line`, id) of a row."""
        return str(self.sources[row]), str(self.row_ids[row])

    def verdicts_of(self, row: int) -> list[str]:
        """Names of the verdicts on a row."""
        return [name for name, mask in self.verdicts.items() if mask[row]]


def judge(losses: Floats, first: Floats, last: Floats) -> dict[str, Mask]:
    """What the losses of rows say; VERDICTS has each rule in words. With one epoch nothing can fall or rise.

    Shapes: losses [R, E], NaN where a row was not trained; first, last [R].
    """
    finite: Mask = np.isinf(losses).sum(axis=1) == 0
    usual_first, usual_last = _median(first[finite]), _median(last[finite])
    before, after = _pair_visits(np.where(finite[:, None], losses, np.nan))
    lowest = np.nanmin(losses, axis=1)
    lowest_later = np.nanmin(after, axis=1, initial=np.inf)  # infinite where there is no later one
    with np.errstate(invalid="ignore"):
        jumps = (after > 2 * before) & (after - before > usual_first / 10)
        rose = (last > 1.5 * lowest) & (last - lowest > usual_first / 10)
    has_later = np.isfinite(lowest_later)
    return {
        "not finite": ~finite,
        "never fell": has_later & (lowest_later >= 0.9 * first) & (last > usual_last),
        "spiked": np.any(jumps, axis=1),
        "forgotten": finite & rose,
        "known from the start": finite & (first < usual_first / 5),
    }


def _pair_visits(losses: Floats) -> tuple[Floats, Floats]:
    """Of every later loss the one before it, which may lie several epochs back, and itself; else NaN [R, E - 1]."""
    before = losses[:, :-1].copy()
    for epoch in range(1, before.shape[1]):
        missing = np.isnan(before[:, epoch])
        before[missing, epoch] = before[missing, epoch - 1]
    return before, np.where(np.isnan(before), np.nan, losses[:, 1:])


def find_disagreeing(prompts: NDArray[np.int64], answers: NDArray[np.int64]) -> Mask:
    """Rows whose prompt stands in another row with another answer [R]. Plain text has no prompt."""
    _, prompt = np.unique(prompts, return_inverse=True)
    pairs = np.unique(np.stack([prompt, answers]), axis=1)
    num_answers = np.bincount(pairs[0], minlength=len(prompts))
    return (num_answers[prompt] > 1) & (prompts != _NO_PROMPT)


def rank_excess(losses: Floats, tokens: NDArray[np.int64]) -> Floats:
    """How far each row's loss lies above the rows of like length: the worst rows are those with the most.

    Short answers have higher losses than long ones, and spread wider, whatever they say. So a row is compared with
    the NEIGHBOURS rows nearest in supervised tokens, itself included: (loss - their median) / their spread, where the
    spread is the median distance from that median. 0: as usual for its length.

    Shapes: losses, tokens [R]; infinite losses come out infinite.
    """
    count = min(NEIGHBOURS, len(losses))
    order = np.argsort(tokens, kind="stable")
    ordered = losses[order]
    windows = np.lib.stride_tricks.sliding_window_view(ordered, count)
    usual, spread = np.empty(len(windows)), np.empty(len(windows))
    window = np.clip(np.arange(len(losses)) - count // 2, 0, len(windows) - 1)
    with np.errstate(invalid="ignore"):
        for start in range(0, len(windows), _CHUNK):  # a million windows at once would take half a gigabyte
            part = slice(start, start + _CHUNK)
            usual[part] = np.median(windows[part], axis=1)
            spread[part] = np.median(np.abs(windows[part] - usual[part, None]), axis=1)
        excess = (ordered - usual[window]) / np.maximum(spread[window], 1e-6)
    excess[np.isinf(ordered)] = np.inf
    result = np.empty(len(losses))
    result[order] = excess
    return result


def _median(values: Floats) -> float:
    return float(np.median(values)) if len(values) else np.nan


def choose_rows(losses: RowLosses, *, sort: str = "excess", verdict: str | None = None) -> list[int]:
    """Rows by one of verdicts.SORTS, most first; `place`: as in the data. verdict: only rows that have it."""
    keys: dict[str, NDArray[Any]] = {
        "excess": -losses.excess,
        "loss": -losses.last,
        "rise": np.nanmin(losses.losses, axis=1) - losses.last,
        "first": -losses.first,
        "tokens": -losses.tokens,
        "place": np.arange(len(losses.tokens)),
    }
    order = np.argsort(keys[sort], kind="stable")
    if verdict is not None:
        order = order[losses.verdicts[verdict][order]]
    if verdict == "disagrees" and losses.hashes is not None:  # rows of one prompt stand together
        _, place, prompt = np.unique(losses.hashes[0][order], return_index=True, return_inverse=True)
        order = order[np.argsort(place[prompt], kind="stable")]
    return order.tolist()


# ---- reading ----


def read_row_losses(path: Path) -> RowLosses:
    """Read rows.parquet. Raises: SettingsError: it is damaged, or no such file."""
    import pyarrow.parquet as pq

    with explain_bad_files(f"{path}: cannot be read"):
        names = set(pq.read_schema(path).names)
        if missing := _COLUMNS.keys() - names:
            raise SettingsError(
                f"{path}: is no list of row losses: the columns {', '.join(sorted(missing))} are missing"
            )
        has_hashes = _HASHES.keys() <= names
        kinds = {**_COLUMNS, **(_HASHES if has_hashes else {})}
        table = pq.read_table(path, columns=list(kinds))
        columns = {name: _read_column(table[name], name, kind) for name, kind in kinds.items()}
        return _arrange(columns, has_hashes=has_hashes)


def _read_column(column: Any, name: str, kind: type) -> NDArray[Any]:
    if column.null_count:
        raise ValueError(f"the column {name} has empty cells")
    if kind is str:
        return np.array(column.to_pylist(), dtype=object)
    values = np.asarray(column)
    if values.dtype.kind not in ("iu" if kind is int else "f"):
        raise ValueError(f"the column {name} holds {column.type}")
    return values.astype(np.int64 if kind is int else np.float64)


def _arrange(columns: dict[str, NDArray[Any]], *, has_hashes: bool) -> RowLosses:
    """Visits to rows and epochs. Several visits of a row in an epoch (file*2.5) count by their mean."""
    _, place, row = np.unique(columns["row"], return_index=True, return_inverse=True)
    epochs, epoch = np.unique(columns["epoch"], return_inverse=True)
    if not len(place):
        raise ValueError("there is no row in it yet")
    if len(place) * len(epochs) > _MAX_CELLS:
        raise ValueError(f"{len(place):,} rows in {len(epochs):,} epochs are too many to compare")
    losses = np.where(np.isfinite(columns["loss"]), columns["loss"], np.inf)
    sums, counts = np.zeros((len(place), len(epochs))), np.zeros((len(place), len(epochs)))
    np.add.at(sums, (row, epoch), losses)
    np.add.at(counts, (row, epoch), 1)
    with np.errstate(invalid="ignore"):
        means = sums / counts  # 0 / 0 is NaN: not trained in that epoch
    hashes = (columns["prompt_hash"][place], columns["answer_hash"][place]) if has_hashes else None
    return RowLosses(
        columns["row_id"][place], columns["source"][place], columns["tokens"][place], epochs, means, hashes
    )
