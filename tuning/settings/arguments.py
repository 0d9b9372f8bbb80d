"""Settings as transformers' training code takes them. Building them has no side effects: distributed.startup acts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import TrainingArguments

from tuning.errors import SettingsError
from tuning.settings.command_line import read_settings
from tuning.settings.meaning import list_meanings
from tuning.settings.optimizer_checks import check_optimizer
from tuning.settings.options import DataArguments, LoraArguments, ModelArguments, RunOptions, Settings


@dataclass
class RunArguments(RunOptions, TrainingArguments):
    """RunOptions as transformers' TrainingArguments.

    started: whether distributed.startup.start_processes has run; until then there is no device and no engine.
    """

    def __post_init__(self) -> None:
        self.started = False
        given: Any = self
        self.checkpoints_if_needed = given.gradient_checkpointing == "auto"
        if self.checkpoints_if_needed:
            given.gradient_checkpointing = False
        # transformers would read DeepSpeed's file and shard the model its own way.
        deepspeed, fsdp = self.deepspeed, self.fsdp
        self.deepspeed = self.fsdp = None
        super().__post_init__()
        self.deepspeed, self.fsdp = deepspeed, fsdp

    @property
    def device(self) -> torch.device:
        """Where this process computes. transformers opens the process group when it is first asked for it."""
        if not self.started:
            return torch.device("cpu")
        device: torch.device = super().device
        return device

    @property
    def engine(self) -> Literal["single", "ddp", "zero1", "zero2", "zero3", "fsdp"]:
        """The engine that distributes the work over processes. Known once processes have started."""
        config: Any = self.deepspeed
        if config is not None:
            return ("zero1", "zero2", "zero3")[config["zero_optimization"]["stage"] - 1]
        if self.fsdp is not None:
            return "fsdp"
        return "ddp" if self.world_size > 1 else "single"

    @property
    def order_seed(self) -> int:
        """The seed of the order of the data."""
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def optimizer_name(self) -> str:
        """--optim, without transformers' class around it."""
        return str(getattr(self.optim, "value", self.optim))

    def describe_engine(self) -> str:
        """The processes and their engine for the log; nothing for a single process without one."""
        names = {"ddp": "DDP", "fsdp": f"FSDP2 ({self.fsdp})", "zero1": "ZeRO-1", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}
        processes = "1 process" if self.world_size == 1 else f"{self.world_size} processes"
        return "" if self.engine == "single" else f"; {processes}, {names[self.engine]}"


@dataclass
class Arguments:
    """All settings, ready for training."""

    model: ModelArguments
    data: DataArguments
    lora: LoraArguments
    run: RunArguments

    def __iter__(self) -> Any:
        return iter((self.model, self.data, self.lora, self.run))


def parse_arguments(argv: Sequence[str] | None = None) -> Arguments:
    """Read, build and check all that a command line says. Raises: SettingsError, SystemExit: as read_settings."""
    return build_arguments(read_settings(argv))


def build_arguments(settings: Settings) -> Arguments:
    """The settings with the machine's defaults, held against torch and transformers.

    Raises: SettingsError: what these do not take, or would ignore.
    """
    values = vars(settings.run) | _device_defaults(settings)
    try:
        run = RunArguments(**values)
    except (ValueError, TypeError, ImportError, OverflowError) as error:  # TrainingArguments' own checks
        raise SettingsError(" ".join(str(error).split())) from None
    if run.fp16 and run.use_cpu:
        raise SettingsError("--fp16: needs a GPU; use fp32 (no flag) or --bf16 on a CPU")
    optim = settings.run.optim
    if optim.startswith("paged_") and run.use_cpu:
        raise SettingsError(f"--optim {optim}: moves its state between GPU and host; on a CPU use adamw_8bit")
    check_optimizer(run, set(settings.given))
    return Arguments(settings.model, settings.data, settings.lora, run)


def _device_defaults(settings: Settings) -> dict[str, Any]:
    """Defaults that depend on the machine: use_cpu if there is no accelerator; on GPUs bf16 if supported, else fp16."""
    run = settings.run
    if run.use_cpu:
        return {}
    if not torch.cuda.is_available():
        other = torch.backends.mps.is_available() or (hasattr(torch, "xpu") and torch.xpu.is_available())
        return {} if other else {"use_cpu": True}
    if run.bf16 or run.fp16 or settings.model.pure_bf16 or "bf16" in settings.given:
        return {}  # --bf16 False asks for fp32
    return {"bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16": True}


def describe_settings(arguments: Arguments) -> dict[str, dict[str, Any]]:
    """All settings as plain JSON values, for run.json."""
    run = arguments.run.to_dict()
    return {"model": vars(arguments.model), "data": vars(arguments.data), "lora": vars(arguments.lora), "run": run}


def describe_trajectory_settings(arguments: Arguments) -> dict[str, Any]:
    """The settings that change what is computed, as plain JSON values."""
    settings = describe_settings(arguments)
    return {
        name: settings[group][name]
        for group, values in zip(settings, arguments, strict=True)
        for name, meaning in list_meanings(values).items()
        if meaning.trajectory
    }


def flatten_settings(arguments: Arguments) -> dict[str, Any]:
    """The settings that must be the same in all processes, by flag."""
    groups = describe_settings(arguments).values()
    return {f"--{name}": value for group in groups for name, value in group.items() if name != "local_rank"}
