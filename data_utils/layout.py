"""Which row goes to which step, rank and micro-batch. Pure integers, standard library only.

A step is a set of rows; how they lie in micro-batches changes nothing but speed. The order of rows is a pure
function of (seed, epoch): nothing about it lives in a worker, so a run resumes exactly on any number of ranks.
"""

import heapq
import random
from bisect import bisect_left, insort
from collections.abc import Sequence

# Tokens at which a row's attention (quadratic) costs as much as its linear layers: 6 x hidden size, for 2048.
_QUADRATIC_LENGTH = 12_288


class Layout:
    """Steps of a run, planned one at a time: micro-batches of row indices for every rank.

    lengths: tokens of each row.
    rows_per_step: over all ranks; the last step of an epoch may have fewer.
    max_tokens: tokens a micro-batch may have, padding included.
    packed: rows lie one behind the other, without padding; else beside each other, padded to the longest.
    seed: of the order of rows; None keeps it (evaluation).
    groups: (row indices, weight) of each file, where rows are trained more or less often than once an epoch.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        rows_per_step: int,
        num_ranks: int,
        max_tokens: int,
        packed: bool,
        seed: int | None,
        groups: Sequence[tuple[Sequence[int], float]] | None = None,
    ):
        self.lengths = lengths
        self._groups = groups
        self.rows_per_epoch = count_epoch(groups) if groups else len(lengths)
        self.rows_per_step = rows_per_step
        self.num_ranks = num_ranks
        self.max_tokens = max_tokens
        self.packed = packed
        self.seed = seed
        self._order: tuple[int, Sequence[int]] = (-1, [])  # of the epoch that was asked for last

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        return -(-self.rows_per_epoch // self.rows_per_step)

    def rows_of(self, step: int) -> list[int]:
        """Row indices of a step, counted over epochs."""
        epoch, position = divmod(step, self.steps_per_epoch)
        known, order = self._order  # read once: another thread may ask for another epoch
        if known != epoch:
            order = self._order_epoch(epoch)
            self._order = (epoch, order)
        start = position * self.rows_per_step
        return list(order[start : start + self.rows_per_step])

    def _order_epoch(self, epoch: int) -> Sequence[int]:
        if self.seed is None:
            return range(len(self.lengths))
        order = order_rows(self.rows_per_epoch, self.seed, epoch)
        if self._groups is None:
            return order
        rows = mix_rows(self._groups, self.seed, epoch)
        return [rows[index] for index in order]

    def plan(self, step: int) -> list[list[list[int]]]:
        """For each rank its micro-batches of a step, counted over epochs, each a list of row indices."""
        rows = self.rows_of(step)
        lengths = [int(self.lengths[row]) for row in rows]
        plan = plan_step(lengths, num_ranks=self.num_ranks, max_tokens=self.max_tokens, packed=self.packed)
        return [[[rows[index] for index in micro_batch] for micro_batch in rank] for rank in plan]


def order_rows(num_rows: int, seed: int, epoch: int) -> list[int]:
    """The order of an epoch: a permutation of range(num_rows)."""
    order = list(range(num_rows))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def count_epoch(groups: Sequence[tuple[Sequence[int], float]]) -> int:
    """How many rows an epoch has, counted as often as they are trained. groups: as in Layout."""
    return sum(round(len(rows) * weight) for rows, weight in groups)


def mix_rows(groups: Sequence[tuple[Sequence[int], float]], seed: int, epoch: int) -> list[int]:
    """The rows of an epoch, before they are put in order: each as often as its file's weight says.

    What is over the whole number is a part of the file, another one each epoch: over several epochs every row of a file
    comes equally often, up to one.

    Example: [([0, 1], 1.5), ([2], 2.0)] -> [0, 1, 0, 2, 2], in the next epoch [0, 1, 1, 2, 2]
    """
    mixed: list[int] = []
    for number, (rows, weight) in enumerate(groups):
        mixed += list(rows) * int(weight)
        left = round(len(rows) * weight) - len(rows) * int(weight)
        if left:
            order = list(rows)
            random.Random(f"{seed}/part/{number}").shuffle(order)
            mixed += [order[(epoch * left + index) % len(order)] for index in range(left)]
    return mixed


def plan_step(lengths: Sequence[int], *, num_ranks: int, max_tokens: int, packed: bool) -> list[list[list[int]]]:
    """Lay the rows of one step out in micro-batches.

    lengths: tokens of each row of the step.
    max_tokens, packed: as in Layout.

    Returns: for each rank its micro-batches, each a list of indices into `lengths`. Every rank has the same number
        of micro-batches, as few as fit; one of a rank without rows is empty.
    Raises: ValueError: a row is longer than max_tokens.
    Example: plan_step([5, 9, 4, 8], num_ranks=2, max_tokens=20, packed=True) -> [[[1, 2]], [[3, 0]]]
    """
    if lengths and max(lengths) > max_tokens:
        raise ValueError(f"a row of {max(lengths)} tokens does not fit in a micro-batch of {max_tokens}")
    longest_first = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    lay_out = _pack if packed else _pad
    bins = lay_out(longest_first, lengths, num_ranks, max_tokens)
    # Dealt out like cards, back and forth: the dearest micro-batches go to different ranks.
    cost = _packed_cost if packed else _padded_cost
    bins.sort(key=lambda bin_: -cost(bin_, lengths))
    plan: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    for index, bin_ in enumerate(bins):
        turn, position = divmod(index, num_ranks)
        plan[position if turn % 2 == 0 else num_ranks - 1 - position].append(bin_)
    return plan


def _pack(order: list[int], lengths: Sequence[int], num_ranks: int, max_tokens: int) -> list[list[int]]:
    """Best-fit decreasing says how many micro-batches it takes; rows are then spread over them by cost."""
    fitted = _best_fit(order, lengths, max_tokens)
    num_bins = max(1, -(-len(fitted) // num_ranks)) * num_ranks
    spread = _spread(order, lengths, num_bins, max_tokens)
    return spread or fitted + [[] for _ in range(num_bins - len(fitted))]


def _best_fit(order: list[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Put each row, longest first, where it leaves the least room."""
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, number of the bin), ascending
    for index in order:
        place = bisect_left(room, (lengths[index], 0))
        if place == len(room):
            bins.append([])
            left, number = max_tokens, len(bins) - 1
        else:
            left, number = room.pop(place)
        bins[number].append(index)
        insort(room, (left - lengths[index], number))
    return bins


def _spread(order: list[int], lengths: Sequence[int], num_bins: int, max_tokens: int) -> list[list[int]] | None:
    """Put each row, longest first, into the cheapest micro-batch with room; None where one finds no room."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    cheapest = [(0, 0, number) for number in range(num_bins)]  # (cost, tokens, number of the bin), a heap
    for index in order:
        full = []
        while cheapest and cheapest[0][1] + lengths[index] > max_tokens:
            full.append(heapq.heappop(cheapest))
        if not cheapest:
            return None
        cost, tokens, number = cheapest[0]
        bins[number].append(index)
        heapq.heapreplace(cheapest, (cost + _row_cost(lengths[index]), tokens + lengths[index], number))
        for bin_ in full:
            heapq.heappush(cheapest, bin_)
    return bins


def _pad(order: list[int], lengths: Sequence[int], num_ranks: int, max_tokens: int) -> list[list[int]]:
    """Runs of rows of about the same length, as few as fit, of least padded size."""
    best = _cut(order, lengths, max_tokens)
    num_bins = max(1, -(-len(best) // num_ranks)) * num_ranks
    low, high = max(lengths, default=1), max_tokens
    while low <= high:
        limit = (low + high) // 2
        bins = _cut(order, lengths, limit)
        if len(bins) <= num_bins:
            best, high = bins, limit - 1
        else:
            low = limit + 1
    return best + [[] for _ in range(num_bins - len(best))]


def _cut(order: list[int], lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Cut rows, longest first, into runs of at most `limit` tokens, padding included."""
    bins: list[list[int]] = []
    for index in order:
        if not bins or (len(bins[-1]) + 1) * lengths[bins[-1][0]] > limit:
            bins.append([])
        bins[-1].append(index)
    return bins


def _row_cost(length: int) -> int:
    return length * (_QUADRATIC_LENGTH + length)


def _packed_cost(bin_: list[int], lengths: Sequence[int]) -> int:
    return sum(_row_cost(lengths[index]) for index in bin_)


def _padded_cost(bin_: list[int], lengths: Sequence[int]) -> int:
    return len(bin_) * _row_cost(lengths[bin_[0]]) if bin_ else 0
