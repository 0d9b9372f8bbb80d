"""The training loop: transformers' Trainer, where one dataloader item is one rank's whole optimizer step."""

import contextlib
import math
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from transformers import PrinterCallback, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from tuning.checkpoint import ResultWriter
from tuning.errors import MachineError
from tuning.flops import count_flops, measure_matmul_flops
from tuning.gradient_watch import GradientWatch
from tuning.machine import describe_lost_process, describe_out_of_memory, is_out_of_memory, peak_memory_gib
from tuning.model import TrainingModel
from tuning.processes import raise_together
from tuning.record import append_metrics
from tuning.resumable_trainer import ResumableTrainer
from tuning.sharding import reshard, shape_of
from tuning.step_loader import StepSampler, build_loader, move_micro_batch
from tuning.stopping import GO_ON
from tuning.training_state import trained_parameters
from tuning.window import StepWindow


class StepTrainer(ResumableTrainer):
    """Trains a TrainingModel on steps.

    train_dataset, eval_dataset: item s is this rank's share of step s of the run, counted over epochs:
        {"micro_batches": [inputs of the model's forward, ...], "row_ids": [[...], ...], "num_targets", "num_tokens",
        "num_positions", "num_pairs"} (data_utils.steps.Step); len() is the steps of one epoch. Every rank has the
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
        self._window: StepWindow | None = None  # opened by the first step
        self._saved_window: dict[str, Any] | None = None
        self._num_tokens_seen = self._num_targets_seen = 0
        self._train_s = 0.0  # before _began
        self._gradients_seen = False
        self._training_model, self._flops = model, count_flops(model)
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
            self._window = StepWindow(
                self.args.device,
                saved=self._saved_window,
                rank=self.args.process_index,
                num_ranks=self.args.world_size,
            )
            self._saved_window = None
        watch = None
        if not self._gradients_seen and hasattr(self.model.model, "peft_config"):
            trained = trained_parameters(self.model)  # an expert may get no token
            watch = GradientWatch({name: p for name, p in trained.items() if "expert" not in name})
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

    def _gather_loss_sums(self, window: StepWindow) -> list[float]:
        return self.accelerator.gather(window.loss_sum.reshape(1)).tolist()

    def _check_finite(self, window: StepWindow, loss_sums: list[float]) -> None:
        """Raises: MachineError: a loss is no number, or a gradient (in fp16 that is the loss scale's business)."""
        fault = window.find_non_finite(gradients=not self.args.fp16)
        if fault is not None or not all(map(math.isfinite, loss_sums)):
            advice = "lower --learning_rate, look at these rows, or compute in bf16 instead of fp16"
            raise_together(fault and f"{fault}; {advice}. Nothing after the last checkpoint is saved")

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
            self._peak_flops_per_s = measure_matmul_flops(device, dtype, size=8192) * self.args.world_size
            torch.cuda.reset_peak_memory_stats(device)
        self._began = time.perf_counter()
        with self.stop:
            try:
                result = super().train(*args, **options)
            except RuntimeError as error:
                if lost := describe_lost_process(error):
                    raise MachineError(f"{lost}; {GO_ON}") from error
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
