"""What each of transformers' TrainingArguments means here. options.py declares those with another default anew."""

from tuning.settings.meaning import Meaning

_STEP = "has no effect here: micro-batches are built by token count, and the loss is summed over all ranks"
OWN_LOOP = "the training step and the evaluation here do not use it"
_HUB = "upload the finished directory instead: hf upload NAME DIR"
LATER = "not available yet"
_FSDP = (
    "--fsdp full_shard or shard_grad_op is all there is to set; layers and precision follow from the model and --bf16"
)
_COUNT = 2**53  # of steps and epochs, which are floats here
_SEEDS = 2**32  # numpy's seeds are below

_SUPPORTED = [
    "logging_strategy", "log_level", "log_level_replica", "report_to", "eval_on_start",
    "save_strategy", "full_determinism", "use_cpu", "dataloader_pin_memory",
    "ddp_find_unused_parameters",
    "ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend", "do_train", "do_eval", "local_rank",
    "metric_for_best_model", "greater_is_better", "save_only_model", "activation_checkpointing",
]  # fmt: skip
_TRAJECTORY = [
    "lr_scheduler_type", "lr_scheduler_kwargs", "optim", "optim_args",
    "tf32", "load_best_model_at_end",
]  # fmt: skip
_REFUSED = {
    _STEP: [
        "average_tokens_across_devices", "auto_find_batch_size", "dataloader_drop_last", "train_sampling_strategy",
        "length_column_name", "label_names", "remove_unused_columns", "accelerator_config",
        "dataloader_in_order", "dataloader_multiprocessing_context",
    ],
    OWN_LOOP: [
        "label_smoothing_factor", "neftune_noise_alpha", "torch_empty_cache_steps", "optim_target_modules",
        "bf16_full_eval", "fp16_full_eval", "prediction_loss_only", "eval_do_concat_batches",
        "eval_use_gather_object", "eval_accumulation_steps", "include_for_metrics", "batch_eval_metrics",
        "include_num_input_tokens_seen", "logging_nan_inf_filter", "log_on_each_node", "disable_tqdm", "debug",
        "skip_memory_metrics", "use_cache", "use_liger_kernel", "liger_kernel_config", "torch_compile",
        "torch_compile_backend", "torch_compile_mode", "parallelism_config", "activation_checkpointing_kwargs",
        "gradient_checkpointing_kwargs", "do_predict", "project", "trackio_space_id",
        "trackio_bucket_id", "trackio_static_space_id", "enable_jit_checkpoint", "save_on_each_node",
        "ignore_data_skip", "restore_callback_states_from_checkpoint",
    ],
    _HUB: [
        "push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push",
        "hub_revision",
    ],
    _FSDP: ["fsdp_config"],
}  # fmt: skip

# Every field that options.py does not declare. A test holds it complete.
MEANINGS: dict[str, Meaning] = {
    **dict.fromkeys(_SUPPORTED, Meaning()),
    **dict.fromkeys(_TRAJECTORY, Meaning(trajectory=True)),
    **{name: Meaning(refused=reason) for reason, names in _REFUSED.items() for name in names},
    "run_name": Meaning(needs="report_to"),
    "dataloader_num_workers": Meaning(at_least=0),
    "dataloader_persistent_workers": Meaning(needs="dataloader_num_workers"),
    "dataloader_prefetch_factor": Meaning(at_least=1, needs="dataloader_num_workers"),
    "ddp_bucket_cap_mb": Meaning(at_least=1),
    "ddp_timeout": Meaning(at_least=1),
    "eval_delay": Meaning(at_least=0, below=_COUNT, needs="eval_strategy steps|epoch"),
    "max_steps": Meaning(trajectory=True, at_least=-1),
    "num_train_epochs": Meaning(trajectory=True, above=0, below=_COUNT),
    "warmup_steps": Meaning(trajectory=True, at_least=0, below=_COUNT),
    "weight_decay": Meaning(trajectory=True, at_least=0),
    "adam_beta1": Meaning(trajectory=True, at_least=0, below=1),
    "adam_beta2": Meaning(trajectory=True, at_least=0, below=1),
    "adam_epsilon": Meaning(trajectory=True, at_least=0),
    "seed": Meaning(trajectory=True, at_least=0, below=_SEEDS),
    "data_seed": Meaning(trajectory=True, at_least=0, below=_SEEDS),
    "learning_rate": Meaning(trajectory=True, above=0),
    "per_device_train_batch_size": Meaning(at_least=1, deepspeed="train_micro_batch_size_per_gpu"),
    "per_device_eval_batch_size": Meaning(at_least=1),
    "gradient_accumulation_steps": Meaning(at_least=1, deepspeed="gradient_accumulation_steps"),
    "max_grad_norm": Meaning(trajectory=True, at_least=0, deepspeed="gradient_clipping"),
    "bf16": Meaning(trajectory=True, deepspeed="bf16.enabled"),
    "fp16": Meaning(trajectory=True, deepspeed="fp16.enabled"),
    "save_steps": Meaning(above=0, below=_COUNT, needs="save_strategy steps"),
    "save_total_limit": Meaning(at_least=1, needs="save_strategy steps|epoch|best"),
    "eval_strategy": Meaning(aliases=("evaluation_strategy",)),
    "eval_steps": Meaning(above=0, below=_COUNT, needs="eval_strategy steps"),
}
