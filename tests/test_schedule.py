"""What is due after a step: a table, and a property over all of it."""

from itertools import product
from types import SimpleNamespace

import pytest

from tuning.settings.arguments import RunArguments
from tuning.training.announce import count_checkpoints, find_doubts, find_rates
from tuning.training.schedule import Due, ScheduleCallback, find_due

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


def doubts(tmp_path, num_steps, **settings):
    run = RunArguments(output_dir=str(tmp_path), use_cpu=True, **settings)
    plan = SimpleNamespace(survey=SimpleNamespace(num_steps=num_steps))
    return find_doubts(SimpleNamespace(run=run), plan, find_rates(run, num_steps))


def test_a_warmup_longer_than_the_run_or_a_third_of_it_is_said(tmp_path):
    assert doubts(tmp_path, 200, warmup_steps=5000) == [
        "schedule: the warm-up of 5,000 steps is no shorter than the run of 200; the learning rate only reaches 4% of "
        "--learning_rate; lower --warmup_steps"
    ]
    assert doubts(tmp_path, 200, warmup_steps=100) == [
        "schedule: the warm-up takes 100 of 200 steps; lower --warmup_steps"
    ]
    assert doubts(tmp_path, 200, warmup_steps=66) == [] == doubts(tmp_path, 200, warmup_steps=0.03)
    assert doubts(tmp_path, 200, warmup_steps=5000, lr_scheduler_type="constant") == []


def test_runs_that_teach_little_or_nothing_say_so(tmp_path):
    (few,) = doubts(tmp_path, 12, learning_rate=1e-4)
    assert few.startswith("schedule: 12 steps at 0.0001 teach little; raise --num_train_epochs, or lower")
    assert doubts(tmp_path, 50) == []
    (nothing,) = doubts(tmp_path, 1, warmup_steps=1)
    assert nothing == "schedule: the learning rate is 0 at every step, so nothing is learnt; lower --warmup_steps"


@pytest.mark.parametrize("changes", [
    {"save_strategy": "steps", "save_steps": 2}, {"save_strategy": "steps", "save_steps": 100},
    {"save_strategy": "epoch"}, {"save_strategy": "no"},
])  # fmt: skip
@pytest.mark.parametrize("num_steps", [1, 6, 7])
def test_checkpoints_are_counted_as_they_are_written(changes, num_steps):
    args, state = settings(1, changes)
    state.max_steps = num_steps
    written = 0
    for step in range(1, num_steps + 1):
        state.global_step = step
        written += find_due(args, state, 3).save
    assert count_checkpoints(args, num_steps, 3) == written
