"""What is due after a step: its log line, its evaluation, its checkpoint, the end."""

from typing import Any, NamedTuple

from transformers import TrainerCallback

from tuning.distributed.processes import on_rank_0


class Due(NamedTuple):
    """What follows a step, in this order."""

    log: bool
    evaluate: bool
    save: bool
    stop: bool


def find_due(args: Any, state: Any, steps_per_epoch: int) -> Due:
    """What is due after state.global_step, counted from 1, as transformers' options say it.

    args: TrainingArguments. state: a TrainerState, where steps are no shares of the run. eval_delay is in steps or
    epochs, as eval_strategy counts. "best" saves by the evaluation's result, which is not known here.
    """
    step = state.global_step
    last = step >= state.max_steps
    ends_epoch = last or step % steps_per_epoch == 0
    waited = {"steps": step, "epoch": step / steps_per_epoch}.get(args.eval_strategy.value, 0)

    def is_due(strategy: Any, num_steps: int) -> bool:
        at_step = last or step % num_steps == 0
        return {"no": False, "best": False, "steps": at_step, "epoch": ends_epoch}[strategy.value]

    return Due(
        log=is_due(args.logging_strategy, state.logging_steps) or (step == 1 and args.logging_first_step),
        evaluate=is_due(args.eval_strategy, state.eval_steps) and args.eval_delay <= waited,
        save=is_due(args.save_strategy, state.save_steps),
        stop=last,
    )


class ScheduleCallback(TrainerCallback):
    """Orders what is due after each step, in place of transformers' DefaultFlowCallback.

    trainer: a StepTrainer.
    """

    def __init__(self, trainer: Any):
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Everything is loaded: the run begins."""
        if self._trainer.on_begin is not None:
            on_rank_0(self._trainer.on_begin)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Order what is due; a signal stops all ranks at the same step.

        Then an evaluation that was due is postponed: whoever resumes the run starts with it.
        """
        trainer = self._trainer
        due = find_due(args, state, trainer.steps_per_epoch)
        if signal_number := trainer.stop.agreed():
            trainer.stopped_by, trainer.evaluation_due = signal_number, due.evaluate
            due = due._replace(evaluate=False, save=True, stop=True)
        control.should_log, control.should_evaluate = due.log, due.evaluate
        control.should_save, control.should_training_stop = due.save, due.stop
