"""Every option of finetune.py, declared once. Building the arguments has no side effects: distributed.startup acts."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import TrainingArguments

from tuning.errors import SettingsError
from tuning.settings.meaning import Meaning, option
from tuning.settings.transformers_options import MEANINGS


@dataclass
class ModelArguments:
    """What is trained."""

    model_name_or_path: str = option("checkpoint directory or hub name")
    cache_dir: str | None = option("where hub downloads and tokenised data are kept", default=None)
    trust_remote_code: bool = option("run Python code that comes with the checkpoint", default=False)
    allow_pickle: bool = option("read .bin weights (they can run code when loaded)", default=False)
    pure_bf16: bool = option(
        "full training with bf16 weights and optimizer states (default: fp32 ones)", default=False, trajectory=True
    )


@dataclass
class DataArguments:
    """What it is trained on."""

    data_path: list[str] = option("training data: files, FILE#N (a sample of N conversations), directories")
    eval_data_path: list[str] | None = option("conversations to evaluate on", default=None)
    model_max_length: int = option(
        "tokens a conversation may have; longer ones lose turns from the end", default=2048, trajectory=True, at_least=2
    )
    system_message: str | None = option("system turn for conversations without one", default=None, trajectory=True)
    label_mask: Literal["assistant", "qwen"] = option(
        "supervised tokens: the answers, or those of the original Qwen recipe", default="assistant", trajectory=True
    )
    chat_template: str | None = option(
        "file with a chat template (jinja) to train with and to save with the result", default=None
    )
    chat_template_kwargs: str | None = option(
        "defaults for the template, as JSON: '{\"enable_thinking\": false}'", default=None, trajectory=True
    )
    data_format: Literal["conversations", "messages", "alpaca", "prompt", "text"] | None = option(
        "format of the data (default: told by the keys of each record)", default=None
    )
    supervise: Literal["all", "last"] = option("assistant turns to train", default="all", trajectory=True)
    on_bad_row: Literal["error", "skip"] = option(
        "list all bad records and stop, or count them and continue", default="error"
    )
    on_long: Literal["drop_turns", "drop", "error"] = option(
        "conversations beyond model_max_length lose turns, are left out, or stop the run",
        default="drop_turns",
        trajectory=True,
    )
    no_cache: bool = option("tokenise again, and keep nothing", default=False)
    lazy_preprocess: bool = option("accepted for older scripts; has no effect", default=False)


@dataclass
class LoraArguments:
    """How it is trained."""

    use_lora: bool = option("train LoRA adapters instead of all weights", default=False, trajectory=True)
    q_lora: bool = option(
        "LoRA on a quantised model: a GPTQ or bitsandbytes checkpoint, or any, quantised at loading", default=False
    )
    bits: int | None = option("bits to quantise to at loading: 4 (default) or 8", default=None, needs="q_lora")
    quant_type: Literal["nf4", "fp4"] | None = option(
        "data type of 4-bit weights: nf4 (default) or fp4", default=None, needs="q_lora"
    )
    lora_r: int = option("rank of the adapters", default=64, trajectory=True, needs="use_lora", at_least=1)
    lora_alpha: int = option(
        "scale: alpha / r (rsLoRA: alpha / sqrt(r))", default=16, trajectory=True, needs="use_lora", above=0
    )
    lora_dropout: float = option(
        "dropout before the adapters, 0 to 1", default=0.05, trajectory=True, needs="use_lora", at_least=0, below=1
    )
    lora_target_modules: list[str] | None = option(
        "names of the layers to adapt (default: every linear layer but the output)",
        default=None,
        trajectory=True,
        needs="use_lora",
    )
    lora_weight_path: str | None = option("adapter directory to start from", default=None, needs="use_lora")
    lora_bias: Literal["none", "all", "lora_only"] = option(
        "biases to train", default="none", trajectory=True, needs="use_lora"
    )
    use_dora: bool = option("weight-decomposed LoRA", default=False, trajectory=True, needs="use_lora")
    use_rslora: bool = option("rank-stabilised LoRA", default=False, trajectory=True, needs="use_lora")
    loraplus_lr_ratio: float | None = option(
        "LoRA+: learning rate of the B matrices over that of the A matrices",
        default=None,
        trajectory=True,
        needs="use_lora",
        above=0,
    )
    train_embeddings: Literal["auto", "tokens", "full", "off"] = option(
        "embedding and output layer with LoRA: the control tokens' vocabulary rows, both matrices, or nothing; auto: "
        "rows on a base model, nothing on a chat model",
        default="auto",
        trajectory=True,
        needs="use_lora",
    )


@dataclass
class RunArguments(TrainingArguments):
    """transformers' options (transformers_options.py says what each means here), some with another default.

    started: whether distributed.startup.start_processes has run; until then there is no device and no engine.
    """

    output_dir: str = option("directory for the result")
    logging_steps: float = option(
        "steps between log lines", default=1, above=0, below=2**53, needs="logging_strategy steps"
    )
    logging_first_step: bool = option("log the first step whatever logging_steps is", default=True)
    sample_prompts: str | None = option("file with a prompt a line, answered at each evaluation", default=None)
    sample_max_new_tokens: int = option(
        "longest sample answer in tokens", default=128, needs="sample_prompts", at_least=1
    )
    overwrite_output_dir: bool = option("delete the earlier run in output_dir first", default=False)
    resume_from_checkpoint: str | None = option(
        "auto: resume from the newest complete checkpoint in output_dir; or a checkpoint directory", default=None
    )
    force_resume: bool = option(
        "resume with changed data, settings or base model", default=False, needs="resume_from_checkpoint"
    )
    gradient_checkpointing: str | None = option(
        "recompute activations in the backward pass (True, False); auto: where they would not fit",
        default=None,
        argument={"nargs": "?", "const": "True"},
    )
    micro_batch_tokens: str | None = option(
        "tokens of a micro-batch (default: per_device_train_batch_size x model_max_length); auto: what fits",
        default=None,
    )
    dry_run: bool = option("print and write the plan of the run, and train nothing", default=False)
    device_memory_gib: float | None = option(
        "memory of a device to plan for (default: that of this machine)", default=None, above=0
    )
    ignore_memory_plan: bool = option("train even if the plan says that it cannot fit", default=False)
    deepspeed: str | None = option(
        "DeepSpeed's JSON: finetune/ds_config_zero2.json, ds_config_zero3.json, yours", default=None
    )
    fsdp: str | None = option(
        "full_shard: FSDP2 shards weights, gradients and optimizer state over the processes; shard_grad_op: the same, "
        "with full weights kept between forward and backward",
        default=None,
    )

    def __post_init__(self) -> None:
        self.started = False
        given: Any = self
        self.checkpoints_if_needed = str(given.gradient_checkpointing).lower() == "auto"
        given.gradient_checkpointing = _read_checkpointing(given.gradient_checkpointing)
        # transformers would read DeepSpeed's file and shard the model its own way.
        deepspeed, fsdp = self.deepspeed, self.fsdp
        self.deepspeed = self.fsdp = None
        super().__post_init__()
        # As the system resolves it: without links, `link/..` is not the directory that holds the link.
        leaves = ".." in Path(self.output_dir).parts
        self.output_dir = (os.path.realpath if leaves else os.path.normpath)(self.output_dir) if self.output_dir else ""
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

    def describe_engine(self) -> str:
        """The processes and their engine for the log; nothing for a single process without one."""
        names = {"ddp": "DDP", "fsdp": f"FSDP2 ({self.fsdp})", "zero1": "ZeRO-1", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}
        processes = "1 process" if self.world_size == 1 else f"{self.world_size} processes"
        return "" if self.engine == "single" else f"; {processes}, {names[self.engine]}"


def _read_checkpointing(value: str | bool | None) -> bool | None:
    if value is None:
        return None
    word = str(value).lower()
    if word in ("true", "yes", "t", "y", "1"):
        return True
    if word in ("false", "no", "f", "n", "0", "auto"):
        return False
    raise SettingsError(f"--gradient_checkpointing {value}: say True, False or auto")


@dataclass
class Arguments:
    """All settings, from the YAML file and the command line."""

    model: ModelArguments
    data: DataArguments
    lora: LoraArguments
    run: RunArguments

    def __iter__(self) -> Any:
        return iter((self.model, self.data, self.lora, self.run))


GROUPS = (ModelArguments, DataArguments, LoraArguments, RunArguments)


def list_meanings(group: Any) -> dict[str, Meaning]:
    """The meaning of every option of a group (one of GROUPS, or an instance)."""
    declared = {field.name: field.metadata.get("meaning") for field in dataclasses.fields(group)}
    unknown = Meaning(refused="not known to this version of the toolkit")
    return {name: meaning or MEANINGS.get(name, unknown) for name, meaning in declared.items()}


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
