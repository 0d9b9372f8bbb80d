"""What is due after a step: a table, and a property over all of it."""

from itertools import product
from types import SimpleNamespace

import pytest

from tuning.settings.options import RunArguments
from tuning.training.schedule import Due, ScheduleCallback, describe_warmup, find_due

# 7 steps of 3 an epoch: epochs end after 3, 6 and, cut short, 7.
QUIET = dict(
    max_steps=7,
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


def settings(step, changes):
    """Arguments and state, in which strategies are enums."""
    values = {name: SimpleNamespace(value=v) if "strategy" in name else v for name, v in (QUIET | changes).items()}
    both = SimpleNamespace(**values, global_step=step)
    return both, both


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
    assert [step for step in STEPS if getattr(find_due(*settings(step, changes), 3), field)] == expected


def test_a_stop_saves_and_leaves_the_evaluation_for_later():
    strategies = ("no", "steps", "epoch")
    for logging, evaluating, saving in product(strategies, strategies, (*strategies, "best")):
        changes = {"logging_strategy": logging, "eval_strategy": evaluating, "save_strategy": saving}
        for step, signal_number in product(STEPS, (0, 15)):
            args, state = settings(step, changes)
            calm, control = find_due(args, state, 3), SimpleNamespace()
            trainer = SimpleNamespace(steps_per_epoch=3, stop=SimpleNamespace(agreed=lambda n=signal_number: n))
            trainer.stopped_by, trainer.evaluation_due = 0, False
            ScheduleCallback(trainer).on_step_end(args, state, control)
            ordered = Due(
                log=control.should_log,
                evaluate=control.should_evaluate,
                save=control.should_save,
                stop=control.should_training_stop,
            )
            postponed = bool(signal_number) and calm.evaluate
            assert (trainer.stopped_by, trainer.evaluation_due) == (signal_number, postponed)
            assert ordered == (calm._replace(evaluate=False, save=True, stop=True) if signal_number else calm)


def test_a_warmup_longer_than_the_run_is_said(tmp_path):
    def describe(num_steps, **settings):
        return describe_warmup(RunArguments(output_dir=str(tmp_path), use_cpu=True, **settings), num_steps)

    assert describe(20, warmup_steps=500) == (
        "schedule: the warm-up of 500 steps is no shorter than the run of 20; the learning rate only reaches 4% of "
        "--learning_rate; lower --warmup_steps"
    )
    assert describe(20, warmup_steps=20) and describe(1, warmup_steps=1)
    assert describe(20, warmup_steps=19) is None and describe(20) is None and describe(20, warmup_steps=0.5) is None
    assert describe(20, warmup_steps=500, lr_scheduler_type="constant") is None
