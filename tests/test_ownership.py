"""What others made is never deleted, and good weights never either."""

import contextlib
import itertools
import json
import os
import random
import subprocess
import sys

import pytest

from tests.conftest import CONVERSATIONS, ROOT
from tests.test_cli import flags
from tuning.checkpoint.manifest import find_fault, write_manifest
from tuning.checkpoint.output_directory import prepare_output_directory, rotate_checkpoints
from tuning.checkpoint.ownership import (
    abandon_result,
    begin_result,
    delete_checkpoint,
    find_foreign,
    finish_interrupted,
    is_run,
    list_checkpoints,
    lock,
    new_result,
    publish_result,
)
from tuning.errors import SettingsError
from tuning.settings.arguments import parse_arguments

NAMES = [
    "model.safetensors", "adapter_model.safetensors", "model-00001-of-00002.safetensors", "config.json",
    "adapter_config.json", "generation_config.json", "tokenizer.json", "metrics.jsonl", "notes.txt", "data.json",
    ".notes.tmp", ".run.json.tmp", "prompts/a.txt", "checkpoint-5/model.safetensors", "checkpoint-5/trainer_state.json",
    "checkpoint-7/optimizer.pt", "checkpoint-x/a", "model.safetensors.index.json", "loss.png",
]  # fmt: skip
RUN = {"program": "finetune.py", "status": "finished"}


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def tree(directory):
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def write_result(directory, files):
    """A result of ours: files by name, each with its content."""
    unfinished = begin_result(directory)
    for name, content in files.items():
        write(unfinished / name, content)
    write_manifest(unfinished, onto="base")
    publish_result(directory)


@pytest.mark.parametrize("seed", range(300))
def test_a_run_deletes_nothing_that_others_made(tmp_path, seed):
    """Directories of our files and others' at random: the check refuses, or all of theirs is there afterwards."""
    chance = random.Random(seed)
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    out.mkdir()
    for name in ("model.safetensors", "manifest.json"):
        write(elsewhere / name, "theirs, elsewhere")
    plain = [name for name in NAMES if not name.endswith(".tmp") and "/" not in name]
    if chance.random() < 0.7:
        write_result(out, dict.fromkeys(chance.sample(plain, chance.randrange(6)), "ours"))
    steps = chance.sample([2, 5, 7, 9], chance.randrange(3))
    for step in steps:
        directory = out / f"checkpoint-{step}"
        if chance.random() < 0.5:
            write_result(directory, {"model.safetensors": "ours", "additional_chat_templates/a.jinja": "ours"})
        else:
            write(begin_result(directory) / "model.safetensors", "ours")
    write(out / "run.json", json.dumps(RUN if chance.random() < 0.8 else {"tool": "another"}))
    for name in chance.sample([*NAMES, *(f"checkpoint-{step}/{name}" for step in steps for name in plain)], 6):
        if not (out / name).exists() and name not in ("metrics.jsonl", "loss.png"):
            write(out / name, "theirs")
    for name in ("checkpoint-3", "checkpoint-11"):
        if chance.random() < 0.3:
            (out / name).symlink_to(elsewhere, target_is_directory=True)
    theirs = [path for path, content in tree(out).items() if content == b"theirs" and path.name != ".run.json.tmp"]
    if is_run(out) and find_foreign(out) is None:
        prepare_output_directory(out, None)
        assert not any(content == b"ours" for content in tree(out).values())
    for path in list_checkpoints(out):
        delete_checkpoint(path)
    rotate_checkpoints(out / "checkpoint-100", 1, keep=None)
    assert all((out / path).read_bytes() == b"theirs" for path in theirs)
    for step in steps:
        write_result(out / f"checkpoint-{step}", dict.fromkeys(plain, "ours"))
    kept = sum(content == b"theirs" and path.name != ".run.json.tmp" for path, content in tree(out).items())
    assert kept == len(theirs), "beside a new result, under another name"
    assert {path.name for path in elsewhere.iterdir()} == {"model.safetensors", "manifest.json"}


@contextlib.contextmanager
def killed_at(change, monkeypatch):
    """End what is inside at a call of the system's that moves or deletes, counted from 0."""
    calls = itertools.count()

    def count(function):
        def call(*args, **kwargs):
            if next(calls) == change:
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        for name in ("replace", "rename", "unlink", "rmdir"):
            patch.setattr(os, name, count(getattr(os, name)))
        yield


@pytest.mark.parametrize("change", range(40))
def test_a_kill_at_any_change_leaves_the_old_result_or_the_new_one_to_be_finished(tmp_path, monkeypatch, change):
    old = {"config.json": "old", "model-1.safetensors": "old", "model-2.safetensors": "old", "tokenizer.json": "old"}
    new = {"config.json": "new", "model.safetensors": "new", "tokenizer.json": "new", "templates/a.jinja": "new"}
    theirs = {"notes.txt": "theirs", "model.safetensors": "theirs", "model-3.safetensors": "theirs"}
    write_result(tmp_path, old)
    for name, content in theirs.items():
        write(tmp_path / name, content)
    unfinished = begin_result(tmp_path)
    for name, content in new.items():
        write(unfinished / name, content)
    write_manifest(unfinished, onto="base")
    with killed_at(change, monkeypatch):
        publish_result(tmp_path)
    there = {str(path): content.decode() for path, content in tree(tmp_path).items()}
    assert sorted(there.values()).count("theirs") == 3
    if "config.json" in there:  # something loads
        whole = old if there["config.json"] == "old" else new
        assert there.items() >= whole.items()
        assert "model-1.safetensors" not in there or whole is old
    assert (find_fault(tmp_path) is None) == ("manifest.json" in there)
    finish_interrupted(tmp_path)
    there = {str(path): content.decode() for path, content in tree(tmp_path).items()}
    assert find_fault(tmp_path) is None and there.items() >= new.items()
    assert sorted(there.values()).count("theirs") == 3 and "old" not in there.values()
    assert not [name for name in there if name.startswith(".w")], there


@pytest.mark.parametrize("change", range(12))
def test_a_kill_at_any_change_leaves_a_deletion_that_goes_on(tmp_path, monkeypatch, change):
    directory = tmp_path / "checkpoint-4"
    write_result(directory, {"config.json": "ours", "model.safetensors": "ours", "a/b.jinja": "ours"})
    write(directory / "notes.txt", "theirs")
    with killed_at(change, monkeypatch):
        delete_checkpoint(directory)
    assert find_foreign(tmp_path) is None
    delete_checkpoint(directory)
    assert {path.name for path in directory.iterdir()} == {"notes.txt"}


@pytest.mark.parametrize("more", [["--resume_from_checkpoint", "auto"], ["--overwrite_output_dir"]])
def test_another_programs_run_is_left_alone(run_script, checkpoints, tmp_path, more):
    out = tmp_path / "out"
    for name in ("model.safetensors", "config.json", "checkpoint-500/model.safetensors"):
        write(out / name, "theirs")
    for record in ({"tool": "another"}, RUN):  # or a run of ours into which others' files were put
        write(out / "run.json", json.dumps(record))
        before = tree(out)
        code, _, stderr = run_script("finetune.py", *flags(checkpoints["untied"], CONVERSATIONS, out, *more))
        assert code == 2 and len(stderr.splitlines()) == 1 and "another" in stderr, stderr
        assert tree(out) == before


def test_inputs_inside_the_output_directory_are_named(run_script, checkpoints, tmp_path):
    data = tmp_path / "out" / "data.json"
    write(data, CONVERSATIONS.read_text())
    code, _, stderr = run_script("finetune.py", *flags(checkpoints["untied"], f"{data}#5", tmp_path / "out"))
    assert code == 2 and "data.json is an input of this run" in stderr and data.exists()


def test_an_edited_small_file_costs_no_checkpoint(forks, checkpoints, tmp_path):
    out = tmp_path / "out"
    words = flags(checkpoints["untied"], CONVERSATIONS, out, "--save_steps", 2, "--resume_from_checkpoint", "auto")
    assert forks.run(*words, at=3, do="SIGKILL", only="step")[0] == 137
    edited = out / "checkpoint-2" / "generation_config.json"
    content = edited.read_bytes()
    edited.write_text("{}")
    before = tree(out)
    code, _, stderr = forks.run(*words)
    assert code == 2 and "generation_config.json" in stderr and "put back what changed" in stderr, stderr
    assert tree(out) == before
    edited.write_bytes(content)
    code, stdout, _ = forks.run(*words)
    assert code == 0 and "resuming from" in stdout


def test_an_output_directory_behind_a_link_is_one_place(tmp_path, monkeypatch):
    (tmp_path / "far" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "inner")
    monkeypatch.chdir(tmp_path)
    words = ["--model_name_or_path", "m", "--data_path", "d", "--use_cpu", "--output_dir"]
    assert parse_arguments([*words, "link/../o"]).run.output_dir == str(tmp_path / "far" / "o")
    assert parse_arguments([*words, "o/./p/"]).run.output_dir == "o/p"


@pytest.mark.parametrize("place", ["absent", "empty", "link", "dot", "earlier"])
@pytest.mark.parametrize("fails", [False, True])
def test_a_new_result_takes_the_place_of_the_old_one_when_it_is_whole(tmp_path, monkeypatch, place, fails):
    out = real = tmp_path / "out"
    if place != "absent":
        out.mkdir()
    if place == "link":
        out = tmp_path / "link"
        out.symlink_to(real)
    if place == "dot":
        monkeypatch.chdir(out)
        out = type(out)(".")
    if place == "earlier":
        write_result(out, {"model-00001-of-00002.safetensors": "old"})
        write(out / "notes.txt", "theirs")
    before = tree(real)
    try:
        with new_result(out) as unfinished:
            write(unfinished / "model.safetensors", "new")
            write(unfinished / "additional_chat_templates" / "a.jinja", "new")
            assert tree(real).items() >= before.items(), "the old one is there until the new one is whole"
            assert not (out / "model.safetensors").exists()
            if fails:
                raise RuntimeError
            write_manifest(unfinished, onto="base")
    except RuntimeError:
        assert tree(real) == before and real.exists() == (place != "absent")
        return
    names = {str(path) for path in tree(real)}
    assert names >= {"model.safetensors", "manifest.json", "additional_chat_templates/a.jinja"}
    assert "model-00001-of-00002.safetensors" not in names and ("notes.txt" in names) == (place == "earlier")


def test_what_a_killed_write_left_is_no_model_and_no_obstacle(tmp_path):
    out = tmp_path / "out"
    write(begin_result(out) / "config.json", "half")
    with new_result(out) as unfinished:
        assert not (unfinished / "config.json").exists()
        write(unfinished / "model.safetensors", "new")
        write_manifest(unfinished, onto="base")
    assert not (out / ".unfinished.tmp").exists()


def test_two_processes_do_not_write_into_one_directory(tmp_path):
    program = "import sys, pathlib; from tuning.checkpoint.ownership import lock; lock(pathlib.Path(sys.argv[1]))"
    holding = subprocess.Popen(
        [sys.executable, "-c", f"{program}; print('held', flush=True); input()", str(tmp_path)],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holding.stdout.readline() == "held\n"
    with pytest.raises(SettingsError, match="another process is writing there"):
        lock(tmp_path)
    holding.communicate("\n")
    lock(tmp_path)
    lock(tmp_path / "." if os.sep == "/" else tmp_path)


def leave_interrupted(directory, change, monkeypatch):
    """A whole result whose move was killed at a change. Returns: what others put there."""
    theirs = {"notes.txt": "theirs", "prompts/a.txt": "theirs"}
    for name, content in theirs.items():
        write(directory / name, content)
    unfinished = begin_result(directory)
    for name in ("adapter_config.json", "adapter_model.safetensors", "generation_config.json", "templates/a.jinja"):
        write(unfinished / name, "ours")
    write_manifest(unfinished, step=4)
    with killed_at(change, monkeypatch):
        publish_result(directory)
    return theirs


def contents(directory):
    return {str(path): content.decode() for path, content in tree(directory).items() if path.name != "run.json"}


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("change", range(14))
def test_a_run_whose_result_was_being_moved_can_go_on_and_be_overwritten(tmp_path, monkeypatch, change, earlier):
    """And so can a checkpoint, which is also deleted whole, be it in rotation or with its run."""
    for step in ("overwrite", "write again", "rotate"):
        out = tmp_path / step
        place = out / "checkpoint-4" if step == "rotate" else out
        if earlier:
            write_result(place, {"adapter_model.safetensors": "earlier", "tokenizer.json": "earlier"})
        theirs = leave_interrupted(place, change, monkeypatch)
        write(out / "run.json", json.dumps(RUN))
        assert find_foreign(out) is None
        if step == "overwrite":
            prepare_output_directory(out, None)
            assert contents(out) == theirs
        elif step == "rotate":
            delete_checkpoint(place)
            assert contents(place) == theirs
        else:
            write_result(out, {"model.safetensors": "new", "config.json": "new"})
            assert find_fault(out) is None
            kept = {name: text for name, text in contents(out).items() if name != "manifest.json"}
            assert kept == {**theirs, "model.safetensors": "new", "config.json": "new"}


def test_nothing_is_moved_where_there_is_no_whole_result(tmp_path):
    write_result(tmp_path, {"config.json": "ours", "model.safetensors": "ours"})
    before = tree(tmp_path)
    with pytest.raises(SettingsError, match="holds no whole result; did another command write there"):
        publish_result(tmp_path)
    write(begin_result(tmp_path) / "config.json", "half")
    with pytest.raises(SettingsError, match="holds no whole result"):
        publish_result(tmp_path)
    abandon_result(tmp_path)
    assert tree(tmp_path) == before, "and what cannot be written costs nothing that was there"


def test_a_result_that_cannot_be_written_leaves_nothing_new(tmp_path):
    write(begin_result(tmp_path / "checkpoint-8") / "model.safetensors", "half")
    abandon_result(tmp_path / "checkpoint-8")
    assert not (tmp_path / "checkpoint-8").exists()


def test_a_failed_save_leaves_an_earlier_checkpoint_of_its_step(forks, checkpoints, tmp_path):
    """As it was: its weights may be all that is left of a longer run."""
    out = tmp_path / "out"
    words = flags(checkpoints["untied"], CONVERSATIONS, out, "--use_lora", "--save_steps", 2)
    words[words.index("--max_steps") + 1] = 6
    assert forks.run(*words, at=5, do="SIGKILL", only="step")[0] == 137
    edited = out / "checkpoint-4" / "generation_config.json"
    edited.write_text("{}")
    before = tree(out / "checkpoint-4")
    resumed = [*words, "--resume_from_checkpoint", out / "checkpoint-2"]
    code, _, stderr = forks.run(*resumed, at=2, do="full", bytes=2000, only="step")
    assert code == 1 and "could not be written" in stderr, stderr
    assert tree(out / "checkpoint-4") == before and find_fault(out / "checkpoint-2") is None


def test_a_manifest_of_others_is_kept_and_counts_for_nothing(tmp_path):
    write(tmp_path / "manifest.json", '{"name": "their app"}')
    write(tmp_path / "run.json", json.dumps(RUN))
    write_result(tmp_path, {"model.safetensors": "ours"})
    assert (tmp_path / "manifest.json.kept").read_text() == '{"name": "their app"}'
    write(tmp_path / "manifest.json", '{"name": "their app"}')
    prepare_output_directory(tmp_path, None)
    assert (tmp_path / "manifest.json").read_text() == '{"name": "their app"}'
    for step in (2, 4):
        write_result(tmp_path / f"checkpoint-{step}", {"model.safetensors": "ours"})
    write(tmp_path / "checkpoint-3" / "manifest.json", "{}")
    rotate_checkpoints(tmp_path / "checkpoint-4", 2, keep=None)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]


def test_what_another_process_moves_is_not_moved_twice(tmp_path, monkeypatch):
    leave_interrupted(tmp_path, 2, monkeypatch)
    program = "import sys, pathlib; from tuning.checkpoint.ownership import lock; lock(pathlib.Path(sys.argv[1]))"
    holding = subprocess.Popen(
        [sys.executable, "-c", f"{program}; print('held', flush=True); input()", str(tmp_path)],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holding.stdout.readline() == "held\n"
    before = tree(tmp_path)
    with pytest.raises(SettingsError, match="another process is writing there"):
        finish_interrupted(tmp_path)
    assert tree(tmp_path) == before
    holding.communicate("\n")
    finish_interrupted(tmp_path)
    assert find_fault(tmp_path) is None


def test_a_place_is_looked_at_again_once_it_is_held(tmp_path):
    def check():
        raise SettingsError("exists and is not empty")

    write_result(tmp_path / "out", {"config.json": "another command's", "model.safetensors": "another command's"})
    before = tree(tmp_path)
    with pytest.raises(SettingsError, match="not empty"), new_result(tmp_path / "out", check=check):
        raise AssertionError("nothing is written")
    assert tree(tmp_path) == before
