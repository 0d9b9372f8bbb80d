"""Which row goes to which step, rank and micro-batch. Pure integers, standard library only.

A step is a set of rows; how they lie in micro-batches changes nothing but speed. The order of rows is a pure
function of (seed, epoch): nothing about it lives in a worker, so a run resumes exactly on any number of ranks.
"""

import random
from collections.abc import Sequence


def count_steps(num_rows: int, rows_per_step: int) -> int:
    """Optimizer steps of an epoch; the last one may be smaller."""
    return -(-num_rows // rows_per_step)


def order_rows(num_rows: int, seed: int, epoch: int) -> list[int]:
    """The order of an epoch: a permutation of range(num_rows)."""
    order = list(range(num_rows))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def plan_step(lengths: Sequence[int], *, num_ranks: int, max_tokens: int) -> list[list[list[int]]]:
    """Lay the rows of one step out in padded micro-batches.

    lengths: tokens of each row of the step.
    max_tokens: tokens a micro-batch may have, padding included (rows x longest row).

    Returns: for each rank its micro-batches, each a list of indices into `lengths`. Every rank has the same number
        of micro-batches, as few as fit; one of a rank without rows is empty.
    Raises: ValueError: a row is longer than max_tokens.
    Example: plan_step([5, 9, 4, 8], num_ranks=2, max_tokens=20) -> [[[1, 3]], [[0, 2]]]
    """
    if lengths and max(lengths) > max_tokens:
        raise ValueError(f"a row of {max(lengths)} tokens does not fit in a micro-batch of {max_tokens}")
    longest_first = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    num_bins = num_ranks
    while (bins := _split(longest_first, lengths, num_bins, max_tokens)) is None:
        num_bins += num_ranks
    bins += [[] for _ in range(num_bins - len(bins))]
    # Dealt out like cards, back and forth: the dearest micro-batches go to different ranks.
    bins.sort(key=lambda bin_: -_cost(bin_, lengths))
    plan: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    for index, bin_ in enumerate(bins):
        turn, position = divmod(index, num_ranks)
        plan[position if turn % 2 == 0 else num_ranks - 1 - position].append(bin_)
    return plan


def _split(order: list[int], lengths: Sequence[int], num_bins: int, max_tokens: int) -> list[list[int]] | None:
    """Cut rows, longest first, into at most num_bins runs of least padded size; None where max_tokens is too few."""
    low, high, best = max(lengths, default=1), max_tokens, None
    while low <= high:
        limit = (low + high) // 2
        bins: list[list[int]] = []
        for index in order:
            if not bins or (len(bins[-1]) + 1) * lengths[bins[-1][0]] > limit:
                bins.append([])
            bins[-1].append(index)
        if len(bins) <= num_bins:
            best, high = bins, limit - 1
        else:
            low = limit + 1
    return best


def _cost(bin_: list[int], lengths: Sequence[int]) -> int:
    return len(bin_) * lengths[bin_[0]] if bin_ else 0
