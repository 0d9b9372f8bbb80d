"""What people bring from other tools: names of settings, and whole files."""

import random
import re

import pytest
import yaml

from tests.conftest import CONVERSATIONS
from tuning.errors import SettingsError
from tuning.settings import other_tools
from tuning.settings.arguments import build_arguments
from tuning.settings.command_line import MEANINGS, read_mapping, read_settings
from tuning.settings.transformers_options import REFUSED

BASE = ["--model_name_or_path", "m", "--data_path", "d.json", "--output_dir", "o"]


def mistakes(words, *checks) -> list[str]:
    with pytest.raises(SettingsError) as error:
        read_settings([str(word) for word in words], *checks)
    return str(error.value).split("\n")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--lr", "1e-4"], "--lr: here --learning_rate"),
        (["--lora_rank", "8"], "--lora_rank: here --lora_r"),
        (["--cutoff_len", "512"], "--cutoff_len: here --model_max_length"),
        (["--max_seq_length", "512"], "--max_seq_length: here --model_max_length"),
        (["--val_size", "0.1"], "--val_size: here --eval_share 0.05, with --eval_strategy epoch or steps"),
        (["--packing"], "--packing: not needed: sequences are packed where the model can"),
        (
            ["--template", "qwen"],
            "--template: not needed: the model's own chat template is used; another one by --chat_te",
        ),
        (["--flash_attn", "fa2"], "--flash_attn: not needed: the fastest exact attention of the machine is taken"),
        (["--load_in_4bit"], "--load_in_4bit: here --q_lora"),
        (["--finetuning_type", "lora"], "--finetuning_type: here --use_lora for lora, nothing for full"),
        (["--stage", "dpo"], "--stage: not needed for sft; pt is rows with"),
        (["--micro_batch_size", "1"], "--micro_batch_size: here --per_device_train_batch_size"),
        (["--num_epochs", "1"], "--num_epochs: here --num_train_epochs"),
        (["--neftune_alpha", "5"], "--neftune_alpha: not available yet"),
        (["--frobnicate", "5"], "--frobnicate: unknown setting; see --help"),
        (["--warmup"], "--warmup: here --warmup_steps"),
    ],
)
def test_names_of_other_tools_have_a_way_out_and_no_absurd_guess(words, line):
    (found,) = mistakes([*BASE, *words])
    assert found.startswith(line)


def test_every_way_out_is_a_setting():
    own = MEANINGS.keys() | {"warmup_ratio"}
    assert {*other_tools._RENAMED} <= own
    for text in [*other_tools._SAY.values(), *other_tools._NOT_HERE]:
        assert {*re.findall(r"--(\w+)", text)} <= own, text
    aliases = {alias for meaning in MEANINGS.values() for alias in meaning.aliases}
    others = [*other_tools._HERE, *other_tools._REASONS]
    assert not {*others} & (own | aliases | REFUSED.keys())
    assert len(others) == len({*others}), "each name has one explanation"


def test_nested_settings_and_targets(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model:\n  name: x\n  dtype: bf16\noutput_dir: o\ndata_path: d.json\nmodel_name_or_path: m\n")
    (line,) = mistakes([file])
    assert line == f"{file}:1: model: settings are not nested here; here model_name_or_path"
    file.write_text("training:\n  lr: 1\n  seed: 2\noutput_dir: o\ndata_path: d.json\nmodel_name_or_path: m\n")
    (line,) = mistakes([file])
    assert line == f"{file}:1: training: settings are not nested here; write lr: ..., seed: ... without it"
    for text, found in (
        ("all-linear", None), ("q_proj,v_proj", ["q_proj", "v_proj"]), ("[q_proj, v_proj]", ["q_proj", "v_proj"]),
        (r"'.*\.[qv]_proj'", r".*\.[qv]_proj"),
    ):  # fmt: skip
        file.write_text(
            f"output_dir: o\ndata_path: d\nmodel_name_or_path: m\nuse_lora: true\nlora_target_modules: {text}\n"
        )
        assert read_settings([str(file)]).lora.lora_target_modules == found


WRONG = {
    "--lr": (["--lr", "1"], "--lr: here --learning_rate"),
    "typo": (["--save_step", "1"], "--save_step: unknown setting; did you mean --save_steps?"),
    "bound": (["--lora_dropout", "2"], "--lora_dropout 2.0: must be at least 0 and below 1"),
    "kind": (["--seed", "x"], "--seed: invalid int value: 'x'"),
    "choice": (["--optim", "adam"], "--optim adam: must be adamw_torch"),
    "bool": (["--bf16", "maybe"], "--bf16 maybe: must be True or False"),
    "void": (["--bits", "4"], "--bits: has no effect without --q_lora"),
    "contradiction": (["--deepspeed", "a", "--fsdp", "full_shard"], "--deepspeed and --fsdp: choose one"),
    "refused": (["--push_to_hub"], "--push_to_hub: upload the finished directory"),
    "evaluation": (["--eval_strategy", "epoch"], "--eval_strategy: needs --eval_data_path, or --eval_share"),
    "stray": (["--dry_run", "True", "oops"], "oops: belongs to no setting"),
}


def test_all_mistakes_are_told_at_once_and_no_other():
    chance = random.Random(1)
    for _ in range(300):
        chosen = chance.sample(sorted(WRONG), chance.randint(1, len(WRONG)))
        found = mistakes([*BASE, "--use_lora", *(word for name in chosen for word in WRONG[name][0])])
        for name in chosen:
            assert sum(line.startswith(WRONG[name][1]) for line in found) == 1, (name, found)
        assert len(found) == len(chosen), found


def test_what_depends_on_a_mistake_is_not_judged():
    words = ["--model_name_or_path", "m", "--data_path", "d.json", "--ouput_dir", "o"]
    assert mistakes(words) == ["--ouput_dir: unknown setting; did you mean --output_dir?"]
    assert mistakes([*BASE, "--use_lora", "perhaps", "--lora_r", "8"]) == ["--use_lora perhaps: must be True or False"]
    assert mistakes([*BASE, "--use_peft", "--lora_r", "8"]) == ["--use_peft: here --use_lora"]


LLAMA_FACTORY = """
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
trust_remote_code: true
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
quantization_bit: 8
dataset: identity,alpaca_en_demo
dataset_dir: data
template: llama3
cutoff_len: 1024
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16
output_dir: saves/sft
logging_steps: 10
plot_loss: true
overwrite_output_dir: true
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
resume_from_checkpoint: null
deepspeed: examples/deepspeed/ds_z3_config.json
val_size: 0.1
eval_strategy: steps
eval_steps: 500
"""
AXOLOTL = """
base_model: NousResearch/Llama-3.2-1B
load_in_4bit: true
datasets:
  - path: rows/a.jsonl
    type: alpaca
val_set_size: 0.05
output_dir: ./outputs/out
adapter: qlora
sequence_len: 2048
sample_packing: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
micro_batch_size: 2
num_epochs: 4
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
tf32: false
flash_attention: true
special_tokens:
  pad_token: "<|end_of_text|>"
"""
TRL = """
model_name_or_path: Qwen/Qwen2.5-0.5B
dataset_name: trl-lib/Capybara
attn_implementation: flash_attention_2
packing: true
dataset_num_proc: 12
gradient_checkpointing_kwargs: {use_reentrant: false}
use_peft: true
lora_alpha: 8
num_train_epochs: 1
eval_strategy: epoch
output_dir: data/out
"""


@pytest.mark.parametrize(
    ("tool", "text", "expected"),
    [
        (
            "LLaMA-Factory's", LLAMA_FACTORY,
            dict(q_lora=True, bits=8, lora_r=8, lora_alpha=16, lora_dropout=0.0, model_max_length=1024, eval_share=0.1,
                 data_path=["data/identity.json", "data/alpaca_en_demo.json"], eval_steps=500, learning_rate=1e-4,
                 deepspeed="finetune/ds_config_zero3.json", warmup_ratio=0.1),
        ),
        (
            "axolotl's", AXOLOTL,
            dict(q_lora=True, bits=4, lora_r=32, data_path=["rows/a.jsonl"], per_device_train_batch_size=2,
                 num_train_epochs=4, optim="adamw_bnb_8bit", eval_share=0.05, eval_strategy="epoch", tf32=False),
        ),
        (
            "TRL's", TRL,
            dict(use_lora=True, lora_r=16, lora_alpha=8, learning_rate=2e-5, model_max_length=1024,
                 gradient_checkpointing=True, data_path=["hf:trl-lib/Capybara"]),
        ),
    ],
)  # fmt: skip
def test_files_of_other_tools_are_recognised_and_translated(tmp_path, capsys, tool, text, expected):
    import finetune

    file = tmp_path / "theirs.yaml"
    file.write_text(text)
    (line,) = mistakes([file])
    assert f"looks like {tool} (" in line and line.endswith(f"python finetune.py --translate {file} > OURS.yaml")
    assert finetune.main(["--translate", str(file)]) == 0
    ours = tmp_path / "ours.yaml"
    ours.write_text(capsys.readouterr().out)
    found = yaml.safe_load(ours.read_text())
    assert {name: found.get(name) for name in expected} == expected
    settings = read_settings([str(ours)])  # no mistake in it
    assert settings.given >= {name for name in expected if name != "warmup_ratio"}
    # Every key of theirs is a setting of ours, has a line, or says nothing.
    silent = {"do_train", "finetuning_type", "lora_target", "lora_target_linear", "adapter", "load_in_4bit", "bf16"}
    for name, value in yaml.safe_load(text).items():
        renamed = other_tools._HERE.get(name, name)
        told = f"# {name}: " in ours.read_text() or renamed in found
        assert told or value is None or name in {*silent, "stage", "quantization_bit", "val_size"}, name


def test_settings_from_python():
    settings = read_mapping(
        {"model_name_or_path": "m", "data_path": ["a b.json"], "output_dir": "o", "use_lora": True,
         "learning_rate": 1e-4, "lora_target_modules": ["q_proj"], "lr_scheduler_kwargs": {"power": 2},
         "lr_scheduler_type": "polynomial",
         "use_cpu": True, "system_message": "--x"}
    )  # fmt: skip
    assert settings.data.data_path == ["a b.json"] and settings.data.system_message == "--x"
    arguments = build_arguments(settings)
    assert arguments.run.lr_scheduler_kwargs == {"power": 2} and arguments.run.learning_rate == 1e-4
    with pytest.raises(SettingsError) as error:
        read_mapping({"lr": 1, "model_name_or_path": "m", "data_path": "d", "output_dir": "o", "seed": -1})
    lines = str(error.value).split("\n")
    assert lines == ["--lr: here --learning_rate", "--seed -1: must be at least 0 and below 4,294,967,296"]


def test_a_run_from_python_returns_its_record(checkpoints, tmp_path):
    import finetune

    settings = {
        "model_name_or_path": str(checkpoints["untied"]), "data_path": str(CONVERSATIONS), "report_to": "none",
        "output_dir": str(tmp_path / "out"), "use_lora": True, "max_steps": 2, "model_max_length": 160,
        "eval_share": 0.1, "eval_strategy": "epoch", "lora_target_modules": r".*\.[qv]_proj",
    }  # fmt: skip
    record = finetune.run(settings)
    assert record["status"] == "finished" and record["steps"] == 2 and record["eval_loss"] > 0
    (session,) = record["sessions"]
    assert session["first_step"] == 1 and session["began"] <= session["ended"] and record["wall_s"] == session["wall_s"]
    assert record["settings"]["lora"]["lora_target_modules"] == r".*\.[qv]_proj"
    assert finetune.run(settings | {"output_dir": str(tmp_path / "plan"), "dry_run": True})["trainable"] > 0
