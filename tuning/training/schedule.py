"""What is due after a step: its log line, its evaluation, its checkpoint, the end."""

from dataclasses import dataclass


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
