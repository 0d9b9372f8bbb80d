"""Settings: one declaration each, what transformers' own settings mean here, and the checks across them."""

from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from tuning.distributed.startup import join_for_deepspeed
from tuning.errors import SettingsError
from tuning.settings.deepspeed_json import read_deepspeed_config


@dataclass
class ModelArguments:
    """What is trained."""

    model_name_or_path: str = field(metadata={"help": "checkpoint directory or hub name"})
    cache_dir: str | None = field(default=None, metadata={"help": "where hub downloads and tokenised data are kept"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run Python code that comes with the checkpoint"})
    allow_pickle: bool = field(default=False, metadata={"help": "read .bin weights (they can run code when loaded)"})
    pure_bf16: bool = field(
        default=False, metadata={"help": "full training with bf16 weights and optimizer states (default: fp32 ones)"}
    )


@dataclass
class DataArguments:
    """What it is trained on."""

    data_path: list[str] = field(metadata={"help": "training data: files, FILE#N (a sample of N rows), directories"})
    eval_data_path: list[str] | None = field(default=None, metadata={"help": "conversations to evaluate on"})
    model_max_length: int = field(
        default=2048, metadata={"help": "tokens a row may have; longer ones lose whole turns"}
    )
    system_message: str | None = field(default=None, metadata={"help": "system turn for conversations without one"})
    label_mask: Literal["assistant", "qwen"] = field(
        default="assistant", metadata={"help": "trained tokens: the answers, or those of the original Qwen recipe"}
    )
    chat_template: str | None = field(
        default=None, metadata={"help": "file with a chat template (jinja) to train with and to save with the result"}
    )
    chat_template_kwargs: str | None = field(
        default=None, metadata={"help": "defaults for the template, as JSON: '{\"enable_thinking\": false}'"}
    )
    data_format: Literal["conversations", "messages", "alpaca", "prompt", "text"] | None = field(
        default=None, metadata={"help": "format of the rows (default: told by each row's keys)"}
    )
    supervise: Literal["all", "last"] = field(default="all", metadata={"help": "assistant turns to train"})
    on_bad_row: Literal["error", "skip"] = field(
        default="error", metadata={"help": "list all bad rows and stop, or count them and go on"}
    )
    on_long: Literal["drop_turns", "drop", "error"] = field(
        default="drop_turns",
        metadata={"help": "rows beyond model_max_length lose turns, are left out, or stop the run"},
    )
    no_cache: bool = field(default=False, metadata={"help": "tokenise anew, and keep nothing"})
    lazy_preprocess: bool = field(default=False, metadata={"help": "accepted for older scripts; has no effect"})


@dataclass
class LoraArguments:
    """How it is trained."""

    use_lora: bool = field(default=False, metadata={"help": "train LoRA adapters instead of all weights"})
    q_lora: bool = field(
        default=False,
        metadata={"help": "LoRA on a quantised model: a GPTQ or bitsandbytes checkpoint, or any, quantised at loading"},
    )
    bits: int | None = field(default=None, metadata={"help": "bits to quantise to at loading: 4 (default) or 8"})
    quant_type: Literal["nf4", "fp4"] | None = field(
        default=None, metadata={"help": "numbers that 4 bits stand for: nf4 (default) or fp4"}
    )
    lora_r: int = field(default=64, metadata={"help": "rank of the adapters"})
    lora_alpha: int = field(default=16, metadata={"help": "scale: alpha / r (rsLoRA: alpha / sqrt(r))"})
    lora_dropout: float = field(default=0.05, metadata={"help": "dropout before the adapters, 0 to 1"})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "names of the layers to adapt (default: every linear layer but the output)"}
    )
    lora_weight_path: str | None = field(default=None, metadata={"help": "adapter directory to start from"})
    lora_bias: Literal["none", "all", "lora_only"] = field(default="none", metadata={"help": "biases to train"})
    use_dora: bool = field(default=False, metadata={"help": "weight-decomposed LoRA"})
    use_rslora: bool = field(default=False, metadata={"help": "rank-stabilised LoRA"})
    loraplus_lr_ratio: float | None = field(
        default=None, metadata={"help": "LoRA+: learning rate of the B matrices over that of the A matrices"}
    )
    train_embeddings: Literal["auto", "tokens", "full", "off"] = field(
        default="auto",
        metadata={
            "help": "embedding and output layer with LoRA: control tokens' rows, whole matrices, or nothing; "
            "auto: rows on a base model, nothing on a chat model"
        },
    )


@dataclass
class RunArguments(TrainingArguments):
    """transformers' settings (transformers_settings.py says what each means here), some with another default."""

    output_dir: str = field(metadata={"help": "directory for the result"})
    logging_steps: float = field(default=1, metadata={"help": "steps between log lines"})
    logging_first_step: bool = field(default=True, metadata={"help": "log the first step whatever logging_steps is"})
    sample_prompts: str | None = field(
        default=None, metadata={"help": "file with a prompt a line, answered at each evaluation"}
    )
    sample_max_new_tokens: int = field(default=128, metadata={"help": "longest sample answer in tokens"})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "delete the earlier run in output_dir first"})
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={"help": "auto: go on from the newest complete checkpoint in output_dir; or a checkpoint directory"},
    )
    force_resume: bool = field(
        default=False, metadata={"help": "resume in spite of changed data, settings or base model"}
    )
    gradient_checkpointing: str | None = field(
        default=None,
        metadata={
            "nargs": "?",
            "const": "True",
            "help": "recompute activations in the backward pass (True, False); auto: where they would not fit",
        },
    )
    micro_batch_tokens: str | None = field(
        default=None,
        metadata={
            "help": "tokens of a micro-batch (default: per_device_train_batch_size x model_max_length); auto: what fits"
        },
    )
    dry_run: bool = field(default=False, metadata={"help": "print and write the plan of the run, and train nothing"})
    device_memory_gib: float | None = field(
        default=None, metadata={"help": "memory of a device to plan for (default: that of this machine)"}
    )
    ignore_memory_plan: bool = field(default=False, metadata={"help": "train though the plan says that it cannot fit"})
    deepspeed: str | None = field(
        default=None, metadata={"help": "DeepSpeed's JSON: finetune/ds_config_zero2.json, ds_config_zero3.json, yours"}
    )
    fsdp: str | None = field(
        default=None,
        metadata={
            "help": "full_shard: FSDP2 shards weights, gradients and optimizer over the processes; shard_grad_op: the "
            "same, with weights kept whole between forward and backward"
        },
    )

    def __post_init__(self) -> None:
        # To the Trainer a step is one item, whatever it accumulates, and the model comes to it sharded (sharding.py).
        given: Any = self
        accumulation, fsdp = given.gradient_accumulation_steps, given.fsdp
        self.checkpoints_if_needed = str(given.gradient_checkpointing).lower() == "auto"
        given.gradient_checkpointing = _read_checkpointing(given.gradient_checkpointing)
        if self.deepspeed is not None:
            given.deepspeed = read_deepspeed_config(self.deepspeed, self)
            join_for_deepspeed(use_cpu=self.use_cpu)
            self.gradient_accumulation_steps = 1
        self.fsdp = None
        super().__post_init__()
        unset_hf_deepspeed_config()  # from_pretrained would shard at once; here the first process loads it all
        self.gradient_accumulation_steps, self.fsdp = accumulation, fsdp

    @property
    def engine(self) -> Literal["single", "ddp", "zero1", "zero2", "zero3", "fsdp"]:
        """What spreads the work over processes."""
        config: Any = self.deepspeed
        if config is not None:
            return ("zero1", "zero2", "zero3")[config["zero_optimization"]["stage"] - 1]
        if self.fsdp is not None:
            return "fsdp"
        return "ddp" if self.world_size > 1 else "single"


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
    """Everything the command line said."""

    model: ModelArguments
    data: DataArguments
    lora: LoraArguments
    run: RunArguments


def describe_settings(arguments: Arguments) -> dict[str, dict[str, Any]]:
    """All settings as plain JSON values, for run.json."""
    run = arguments.run.to_dict()
    return {"model": vars(arguments.model), "data": vars(arguments.data), "lora": vars(arguments.lora), "run": run}
