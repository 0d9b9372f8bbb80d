from hypothesis import given
from hypothesis import strategies as st

from data_utils.layout import count_steps, order_rows, plan_step

LENGTHS = st.lists(st.integers(1, 50), max_size=24)


@given(LENGTHS, st.integers(1, 4), st.integers(50, 200))
def test_every_row_once_within_the_budget_and_as_many_micro_batches_on_every_rank(lengths, num_ranks, max_tokens):
    plan = plan_step(lengths, num_ranks=num_ranks, max_tokens=max_tokens)
    assert len(plan) == num_ranks
    assert len({len(micro_batches) for micro_batches in plan}) == 1
    assert sorted(i for rank in plan for micro_batch in rank for i in micro_batch) == list(range(len(lengths)))
    for rank in plan:
        for micro_batch in rank:
            assert len(micro_batch) * max((lengths[i] for i in micro_batch), default=0) <= max_tokens
    assert plan == plan_step(lengths, num_ranks=num_ranks, max_tokens=max_tokens)


def test_rows_that_fit_lie_in_one_micro_batch_and_ranks_share_the_work():
    assert plan_step([5, 9, 4, 8], num_ranks=1, max_tokens=36) == [[[1, 3, 0, 2]]]
    assert plan_step([5, 9, 4, 8], num_ranks=2, max_tokens=20) == [[[1, 3]], [[0, 2]]]
    assert plan_step([7], num_ranks=2, max_tokens=20) == [[[0]], [[]]]


def test_a_row_beyond_the_budget_is_refused():
    try:
        plan_step([30], num_ranks=1, max_tokens=20)
    except ValueError as error:
        assert "30 tokens does not fit" in str(error)
    else:
        raise AssertionError("not refused")


def test_order_is_a_function_of_seed_and_epoch():
    assert sorted(order_rows(100, 7, 3)) == list(range(100))
    assert order_rows(100, 7, 3) == order_rows(100, 7, 3)
    assert order_rows(100, 7, 3) != order_rows(100, 7, 4) != order_rows(100, 8, 4)
    # Written down, since a resumed run on another Python must see the same order.
    assert order_rows(8, 42, 0) == [int(digit) for digit in "12576034"]


def test_the_last_step_may_be_smaller():
    assert [count_steps(n, 4) for n in (1, 4, 5, 8)] == [1, 1, 2, 2]
