"""Every option of finetune.py, declared once. Needs neither torch nor transformers: mistakes are told at once."""

from dataclasses import dataclass
from typing import Any, Literal

from tuning.settings.meaning import option

_COUNT = 2**53  # of steps and epochs, which are floats here
_SEEDS = 2**32  # numpy's seeds are below

# Of transformers' ones are missing: schedules that look at the loss, optimizers that step inside the backward pass
# (layerwise, lomo) or keep no learning rate (schedule_free).
SCHEDULES = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
    "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay",
)  # fmt: skip
OPTIMIZERS = (
    "adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adafactor", "adamw_anyprecision",
    "adamw_torch_4bit", "adamw_torch_8bit", "ademamix", "sgd", "adagrad", "adamw_bnb_8bit", "adamw_8bit",
    "ademamix_8bit", "lion_8bit", "lion_32bit", "paged_adamw_32bit", "paged_adamw_8bit", "paged_ademamix_32bit",
    "paged_ademamix_8bit", "paged_lion_32bit", "paged_lion_8bit", "rmsprop", "rmsprop_bnb", "rmsprop_bnb_8bit",
    "rmsprop_bnb_32bit", "galore_adamw", "galore_adamw_8bit", "galore_adafactor", "grokadamw", "apollo_adamw",
    "stable_adamw",
)  # fmt: skip
_LOG_LEVELS = ("detail", "debug", "info", "warning", "error", "critical", "passive")


@dataclass
class ModelArguments:
    """What is trained."""

    model_name_or_path: str = option("checkpoint directory or hub name", section="model", main=True)
    hub: Literal["huggingface", "modelscope"] | None = option(
        "where names of models are looked up",
        default=None, shown="huggingface; modelscope with USE_MODELSCOPE_HUB=1",
    )  # fmt: skip
    cache_dir: str | None = option(
        "where hub downloads and tokenised data are kept", default=None, shown="the user's cache directory"
    )
    trust_remote_code: bool = option("run Python code that comes with the checkpoint", default=False)
    allow_pickle: bool = option("read .bin weights (they can run code when loaded)", default=False)
    pure_bf16: bool = option(
        "full training with bf16 weights and optimizer states, in place of fp32 ones", default=False, trajectory=True
    )


@dataclass
class DataArguments:
    """What it is trained on."""

    data_path: list[str] = option(
        "training data: files, FILE#N (a sample of N conversations), directories, hf:OWNER/NAME, ms:OWNER/NAME",
        section="data",
        main=True,
    )
    eval_data_path: list[str] | None = option("conversations to evaluate on", default=None)
    eval_share: float | None = option(
        "share of the training data to hold back and evaluate on, whole conversations: 0.05",
        default=None, trajectory=True, above=0, below=1, main=True,
    )  # fmt: skip
    map: list[str] | None = option(
        "what the rows call our keys and roles: role=speaker content=text messages=dialog assistant=bot", default=None
    )
    model_max_length: int = option(
        "tokens a conversation may have; longer ones lose turns from the end",
        default=2048, trajectory=True, at_least=2, main=True,
    )  # fmt: skip
    system_message: str | None = option("system turn for conversations without one", default=None, trajectory=True)
    label_mask: Literal["assistant", "qwen"] = option(
        "supervised tokens: the answers, or those of the original Qwen recipe", default="assistant", trajectory=True
    )
    chat_template: str | None = option(
        "file with a chat template (jinja) to train with and to save with the result; or chatml-tools",
        default=None, shown="the tokenizer's own", main=True,
    )  # fmt: skip
    chat_template_kwargs: str | None = option(
        "defaults for the template, as JSON: '{\"enable_thinking\": false}'", default=None, trajectory=True
    )
    add_special_tokens: list[str] | None = option(
        "new tokens for markers in conversations, in any role: words, or a file with one a line; their vocabulary rows "
        "train, with LoRA as token rows",
        default=None, trajectory=True,
    )  # fmt: skip
    data_format: Literal["conversations", "messages", "alpaca", "prompt", "text"] | None = option(
        "format of the data", default=None, shown="told by the keys of each record"
    )
    supervise: Literal["all", "last"] = option("assistant turns to train", default="all", trajectory=True)
    on_bad_row: Literal["error", "skip"] = option(
        "list all bad records and stop, or count them and continue", default="error"
    )
    on_long: Literal["drop_turns", "drop", "error"] = option(
        "conversations beyond model_max_length lose turns, are left out, or stop the run",
        default="drop_turns", trajectory=True,
    )  # fmt: skip
    no_cache: bool = option("tokenise again, and keep nothing", default=False)
    lazy_preprocess: bool = option("accepted for older scripts; has no effect", default=False)


@dataclass
class LoraArguments:
    """How it is trained."""

    use_lora: bool = option(
        "train LoRA adapters instead of all weights", default=False, trajectory=True, section="LoRA", main=True
    )
    q_lora: bool = option(
        "LoRA on a quantised model: a GPTQ or bitsandbytes checkpoint, or any, quantised at loading",
        default=False, main=True,
    )  # fmt: skip
    bits: int | None = option("bits to quantise to at loading: 4 or 8", default=None, needs="q_lora", shown="4")
    quant_type: Literal["nf4", "fp4"] | None = option(
        "data type of 4-bit weights", default=None, needs="q_lora", shown="nf4"
    )
    lora_r: int = option("rank of the adapters", default=64, trajectory=True, needs="use_lora", at_least=1, main=True)
    lora_alpha: int = option(
        "scale: alpha / r (rsLoRA: alpha / sqrt(r))",
        default=16, trajectory=True, needs="use_lora", above=0, main=True,
    )  # fmt: skip
    lora_dropout: float = option(
        "dropout before the adapters, 0 to 1", default=0.05, trajectory=True, needs="use_lora", at_least=0, below=1
    )
    lora_target_modules: list[str] | str | None = option(
        "layers to adapt: names (q_proj v_proj, or q_proj,v_proj), a regular expression, or all-linear",
        default=None, shown="every linear layer but the output", trajectory=True, needs="use_lora",
    )  # fmt: skip
    lora_experts: Literal["auto", "on", "off"] = option(
        "adapt the experts of a mixture of experts; auto: unless --lora_target_modules says what to adapt",
        default="auto", trajectory=True, needs="use_lora",
    )  # fmt: skip
    lora_weight_path: str | None = option("adapter directory to start from", default=None, needs="use_lora")
    lora_bias: Literal["none", "all", "lora_only"] = option(
        "biases to train", default="none", trajectory=True, needs="use_lora"
    )
    use_dora: bool = option("weight-decomposed LoRA", default=False, trajectory=True, needs="use_lora")
    use_rslora: bool = option("rank-stabilised LoRA", default=False, trajectory=True, needs="use_lora")
    loraplus_lr_ratio: float | None = option(
        "LoRA+: learning rate of the B matrices over that of the A matrices",
        default=None, shown="no LoRA+", trajectory=True, needs="use_lora", above=0,
    )  # fmt: skip
    train_embeddings: Literal["auto", "tokens", "full", "off"] = option(
        "embedding and output layer with LoRA: the control tokens' vocabulary rows, both matrices, or nothing; auto: "
        "rows on a base model, nothing on a chat model; with rows or matrices, merge the adapter before serving it",
        default="auto", trajectory=True, needs="use_lora",
    )  # fmt: skip


@dataclass
class RunOptions:
    """How the run goes: transformers' options that mean something here, and ours.

    The types are those of plain words and numbers; arguments.RunArguments makes transformers' TrainingArguments of it.
    """

    output_dir: str = option("directory for the result", section="training", main=True)
    learning_rate: float = option("the highest learning rate", default=5e-5, trajectory=True, above=0, main=True)
    num_train_epochs: float = option(
        "passes over the data", default=3.0, trajectory=True, above=0, below=_COUNT, main=True
    )
    max_steps: int = option(
        "steps, in place of num_train_epochs", default=-1, shown="all epochs", trajectory=True, at_least=-1
    )
    per_device_train_batch_size: int = option(
        "conversations a micro-batch and device", default=8, at_least=1, main=True,
        deepspeed="train_micro_batch_size_per_gpu",
    )  # fmt: skip
    gradient_accumulation_steps: int = option(
        "micro-batches a step; rows a step: batch size x this x processes", default=1, at_least=1, main=True,
        deepspeed="gradient_accumulation_steps",
    )  # fmt: skip
    lr_scheduler_type: str = option("how the learning rate falls", default="linear", trajectory=True, choices=SCHEDULES)
    lr_scheduler_kwargs: str | None = option(
        "arguments of the schedule, as JSON: '{\"min_lr\": 1e-6}'", default=None, trajectory=True
    )
    warmup_steps: float = option(
        "steps over which the learning rate rises from 0; below 1 a share of the run",
        default=0, trajectory=True, at_least=0, below=_COUNT, main=True,
    )  # fmt: skip
    optim: str = option("optimizer", default="adamw_torch_fused", trajectory=True, choices=OPTIMIZERS)
    optim_args: str | None = option("arguments of the optimizer: name=value,name=value", default=None, trajectory=True)
    weight_decay: float = option(
        "decay of the weights, but of biases and norms", default=0.0, trajectory=True, at_least=0
    )
    adam_beta1: float = option("Adam's mean of gradients", default=0.9, trajectory=True, at_least=0, below=1)
    adam_beta2: float = option("Adam's mean of their squares", default=0.999, trajectory=True, at_least=0, below=1)
    adam_epsilon: float = option("Adam's least denominator", default=1e-8, trajectory=True, at_least=0)
    max_grad_norm: float = option(
        "gradients are scaled down to this norm; 0: never", default=1.0, trajectory=True, at_least=0,
        deepspeed="gradient_clipping",
    )  # fmt: skip
    seed: int = option("of everything random", default=42, trajectory=True, at_least=0, below=_SEEDS)
    data_seed: int | None = option(
        "of the order of the data", default=None, shown="seed", trajectory=True, at_least=0, below=_SEEDS
    )
    full_determinism: bool = option("deterministic kernels, slower", default=False)
    dry_run: bool = option("print and write the plan of the run, and train nothing", default=False, main=True)
    do_train: bool = option("accepted for older scripts", default=False)

    overwrite_output_dir: bool = option(
        "delete the earlier run in output_dir first", default=False, section="checkpoints"
    )
    resume_from_checkpoint: str | None = option(
        "auto: resume from the newest complete checkpoint in output_dir; or a checkpoint directory",
        default=None, shown="start anew", main=True,
    )  # fmt: skip
    force_resume: bool = option(
        "resume with changed data, settings or base model", default=False, needs="resume_from_checkpoint"
    )
    save_strategy: Literal["no", "steps", "epoch", "best"] = option("when to save a checkpoint", default="steps")
    save_steps: float = option(
        "steps between checkpoints", default=500, above=0, below=_COUNT, needs="save_strategy steps", main=True
    )
    save_total_limit: int | None = option(
        "checkpoints to keep, the newest", default=None, shown="all", at_least=1,
        needs="save_strategy steps|epoch|best",
    )  # fmt: skip
    save_only_model: bool = option("checkpoints without what resuming needs", default=False)

    eval_strategy: Literal["no", "steps", "epoch"] = option(
        "when to evaluate", default="no", aliases=("evaluation_strategy",), section="evaluation", main=True
    )
    eval_steps: float | None = option(
        "steps between evaluations", default=None, shown="logging_steps", above=0, below=_COUNT,
        needs="eval_strategy steps",
    )  # fmt: skip
    eval_delay: float = option(
        "steps or epochs before the first evaluation", default=0, at_least=0, below=_COUNT,
        needs="eval_strategy steps|epoch",
    )  # fmt: skip
    eval_on_start: bool = option("evaluate before the first step", default=False)
    per_device_eval_batch_size: int = option(
        "conversations a micro-batch and device of an evaluation", default=8, at_least=1
    )
    sample_prompts: str | None = option("file with a prompt a line, answered at each evaluation", default=None)
    sample_max_new_tokens: int = option(
        "longest sample answer in tokens", default=128, needs="sample_prompts", at_least=1
    )
    load_best_model_at_end: bool = option("the best evaluation becomes the result", default=False, trajectory=True)
    metric_for_best_model: str | None = option("loss or perplexity", default=None, shown="loss")
    greater_is_better: bool | None = option("of that metric", default=None, shown="False")
    eval_generate: int | None = option(
        "held-out conversations that are answered at each evaluation, and measured",
        default=None, shown="none", at_least=1, needs="eval_strategy steps|epoch",
    )  # fmt: skip
    forgetting: bool = option(
        "at each evaluation, loss and divergence from the start on general text", default=False,
        needs="eval_strategy steps|epoch",
    )  # fmt: skip
    general: str | None = option(
        "that text: any data file", default=None, shown="200 short items that come with the program", needs="forgetting"
    )
    early_stopping_patience: int | None = option(
        "evaluations without a lower loss after which the run ends",
        default=None, shown="none", at_least=1, trajectory=True, needs="eval_strategy steps|epoch",
    )  # fmt: skip
    early_stopping_threshold: float = option(
        "how much lower it must be", default=0.0, at_least=0, trajectory=True, needs="early_stopping_patience"
    )
    do_eval: bool = option("accepted for older scripts", default=False)

    logging_strategy: Literal["no", "steps", "epoch"] = option("when to log", default="steps", section="log")
    logging_steps: float = option(
        "steps between log lines", default=1, above=0, below=_COUNT, needs="logging_strategy steps"
    )
    logging_first_step: bool = option("log the first step whatever logging_steps is", default=True)
    record_rows: bool = option("write every row's loss, each time it was trained: rows.parquet", default=True)
    report_to: list[str] = option("tensorboard and wandb; none: only metrics.jsonl", default="none")
    run_name: str | None = option("name of the run there", default=None, needs="report_to")
    log_level: str = option("of the libraries", default="passive", choices=_LOG_LEVELS)
    log_level_replica: str = option(
        "the same, of other processes than the first", default="warning", choices=_LOG_LEVELS
    )

    gradient_checkpointing: bool | Literal["auto"] | None = option(
        "recompute activations in the backward pass; auto: where they would not fit",
        default=None, shown="False", aliases=("activation_checkpointing",), section="speed and memory", main=True,
    )  # fmt: skip
    compile_layers: bool = option(
        "let torch.compile fuse each decoder layer: minutes at the start; with dropout other random numbers",
        default=False, trajectory=True,
    )  # fmt: skip
    micro_batch_tokens: str | None = option(
        "tokens of a micro-batch; auto: what fits",
        default=None, shown="per_device_train_batch_size x model_max_length",
    )  # fmt: skip
    device_memory_gib: float | None = option(
        "memory of a device to plan for", default=None, shown="that of this machine", above=0
    )
    ignore_memory_plan: bool = option("train even if the plan says that it cannot fit", default=False)
    bf16: bool = option(
        "compute in bfloat16", default=False, shown="bf16 where the GPU has it, else fp16; fp32 on a CPU",
        trajectory=True, deepspeed="bf16.enabled",
    )  # fmt: skip
    fp16: bool = option(
        "compute in float16", default=False, shown="where a GPU has no bf16", trajectory=True, deepspeed="fp16.enabled"
    )
    tf32: bool | None = option("TF32 on GPUs that have it", default=None, shown="torch's", trajectory=True)
    use_cpu: bool = option("train on the CPU", default=False, shown="where there is no GPU")
    dataloader_num_workers: int = option("processes that prepare batches", default=0, at_least=0)
    dataloader_pin_memory: bool = option("pinned host memory for batches", default=True)
    dataloader_persistent_workers: bool = option(
        "keep these processes between epochs", default=False, needs="dataloader_num_workers"
    )
    dataloader_prefetch_factor: int | None = option(
        "batches each of them prepares ahead", default=None, shown="torch's", at_least=1, needs="dataloader_num_workers"
    )

    deepspeed: str | None = option(
        "DeepSpeed's JSON: finetune/ds_config_zero2.json, ds_config_zero3.json, yours",
        default=None, section="several processes (torchrun)", main=True,
    )  # fmt: skip
    fsdp: str | None = option(
        "full_shard: FSDP2 shards weights, gradients and optimizer state over the processes; shard_grad_op: the same, "
        "with full weights kept between forward and backward",
        default=None, main=True,
    )  # fmt: skip
    ddp_backend: str | None = option(
        "backend of torch.distributed", default=None, shown="nccl on GPUs, gloo on CPUs",
        choices=("nccl", "gloo", "mpi", "xccl", "hccl", "cncl", "mccl"),
    )  # fmt: skip
    ddp_timeout: int = option("seconds a collective may take", default=1800, at_least=1)
    ddp_find_unused_parameters: bool | None = option("DDP's", default=None, shown="DDP's")
    ddp_bucket_cap_mb: int | None = option("DDP's", default=None, shown="DDP's", at_least=1)
    ddp_broadcast_buffers: bool | None = option("DDP's", default=None, shown="DDP's")
    ddp_static_graph: bool | None = option("DDP's", default=None, shown="DDP's")
    local_rank: int = option("set by older launchers", default=-1)


GROUPS = (ModelArguments, DataArguments, LoraArguments, RunOptions)


@dataclass
class Settings:
    """All settings, from the YAML file and the command line, checked as far as they can be without torch.

    given: names of those that were given, but for values of the file that a flag made void.
    """

    model: ModelArguments
    data: DataArguments
    lora: LoraArguments
    run: RunOptions
    given: frozenset[str]

    def __iter__(self) -> Any:
        return iter((self.model, self.data, self.lora, self.run))

    def describe(self) -> str:
        """The run in one line: what, of which model, on which data, to where."""
        kind = "Q-LoRA" if self.lora.q_lora else "LoRA" if self.lora.use_lora else "full training"
        data = ", ".join(self.data.data_path[:3]) + (", ..." if len(self.data.data_path) > 3 else "")
        return f"{kind} of {self.model.model_name_or_path} on {data} -> {self.run.output_dir}"
