import importlib.util
from dataclasses import fields

import pytest
from transformers import TrainingArguments

from tests.conftest import run_python
from tuning.distributed.startup import start_processes
from tuning.errors import SettingsError
from tuning.settings.command_line import parse_arguments
from tuning.settings.options import RunArguments, describe_settings, describe_trajectory_settings, list_meanings
from tuning.settings.transformers_options import MEANINGS

BASE = ["--model_name_or_path", "m", "--data_path", "d.json", "--output_dir", "/tmp/never-made", "--use_cpu", "True"]


def test_every_setting_of_transformers_is_honoured_or_refused():
    declared = {field.name for field in fields(RunArguments) if "meaning" in field.metadata}
    missing = {field.name for field in fields(TrainingArguments)} - MEANINGS.keys() - declared
    assert not missing, "decide in tuning/settings/transformers_options.py what these mean here"
    assert not declared & MEANINGS.keys(), "each option is declared once"
    assert all(meaning.refused is None or len(meaning.refused) > 10 for meaning in list_meanings(RunArguments).values())


def test_the_original_scripts_flags_parse_to_what_they_meant():
    arguments = parse_arguments(
        [
            *("--model_name_or_path", "Qwen/Qwen-7B", "--data_path", "a.json", "b.jsonl", "--eval_data_path", "e.json"),
            *("--bf16", "True", "--output_dir", "out", "--num_train_epochs", "5", "--per_device_train_batch_size", "2"),
            *("--per_device_eval_batch_size", "1", "--gradient_accumulation_steps", "8"),
            *("--evaluation_strategy", "epoch", "--save_strategy", "steps", "--save_steps", "1000"),
            *("--save_total_limit", "10", "--learning_rate", "3e-4", "--weight_decay", "0.1", "--adam_beta2", "0.95"),
            *("--warmup_ratio", "0.01", "--lr_scheduler_type", "cosine", "--logging_steps", "1", "--report_to", "none"),
            *("--model_max_length", "512", "--lazy_preprocess", "True", "--gradient_checkpointing", "--use_lora"),
            *("--lora_r", "32", "--lora_target_modules", "c_attn", "w1", "--overwrite_output_dir", "--use_cpu"),
        ]
    )
    assert arguments.data.data_path == ["a.json", "b.jsonl"] and arguments.data.eval_data_path == ["e.json"]
    assert arguments.run.eval_strategy == "epoch" and arguments.run.warmup_steps == 0.01
    assert arguments.run.get_warmup_steps(1000) == 10
    assert arguments.run.gradient_checkpointing and arguments.run.overwrite_output_dir
    assert arguments.lora.lora_target_modules == ["c_attn", "w1"] and arguments.lora.lora_r == 32
    assert describe_settings(arguments)["run"]["adam_beta2"] == 0.95


def test_the_originals_defaults():
    lora = parse_arguments([*BASE, "--use_lora"]).lora
    assert (lora.lora_r, lora.lora_alpha, lora.lora_dropout, lora.lora_bias) == (64, 16, 0.05, "none")


BEST = ["--load_best_model_at_end", "True", "--save_steps", "2"]
EVALUATED = ["--eval_data_path", "e.json", "--eval_strategy", "steps", "--eval_steps", "2"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--learning_rat", "1"], "--learning_rat: unknown setting; did you mean --learning_rate?"),
        (["--per_device_train", "8"], "did you mean --per_device_train_batch_size?"),
        (["--use_loraa"], "did you mean --use_lora?"),
        (["--zzz"], "--zzz: unknown setting; see --help"),
        (["--lora_r", "many", "--use_lora"], "--lora_r: invalid int value: 'many'"),
        (["--lora_bias", "some", "--use_lora"], "--lora_bias: invalid choice: 'some'"),
        (["stray"], "stray: belongs to no setting"),
        (["--bits", "8"], "--bits: has no effect without --q_lora"),
        (["--use_lora", "--quant_type", "fp4"], "--quant_type: has no effect without --q_lora"),
        (["--q_lora", "--bits", "3"], "--bits 3: must be 4 or 8"),
        (["--q_lora", "--bits", "8", "--quant_type", "nf4"], "--quant_type nf4: has no effect with --bits 8"),
        (["--q_lora", "--use_dora"], "--use_dora and --q_lora"),
        (["--q_lora", "--use_lora", "False"], "--use_lora False and --q_lora True"),
        (["--optim", "paged_adamw_8bit"], "on a CPU use adamw_8bit"),
        (["--deepspeed", "a.json", "--fsdp", "full_shard"], "--deepspeed and --fsdp: choose one"),
        (["--fsdp_config", "a.json"], "--fsdp_config a.json: --fsdp full_shard or shard_grad_op is all"),
        (["--force_resume", "True"], "--force_resume: has no effect without --resume_from_checkpoint"),
        (["--resume_from_checkpoint", "auto", "--overwrite_output_dir"], "--overwrite_output_dir: choose one"),
        (["--optim", "schedule_free_adamw"], "--optim schedule_free_adamw: not available yet"),
        (["--optim", "adamw_torch_8bit"], "--optim adamw_torch_8bit: its state cannot be saved"),
        (["--resume_from_checkpoint", "True"], "--resume_from_checkpoint True: say auto"),
        ([*EVALUATED, "--load_best_model_at_end", "True", "--save_strategy", "epoch"], "Save strategy"),
        ([*EVALUATED, *BEST, "--save_only_model", "True"], "the best cannot be loaded; choose one"),
        (["--optim", "lomo"], "--optim lomo: steps inside the backward pass"),
        (["--save_strategy", "best"], "--save_strategy best: needs --eval_strategy"),
        ([*EVALUATED, "--load_best_model_at_end", "True", "--save_steps", "4"], "(4) equal to --eval_steps (2)"),
        ([*EVALUATED, "--metric_for_best_model", "accuracy"], "evaluation measures loss and perplexity"),
        ([*EVALUATED, "--metric_for_best_model", "loss", "--greater_is_better", "True"], "the lower is the better"),
        (["--metric_for_best_model", "loss"], "--metric_for_best_model: has no effect without --eval_strategy"),
        (["--label_smoothing_factor", "0.1"], "--label_smoothing_factor 0.1: the training step"),
        (["--group_by_length"], "--group_by_length: not needed"),
        (["--dataloader_drop_last", "True"], "--dataloader_drop_last True: has no effect here"),
        (["--push_to_hub"], "hf upload"),
        (["--lora_r", "8"], "--lora_r: has no effect without --use_lora"),
        (["--use_lora", "--pure_bf16"], "--pure_bf16: has no effect with LoRA"),
        (["--use_lora", "--lora_dropout", "1"], "--lora_dropout 1.0: must be"),
        (["--eval_data_path", "e.json"], "--eval_data_path: has no effect without --eval_strategy"),
        (["--eval_strategy", "epoch"], "--eval_strategy: needs --eval_data_path"),
        (["--per_device_train_batch_size", "0"], "--per_device_train_batch_size 0: must be at least 1"),
        (["--num_train_epochs", "0"], "--num_train_epochs 0.0: must be above 0"),
        (["--model_max_length", "1"], "--model_max_length 1: must be"),
        (["--lr_scheduler_type", "cosin"], "cosin"),
        (["--lora-r", "8"], "--lora_r: has no effect without --use_lora"),
        (["--warmup-ratio", "1.0"], "--warmup_ratio 1.0: a share of the steps"),
        (["--lora_weight_path", "a", "--use_lora", "--lora_r", "8"], "--lora_r: has no effect with --lora_weight_path"),
        (["--use_lora", "--lora_alpha", "0"], "--lora_alpha 0: must be above 0"),
        (["--use_lora", "--loraplus_lr_ratio", "-1"], "--loraplus_lr_ratio -1.0: must be above 0"),
        (["--learning_rate", "nan"], "--learning_rate nan: must be above 0"),
        (["--fp16"], "--fp16: needs a GPU"),
        (["--gradient_checkpointing", "maybe"], "--gradient_checkpointing maybe: say True, False or auto"),
        (["--micro_batch_tokens", "many"], "--micro_batch_tokens many: say a number of tokens, or auto"),
        (["--device_memory_gib", "0"], "--device_memory_gib 0.0: must be above 0"),
        (["--do_train", "False"], "--do_train False: training is what"),
        (["--save_total_limit", "0"], "--save_total_limit 0: must be at least 1"),
        (["--eval_steps", "5"], "--eval_steps: has no effect without"),
    ],
)
def test_mistakes_are_one_line(words, message):
    with pytest.raises(SettingsError) as error:
        parse_arguments([*BASE, *words])
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("words", [["--deepspeed", "finetune/ds_config_zero2.json"], ["--fsdp", "full_shard"]])
def test_engines_need_torchrun(words, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SettingsError, match=f"{words[0]}: needs torchrun, for one process too"):
        start_processes(parse_arguments([*BASE, *words]))


def test_required_settings_are_named():
    with pytest.raises(SettingsError, match="required: --model_name_or_path, --data_path"):
        parse_arguments(["--output_dir", "x"])
    with pytest.raises(SettingsError, match="required: --output_dir"):
        parse_arguments(["--model_name_or_path", "m", "--data_path", "d"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [([], False), (["--gradient_checkpointing"], True), (["--gradient_checkpointing", "no"], False),
     (["--gradient_checkpointing=true"], True), (["--gradient_checkpointing", "Auto"], "auto")],
)  # fmt: skip
def test_spellings_of_gradient_checkpointing(words, expected):
    run = parse_arguments([*BASE, *words]).run
    assert ("auto" if run.checkpoints_if_needed else bool(run.gradient_checkpointing)) == expected


def test_a_missing_reporter_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match="--report_to wandb: wandb is not installed; pip install wandb"):
        parse_arguments([*BASE, "--report_to", "wandb"])
    parse_arguments([*BASE, "--report_to", "none"])


def test_building_the_arguments_reads_and_opens_nothing(monkeypatch):
    """In a fresh process with a process group to join: neither sockets nor files nor DeepSpeed."""
    code = """
import socket, sys
from tuning.settings.command_line import parse_arguments
socket.socket = None
before = set(sys.modules)
arguments = parse_arguments(sys.argv[1:])
import torch.distributed
assert not torch.distributed.is_initialized()
assert not [name for name in set(sys.modules) - before if name.startswith("deepspeed")]
assert arguments.run.deepspeed == "no/such/file.json" and not arguments.run.started
"""
    rank = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    run_python("-c", code, *BASE, "--deepspeed", "no/such/file.json", **rank)


def test_options_of_the_trajectory_are_what_a_resumed_run_must_have():
    arguments = parse_arguments([*BASE, "--use_lora", "--seed", "7"])
    chosen = describe_trajectory_settings(arguments)
    assert chosen["seed"] == 7 and chosen["lora_r"] == 64 and chosen["label_mask"] == "assistant"
    assert not {"output_dir", "logging_steps", "save_steps", "per_device_train_batch_size", "no_cache"} & chosen.keys()
