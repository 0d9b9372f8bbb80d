"""Launchers: their commands parse, under sh and bash; the default run is a run."""

import shlex
import subprocess

import pytest

from tests.conftest import ROOT
from tuning.args import parse_arguments

LAUNCHERS = sorted((ROOT / "finetune").glob("finetune_*.sh"))


def dry_run(shell, launcher, *words, cwd=ROOT):
    return subprocess.run(
        [shell, launcher, *words],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={"DRY_RUN": "1", "PATH": "/usr/bin:/bin"},
    )


@pytest.mark.parametrize("shell", ["sh", "bash"])
@pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda p: p.stem)
def test_flags_parse_and_pass_through(shell, launcher, tmp_path):
    (tmp_path / "my data.json").write_text("[]")
    words = ["-m", "org/model", "--max_steps", "8", "-d", "my data.json", "-o", "out dir"]
    done = dry_run(shell, launcher, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    _, script, *words = shlex.split(done.stdout)
    assert script == str(ROOT / "finetune.py")
    arguments = parse_arguments(words)
    assert arguments.model.model_name_or_path == "org/model"
    assert arguments.data.data_path == [str(tmp_path / "my data.json")]
    assert arguments.run.output_dir == str(tmp_path / "out dir")
    assert arguments.run.max_steps == 8
    assert arguments.lora.use_lora == ("lora" in launcher.stem)
    assert arguments.run.learning_rate == (3e-4 if arguments.lora.use_lora else 1e-5)
    assert arguments.run.per_device_train_batch_size * arguments.run.gradient_accumulation_steps == 16


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda p: p.stem)
def test_defaults_help_and_mistakes(launcher):
    words = shlex.split(dry_run("sh", launcher).stdout)
    assert str(ROOT / "examples" / "conversations.json") in words
    assert str(ROOT / "examples" / "tiny-qwen3-base") in words
    assert dry_run("sh", launcher, "-h").stdout.startswith("usage:")
    for wrong in (["-x"], ["-m"], ["-d", ""], ["-m", "-d", "x"], ["-d", "a", "-d", "b"]):
        done = dry_run("sh", launcher, *wrong)
        assert done.returncode == 2 and done.stderr.startswith("error:") and done.stderr.count("\n") == 1
    quoted = shlex.split(dry_run("sh", launcher, "--system_message", 'it\'s $HOME "x"').stdout)
    assert quoted[-1] == 'it\'s $HOME "x"'
