"""The training loop: transformers' Trainer, where one dataloader item is one rank's whole optimizer step."""

import contextlib
import math
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import DistributedType
from peft.optimizers import create_loraplus_optimizer
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from tuning.checkpoint import rotate_checkpoints
from tuning.errors import MachineError
from tuning.machine import describe_out_of_memory, is_out_of_memory
from tuning.model import TrainingModel
from tuning.record import METRICS_FILE, append_metrics


class StepTrainer(Trainer):
    """Trains a TrainingModel on steps.

    train_dataset, eval_dataset: item s is this rank's share of step s of the run, counted over epochs:
        {"micro_batches": [inputs of the model's forward, ...], "row_ids": [[...], ...], "num_targets": supervised
        tokens of the step on all ranks, "num_tokens": likewise without padding}; len() is the steps of one epoch.
        Every rank has the same number of micro-batches.
    save_result: writes what was trained into a directory, given the step (called on rank 0).
    """

    def __init__(
        self,
        model: TrainingModel,
        args: TrainingArguments,
        *,
        train_dataset: Dataset[Any],
        eval_dataset: Dataset[Any] | None = None,
        save_result: Callable[..., None],
        loraplus_lr_ratio: float | None = None,
    ):
        # Accumulation is the layout's business; one item is a whole step to the Trainer.
        args.gradient_accumulation_steps = 1
        args.logging_nan_inf_filter = False  # a host sync per step, to hide what must be seen
        # Already enabled on the model itself; the Trainer would look for it on the wrapper.
        args.gradient_checkpointing = False
        if hasattr(args, "activation_checkpointing"):
            args.activation_checkpointing = False
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False  # every trained parameter takes part in every forward
        # On a machine with several GPUs one process uses one: transformers would wrap the model in DataParallel, which
        # is slow and knows nothing of steps. torchrun uses them all.
        args._n_gpu = min(args.n_gpu, 1)
        super().__init__(model=model, args=args, train_dataset=train_dataset, eval_dataset=eval_dataset)
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.add_callback(_LogLastStep)
        self.optimizer: torch.optim.Optimizer | None
        self.control: TrainerControl
        self._save_result = save_result
        self._loraplus_lr_ratio = loraplus_lr_ratio
        self._metrics_path = Path(args.output_dir) / METRICS_FILE
        self._window: _Window | None = None  # opened by the first step
        self._num_tokens_seen = self._num_targets_seen = 0
        self._train_s = 0.0

    # ---- data ----

    def get_train_dataloader(self) -> DataLoader:
        """Steps of the epoch that the state stands in."""
        sampler = _StepSampler(lambda: self.state.global_step, len(self.train_dataset))
        return self._build_dataloader(self.train_dataset, sampler)

    def _build_dataloader(self, dataset: Dataset[Any], sampler: Sampler[int] | None) -> DataLoader:
        # batch_size=1, not None: accelerate's skip_first_batches needs a batch sampler.
        workers = self.args.dataloader_num_workers
        return DataLoader(
            dataset,
            batch_size=1,
            sampler=sampler,
            collate_fn=_only_item,
            num_workers=workers,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
            persistent_workers=self.args.dataloader_persistent_workers and workers > 0,
            prefetch_factor=self.args.dataloader_prefetch_factor if workers else None,
        )

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> tuple:
        """One item, which is a whole step, and its number of supervised tokens over all ranks."""
        step = next(epoch_iterator)
        return [step], step["num_targets"]

    # ---- step ----

    def create_optimizer(self, model: Any = None) -> Any:
        """AdamW and its kin as transformers builds them; LoRA+ through peft."""
        if self._loraplus_lr_ratio is None or self.optimizer is not None:
            return super().create_optimizer() if model is None else super().create_optimizer(model)
        optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        learning_rate = options.pop("lr")
        self.optimizer = create_loraplus_optimizer(
            self.model,
            optimizer_cls=optimizer_class,
            lr=learning_rate,
            loraplus_lr_ratio=self._loraplus_lr_ratio,
            loraplus_weight_decay=self.args.weight_decay,
            **options,
        )
        return self.optimizer

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward of every micro-batch; gradients are synchronised at the last one.

        Returns: this rank's share of the step's loss, times the number of ranks (the Trainer logs the mean over
            ranks; DDP, ZeRO and FSDP average gradients over ranks).
        """
        if not model.training:
            model.train()
        self._window = self._window or _Window()
        scale = self.args.world_size / num_items_in_batch
        total = torch.zeros((), device=self.args.device)
        last = len(inputs["micro_batches"]) - 1
        options = {"scale_wrt_gas": False} if self.accelerator.distributed_type == DistributedType.DEEPSPEED else {}
        for index, micro_batch in enumerate(inputs["micro_batches"]):
            self._seed_micro_batch(index)
            self.accelerator.gradient_state._set_sync_gradients(index == last)
            synchronises = index == last or options
            try:
                with contextlib.nullcontext() if synchronises else self.accelerator.no_sync(model):
                    total += self._run_micro_batch(model, micro_batch, scale, options)
            except Exception as error:
                raise self._explain(error, micro_batch, inputs["row_ids"][index]) from error
        self._window.add(inputs)
        self._num_tokens_seen += inputs["num_tokens"]
        self._num_targets_seen += inputs["num_targets"]
        return total

    def _run_micro_batch(self, model: Any, micro_batch: Any, scale: float, options: dict[str, Any]) -> torch.Tensor:
        loss = model(**self._prepare_input(micro_batch)) * scale
        self.accelerator.backward(loss, **options)
        return loss.detach()

    def _explain(self, error: Exception, micro_batch: Any, row_ids: list[str]) -> Exception:
        """An error of a micro-batch, with the micro-batch in it where memory ran out."""
        if not is_out_of_memory(error):
            return error
        checkpointing = any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules())
        return MachineError(describe_out_of_memory(micro_batch, row_ids, checkpointing=checkpointing))

    def _seed_micro_batch(self, index: int) -> None:
        # Dropout's random numbers follow from (seed, step, rank, micro-batch), so a resumed run repeats them.
        place = f"{self.args.seed}/{self.state.global_step}/{self.args.process_index}/{index}"
        torch.manual_seed(zlib.crc32(place.encode()))

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: the Trainer's estimate walks over all parameters in every step."""
        return 0

    # ---- evaluation ----

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Summed loss over all supervised tokens, divided by their number, and its perplexity."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        assert dataset is not None
        started = time.perf_counter()
        model = self.model_wrapped
        model.eval()
        sums, num_targets = [], 0
        with torch.no_grad():
            for step in self._build_dataloader(dataset, None):
                for micro_batch in step["micro_batches"]:
                    sums.append(model(**self._prepare_input(micro_batch)))
                num_targets += step["num_targets"]
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
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if self._window is not None:
            self._window.exclude(time.perf_counter() - started)
        return metrics

    # ---- log and save ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add throughput to the Trainer's logs and append them to metrics.jsonl."""
        if "loss" in logs:
            if not math.isfinite(logs["loss"]):
                raise MachineError(
                    f"the loss is {logs['loss']} at step {self.state.global_step}; lower --learning_rate, or compute "
                    "in bf16 instead of fp16. Nothing after the last checkpoint is saved"
                )
            assert self._window is not None
            logs.update(self._window.close())
            self._window = None
        # The Trainer's summary counts steps as samples; run.json has the right one.
        if self.is_world_process_zero() and "train_runtime" not in logs:
            append_metrics(self._metrics_path, {"step": self.state.global_step, "epoch": self.state.epoch, **logs})
        super().log(logs, start_time)

    def train(self, *args: Any, **options: Any) -> Any:
        """Train, and take the time."""
        started = time.perf_counter()
        # from_pretrained leaves the model in eval mode inside a wrapper that says it trains: no dropout of its own,
        # no gradient checkpointing.
        self.model.train()
        result = super().train(*args, **options)
        self._train_s = time.perf_counter() - started
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
            "loss": {"first": losses[0], "last": losses[-1]} if losses else None,
            "eval_loss": evaluations[-1] if evaluations else None,
        }

    def close(self) -> None:
        """Wait for all ranks and leave the process group: a process that exits with one alive may abort."""
        self.accelerator.wait_for_everyone()
        if dist.is_initialized():
            dist.destroy_process_group()

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # Not the Trainer's: it rotates before a checkpoint is complete.
        started = time.perf_counter()
        run_directory = Path(self.args.output_dir)
        if self.is_world_process_zero():
            self._save_result(run_directory / f"checkpoint-{self.state.global_step}", step=self.state.global_step)
            rotate_checkpoints(run_directory, self.args.save_total_limit)
        self.accelerator.wait_for_everyone()
        if self._window is not None:
            self._window.exclude(time.perf_counter() - started)


class _StepSampler(Sampler[int]):
    """Numbers of the steps of the current epoch, counted over the whole run."""

    def __init__(self, global_step: Callable[[], int], steps_per_epoch: int):
        self._global_step = global_step
        self._steps_per_epoch = steps_per_epoch

    def __iter__(self) -> Iterator[int]:
        epoch = self._global_step() // self._steps_per_epoch
        return iter(range(epoch * self._steps_per_epoch, (epoch + 1) * self._steps_per_epoch))

    def __len__(self) -> int:
        return self._steps_per_epoch


class _LogLastStep(TrainerCallback):
    """Logs the last step whatever logging_steps is, so that the last loss is the last loss."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= state.max_steps and args.logging_strategy != "no":
            control.should_log = True


class _Window:
    """Tokens and time since the last log line."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._num_tokens = self._num_targets = 0

    def add(self, step: dict[str, Any]) -> None:
        """Count one step."""
        self._num_tokens += step["num_tokens"]
        self._num_targets += step["num_targets"]

    def close(self) -> dict[str, float]:
        """Rates over all ranks since the last call, without what was excluded."""
        elapsed_s = time.perf_counter() - self._started
        return {
            "supervised_tokens": float(self._num_targets),
            "tokens_per_s": round(self._num_tokens / elapsed_s, 1),
            "supervised_tokens_per_s": round(self._num_targets / elapsed_s, 1),
        }

    def exclude(self, elapsed_s: float) -> None:
        """Take time that was not training (evaluating, saving) out of the window."""
        self._started += elapsed_s


def _only_item(items: list[Any]) -> Any:
    return items[0]
