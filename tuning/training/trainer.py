"""The training loop: transformers' Trainer, where one dataloader item is one rank's share of an optimizer step."""

import contextlib
import math
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from transformers import DefaultFlowCallback, PrinterCallback, Trainer, TrainerControl, TrainerState
from transformers.trainer_callback import ProgressCallback

from tuning.checkpoint.output_directory import rotate_checkpoints
from tuning.checkpoint.ownership import UNFINISHED, abandon_result, begin_result, publish_result
from tuning.checkpoint.result import ResultWriter
from tuning.checkpoint.resume import check_best
from tuning.checkpoint.run_record import METRICS_FILE, append_metrics
from tuning.checkpoint.training_state import (
    load_optimizer,
    load_weights,
    read_counters,
    save_training_state,
    trained_parameters,
)
from tuning.console import say
from tuning.distributed.processes import RankZeroWork, leave_processes, on_rank_0, raise_on_all_ranks
from tuning.distributed.sharding import local_part, reshard
from tuning.errors import MachineError, explain_failed_write
from tuning.machine import is_out_of_memory, peak_memory_gib
from tuning.messages import RESUME_HINT
from tuning.model.training_model import TrainingModel
from tuning.planning.operations import count_operations, measure_matmul_rate
from tuning.settings.arguments import RunArguments
from tuning.training.failures import describe_lost_process, describe_out_of_memory
from tuning.training.forgetting import ForgettingMeter
from tuning.training.gradient_check import GradientCheck
from tuning.training.metrics import StepMetrics
from tuning.training.optimizer import describe_schedules, group_for_loraplus, restore_schedules
from tuning.training.outcome import count_stale, describe_epoch, describe_outcome, is_told
from tuning.training.row_recorder import RowRecorder
from tuning.training.schedule import ScheduleCallback
from tuning.training.step_loader import StepSampler, build_loader, move_micro_batch
from tuning.training.stopping import StopRequest

TRAINER_STATE_FILE = "trainer_state.json"

# Private methods of transformers' Trainer that StepTrainer overrides, and why. tests/test_trainer.py says which of
# them a new transformers has changed.
OVERRIDDEN = {
    "_save_checkpoint": "a checkpoint is complete or absent, and older ones are deleted only after it is complete",
    "_init_training_state": "the state is read from our checkpoints, whose steps count as ours do",
    "_prepare_for_training": "weights and optimizer are filled after the engine was built, for all engines alike",
    "_load_from_checkpoint": "does nothing: _prepare_for_training has loaded weights and optimizer",
    "_load_rng_state": "random numbers are seeded at every micro-batch",
    "_run_epoch": "a run that is resumed at its last step trains no further step",
    "_determine_best_metric": "the best evaluation is known from the evaluation itself",
    "_load_best_model": "its weights are read exactly, from our checkpoint",
    "_get_grad_norm": "the norm is a plain number under every engine, and is checked with the losses",
}


class StepTrainer(Trainer):
    """Trains a TrainingModel on steps; logs, evaluates, saves and resumes them.

    train_dataset, eval_dataset: item s is this rank's share of step s of the run, counted over epochs:
        {"micro_batches": [inputs of the model's forward, ...], "rows": [[...], ...], "row_ids": [[...], ...],
        "num_targets", "num_tokens", "num_positions", "num_pairs"} (data_utils' Step); len() is the steps of one epoch.
        Every rank has the same number of micro-batches.
    writer: writes what was trained into a directory (on rank 0).
    recorder: of the rows' losses. meter: of what is forgotten.
    on_begin: called on rank 0 when everything is loaded, before the first step: until then no file is touched.

    stopped_by: the signal that ended train() early, or 0.
    evaluation_due: a stop came before an evaluation; whoever resumes starts with it.
    observers: called with (event, trainer) when a step begins ("step"), a micro-batch went backward ("backward"), a
        micro-batch is evaluated ("evaluate"), checkpoints are rotated ("rotate", before and after).
    """

    observers: ClassVar[list[Callable[[str, "StepTrainer"], None]]] = []
    optimizer: torch.optim.Optimizer | None
    control: TrainerControl
    lr_scheduler: Any

    def __init__(
        self,
        model: TrainingModel,
        args: RunArguments,
        *,
        train_dataset: Dataset[Any],
        eval_dataset: Dataset[Any] | None = None,
        writer: ResultWriter,
        on_begin: Callable[[], None] | None = None,
        loraplus_lr_ratio: float | None = None,
        recorder: RowRecorder | None = None,
        meter: ForgettingMeter | None = None,
    ):
        # The model comes sharded (distributed/sharding.py); the Trainer and accelerate would do it again, their way.
        self._is_fsdp = args.fsdp is not None
        # The Trainer deletes checkpoints when it ends; here rotate_checkpoints does, after each save.
        self._save_total_limit = args.save_total_limit
        _adapt_arguments(args)
        super().__init__(model=model, args=args, train_dataset=train_dataset, eval_dataset=eval_dataset)
        for callback in (DefaultFlowCallback, PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self.add_callback(ScheduleCallback(self))
        self.writer = writer
        self.on_begin = on_begin
        self.metrics_path = Path(args.output_dir) / METRICS_FILE
        self.stop = StopRequest()
        self.stopped_by = 0
        self.evaluation_due = False
        self.steps_per_epoch = len(train_dataset)  # type: ignore[arg-type]
        self._is_best = False
        self._resumed_from: Path | None = None
        self._loraplus_lr_ratio = loraplus_lr_ratio
        self._recorder, self._meter = recorder, meter
        self.general: dict[str, float] | None = None  # what the meter said last, and after which step
        self._general_step: int | None = None
        model.records_rows = recorder is not None
        self._metrics: StepMetrics | None = None  # opened by the first step after a log line
        self._saved_metrics: dict[str, Any] | None = None
        self._num_tokens_seen = self._num_targets_seen = 0
        self._train_s = 0.0  # before _began
        self._gradients_checked = False
        self._training_model, self._operations = model, count_operations(model)
        self._peak_rate: float | None = None  # operations per second of all devices
        self._began = time.perf_counter()

    def create_accelerator_and_postprocess(self) -> None:
        """Accelerate as transformers sets it up; a model that is sharded already gets autocast only."""
        super().create_accelerator_and_postprocess()
        if self._is_fsdp:
            prepare = self.accelerator.prepare_model
            self.accelerator.prepare_model = lambda model, **_: prepare(
                model, device_placement=False, evaluation_mode=True
            )

    def _tell(self, event: str) -> None:
        for observer in self.observers:
            observer(event, self)

    # ---- data ----

    def get_train_dataloader(self) -> DataLoader:
        """Steps of the epoch that state.global_step is in."""
        sampler = StepSampler(lambda: self.state.global_step, self.steps_per_epoch)
        return build_loader(self.train_dataset, self.args, sampler)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> tuple:
        """One item, which is a full step, and its number of supervised tokens over all ranks."""
        step = next(epoch_iterator)
        return [step], step["num_targets"]

    # ---- step ----

    def create_optimizer(self, model: Any = None) -> Any:
        """As transformers builds it; with LoRA+ in groups with rates of their own."""
        if self._loraplus_lr_ratio is None or self.optimizer is not None:
            return super().create_optimizer() if model is None else super().create_optimizer(model)
        optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        rate = options.pop("lr")
        groups = group_for_loraplus(
            trained_parameters(self.model),
            set(self.get_decay_parameter_names(self.model)),
            rate=rate,
            ratio=self._loraplus_lr_ratio,
            weight_decay=self.args.weight_decay,
        )
        self.optimizer = optimizer_class(groups, lr=rate, **options)
        return self.optimizer

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward of every micro-batch; gradients are synchronised at the last one.

        Returns: this rank's share of the step's loss, times the number of ranks (the Trainer logs the mean over
            ranks; DDP, ZeRO and FSDP average gradients over ranks).
        """
        self._tell("step")
        if not self.model.training:  # DeepSpeed's wrapper says that it trains whatever its model does
            self.model.train()
        if self._metrics is None:
            self._metrics = StepMetrics(
                self.args.device,
                saved=self._saved_metrics,
                rank=self.args.process_index,
                num_ranks=self.args.world_size,
            )
            self._saved_metrics = None
        check = None
        if not self._gradients_checked and hasattr(self.model.model, "peft_config"):
            trained = trained_parameters(self.model)  # an expert may get no token
            check = GradientCheck({name: p for name, p in trained.items() if "expert" not in name})
        self._gradients_checked = True
        scale = self.args.world_size / num_items_in_batch
        losses = []
        micro_batches = [move_micro_batch(micro_batch, self.args.device) for micro_batch in inputs["micro_batches"]]
        last = len(micro_batches) - 1
        options = {"scale_wrt_gas": False} if self.accelerator.distributed_type == DistributedType.DEEPSPEED else {}
        for index, micro_batch in enumerate(micro_batches):
            self._seed_micro_batch(index)
            self.accelerator.gradient_state._set_sync_gradients(index == last)
            # Engines that shard gradients reduce them in every micro-batch: full gradients would need more memory.
            synchronises = index == last or not isinstance(model, DistributedDataParallel)
            try:
                with contextlib.nullcontext() if synchronises else self.accelerator.no_sync(model):
                    loss = model(**micro_batch) * scale
                    self.accelerator.backward(loss, **options)
                    losses.append(loss.detach())
                if self._recorder is not None and (row_losses := self._training_model.row_losses) is not None:
                    self._recorder.add(self.state.global_step + 1, inputs["rows"][index], row_losses)
            except Exception as error:
                if is_out_of_memory(error):
                    raise self._explain_memory(micro_batch, inputs["row_ids"][index]) from error
                raise
            self._tell("backward")
        self._num_tokens_seen += inputs["num_tokens"]
        self._num_targets_seen += inputs["num_targets"]
        if check is not None:
            check.finish()
        return self._metrics.add(self.state.global_step + 1, inputs, losses)

    def _explain_memory(self, micro_batch: Any, row_ids: list[str]) -> MachineError:
        """Which micro-batch did not fit."""
        checkpointing = any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules())
        batch_size = self.args.per_device_train_batch_size
        return MachineError(
            describe_out_of_memory(micro_batch, row_ids, batch_size=batch_size, checkpointing=checkpointing)
        )

    def _seed_micro_batch(self, index: int) -> None:
        # Dropout's random numbers follow from (seed, step, rank, micro-batch), so a resumed run repeats them.
        place = f"{self.args.seed}/{self.state.global_step}/{self.args.process_index}/{index}"
        torch.manual_seed(zlib.crc32(place.encode()))

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if isinstance(norm, float) and norm < 0:  # what DeepSpeed returns for a non-finite one when it offloads
            norm = math.nan
        assert self._metrics is not None
        self._metrics.add_gradient_norm(self.state.global_step + 1, norm)
        return norm

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: the Trainer's estimate walks over all parameters in every step."""
        return 0

    # ---- log ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add throughput to the Trainer's logs and append them to metrics.jsonl."""
        if "loss" in logs:
            assert self._metrics is not None
            loss_sums = self._gather_loss_sums(self._metrics)
            self._check_finite(self._metrics, loss_sums)
            logs["loss"] = self._metrics.mean_loss(loss_sums)
            logs.update(self._metrics.rates(self._operations, self._peak_rate))
            logs["peak_gib"] = round(peak_memory_gib(self.args.device), 3)
            self._metrics = None
            if self._recorder is not None:
                self._recorder.collect()
        # The Trainer's summary counts steps as samples; run.json has the right one.
        if self.is_world_process_zero() and "train_runtime" not in logs:
            append_metrics(self.metrics_path, {"step": self.state.global_step, "epoch": self.state.epoch, **logs})
        super().log(logs, start_time)

    def _gather_loss_sums(self, metrics: StepMetrics) -> list[float]:
        return self.accelerator.gather(metrics.loss_sum.reshape(1)).tolist()

    def _check_finite(self, metrics: StepMetrics, loss_sums: list[float]) -> None:
        """Raises: MachineError: a non-finite loss, or gradient norm (in fp16 the loss scaler takes care of those)."""
        fault = metrics.find_non_finite(gradients=not self.args.fp16)
        # Gradient norms are the same on all ranks, so that all come here or none.
        if fault is not None or not all(map(math.isfinite, loss_sums)):
            advice = "lower --learning_rate, look at these conversations, or compute in bf16 instead of fp16"
            raise_on_all_ranks(fault and f"{fault}; {advice}. Nothing after the last checkpoint is saved")

    # ---- evaluate ----

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Summed loss over all supervised tokens, divided by their number, and its perplexity; nothing if stopped."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        assert dataset is not None
        started = time.perf_counter()
        self.evaluation_due = False
        model = self.model_wrapped
        self.model.eval()
        sums, num_targets = [], 0
        with torch.no_grad():
            for step in build_loader(dataset, self.args):
                if self.is_in_train and (signal_number := self.stop.agreed()):
                    self._stop_evaluating(signal_number)
                    return {}
                for micro_batch in step["micro_batches"]:
                    self._tell("evaluate")
                    sums.append(model(**move_micro_batch(micro_batch, self.args.device)))
                num_targets += step["num_targets"]
        reshard(self.model)
        total = torch.stack(sums).sum()
        if self.args.world_size > 1:
            dist.all_reduce(total)
        loss = total.item() / num_targets
        if self._meter is not None:
            self._measure_general()
        metrics = {
            f"{metric_key_prefix}_loss": loss,
            f"{metric_key_prefix}_perplexity": math.exp(min(loss, 700.0)),
            f"{metric_key_prefix}_runtime": round(time.perf_counter() - started, 3),
            **(self.general or {}),
        }
        self.log(metrics)
        self._note_best(loss)
        if self.is_in_train and self.is_stale():
            self.control.should_training_stop = True
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._exclude_time(started)
        return metrics

    def _measure_general(self) -> None:
        assert self._meter is not None
        self.general, self._general_step = self._meter.measure(self.model_wrapped), self.state.global_step

    def is_stale(self) -> bool:
        """Whether the evaluation's loss has not fallen for --early_stopping_patience evaluations."""
        patience = self.args.early_stopping_patience
        losses = [entry["eval_loss"] for entry in self.state.log_history if "eval_loss" in entry]
        return patience is not None and count_stale(losses, self.args.early_stopping_threshold) >= patience

    def _stop_evaluating(self, signal_number: int) -> None:
        """Leave the evaluation for whoever resumes, and save."""
        self.stopped_by = signal_number
        self.evaluation_due = True
        self.control.should_evaluate = False
        self.control.should_training_stop = True
        self.control.should_save = True

    def _note_best(self, loss: float) -> None:
        """Remember the step of the lowest loss, whose checkpoint stays and may be the result."""
        step, resumed = self.state.global_step, self._resumed_from
        # Before the first step there is no checkpoint to load; a NaN is never the best.
        improves = self.state.best_metric is None or loss < self.state.best_metric
        self._is_best = step > 0 and improves and not math.isnan(loss)
        if self._is_best:
            self.state.best_metric, self.state.best_global_step = loss, step
            # An evaluation that was due when the run stopped belongs to the checkpoint that it was resumed from.
            of_resumed = resumed is not None and resumed.name == self._checkpoint_directory().name
            self.state.best_model_checkpoint = str(resumed if of_resumed else self._checkpoint_directory())

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        # --save_strategy best saves only then, or when stopped.
        return self._is_best if metrics else bool(self.stopped_by)

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        if not self.stopped_by:
            best = Path(self.state.best_model_checkpoint)
            on_rank_0(lambda: check_best(best))
            load_weights(best, self.model)

    # ---- save ----

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        started = time.perf_counter()
        counters = self._count()
        self.check_weights()
        directory, work = self._checkpoint_directory(), RankZeroWork()
        unfinished = directory / UNFINISHED

        def write(function: Callable[[], object]) -> None:
            work.do(lambda: _write_into(directory, function))

        if self._recorder is not None:
            self._recorder.gather()
        write(lambda: begin_result(directory))
        result = self.writer.collect()
        write(lambda: self.writer.write(unfinished, result))
        if not self.args.save_only_model:
            assert self.optimizer is not None
            schedules = describe_schedules(self.optimizer, self.lr_scheduler, self.accelerator.scaler)
            state = {**schedules, "evaluation_due": self.evaluation_due, **counters}
            save_training_state(unfinished, self.model, self.optimizer, state, write=write)
        write(lambda: self._seal(unfinished))
        write(lambda: publish_result(directory))
        work.do(lambda: self._rotate(directory))
        work.finish()
        self._exclude_time(started)

    def check_weights(self) -> None:
        """Raises: MachineError: a trained weight is not finite. Every process calls it."""
        trained = trained_parameters(self.model)
        broken = next((name for name, p in trained.items() if not bool(local_part(p).isfinite().all())), None)
        raise_on_all_ranks(broken and f"{broken} is not finite at step {self.state.global_step}; lower --learning_rate")

    def _seal(self, directory: Path) -> None:
        self.state.save_to_json(str(directory / TRAINER_STATE_FILE))
        if self.metrics_path.exists():
            (directory / METRICS_FILE).write_bytes(self.metrics_path.read_bytes())
        if self._recorder is not None:
            self._recorder.write(directory)
        if self._meter is not None:
            self._meter.save(directory)
        self.writer.seal(directory, step=self.state.global_step)

    def _rotate(self, newest: Path) -> None:
        best = self.state.best_model_checkpoint if self.args.metric_for_best_model else None
        self._tell("rotate")
        rotate_checkpoints(newest, self._save_total_limit, keep=Path(best) if best else None)
        self._tell("rotate")

    def _checkpoint_directory(self) -> Path:
        return Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"

    def _count(self) -> dict[str, Any]:
        """Tokens and time so far, and the metrics since the last log line. A collective: all ranks must call it."""
        metrics = None
        if self._metrics is not None:
            loss_sums = self._gather_loss_sums(self._metrics)
            self._check_finite(self._metrics, loss_sums)
            metrics = self._metrics.state(loss_sums)
        return {
            "window": metrics,
            "tokens_seen": self._num_tokens_seen,
            "targets_seen": self._num_targets_seen,
            "train_s": self._train_s + time.perf_counter() - self._began,
        }

    def _exclude_time(self, started: float) -> None:
        """Evaluating and saving are not part of the measured rates."""
        if self._metrics is not None:
            self._metrics.exclude(time.perf_counter() - started)

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
            # Beside the checkpoint, though the run may have moved; or in the run that this one was resumed from.
            there = Path(saved.best_model_checkpoint)
            beside = Path(checkpoint).parent / there.name
            best = beside if beside.is_dir() else there
            if self.args.load_best_model_at_end:
                check_best(best)
            self.state.best_model_checkpoint = str(best)
        counters = read_counters(Path(checkpoint))
        # The processes may be fewer or more than they were.
        self._saved_metrics, self._train_s = counters["window"], counters["train_s"]
        self._num_tokens_seen, self._num_targets_seen = counters["tokens_seen"], counters["targets_seen"]
        self.evaluation_due = self.args.eval_on_start = counters["evaluation_due"] and self.eval_dataset is not None
        return divmod(self.state.global_step, steps_per_epoch)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if resume_from_checkpoint is not None:
            checkpoint = Path(resume_from_checkpoint)
            load_weights(checkpoint, self.model)
            assert self.optimizer is not None
            load_optimizer(checkpoint, self.model, self.optimizer)
            counters = read_counters(checkpoint)
            restore_schedules(counters, self.optimizer, self.lr_scheduler, self.accelerator.scaler)
            if self._recorder is not None and self.is_world_process_zero():
                self._recorder.restore(checkpoint)
            if self._meter is not None:
                self._meter.restore(checkpoint)
        if self._meter is not None:
            self.model.eval()
            with torch.no_grad():
                self._meter.begin(self.model_wrapped)
            reshard(self.model)
            self.model.train()
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """See OVERRIDDEN."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """See OVERRIDDEN."""

    def _run_epoch(self, *args: Any, **options: Any) -> None:
        # Resumed at the last step, or where it had stopped early; or stopped while evaluating at the start.
        if self.stopped_by or self.state.global_step >= self.state.max_steps or self.is_stale():
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **options)
        if not self.stopped_by and self.state.global_step % self.steps_per_epoch == 0:
            self._tell_epoch()

    def _tell_epoch(self) -> None:
        """What the epoch did, in the log."""
        epoch = self.state.global_step // self.steps_per_epoch
        num_epochs = math.ceil(self.state.max_steps / self.steps_per_epoch)
        if not is_told(epoch, num_epochs):
            return
        if self._recorder is not None:
            self._recorder.gather()
        if self.is_world_process_zero():
            rows = self._recorder.summarize(epoch - 1) if self._recorder else None
            for line in describe_epoch(epoch, num_epochs, self.state.log_history, rows):
                say(line)

    # ---- a run ----

    def train(self, *args: Any, **options: Any) -> Any:
        """Train, and take the time.

        Raises: MachineError: a non-finite loss, memory, a write that failed, a process that was lost.
        """
        # from_pretrained leaves the model in eval mode inside a wrapper that says it trains: no dropout of its own,
        # no gradient checkpointing.
        self.model.train()
        device, half = self.args.device, {"bf16": torch.bfloat16, "fp16": torch.float16}
        if device.type == "cuda" and self._operations:
            dtype = half.get(self.accelerator.mixed_precision, self._training_model.causal_lm.dtype)
            self._peak_rate = measure_matmul_rate(device, dtype, size=8192) * self.args.world_size
            torch.cuda.reset_peak_memory_stats(device)
        self._began = time.perf_counter()
        with self.stop:
            try:
                result = super().train(*args, **options)
            except RuntimeError as error:
                if lost := describe_lost_process(error):
                    raise MachineError(f"{lost}; {RESUME_HINT}") from error
                raise
        if not self.stopped_by:
            self.check_weights()
            # Of the result, which may be an earlier checkpoint; the last evaluation may have measured it.
            is_last = self._general_step == self.state.global_step and not self.args.load_best_model_at_end
            if self._meter is not None and not is_last:
                self.model.eval()
                self._measure_general()
        self._train_s += time.perf_counter() - self._began
        return result

    def summarize(self) -> dict[str, Any]:
        """What was trained, for run.json: steps, tokens, times, first, last and mean loss."""
        losses = [entry["loss"] for entry in self.state.log_history if "loss" in entry]
        evaluations = [entry["eval_loss"] for entry in self.state.log_history if "eval_loss" in entry]
        return {
            "steps": self.state.global_step,
            "tokens_trained": self._num_tokens_seen,
            "supervised_tokens_trained": self._num_targets_seen,
            "train_s": round(self._train_s, 1),
            "tokens_per_s": round(self._num_tokens_seen / self._train_s, 1),
            "peak_gib": round(peak_memory_gib(self.args.device), 3),
            "loss": {"first": losses[0], "last": losses[-1]} if losses else None,
            "eval_loss": evaluations[-1] if evaluations else None,
            "general": self.general,
            "outcome": describe_outcome(self.state.log_history, self.general),
            "stopped_early": not self.stopped_by and self.is_stale() and self.state.global_step < self.state.max_steps,
            "best": {"step": self.state.best_global_step, "eval_loss": self.state.best_metric} if evaluations else None,
        }

    def close(self) -> None:
        """Wait for all ranks and leave the process group."""
        self.accelerator.wait_for_everyone()
        leave_processes()


def _adapt_arguments(args: Any) -> None:
    """Tell the Trainer to leave alone what happens elsewhere here."""
    args.gradient_accumulation_steps = 1  # one item is a full step; the batch layout accumulates
    args.fsdp = args.save_total_limit = None
    args.logging_nan_inf_filter = False  # a host sync per step, to hide what must be seen
    # Already enabled on the model itself; the Trainer would look for it on the wrapper.
    args.gradient_checkpointing = False
    if hasattr(args, "activation_checkpointing"):
        args.activation_checkpointing = False
    if args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = False  # every trained parameter takes part in every forward
    if args.ddp_broadcast_buffers is None:
        args.ddp_broadcast_buffers = False  # none changes, and those of quantised layers are large
    if args.save_strategy == "best":
        args.metric_for_best_model = args.metric_for_best_model or "loss"
    # On a machine with several GPUs one process uses one: transformers would wrap the model in DataParallel, which
    # is slow and knows nothing of steps. torchrun uses them all.
    args._n_gpu = min(args.n_gpu, 1)


def _write_into(directory: Path, function: Callable[[], object]) -> None:
    try:
        with explain_failed_write(directory, f"{RESUME_HINT}; earlier checkpoints are untouched"):
            function()
    except BaseException:
        abandon_result(directory)
        raise
