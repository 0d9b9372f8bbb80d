"""What other tools call a setting, and what it is called here.

For flags and files alike: a name of another tool gets the way out, not a guess. translate turns a whole file of
LLaMA-Factory, axolotl, TRL or the original scripts into ours.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from tuning.settings.meaning import list_meanings
from tuning.settings.options import GROUPS
from tuning.settings.transformers_options import REFUSED
from tuning.settings.yaml_file import read_settings_file

_RENAMED = {
    "model_name_or_path": "model base_model model_id model_path pretrained_model_name_or_path model_name",
    "data_path": "dataset datasets train_file train_files train_data dataset_name dataset_path data",
    "eval_data_path": "eval_dataset eval_file val_dataset validation_file test_datasets val_data",
    "output_dir": "output out_dir out output_path save_dir",
    "model_max_length": (
        "cutoff_len max_seq_length max_length max_seq_len sequence_len seq_len block_size max_source_length"
    ),
    "eval_share": "val_size val_set_size split_dataset_ratio test_size validation_split",
    "system_message": "system default_system system_prompt",
    "on_bad_row": "skip_bad_rows",
    "add_special_tokens": "new_special_tokens additional_special_tokens add_tokens tokens",
    "use_lora": "use_peft lora peft",
    "q_lora": "use_qlora qlora load_in_4bit",
    "bits": "quantization_bit quant_bits num_bits",
    "lora_r": "lora_rank rank r peft_lora_r",
    "lora_target_modules": "lora_target target_modules lora_target_linear lora_targets",
    "use_rslora": "use_rs_lora peft_use_rslora rslora",
    "use_dora": "peft_use_dora dora",
    "lora_weight_path": "adapter_name_or_path adapter_path lora_model_dir adapters",
    "loraplus_lr_ratio": "lora_plus_lr_ratio",
    "learning_rate": "lr max_lr",
    "num_train_epochs": "num_epochs epochs n_epochs max_epochs",
    "max_steps": "max_train_steps num_train_steps iters",
    "per_device_train_batch_size": "micro_batch_size batch_size train_batch_size bs",
    "per_device_eval_batch_size": "eval_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation grad_accum accumulation_steps accumulate_grad_batches",
    "lr_scheduler_type": "lr_scheduler scheduler lr_schedule lr_decay_style",
    "warmup_ratio": "lr_warmup_ratio warmup_fraction",
    "warmup_steps": "num_warmup_steps lr_warmup_steps warmup",
    "optim": "optimizer",
    "max_grad_norm": "gradient_clipping clip_grad grad_clip",
    "seed": "random_seed",
    "save_steps": "save_interval save_every saves_per_epoch",
    "save_total_limit": "keep_last max_checkpoints",
    "save_only_model": "save_only_weights",
    "resume_from_checkpoint": "auto_resume_from_checkpoints resume",
    "overwrite_output_dir": "overwrite overwrite_output",
    "eval_steps": "evals_per_epoch eval_interval eval_every",
    "logging_steps": "log_every log_interval log_steps",
    "deepspeed": "deepspeed_config ds_config",
    "use_cpu": "no_cuda",
    "load_best_model_at_end": "save_best",
    "gradient_checkpointing": "use_gradient_checkpointing activation_recompute",
    "no_cache": "overwrite_cache",
    "cache_dir": "dataset_prepared_path",
}
_PACKED = "not needed: sequences are packed where the model can"
_ATTENTION = "not needed: the fastest exact attention of the machine is taken"
_TEMPLATE = "not needed: the model's own chat template is used; another one by --chat_template FILE"
_COLUMNS = "not needed: a record's format is told by its keys; other names by --map role=NAME,content=NAME"
_DPO = "not supported: this trains on conversations (SFT)"
_NOT_HERE = {
    _PACKED: (
        "packing neat_packing sample_packing eval_sample_packing pad_to_sequence_len packing_strategy padding_free "
        "group_by_modality_length pack use_packing eval_packing"
    ),
    _ATTENTION: (
        "flash_attn attn_implementation flash_attention use_flash_attn use_flash_attention_2 sdp_attention "
        "xformers_attention attn_impl use_unsloth enable_liger_kernel"
    ),
    _TEMPLATE: ("template chat_template_jinja model_type tokenizer_type prompt_template conversation_template"),
    _COLUMNS: (
        "dataset_dir dataset_text_field text_column formatting columns field_messages dataset_format messages_field "
        "dataset_config dataset_train_split dataset_test_split prompt_column response_column data_collator type"
    ),
    _DPO: ("pref_beta pref_loss beta reward_model rl kl_coef loss_type ref_model"),
    'not needed: only answers are trained; --supervise last, or "train": false in a turn, say otherwise': (
        "train_on_inputs train_on_prompt mask_history assistant_only_loss completion_only_loss "
        "train_on_responses_only loss_scale roles_to_train train_on_eos"
    ),
    "not needed: the stop token follows from the chat template and is trained": (
        "special_tokens eos_token pad_token add_eos_token"
    ),
    "not needed: --add_special_tokens makes the vocabulary matrices as large as they must be": "resize_vocab",
    "not needed: rows are tokenised by all cores": ("preprocessing_num_workers dataset_processes dataset_num_proc"),
    "not needed: loss.png and metrics.jsonl are always written": ("plot_loss include_effective_tokens_per_second"),
    "not needed: what is trained is printed by python -m data_utils show": ("debug_tokens print_samples"),
    "here FILE#N after a path takes a sample of N rows": ("max_samples max_train_samples max_eval_samples"),
    "here --report_to wandb": ("wandb_project wandb_entity use_wandb wandb use_swanlab"),
    "here --fsdp full_shard": ("fsdp_version tensor_parallel tp_size device_map"),
    "here --train_embeddings full": ("additional_target lora_modules_to_save modules_to_save"),
    "not available yet": (
        "neftune_alpha freeze_trainable_layers use_galore use_badam llama_pro use_apollo "
        "loraplus_lr_embedding curriculum_sampling"
    ),
    "here the type of the weights follows from --bf16, --fp16 and --pure_bf16": (
        "torch_dtype dtype precision compute_type infer_dtype"
    ),
    "merge afterwards: python merge_lora.py OUTPUT MERGED": ("merge_lora export_dir merge_adapter"),
}
_SAY = {
    "finetuning_type": "here --use_lora for lora, nothing for full",
    "tuner_type": "here --use_lora for lora, nothing for full",
    "train_type": "here --use_lora for lora, nothing for full",
    "sft_type": "here --use_lora for lora, nothing for full",
    "adapter": "here --use_lora for lora, --q_lora for qlora",
    "method": "here --use_lora for lora, nothing for full",
    "stage": f"not needed for sft; pt is rows with \"text\"; {_DPO.removeprefix('not supported: ')}",
    "load_in_4bit": "here --q_lora",
    "load_in_8bit": "here --q_lora --bits 8",
    "quantization_bit": "here --q_lora --bits 4 or 8",
    "val_size": "here --eval_share 0.05, with --eval_strategy epoch or steps",
    "val_set_size": "here --eval_share 0.05, with --eval_strategy epoch or steps",
    "dataset": "here --data_path, with paths of files, or hf:OWNER/NAME",
    "datasets": "here --data_path, with paths of files, or hf:OWNER/NAME",
    "dataset_name": "here --data_path, with paths of files, or hf:OWNER/NAME",
    "dataset_dir": "here --data_path takes paths of files or a directory",
    "saves_per_epoch": "here --save_strategy epoch, or --save_steps",
    "evals_per_epoch": "here --eval_strategy epoch, or --eval_steps",
    "overwrite_cache": "here --no_cache",
    "no_cuda": "here --use_cpu",
    "additional_target": "here --train_embeddings full",
    "use_hf": "here --hub huggingface, which is the default, or modelscope",
    "gpu_memory_limit": "here --device_memory_gib",
}  # fmt: skip
_HERE = {other: own for own, others in _RENAMED.items() for other in others.split()}
_REASONS = {name: reason for reason, names in _NOT_HERE.items() for name in names.split()}
_OWN = {name for group in GROUPS for name in list_meanings(group)} | {"warmup_ratio", "evaluation_strategy"}


def explain_name(name: str, value: Any) -> tuple[str, set[str]] | None:
    """What to say of a name of another tool, and our options that it is about; None if no tool is known to have it.

    value: what stands there in a file, since some files nest their settings.
    """
    if isinstance(value, Mapping) and not _REASONS.get(name):
        inner = ", ".join(f"{key}: ..." for key in list(value)[:2]) or "name: value"
        own_name = _HERE.get(name, "")
        way_out = f"here --{own_name}" if own_name else f"write {inner} without it"
        return f"--{name}: settings are not nested here; {way_out}", {own_name}
    own = {_HERE[name]} if name in _HERE else set()
    if name in _SAY:
        return f"--{name}: {_SAY[name]}", own | set(re.findall(r"--(\w+)", _SAY[name]))
    if own:
        return f"--{name}: here --{_HERE[name]}", own
    if name in _REASONS:
        return f"--{name}: {_REASONS[name]}", set()
    return None


# ---- whole files ----

# Names that no other tool has; two of them tell whose file it is.
_SIGNATURES = {
    "LLaMA-Factory's": (
        "cutoff_len dataset_dir finetuning_type lora_rank lora_target overwrite_cache plot_loss "
        "preprocessing_num_workers quantization_bit stage template val_size"
    ),
    "axolotl's": (
        "adapter base_model chat_template datasets lora_target_linear micro_batch_size num_epochs pad_to_sequence_len "
        "sample_packing sequence_len train_on_inputs val_set_size"
    ),
    "TRL's": (
        "assistant_only_loss attn_implementation dataset_name dataset_num_proc dataset_text_field max_length "
        "max_seq_length model_init_kwargs packing use_peft"
    ),
}


# What they take where their file says nothing, and ours is another; of an adapter, and always.
_OF_ADAPTERS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "LLaMA-Factory's": lambda ours: {"lora_r": 8, "lora_alpha": 2 * ours.get("lora_r", 8), "lora_dropout": 0.0},
    "TRL's": lambda _: {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05},
}
_ALWAYS = {"TRL's": {"learning_rate": 2e-5, "model_max_length": 1024, "gradient_checkpointing": True}}


def _recognise(settings: Mapping[str, Any]) -> str:
    """The tool whose file it is; empty where it is ours, or may be meant so."""
    counts = {tool: len({*names.split()} & (settings.keys() - _OWN)) for tool, names in _SIGNATURES.items()}
    tool = max(counts, key=counts.__getitem__)
    return tool if counts[tool] >= 3 else ""


def describe_foreign_file(file: str, settings: Mapping[str, Any]) -> str | None:
    """One line where a file of settings is another tool's; None where it is ours, or may be meant so."""
    if not (tool := _recognise(settings)):
        return None
    names = sorted({*_SIGNATURES[tool].split()} & settings.keys())
    return (
        f"{file}: looks like {tool} ({', '.join(names[:3])}, ...); translate it: "
        f"python finetune.py --translate {file} > OURS.yaml"
    )


def translate(settings: Mapping[str, Any]) -> str:
    """Settings of another tool as a YAML file of ours, with a comment for each that has no counterpart."""
    ours: dict[str, Any] = {}
    notes = []
    tool = _recognise(settings)
    for name, value in settings.items():
        if value is None or value == "":
            continue
        for own, converted, note in _translate_one(str(name), value, settings):
            if own is not None:
                ours[own] = converted
            if note:
                notes.append(f"# {name}: {' '.join(_shorten(value).split())}: {note}")
    is_adapter = ours.get("use_lora") is True or ours.get("q_lora")
    defaults = _OF_ADAPTERS[tool](ours) if is_adapter and tool in _OF_ADAPTERS else {}
    for name, value in {**defaults, **_ALWAYS.get(tool, {})}.items():
        if name not in ours:
            ours[name] = value
            notes.append(f"# {name}: {value}: {tool} default")
    if ours.get("eval_share") and ours.get("eval_strategy", "no") == "no":
        ours["eval_strategy"] = "steps" if "eval_steps" in ours else "epoch"
    if "eval_share" not in ours and "eval_data_path" not in ours:
        for name in ("eval_strategy", "eval_steps", "per_device_eval_batch_size"):
            if name in ours:
                notes.append(f"# {name}: {ours.pop(name)}: there is no evaluation data; name it by eval_data_path")
    if ours.get("use_lora") is not True and not ours.get("q_lora"):
        needs_lora = {
            name for group in GROUPS for name, each in list_meanings(group).items() if each.needs == "use_lora"
        }
        for name in sorted(needs_lora & ours.keys()):
            notes.append(f"# {name}: {ours.pop(name)}: of LoRA, which is not asked for")
    text = yaml.safe_dump(ours, sort_keys=False, allow_unicode=True, width=1_000) if ours else ""
    return "\n".join([text.rstrip(), *notes]).strip() + "\n"


def _shorten(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _translate_one(name: str, value: Any, settings: Mapping[str, Any]) -> list[tuple[str | None, Any, str]]:
    """Our settings of one of another tool: name, value, and what to say of it."""
    if name in _CONVERT:
        return _CONVERT[name](value, settings)
    if name in REFUSED:
        return [(None, None, REFUSED[name])]
    if name in _SAY or name in _REASONS:
        return [(None, None, _SAY.get(name) or _REASONS[name])]
    own = _HERE.get(name, name)
    if own not in _OWN:
        return [(None, None, "no such setting here")]
    if value == "auto" and own != "gradient_checkpointing":
        return [(None, None, "")]  # our default
    return [(own, value, "")]


def _translate_files(value: Any, settings: Mapping[str, Any]) -> list[tuple[str | None, Any, str]]:
    folder = settings.get("dataset_dir")
    entries = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
    of_all = {"name": settings.get("dataset_config"), "split": settings.get("dataset_train_split")}  # TRL's
    described = [{**of_all, **each} if isinstance(each, Mapping) else {**of_all, "path": each} for each in entries]
    paths = [str(each.get("path", each)).strip() for each in described]
    if isinstance(folder, str):
        paths = [path if Path(path).suffix else f"{folder}/{path}.json" for path in paths]
    else:
        paths = [_as_hub_name(path, each) for path, each in zip(paths, described, strict=True)]
    note = "names of data sets become paths of files here, or names on the Hugging Face hub: check them"
    return [("data_path", paths, note)]


def _as_hub_name(path: str, entry: Mapping[str, Any]) -> str:
    """A data set's name on the hub in our form; what looks like a file stays as it is."""
    if path.count("/") != 1 or Path(path).suffix or path[0] in "/.~" or Path(path).exists():
        return path
    subset, split = entry.get("name"), entry.get("split")
    return f"hf:{path}{f'/{subset}' if subset else ''}{f':{split}' if split else ''}"


def _translate_method(value: Any, settings: Mapping[str, Any]) -> list[tuple[str | None, Any, str]]:
    if value == "lora" and (settings.get("quantization_bit") or settings.get("load_in_4bit")):
        return [("q_lora", True, "")]
    known = {"lora": "use_lora", "qlora": "q_lora", "full": None}
    if value not in known:
        return [(None, None, "not supported; LoRA, Q-LoRA and full training are")]
    return [(known[value], True, "")] if known[value] else [(None, None, "")]


def _translate_stage(value: Any, settings: Mapping[str, Any]) -> list[tuple[str | None, Any, str]]:
    return [(None, None, "" if value in ("sft", "pt") else _DPO)]


def _translate_quantization(bits: Any) -> list[tuple[str | None, Any, str]]:
    if not bits:
        return [(None, None, "")]
    return [("q_lora", True, ""), ("bits", bits, "")]


def _translate_targets(value: Any, settings: Mapping[str, Any]) -> list[tuple[str | None, Any, str]]:
    return [(None, None, "")] if value in ("all", "all-linear", True) else [("lora_target_modules", value, "")]


def _translate_tokens(value: Any, settings: Mapping[str, Any]) -> list[tuple[str | None, Any, str]]:
    return [("add_special_tokens", value.split(",") if isinstance(value, str) else value, "")]


def _translate_share(value: Any, settings: Mapping[str, Any]) -> list[tuple[str | None, Any, str]]:
    if not isinstance(value, int | float) or value <= 0:
        return [(None, None, "")]
    return [("eval_share", value, "")] if value < 1 else [(None, None, "here a share of the rows: eval_share: 0.05")]


def _translate_deepspeed(value: Any, settings: Mapping[str, Any]) -> list[tuple[str | None, Any, str]]:
    stage = re.search(r"z(?:ero)?_?(?:stage)?_?([123])", str(value), re.IGNORECASE)
    file = "finetune/ds_config_zero3.json" if stage and stage[1] == "3" else "finetune/ds_config_zero2.json"
    return [("deepspeed", file, "this toolkit's file of that stage; offload: docs/distributed.md")]


_Convert = Callable[[Any, Mapping[str, Any]], list[tuple[str | None, Any, str]]]
_CONVERT: dict[str, _Convert] = {
    "dataset": _translate_files,
    "datasets": _translate_files,
    "dataset_name": _translate_files,
    "finetuning_type": _translate_method,
    "tuner_type": _translate_method,
    "train_type": _translate_method,
    "sft_type": _translate_method,
    "adapter": _translate_method,
    "stage": _translate_stage,
    **dict.fromkeys(("add_special_tokens", *_RENAMED["add_special_tokens"].split()), _translate_tokens),
    "quantization_bit": lambda value, _: _translate_quantization(value),
    "load_in_4bit": lambda value, _: _translate_quantization(4 if value else 0),
    "load_in_8bit": lambda value, _: _translate_quantization(8 if value else 0),
    "lora_target": _translate_targets,
    "lora_target_linear": _translate_targets,
    "lora_target_modules": _translate_targets,
    "val_size": _translate_share,
    "val_set_size": _translate_share,
    "split_dataset_ratio": _translate_share,
    "test_size": _translate_share,
    "deepspeed": _translate_deepspeed,
    "do_eval": lambda value, _: [(None, None, "")],
    "do_train": lambda value, _: [(None, None, "")],
    "no_cuda": lambda value, _: [("use_cpu", True, "")] if value else [(None, None, "")],
}


def translate_file(path: Path) -> str:
    """A file of settings of another tool as one of ours. Raises: SettingsError: no such file, or no settings in it."""
    settings = {name: value for name, value, _ in read_settings_file(path)}
    return f"# translated from {path}\n{translate(settings)}"
