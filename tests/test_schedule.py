"""What is due after a step: a table, and a property over all of it."""

from itertools import product

import pytest

from tuning.training.schedule import Due, Schedule

# 7 steps of 3 an epoch: epochs end after 3, 6 and, cut short, 7.
QUIET = dict(
    max_steps=7,
    steps_per_epoch=3,
    logging_strategy="no",
    logging_steps=2,
    logging_first_step=False,
    eval_strategy="no",
    eval_steps=2,
    eval_delay=0,
    save_strategy="no",
    save_steps=4,
)
STEPS = range(1, 8)


@pytest.mark.parametrize(
    ("field", "changes", "expected"),
    [
        ("log", {}, []),
        ("log", {"logging_first_step": True}, [1]),
        ("log", {"logging_strategy": "steps"}, [2, 4, 6, 7]),
        ("log", {"logging_strategy": "steps", "logging_first_step": True, "logging_steps": 5}, [1, 5, 7]),
        ("log", {"logging_strategy": "epoch"}, [3, 6, 7]),
        ("evaluate", {}, []),
        ("evaluate", {"eval_strategy": "steps"}, [2, 4, 6, 7]),
        ("evaluate", {"eval_strategy": "steps", "eval_delay": 4}, [4, 6, 7]),
        ("evaluate", {"eval_strategy": "epoch"}, [3, 6, 7]),
        ("evaluate", {"eval_strategy": "epoch", "eval_delay": 2}, [6, 7]),
        ("evaluate", {"eval_strategy": "epoch", "eval_delay": 2.2}, [7]),
        ("save", {}, []),
        ("save", {"save_strategy": "best"}, []),
        ("save", {"save_strategy": "steps"}, [4, 7]),
        ("save", {"save_strategy": "epoch"}, [3, 6, 7]),
        ("stop", {}, [7]),
    ],
)
def test_steps_after_which_it_is_due(field, changes, expected):
    schedule = Schedule(**QUIET | changes)
    assert [step for step in STEPS if getattr(schedule.find_due(step, stopped=False), field)] == expected


def test_a_stop_saves_and_leaves_the_evaluation_for_later():
    strategies = ("no", "steps", "epoch")
    for logging, evaluating, saving in product(strategies, strategies, (*strategies, "best")):
        schedule = Schedule(
            **QUIET | {"logging_strategy": logging, "eval_strategy": evaluating, "save_strategy": saving}
        )
        for step in STEPS:
            calm, stopped = (schedule.find_due(step, stopped=each) for each in (False, True))
            assert not calm.evaluation_postponed
            assert stopped == Due(
                log=calm.log, evaluate=False, save=True, stop=True, evaluation_postponed=calm.evaluate
            )
