"""The training loop: transformers' Trainer, where one dataloader item is one rank's whole optimizer step."""

import contextlib
import math
import time
import zlib
from abc import abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from tuning.checkpoint.manifest import find_fault
from tuning.checkpoint.output_directory import remove_checkpoint, rotate_checkpoints
from tuning.checkpoint.result import ResultWriter
from tuning.checkpoint.run_record import METRICS_FILE, append_metrics
from tuning.checkpoint.training_state import (
    load_optimizer,
    load_weights,
    read_counters,
    save_training_state,
    trained_parameters,
)
from tuning.distributed import zero_optimizer
from tuning.distributed.processes import RankZeroWork, on_rank_0, raise_on_all_ranks
from tuning.distributed.sharding import local_part, reshard, shape_of
from tuning.errors import MachineError, SettingsError, explain_failed_write
from tuning.machine import is_out_of_memory, peak_memory_gib
from tuning.messages import RESUME_HINT
from tuning.model.training_model import TrainingModel
from tuning.planning.operations import count_operations, measure_matmul_rate
from tuning.training.failures import describe_lost_process, describe_out_of_memory
from tuning.training.gradient_check import GradientCheck
from tuning.training.metrics import StepMetrics
from tuning.training.step_loader import StepSampler, build_loader, move_micro_batch
from tuning.training.stopping import StopRequest

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
        directory, work = self._checkpoint_directory(), RankZeroWork()

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
        raise_on_all_ranks(broken and f"{broken} is not finite at step {self.state.global_step}; lower --learning_rate")

    def _write_into(self, directory: Path, function: Callable[[], None]) -> None:
        try:
            with explain_failed_write(directory, f"{RESUME_HINT}; earlier checkpoints are untouched"):
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
            on_rank_0(lambda: _check_best(best))
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
            on_rank_0(self._trainer.on_begin)

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


class StepTrainer(ResumableTrainer):
    """Trains a TrainingModel on steps.

    train_dataset, eval_dataset: item s is this rank's share of step s of the run, counted over epochs:
        {"micro_batches": [inputs of the model's forward, ...], "row_ids": [[...], ...], "num_targets", "num_tokens",
        "num_positions", "num_pairs"} (data_utils.collate.Step); len() is the steps of one epoch. Every rank has the
        same number of micro-batches.
    writer: writes what was trained into a directory (on rank 0).
    """

    def __init__(
        self,
        model: TrainingModel,
        args: TrainingArguments,
        *,
        train_dataset: Dataset[Any],
        eval_dataset: Dataset[Any] | None = None,
        writer: ResultWriter,
        on_begin: Callable[[], None] | None = None,
        loraplus_lr_ratio: float | None = None,
    ):
        # Accumulation is the layout's business; one item is a whole step to the Trainer.
        args.gradient_accumulation_steps = 1
        # The model comes sharded (sharding.py); the Trainer and accelerate would do it again, their way.
        self._is_fsdp, args.fsdp = args.fsdp is not None, None
        args.logging_nan_inf_filter = False  # a host sync per step, to hide what must be seen
        # Already enabled on the model itself; the Trainer would look for it on the wrapper.
        args.gradient_checkpointing = False
        if hasattr(args, "activation_checkpointing"):
            args.activation_checkpointing = False
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False  # every trained parameter takes part in every forward
        if args.ddp_broadcast_buffers is None:
            args.ddp_broadcast_buffers = False  # none changes, and those of packed layers are large
        # On a machine with several GPUs one process uses one: transformers would wrap the model in DataParallel, which
        # is slow and knows nothing of steps. torchrun uses them all.
        args._n_gpu = min(args.n_gpu, 1)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            writer=writer,
            on_begin=on_begin,
        )
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self._loraplus_lr_ratio = loraplus_lr_ratio
        self._window: StepMetrics | None = None  # opened by the first step
        self._saved_window: dict[str, Any] | None = None
        self._num_tokens_seen = self._num_targets_seen = 0
        self._train_s = 0.0  # before _began
        self._gradients_seen = False
        self._training_model, self._flops = model, count_operations(model)
        self._peak_flops_per_s: float | None = None
        self._began = time.perf_counter()

    def create_accelerator_and_postprocess(self) -> None:
        """Accelerate as transformers sets it up; a model that is sharded already gets autocast only."""
        super().create_accelerator_and_postprocess()
        if self._is_fsdp:
            prepare = self.accelerator.prepare_model
            self.accelerator.prepare_model = lambda model, **_: prepare(
                model, device_placement=False, evaluation_mode=True
            )

    # ---- data ----

    def get_train_dataloader(self) -> DataLoader:
        """Steps of the epoch that the state stands in."""
        sampler = StepSampler(lambda: self.state.global_step, self.steps_per_epoch)
        return build_loader(self.train_dataset, self.args, sampler)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> tuple:
        """One item, which is a whole step, and its number of supervised tokens over all ranks."""
        step = next(epoch_iterator)
        return [step], step["num_targets"]

    # ---- step ----

    def create_optimizer(self, model: Any = None) -> Any:
        """As transformers builds it; with LoRA+ B matrices and vectors learn at a rate of their own."""
        if self._loraplus_lr_ratio is None or self.optimizer is not None:
            return super().create_optimizer() if model is None else super().create_optimizer(model)
        optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        rate = options.pop("lr")
        trained = trained_parameters(self.model)
        faster = {name for name, p in trained.items() if "lora_B" in name or len(shape_of(p)) == 1}
        decays = set(self.get_decay_parameter_names(self.model))

        def group(names: set[str], rate: float, decay: float) -> dict[str, Any]:
            return {"params": [p for name, p in trained.items() if name in names], "lr": rate, "weight_decay": decay}

        self.optimizer = optimizer_class(
            [
                group(trained.keys() - faster, rate, self.args.weight_decay),
                group(faster & decays, rate * self._loraplus_lr_ratio, self.args.weight_decay),
                group(faster - decays, rate * self._loraplus_lr_ratio, 0.0),
            ],
            lr=rate,
            **options,
        )
        return self.optimizer

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward of every micro-batch; gradients are synchronised at the last one.

        Returns: this rank's share of the step's loss, times the number of ranks (the Trainer logs the mean over
            ranks; DDP, ZeRO and FSDP average gradients over ranks).
        """
        if not self.model.training:  # DeepSpeed's wrapper says that it trains whatever its model does
            self.model.train()
        if self._window is None:
            self._window = StepMetrics(
                self.args.device,
                saved=self._saved_window,
                rank=self.args.process_index,
                num_ranks=self.args.world_size,
            )
            self._saved_window = None
        watch = None
        if not self._gradients_seen and hasattr(self.model.model, "peft_config"):
            trained = trained_parameters(self.model)  # an expert may get no token
            watch = GradientCheck({name: p for name, p in trained.items() if "expert" not in name})
        self._gradients_seen = True
        scale = self.args.world_size / num_items_in_batch
        losses = []
        micro_batches = [move_micro_batch(micro_batch, self.args.device) for micro_batch in inputs["micro_batches"]]
        last = len(micro_batches) - 1
        options = {"scale_wrt_gas": False} if self.accelerator.distributed_type == DistributedType.DEEPSPEED else {}
        for index, micro_batch in enumerate(micro_batches):
            self._seed_micro_batch(index)
            self.accelerator.gradient_state._set_sync_gradients(index == last)
            # Engines that shard gradients sum them over processes at once: whole ones would take their memory back.
            synchronises = index == last or not isinstance(model, DistributedDataParallel)
            try:
                with contextlib.nullcontext() if synchronises else self.accelerator.no_sync(model):
                    losses.append(self._run_micro_batch(model, micro_batch, scale, options))
            except Exception as error:
                raise self._explain(error, micro_batch, inputs["row_ids"][index]) from error
        self._num_tokens_seen += inputs["num_tokens"]
        self._num_targets_seen += inputs["num_targets"]
        if watch is not None:
            watch.check()
        return self._window.add(self.state.global_step + 1, inputs, losses)

    def _run_micro_batch(self, model: Any, micro_batch: Any, scale: float, options: dict[str, Any]) -> torch.Tensor:
        loss = model(**micro_batch) * scale
        self.accelerator.backward(loss, **options)
        return loss.detach()

    def _explain(self, error: Exception, micro_batch: Any, row_ids: list[str]) -> Exception:
        """An error of a micro-batch, with the micro-batch in it where memory ran out."""
        if not is_out_of_memory(error):
            return error
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
        if isinstance(norm, float) and norm < 0:  # what DeepSpeed says for no number when it offloads
            norm = math.nan
        assert self._window is not None
        self._window.add_gradient_norm(self.state.global_step + 1, norm)
        return norm

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: the Trainer's estimate walks over all parameters in every step."""
        return 0

    # ---- evaluation ----

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
                    self.stop_evaluating(signal_number)
                    return {}
                for micro_batch in step["micro_batches"]:
                    sums.append(model(**move_micro_batch(micro_batch, self.args.device)))
                num_targets += step["num_targets"]
        reshard(self.model)
        total = torch.stack(sums).sum()
        if self.args.world_size > 1:
            dist.all_reduce(total)
        loss = total.item() / num_targets
        metrics = {
            f"{metric_key_prefix}_loss": loss,
            f"{metric_key_prefix}_perplexity": math.exp(min(loss, 700.0)),
            f"{metric_key_prefix}_runtime": round(time.perf_counter() - started, 3),
        }
        self.log(metrics)
        self.note_evaluation(loss)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if self._window is not None:
            self._window.exclude(time.perf_counter() - started)
        return metrics

    # ---- log ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add throughput to the Trainer's logs and append them to metrics.jsonl."""
        if "loss" in logs:
            assert self._window is not None
            loss_sums = self._gather_loss_sums(self._window)
            self._check_finite(self._window, loss_sums)
            logs["loss"] = self._window.mean_loss(loss_sums)
            logs.update(self._window.rates(self._flops, self._peak_flops_per_s))
            logs["peak_gib"] = round(peak_memory_gib(self.args.device), 3)
            self._window = None
        # The Trainer's summary counts steps as samples; run.json has the right one.
        if self.is_world_process_zero() and "train_runtime" not in logs:
            append_metrics(self.metrics_path, {"step": self.state.global_step, "epoch": self.state.epoch, **logs})
        super().log(logs, start_time)

    def _gather_loss_sums(self, window: StepMetrics) -> list[float]:
        return self.accelerator.gather(window.loss_sum.reshape(1)).tolist()

    def _check_finite(self, window: StepMetrics, loss_sums: list[float]) -> None:
        """Raises: MachineError: a loss is no number, or a gradient (in fp16 that is the loss scale's business)."""
        fault = window.find_non_finite(gradients=not self.args.fp16)
        if fault is not None or not all(map(math.isfinite, loss_sums)):
            advice = "lower --learning_rate, look at these rows, or compute in bf16 instead of fp16"
            raise_on_all_ranks(fault and f"{fault}; {advice}. Nothing after the last checkpoint is saved")

    # ---- a run ----

    def train(self, *args: Any, **options: Any) -> Any:
        """Train, and take the time.

        Raises: MachineError: a loss that is no number, memory, a write that failed, a process that was lost.
        """
        # from_pretrained leaves the model in eval mode inside a wrapper that says it trains: no dropout of its own,
        # no gradient checkpointing.
        self.model.train()
        device, half = self.args.device, {"bf16": torch.bfloat16, "fp16": torch.float16}
        if device.type == "cuda" and self._flops:
            dtype = half.get(self.accelerator.mixed_precision, self._training_model.causal_lm.dtype)
            self._peak_flops_per_s = measure_matmul_rate(device, dtype, size=8192) * self.args.world_size
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
            "best": {"step": self.state.best_global_step, "eval_loss": self.state.best_metric} if evaluations else None,
        }

    def close(self) -> None:
        """Wait for all ranks and leave the process group: a process that exits with one alive may abort."""
        self.accelerator.wait_for_everyone()
        if dist.is_initialized():
            dist.destroy_process_group()

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        started = time.perf_counter()
        super()._save_checkpoint(model, trial)
        if self._window is not None:
            self._window.exclude(time.perf_counter() - started)

    def counters(self) -> dict[str, Any]:
        """Tokens and time of the run, and the log line that the checkpoint cuts in two."""
        window = None
        if self._window is not None:
            loss_sums = self._gather_loss_sums(self._window)
            self._check_finite(self._window, loss_sums)
            window = self._window.state(loss_sums)
        return {
            "window": window,
            "tokens_seen": self._num_tokens_seen,
            "targets_seen": self._num_targets_seen,
            "train_s": self._train_s + time.perf_counter() - self._began,
        }

    def restore_counters(self, saved: dict[str, Any]) -> None:
        """Go on from there, though the processes may be fewer or more."""
        self._saved_window = saved["window"]
        self._num_tokens_seen, self._num_targets_seen = saved["tokens_seen"], saved["targets_seen"]
        self._train_s = saved["train_s"]
