import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_utils.layout import Layout, order_rows, plan_step

LENGTHS = st.lists(st.integers(1, 50), max_size=24)


def size(micro_batch, lengths, packed):
    tokens = [lengths[index] for index in micro_batch]
    return sum(tokens) if packed else len(tokens) * max(tokens, default=0)


def fewest_micro_batches(lengths, max_tokens, packed):
    """By trying all partitions."""
    best = len(lengths)

    def place(index, bins):
        nonlocal best
        if len(bins) >= best:
            return
        if index == len(lengths):
            best = len(bins)
            return
        for bin_ in [*bins, []]:
            bin_.append(index)
            if size(bin_, lengths, packed) <= max_tokens:
                place(index + 1, bins if any(bin_ is known for known in bins) else [*bins, bin_])
            bin_.pop()

    place(0, [])
    return best


@given(LENGTHS, st.integers(1, 4), st.integers(50, 200), st.booleans())
def test_every_row_once_within_the_budget_and_as_many_micro_batches_on_every_rank(
    lengths, num_ranks, max_tokens, packed
):
    plan = plan_step(lengths, num_ranks=num_ranks, max_tokens=max_tokens, packed=packed)
    assert len(plan) == num_ranks
    assert len({len(micro_batches) for micro_batches in plan}) == 1
    assert sorted(i for rank in plan for micro_batch in rank for i in micro_batch) == list(range(len(lengths)))
    assert all(size(micro_batch, lengths, packed) <= max_tokens for rank in plan for micro_batch in rank)
    assert plan == plan_step(lengths, num_ranks=num_ranks, max_tokens=max_tokens, packed=packed)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=7), st.integers(50, 120), st.booleans())
def test_as_few_micro_batches_as_best_fit_decreasing_needs(lengths, max_tokens, packed):
    (micro_batches,) = plan_step(lengths, num_ranks=1, max_tokens=max_tokens, packed=packed)
    fewest = fewest_micro_batches(lengths, max_tokens, packed)
    # Best-fit decreasing takes at most 11/9 of the fewest; runs of sorted rows are the fewest.
    assert len(micro_batches) <= (fewest * 11 // 9 + 1 if packed else fewest)


@given(st.lists(st.integers(1, 50), min_size=8, max_size=40), st.integers(2, 4))
def test_packed_ranks_differ_by_no_more_than_a_row(lengths, num_ranks):
    plan = plan_step(lengths, num_ranks=num_ranks, max_tokens=sum(lengths), packed=True)
    tokens = [sum(lengths[i] for micro_batch in rank for i in micro_batch) for rank in plan]
    assert max(tokens) - min(tokens) <= max(lengths)


def test_long_rows_weigh_more_than_their_tokens():
    # Two ranks of 9,000 tokens would not be equal: attention within 8,000 costs more than eight times within 1,000.
    plan = plan_step([8000] + [1000] * 10, num_ranks=2, max_tokens=20_000, packed=True)
    with_long, without = sorted(plan, key=lambda rank: 0 not in rank[0])
    assert len(with_long[0]) == 1 and len(without[0]) == 10


def test_rows_that_fit_lie_in_one_micro_batch_and_ranks_share_the_work():
    assert plan_step([5, 9, 4, 8], num_ranks=1, max_tokens=36, packed=False) == [[[1, 3, 0, 2]]]
    assert plan_step([5, 9, 4, 8], num_ranks=2, max_tokens=20, packed=False) == [[[1, 3]], [[0, 2]]]
    assert plan_step([5, 9, 4, 8], num_ranks=1, max_tokens=26, packed=True) == [[[1, 3, 0, 2]]]
    assert plan_step([5, 9, 4, 8], num_ranks=2, max_tokens=20, packed=True) == [[[1, 2]], [[3, 0]]]
    assert plan_step([7], num_ranks=2, max_tokens=20, packed=True) == [[[0]], [[]]]


def test_a_tight_fit_is_kept_where_spreading_by_cost_would_not_fit():
    lengths = [6, 5, 5, 4]  # only 6 + 4 and 5 + 5 fill two bins of 10
    (micro_batches,) = plan_step(lengths, num_ranks=1, max_tokens=10, packed=True)
    assert sorted(sum(lengths[i] for i in bin_) for bin_ in micro_batches) == [10, 10]


@pytest.mark.parametrize("packed", [True, False])
def test_a_row_beyond_the_budget_is_refused(packed):
    with pytest.raises(ValueError, match="30 tokens does not fit"):
        plan_step([30], num_ranks=1, max_tokens=20, packed=packed)


def test_order_is_a_function_of_seed_and_epoch():
    assert sorted(order_rows(100, 7, 3)) == list(range(100))
    assert order_rows(100, 7, 3) == order_rows(100, 7, 3)
    assert order_rows(100, 7, 3) != order_rows(100, 7, 4) != order_rows(100, 8, 4)
    # Written down, since a resumed run on another Python must see the same order.
    assert order_rows(8, 42, 0) == [int(digit) for digit in "12576034"]


@given(st.integers(1, 30), st.integers(1, 8), st.integers(0, 5), st.booleans())
def test_an_epoch_is_every_row_once_and_any_step_can_be_asked_for_first(num_rows, rows_per_step, seed, packed):
    def build():
        lengths = [index % 7 + 1 for index in range(num_rows)]
        return Layout(lengths, rows_per_step=rows_per_step, num_ranks=2, max_tokens=64, packed=packed, seed=seed)

    layout = build()
    steps = layout.steps_per_epoch
    plans = [layout.plan(step) for step in range(2 * steps)]
    for epoch in (plans[:steps], plans[steps:]):
        seen = [row for plan in epoch for rank in plan for micro_batch in rank for row in micro_batch]
        assert sorted(seen) == list(range(num_rows))
    assert build().plan(2 * steps - 1) == plans[-1] and layout.plan(0) == plans[0]


def test_the_last_step_may_be_smaller_and_evaluation_keeps_the_order():
    layout = Layout([3] * 10, rows_per_step=4, num_ranks=1, max_tokens=64, packed=True, seed=None)
    assert [len(layout.rows_of(step)) for step in range(3)] == [4, 4, 2]
    assert [row for step in range(3) for row in layout.rows_of(step)] == list(range(10))
