import contextlib
import importlib.util
import json
import math
from dataclasses import fields

import pytest
import torch
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from tests.conftest import run_python
from tuning.distributed.startup import start_processes
from tuning.errors import SettingsError
from tuning.settings.arguments import describe_settings, describe_trajectory_settings, parse_arguments
from tuning.settings.meaning import list_meanings
from tuning.settings.options import GROUPS, OPTIMIZERS, SCHEDULES, RunOptions
from tuning.settings.transformers_options import ON_BY_DEFAULT, REFUSED

BASE = ["--model_name_or_path", "m", "--data_path", "d.json", "--output_dir", "/tmp/never-made", "--use_cpu", "True"]


def test_every_setting_of_transformers_is_honoured_or_refused():
    theirs = {field.name: field for field in fields(TrainingArguments)}
    ours = list_meanings(RunOptions)
    renamed = {alias for meaning in ours.values() for alias in meaning.aliases}
    missing = theirs.keys() - ours.keys() - REFUSED.keys() - renamed
    assert not missing, "decide in tuning/settings/ what these mean here"
    assert not ours.keys() & REFUSED.keys(), "each option is declared once"
    assert all(len(reason) > 10 for reason in REFUSED.values())
    assert {name for name in REFUSED if name in theirs and theirs[name].default is True} == ON_BY_DEFAULT


OTHER_DEFAULTS = {"output_dir", "logging_steps", "logging_first_step"}


def test_defaults_are_transformers_own_but_for_a_few():
    theirs = {field.name: field.default for field in fields(TrainingArguments)}
    theirs["gradient_checkpointing"] = theirs["gradient_checkpointing"] or None  # off; older versions say False
    for field in fields(RunOptions):
        if field.name in theirs and field.name not in OTHER_DEFAULTS:
            assert field.default == theirs[field.name], field.name


def test_choices_are_transformers_own_but_for_those_that_do_not_work_here():
    schedules, optimizers = ({each.value for each in kind} for kind in (SchedulerType, OptimizerNames))
    assert schedules - {*SCHEDULES} == {"reduce_lr_on_plateau", "greedy"} and {*SCHEDULES} <= schedules
    assert {*OPTIMIZERS} <= optimizers
    assert all(
        any(word in name for word in ("layerwise", "lomo", "schedule_free")) for name in optimizers - {*OPTIMIZERS}
    )


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
        (["--lora_bias", "some", "--use_lora"], "--lora_bias some: must be none, all or lora_only"),
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
        (
            [*EVALUATED, "--load_best_model_at_end", "True", "--save_strategy", "epoch"],
            "(epoch) equal to --eval_strategy",
        ),
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
        (["--lr_scheduler_type", "cosin"], " or warmup_stable_decay; did you mean cosine?"),
        (["--use_lora", "--lora_target_modules", "q.*["], "--lora_target_modules q.*[: not a regular expression"),
        (["--lora-r", "8"], "--lora_r: has no effect without --use_lora"),
        (["--warmup-ratio", "1.0"], "--warmup_ratio 1.0: a share of the steps"),
        (["--lora_weight_path", "a", "--use_lora", "--lora_r", "8"], "--lora_r: has no effect with --lora_weight_path"),
        (["--use_lora", "--lora_alpha", "0"], "--lora_alpha 0: must be above 0"),
        (["--use_lora", "--loraplus_lr_ratio", "-1"], "--loraplus_lr_ratio -1.0: must be above 0"),
        (["--learning_rate", "nan"], "--learning_rate nan: must be a finite number"),
        (["--fp16"], "--fp16: needs a GPU"),
        (["--gradient_checkpointing", "maybe"], "--gradient_checkpointing maybe: must be True, False or auto"),
        (["--compile_layers", "True", "--gradient_checkpointing", "auto"], "torch would compile nothing; choose one"),
        (["--compile_layers", "True", "--fsdp", "full_shard"], "--compile_layers: not available with --fsdp"),
        (["--torch_compile", "True"], "--torch_compile True: --compile_layers True compiles the decoder's layers"),
        (["--micro_batch_tokens", "many"], "--micro_batch_tokens many: say a number of tokens, or auto"),
        (["--device_memory_gib", "0"], "--device_memory_gib 0.0: must be above 0"),
        (["--do_train", "False"], "--do_train False: training is what"),
        (["--save_total_limit", "0"], "--save_total_limit 0: must be at least 1"),
        (["--eval_steps", "5"], "--eval_steps: has no effect without"),
        (["--seed", "-1"], "--seed -1: must be at least 0 and below 4,294,967,296"),
        (["--max_steps", "5", "--num_train_epochs", "2"], "--max_steps and --num_train_epochs: choose one"),
        (["--save_strategy", "no", "--save_steps", "5"], "--save_steps: has no effect without --save_strategy steps"),
        (["--save_strategy", "no", "--save_total_limit", "5"], "has no effect without --save_strategy steps or epoch"),
        (["--logging_strategy", "no", "--logging_steps", "5"], "--logging_steps: has no effect without"),
        (["--run_name", "x"], "--run_name: has no effect without --report_to"),
        (["--optim_args", "beta1=0.3"], "--optim_args beta1: has no effect with --optim adamw_torch"),
        (["--optim", "sgd", "--optim_args", "momentum=0.9,speed=2"], "--optim_args speed: has no effect with"),
        (["--optim", "sgd", "--optim_args", "momentum=nan"], "nan is not a finite number"),
        (["--optim", "sgd", "--optim_args", "momentum"], "--optim_args momentum: say name=value,name=value"),
        (["--optim", "sgd", "--optim_args", "momentum=x"], "--optim sgd --optim_args momentum=x: could not convert"),
        (["--optim", "adafactor", "--adam_beta1", "0.8"], "--adam_beta1: has no effect with --optim adafactor"),
        (["--lr_scheduler_type", "constant", "--warmup_steps", "5"], "--warmup_steps 5: has no effect with"),
        (["--lr_scheduler_type", "cosine_with_min_lr"], "; it needs --lr_scheduler_kwargs '{\"min_lr\": 1e-6}'"),
        (["--lr_scheduler_type", "warmup_stable_decay"], "missing 1 required positional argument: 'num_decay_steps'"),
        (["--lr_scheduler_kwargs", '{"power": 2}'], "{'power': 2}: got an unexpected keyword argument 'power'"),
        (["--lr_scheduler_kwargs", "{x"], "--lr_scheduler_kwargs {x: not JSON"),
        (["--lr_scheduler_kwargs", "[1]"], "--lr_scheduler_kwargs [1]: must be names and values"),
        (["--lr_scheduler_kwargs", '{"power": NaN}'], "--lr_scheduler_kwargs power nan: must be a finite number"),
        (["--lr_scheduler_type", "constant", "--lr_scheduler_kwargs", '{"a": 1}'], "has no effect with"),
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
from tuning.settings.arguments import parse_arguments
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


def numeric_options():
    for group in GROUPS:
        for field in fields(group):
            kinds = getattr(field.type, "__args__", (field.type,))
            if field.init and {int, float} & {*kinds, *(int for kind in kinds if kind in ("int", "float"))}:
                yield field.name


@pytest.mark.parametrize("name", sorted(numeric_options()))
def test_odd_numbers_are_refused_by_name(name):
    for value in ("nan", "inf", "-inf", "1e400", "1" * 40, "-" + "1" * 40, "1e300"):
        with pytest.raises(SettingsError) as error:
            parse_arguments([*BASE, f"--{name}={value}"])
        assert f"--{name}" in str(error.value) and "\n" not in str(error.value)
    for value in ("0", "-1", "-0.5", "1", "1e-300"):  # taken, or refused in one line
        with contextlib.suppress(SettingsError):
            parse_arguments([*BASE, f"--{name}={value}"])


@pytest.mark.parametrize("name", sorted(kind.value for kind in OptimizerNames))
def test_every_optimizer_is_built_or_refused_before_a_model_loads(name):
    with contextlib.suppress(SettingsError):
        run = parse_arguments([*BASE, "--optim", name]).run
        chosen, arguments = Trainer.get_optimizer_cls_and_kwargs(run)
        chosen([torch.nn.Parameter(torch.zeros(2, 2))], **arguments)


@pytest.mark.parametrize("name", sorted(kind.value for kind in SchedulerType))
def test_every_schedule_is_built_or_refused_before_a_model_loads(name):
    for kwargs in ({}, {"min_lr": 1e-6}, {"min_lr": "x"}, {"num_decay_steps": 5}, {"power": -1}, {"num_cycles": 1e308}):
        words = ["--lr_scheduler_type", name, "--lr_scheduler_kwargs", json.dumps(kwargs)]
        with contextlib.suppress(SettingsError):
            run = parse_arguments([*BASE, *(words if kwargs else words[:2])]).run
            optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=run.learning_rate)
            schedule = get_scheduler(run.lr_scheduler_type, optimizer, 10, 100, run.lr_scheduler_kwargs)
            assert all(math.isfinite(schedule.lr_lambdas[0](step)) for step in range(100))


def test_a_flag_that_makes_a_value_of_the_file_void_is_no_mistake(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "num_train_epochs: 5\nsave_steps: 1000\nsave_total_limit: 3\nwarmup_ratio: 0.1\nadam_beta2: 0.95\n"
        "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs:\n  min_lr: 1e-5\n"
    )
    assert parse_arguments([str(file), *BASE]).run.lr_scheduler_kwargs == {"min_lr": 1e-5}
    run = parse_arguments([str(file), *BASE, "--max_steps", "7"]).run
    assert run.max_steps == 7
    parse_arguments([str(file), *BASE, "--save_strategy", "no"])
    with pytest.raises(SettingsError, match="unexpected keyword argument 'min_lr'"):
        parse_arguments([str(file), *BASE, "--lr_scheduler_type", "linear"])
    parse_arguments([str(file), *BASE, "--lr_scheduler_type", "constant"])
    parse_arguments([str(file), *BASE, "--optim", "adafactor"])
    file.write_text("max_steps: 7\n")
    run = parse_arguments([str(file), *BASE, "--num_train_epochs", "2"]).run
    assert (run.max_steps, run.num_train_epochs) == (-1, 2)
    file.write_text("max_steps: 7\nnum_train_epochs: 2\n")
    with pytest.raises(SettingsError, match="--max_steps and --num_train_epochs: choose one"):
        parse_arguments([str(file), *BASE])
