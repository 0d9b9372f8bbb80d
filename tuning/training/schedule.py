"""What is due after a step: its log line, its evaluation, its checkpoint, the end."""

from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback

from tuning.distributed.processes import on_rank_0


@dataclass(frozen=True)
class Due:
    """What follows a step, in this order.

    evaluation_postponed: the run stops before an evaluation that was due; whoever resumes it starts with that.
    """

    log: bool
    evaluate: bool
    save: bool
    stop: bool
    evaluation_postponed: bool = False


@dataclass(frozen=True)
class Schedule:
    """When to log, evaluate and save, as transformers' options say it. Strategies are "no", "steps", "epoch", "best".

    logging_steps, eval_steps, save_steps: in steps (not shares of the run). eval_delay: in steps or epochs, as
    eval_strategy counts. "best" saves by the evaluation's result, which is not known here.
    """

    max_steps: int
    steps_per_epoch: int
    logging_strategy: str
    logging_steps: int
    logging_first_step: bool
    eval_strategy: str
    eval_steps: int
    eval_delay: float
    save_strategy: str
    save_steps: int

    def find_due(self, step: int, *, stopped: bool) -> Due:
        """What is due after a step, counted from 1. stopped: a signal asks to stop."""
        last = step >= self.max_steps
        ends_epoch = last or step % self.steps_per_epoch == 0
        log = {
            "no": False,
            "steps": last or step % self.logging_steps == 0,
            "epoch": ends_epoch,
        }[self.logging_strategy]
        evaluate = {
            "no": False,
            "steps": (last or step % self.eval_steps == 0) and self.eval_delay <= step,
            "epoch": ends_epoch and self.eval_delay <= step / self.steps_per_epoch,
        }[self.eval_strategy]
        save = {
            "no": False,
            "best": False,
            "steps": last or step % self.save_steps == 0,
            "epoch": ends_epoch,
        }[self.save_strategy]
        log = log or (step == 1 and self.logging_first_step)
        if stopped:
            return Due(log=log, evaluate=False, save=True, stop=True, evaluation_postponed=evaluate)
        return Due(log=log, evaluate=evaluate, save=save, stop=last)


class ScheduleCallback(TrainerCallback):
    """Orders what is due after each step, in place of transformers' DefaultFlowCallback.

    trainer: a StepTrainer.
    """

    def __init__(self, trainer: Any):
        self._trainer = trainer
        self._schedule: Schedule | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Everything is loaded: the run begins."""
        self._schedule = Schedule(
            max_steps=state.max_steps,
            steps_per_epoch=self._trainer.steps_per_epoch,
            logging_strategy=args.logging_strategy.value,
            logging_steps=state.logging_steps,
            logging_first_step=args.logging_first_step,
            eval_strategy=args.eval_strategy.value,
            eval_steps=state.eval_steps,
            eval_delay=args.eval_delay,
            save_strategy=args.save_strategy.value,
            save_steps=state.save_steps,
        )
        if self._trainer.on_begin is not None:
            on_rank_0(self._trainer.on_begin)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Order what is due; a signal stops all ranks at the same step."""
        trainer = self._trainer
        assert self._schedule is not None
        signal_number = trainer.stop.agreed()
        due = self._schedule.find_due(state.global_step, stopped=bool(signal_number))
        if signal_number:
            trainer.stopped_by, trainer.evaluation_due = signal_number, due.evaluation_postponed
        control.should_log, control.should_evaluate = due.log, due.evaluate
        control.should_save, control.should_training_stop = due.save, due.stop
