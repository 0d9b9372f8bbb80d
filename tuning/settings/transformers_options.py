"""What each of transformers' TrainingArguments means here: honoured, or refused unless it is the default."""

HONOURED = "honoured"


_STEP = "the step here is laid out by tokens and summed over all ranks, which leaves nothing for it to do"


OWN_LOOP = "the training step and the evaluation here do not use it"


_HUB = "upload the finished directory instead: hf upload NAME DIR"


LATER = "not available yet"


# Every field of TrainingArguments: HONOURED, or why any value but the default is refused. A test holds it complete.
FIELDS: dict[str, str] = {
    **dict.fromkeys(
        [
            "output_dir", "per_device_train_batch_size", "num_train_epochs", "max_steps", "learning_rate",
            "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args", "weight_decay",
            "adam_beta1", "adam_beta2", "adam_epsilon", "gradient_accumulation_steps", "max_grad_norm", "bf16", "fp16",
            "tf32", "gradient_checkpointing", "activation_checkpointing", "logging_strategy", "logging_steps",
            "logging_first_step", "log_level", "log_level_replica", "report_to", "run_name", "eval_strategy",
            "eval_steps", "eval_delay", "per_device_eval_batch_size", "eval_on_start", "save_strategy", "save_steps",
            "save_total_limit", "full_determinism", "seed", "data_seed", "use_cpu",
            "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers",
            "dataloader_prefetch_factor", "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers",
            "ddp_static_graph", "ddp_backend", "ddp_timeout", "do_train", "do_eval", "local_rank",
            "overwrite_output_dir", "resume_from_checkpoint", "load_best_model_at_end", "metric_for_best_model",
            "greater_is_better", "save_only_model", "deepspeed", "fsdp",
        ],
        HONOURED,
    ),
    **dict.fromkeys(
        [
            "average_tokens_across_devices", "auto_find_batch_size", "dataloader_drop_last", "train_sampling_strategy",
            "length_column_name", "label_names", "remove_unused_columns", "accelerator_config",
            "dataloader_in_order", "dataloader_multiprocessing_context",
        ],
        _STEP,
    ),
    **dict.fromkeys(
        [
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
        OWN_LOOP,
    ),
    **dict.fromkeys(
        [
            "push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push",
            "hub_revision",
        ],
        _HUB,
    ),
    "fsdp_config": "--fsdp full_shard or shard_grad_op says all there is to say; layers and precision follow from the "
    "model and --bf16",
}  # fmt: skip
