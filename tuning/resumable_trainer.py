"""transformers' Trainer with checkpoints that are complete or absent, in place of its own."""

import math
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tuning import zero_optimizer
from tuning.checkpoint import ResultWriter, remove_checkpoint, rotate_checkpoints
from tuning.errors import SettingsError
from tuning.model import TrainingModel
from tuning.processes import FirstProcess, on_first, raise_together
from tuning.record import METRICS_FILE, explain_failed_write, find_fault
from tuning.sharding import local_part
from tuning.stopping import GO_ON, StopRequest
from tuning.training_state import load_optimizer, load_weights, read_counters, save_training_state, trained_parameters

TRAINER_STATE_FILE = "trainer_state.json"


class ResumableTrainer(Trainer):
    """Saves and resumes by what subclasses count (counters, restore_counters) and by what is due after a step.

    writer: writes what was trained into a directory (on rank 0).
    on_begin: called on rank 0 when everything is loaded, before the first step: until then no file is touched.
    stopped_by: the signal that ended train() early, or 0.
    evaluation_due: a stop came before an evaluation; whoever resumes starts with it.
    """

    def __init__(
        self,
        model: TrainingModel,
        args: TrainingArguments,
        *,
        train_dataset: Dataset[Any],
        eval_dataset: Dataset[Any] | None,
        writer: ResultWriter,
        on_begin: Callable[[], None] | None,
    ):
        # The Trainer deletes checkpoints when it ends; here rotation is one function's business.
        self._save_total_limit, args.save_total_limit = args.save_total_limit, None
        if args.save_strategy == "best":
            args.metric_for_best_model = args.metric_for_best_model or "loss"
        super().__init__(model=model, args=args, train_dataset=train_dataset, eval_dataset=eval_dataset)
        self.optimizer: torch.optim.Optimizer | None
        self.control: TrainerControl
        self.lr_scheduler: Any
        self.writer = writer
        self.on_begin = on_begin
        self.metrics_path = Path(args.output_dir) / METRICS_FILE
        self.stopped_by = 0
        self.evaluation_due = False
        self.stop = StopRequest()
        self.steps_per_epoch = len(train_dataset)  # type: ignore[arg-type]
        self.add_callback(_StepEnd(self))
        self._is_best = False
        self._resumed_from: Path | None = None

    @abstractmethod
    def counters(self) -> dict[str, Any]:
        """What was counted so far, as JSON values. Every process calls it."""

    @abstractmethod
    def restore_counters(self, saved: dict[str, Any]) -> None:
        """Go on counting from there."""

    # ---- save ----

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # Not the Trainer's: it rotates before a checkpoint is complete.
        counters = self.counters()
        self.check_weights()
        directory, work = self._checkpoint_directory(), FirstProcess()

        def write(function: Callable[[], None]) -> None:
            work.do(lambda: self._write_into(directory, function))

        write(lambda: remove_checkpoint(directory))  # what a crash left there
        result = self.writer.collect()
        write(lambda: self.writer.write(directory, result))
        if not self.args.save_only_model:
            assert self.optimizer is not None
            state = self._describe_engines() | counters
            save_training_state(directory, self.model, self.optimizer, state, write=write)
        write(lambda: self._seal(directory))
        best = self.state.best_model_checkpoint if self.args.metric_for_best_model else None
        work.do(lambda: rotate_checkpoints(directory, self._save_total_limit, keep=Path(best) if best else None))
        work.finish()

    def check_weights(self) -> None:
        """Raises: MachineError: a trained weight is no number. Every process calls it."""
        trained = trained_parameters(self.model)
        broken = next((name for name, p in trained.items() if not bool(local_part(p).isfinite().all())), None)
        raise_together(broken and f"{broken} is not finite at step {self.state.global_step}; lower --learning_rate")

    def _write_into(self, directory: Path, function: Callable[[], None]) -> None:
        try:
            with explain_failed_write(directory, f"{GO_ON}; earlier checkpoints are untouched"):
                function()
        except BaseException:
            remove_checkpoint(directory)
            raise

    def _seal(self, directory: Path) -> None:
        self.state.save_to_json(str(directory / TRAINER_STATE_FILE))
        if self.metrics_path.exists():
            (directory / METRICS_FILE).write_bytes(self.metrics_path.read_bytes())
        self.writer.seal(directory, step=self.state.global_step)

    def _checkpoint_directory(self) -> Path:
        return Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"

    def _describe_engines(self) -> dict[str, Any]:
        return {
            "scheduler": {"last_epoch": self.lr_scheduler.last_epoch, "_step_count": self.lr_scheduler._step_count},
            "scaler": self._scaler_state(),
            "evaluation_due": self.evaluation_due,
        }

    def _scaler_state(self) -> dict[str, Any] | None:
        if zero_optimizer.is_zero(self.optimizer):
            return zero_optimizer.scaler_state(self.optimizer)
        scaler = self.accelerator.scaler
        return scaler.state_dict() if scaler is not None else None

    def stop_evaluating(self, signal_number: int) -> None:
        """Leave an evaluation for whoever resumes, and save."""
        self.stopped_by = signal_number
        self.evaluation_due = True
        self.control.should_evaluate = False
        self.control.should_training_stop = True
        self.control.should_save = True

    # ---- resume ----

    def _init_training_state(
        self, max_steps: int, steps_per_epoch: int, num_epochs: int, checkpoint: str | None, trial: Any
    ) -> tuple[int, int]:
        place = super()._init_training_state(max_steps, steps_per_epoch, num_epochs, None, trial)
        if checkpoint is None:
            return place
        # Only what happened; how often to log or to save is the settings' business.
        saved = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_FILE))
        for name in ("global_step", "epoch", "log_history", "best_metric", "best_global_step"):
            setattr(self.state, name, getattr(saved, name))
        self._resumed_from = Path(checkpoint)
        if saved.best_model_checkpoint is not None:
            # Beside the checkpoint, though the run may have moved; or where the run that this one goes on from lies.
            there = Path(saved.best_model_checkpoint)
            beside = Path(checkpoint).parent / there.name
            best = beside if beside.is_dir() else there
            if self.args.load_best_model_at_end:
                _check_best(best)
            self.state.best_model_checkpoint = str(best)
        counters = read_counters(Path(checkpoint))
        self.restore_counters(counters)
        self.evaluation_due = self.args.eval_on_start = counters["evaluation_due"] and self.eval_dataset is not None
        return divmod(self.state.global_step, steps_per_epoch)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        # One way for all engines: they are built first, then filled.
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if resume_from_checkpoint is not None:
            checkpoint = Path(resume_from_checkpoint)
            load_weights(checkpoint, self.model)
            assert self.optimizer is not None
            load_optimizer(checkpoint, self.model, self.optimizer)
            self._restore_engines(read_counters(checkpoint))
        return prepared

    def _restore_engines(self, saved: dict[str, Any]) -> None:
        assert self.optimizer is not None
        scheduler, groups = self.lr_scheduler, self.optimizer.param_groups
        vars(scheduler).update(saved["scheduler"])
        for group, rate, factor in zip(groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
            group["lr"] = rate * factor(scheduler.last_epoch)
        scheduler._last_lr = [group["lr"] for group in groups]
        if saved["scaler"] is None:
            return
        if zero_optimizer.is_zero(self.optimizer):
            zero_optimizer.load_scaler(self.optimizer, saved["scaler"])
        elif (scaler := self.accelerator.scaler) is not None:
            there = saved["scaler"]
            scaler.load_state_dict(
                there if "scale" in there else {**scaler.state_dict(), "scale": there["cur_scale"]}  # DeepSpeed's
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing to load yet: see _prepare_for_training."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing to load: random numbers are seeded at every micro-batch."""

    def _run_epoch(self, *args: Any, **options: Any) -> None:
        # Resumed at the last step, or stopped while evaluating at the start: the Trainer would train one step more.
        if self.stopped_by or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **options)

    # ---- the best ----

    def note_evaluation(self, loss: float) -> None:
        """Remember the step of the lowest loss, whose checkpoint stays and may be the result."""
        step, resumed = self.state.global_step, self._resumed_from
        # Before the first step there is no checkpoint to come back to; nan is better than nothing to no one.
        improves = self.state.best_metric is None or loss < self.state.best_metric
        self._is_best = step > 0 and improves and not math.isnan(loss)
        if self._is_best:
            self.state.best_metric, self.state.best_global_step = loss, step
            made_up_for = resumed is not None and resumed.name == self._checkpoint_directory().name
            self.state.best_model_checkpoint = str(resumed if made_up_for else self._checkpoint_directory())

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        # --save_strategy best saves only then, or when stopped.
        return self._is_best if metrics else bool(self.stopped_by)

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        if not self.stopped_by:
            best = Path(self.state.best_model_checkpoint)
            on_first(lambda: _check_best(best))
            load_weights(best, self.model)


def _check_best(directory: Path) -> None:
    if fault := find_fault(directory):
        raise SettingsError(
            f"--load_best_model_at_end: {directory}, the best so far: {fault}; put it back, or leave the flag out"
        )


class _StepEnd(TrainerCallback):
    """What follows a step: its log line, its evaluation, its checkpoint, in this order; or the stop."""

    def __init__(self, trainer: ResumableTrainer):
        self._trainer = trainer
        self._saves_at_epoch_end = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Everything is loaded: the run begins."""
        if self._trainer.on_begin is not None:
            on_first(self._trainer.on_begin)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Order what is due."""
        if state.global_step >= state.max_steps and args.logging_strategy != "no":
            control.should_log = True  # whatever logging_steps is, so that the last loss is the last loss
        ends_epoch = state.global_step % self._trainer.steps_per_epoch == 0 or control.should_training_stop
        control.should_log |= ends_epoch and args.logging_strategy == "epoch"  # before any save of this step
        if signal_number := self._trainer.stop.agreed():
            self._trainer.stopped_by = signal_number
            self._trainer.evaluation_due = control.should_evaluate or (
                ends_epoch and args.eval_strategy == "epoch" and args.eval_delay <= state.epoch
            )
            control.should_evaluate = False
            control.should_save = control.should_training_stop = True
        elif ends_epoch:
            # The end of the epoch follows at once, with its evaluation: what is saved knows of it.
            self._saves_at_epoch_end, control.should_save = control.should_save, False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save what waited for the end of the epoch; nothing more after a stop."""
        control.should_save |= self._saves_at_epoch_end
        self._saves_at_epoch_end = False
        if self._trainer.stopped_by:
            control.should_log = control.should_evaluate = control.should_save = False
