"""transformers' options that mean nothing here, each with the reason. options.py declares the others."""

_STEP = "has no effect here: micro-batches are built by token count, and the loss is summed over all ranks"
OWN_LOOP = "the training step and the evaluation here do not use it"
_HUB = "upload the finished directory instead: hf upload NAME DIR"
LATER = "not available yet"
_FSDP = (
    "--fsdp full_shard or shard_grad_op is all there is to set; layers and precision follow from the model and --bf16"
)
_COMPILES = "--compile_layers True compiles the decoder's layers"
_RETIRED = "not needed; the conversations of a step are laid out by length already"

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
        "skip_memory_metrics", "use_cache", "use_liger_kernel", "liger_kernel_config", "parallelism_config",
        "activation_checkpointing_kwargs",
        "gradient_checkpointing_kwargs", "do_predict", "project", "trackio_space_id",
        "trackio_bucket_id", "trackio_static_space_id", "enable_jit_checkpoint", "save_on_each_node",
        "ignore_data_skip", "restore_callback_states_from_checkpoint",
    ],
    _HUB: [
        "push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push",
        "hub_revision",
    ],
    _FSDP: ["fsdp_config"],
    _RETIRED: ["group_by_length"],
    _COMPILES: ["torch_compile", "torch_compile_backend", "torch_compile_mode"],
}  # fmt: skip
REFUSED = {name: reason for reason, names in _REFUSED.items() for name in names}
ON_BY_DEFAULT = {
    "average_tokens_across_devices", "remove_unused_columns", "dataloader_in_order", "eval_do_concat_batches",
    "logging_nan_inf_filter", "log_on_each_node", "skip_memory_metrics",
}  # fmt: skip
_SAYS_NOTHING = ("false", "no", "none", "null", "0", "0.0")


def describe_refused(name: str, text: str) -> str | None:
    """Why an option is refused; None where the value is the default, which asks for nothing. text: its value."""
    word = text.strip().lower()
    is_default = word in ("", "true", "yes", "1") if name in ON_BY_DEFAULT else word in _SAYS_NOTHING
    return None if is_default else f"--{name}{f' {text}' if text else ''}: {REFUSED[name]}"
