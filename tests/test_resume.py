"""Where a run starts: decisions, refusals, and what may have changed since the checkpoint."""

import json
import shutil

import pytest

from tests.conftest import CONVERSATIONS, tear
from tests.test_chaos import assert_same_run, read_metrics, words
from tuning.checkpoint.manifest import find_fault, read_manifest, write_manifest
from tuning.checkpoint.output_directory import rotate_checkpoints
from tuning.checkpoint.ownership import UNFINISHED, begin_result, list_checkpoints, publish_result
from tuning.checkpoint.resume import find_starting_point
from tuning.checkpoint.run_record import RunFacts
from tuning.errors import SettingsError
from tuning.settings.arguments import describe_trajectory_settings, parse_arguments


@pytest.fixture(scope="module")
def finished(forks, checkpoints, tmp_path_factory):
    """A finished run of 6 steps with checkpoints 4 and 6."""
    out = tmp_path_factory.mktemp("finished") / "out"
    code, stdout, _ = forks.run(*words(checkpoints["untied"], out, "lora", steps=6))
    assert code == 0 and f"no complete checkpoint in {out}: starting from the beginning" in stdout
    return out


@pytest.fixture
def torn(finished, tmp_path):
    """The same run as a kill in its last save left it."""
    out = tmp_path / "torn"
    shutil.copytree(finished, out)
    tear(out)
    tear(out / "checkpoint-6")
    return out


@pytest.fixture
def run(forks, checkpoints):
    def run(out, *more, **changes):
        command = words(checkpoints["untied"], out, "lora", steps=6)
        for flag, value in changes.items():
            if value is None:
                drop_option(command, f"--{flag}")
            else:
                command[command.index(f"--{flag}") + 1] = value
        code, stdout, stderr = forks.run(*command, *more)
        return code, stdout, stderr.splitlines()

    return run


def drop_option(command, flag):
    at = command.index(flag)
    del command[at : at + 2]


def tree(out):
    return {path.relative_to(out): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


# ---- what is complete ----


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-2])


DAMAGES = {
    "flipped weights": (flip, "adapter_model.safetensors", "adapter_model.safetensors is not the file that was saved"),
    "flipped optimizer": (flip, "training_state.safetensors", "training_state.safetensors is not the file that was"),
    "cut optimizer": (cut, "training_state.safetensors", "instead of the"),
    "cut metrics": (cut, "metrics.jsonl", "instead of the"),
    "missing": (lambda path: path.unlink(), "trainer_state.json", "trainer_state.json is missing"),
    "flipped manifest": (flip, "manifest.json", "manifest.json is damaged"),
    "cut manifest": (cut, "manifest.json", "manifest.json is damaged"),
    "empty manifest": (lambda path: path.write_text(""), "manifest.json", "manifest.json is damaged"),
    "no manifest": (lambda path: path.unlink(), "manifest.json", "has no manifest.json, so the run did not finish"),
}


@pytest.mark.parametrize(("damage", "name", "reason"), DAMAGES.values(), ids=DAMAGES)
def test_every_damage_is_found(finished, tmp_path, damage, name, reason):
    checkpoint = tmp_path / "checkpoint-6"
    shutil.copytree(finished / "checkpoint-6", checkpoint)
    assert find_fault(checkpoint) is None
    damage(checkpoint / name)
    assert reason in find_fault(checkpoint)


def test_every_bit_of_a_manifest_counts(tmp_path):
    (tmp_path / "data").write_text("x")
    write_manifest(tmp_path, step=3)
    content = (tmp_path / "manifest.json").read_bytes()
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1
        (tmp_path / "manifest.json").write_bytes(damaged)
        try:
            same = read_manifest(tmp_path)
        except ValueError:
            continue
        assert same["step"] == 3 and same["files"]["data"]["bytes"] == 1, "only white space may change"


@pytest.mark.parametrize("name", ["flipped optimizer", "cut optimizer", "no manifest"])
def test_auto_passes_over_what_is_damaged_and_ends_the_same(run, finished, torn, name):
    shutil.copytree(finished / "checkpoint-6", torn / "checkpoint-6", dirs_exist_ok=True)
    damage, file, reason = DAMAGES[name]
    damage(torn / "checkpoint-6" / file)
    code, stdout, stderr = run(torn)
    assert code == 0 and stderr == []
    (skipped,) = [line for line in stdout.splitlines() if line.startswith("skipped")]
    assert skipped.startswith(f"skipped {torn}/checkpoint-6: ") and reason in skipped
    assert f"resuming from {torn}/checkpoint-4; 8 conversations a step, as there" in stdout
    assert_same_run(finished, torn, 6)
    entry = json.loads((torn / "run.json").read_text())
    assert entry["status"] == "finished" and entry["resumed_from"].endswith("checkpoint-4") and entry["steps"] == 6
    calm = json.loads((finished / "run.json").read_text())
    same = ["loss", "eval_loss", "tokens_trained", "supervised_tokens_trained", "rows_per_step"]
    assert {key: entry[key] for key in same} == {key: calm[key] for key in same}


def test_a_complete_last_checkpoint_leaves_only_the_result_to_write(run, finished, torn):
    shutil.copytree(finished / "checkpoint-6", torn / "checkpoint-6", dirs_exist_ok=True)
    code, stdout, _ = run(torn)
    assert code == 0 and "resuming from" in stdout and "step 6/6" not in stdout
    assert_same_run(finished, torn, 6)
    assert find_fault(torn) is None


# ---- what is the same run ----


def test_a_finished_run_says_so_and_changes_nothing(run, finished):
    before = tree(finished)
    code, stdout, stderr = run(finished)
    assert code == 0 and stderr == []
    assert stdout.splitlines()[-1] == f"{finished}: this run is finished (6 steps); there is nothing to do"
    assert tree(finished) == before


CHANGES = {
    "seed": ({}, ["--seed", 7], "seed 42 -> 7"),
    "learning rate": ({"learning_rate": 1e-4}, [], "learning_rate 0.003 -> 0.0001"),
    "steps": ({"max_steps": 9}, [], "max_steps 6 -> 9"),
    "rank": ({"lora_r": 8}, [], "lora_r 4 -> 8"),
    "length": ({"model_max_length": 100}, [], "model_max_length 160 -> 100"),
    "optimizer": ({}, ["--weight_decay", 0.1], "weight_decay 0.0 -> 0.1"),
}


def start_of(checkpoint, out, *more, **changes):
    """The starting point of a command in an output directory, as finetune.py finds it; its data is that of the run."""
    command = words(checkpoint, out, "lora", steps=6)
    for flag, value in changes.items():
        command[command.index(f"--{flag}") + 1] = value
    arguments = parse_arguments([str(word) for word in [*command, *more]])
    saved = read_manifest(next(path for path in (out, *list_checkpoints(out)) if (path / "manifest.json").exists()))
    settings = json.loads(json.dumps(describe_trajectory_settings(arguments)))
    assert saved["trajectory"].keys() - settings.keys() == {"base model", "data", "tokenised rows", "quantization"}
    facts = RunFacts(saved["trajectory"] | settings, saved["layout"], "", saved["versions"], saved["quantization"])
    return find_starting_point(arguments.run, facts)


@pytest.mark.parametrize(("changes", "more", "message"), CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("state", ["finished", "torn"])
def test_changed_settings_are_refused_with_the_difference(checkpoints, request, changes, more, message, state):
    out = request.getfixturevalue(state)
    before = tree(out)
    with pytest.raises(SettingsError) as error:
        start_of(checkpoints["untied"], out, *more, **changes)
    line = str(error.value)
    assert "belongs to another run; " in line and message in line and "--force_resume True" in line
    assert "\n" not in line and tree(out) == before


def test_where_a_run_starts(checkpoints, finished, torn, tmp_path):
    base = checkpoints["untied"]
    assert start_of(base, finished).finished
    resumed = start_of(base, torn)
    assert (resumed.finished, resumed.checkpoint, resumed.rows_per_step) == (False, torn / "checkpoint-4", 8)
    forced = start_of(base, torn, "--force_resume", "True", learning_rate=1e-4)
    assert forced.checkpoint == torn / "checkpoint-4"
    assert "  changed since the checkpoint: learning_rate 0.003 -> 0.0001" in forced.notes
    finished_copy = shutil.copytree(finished, tmp_path / "copy")
    (finished_copy / "adapter_model.safetensors").unlink()
    last = start_of(base, finished_copy)
    assert last.checkpoint == finished_copy / "checkpoint-6" and "skipped the result in" in last.notes[0]


def test_a_refused_run_changes_nothing(run, torn):
    before = tree(torn)
    code, _, stderr = run(torn, learning_rate=1e-4)
    assert code == 2 and len(stderr) == 1 and "learning_rate 0.003 -> 0.0001" in stderr[0]
    assert tree(torn) == before


def test_changed_data_and_another_base_are_refused(run, checkpoints, torn, tmp_path):
    rows = json.loads(CONVERSATIONS.read_text())
    (tmp_path / "conversations.json").write_text(json.dumps(rows[:-1]))
    code, _, stderr = run(torn, data_path=tmp_path / "conversations.json")
    assert code == 2 and 'data {"conversations.json": ' in stderr[0] and "tokenised rows" in stderr[0]
    code, _, stderr = run(torn, model_name_or_path=checkpoints["other"])
    assert code == 2 and "base model " in stderr[0] and "seed" not in stderr[0]
    shutil.copytree(checkpoints["untied"], tmp_path / "moved")
    shutil.copy(CONVERSATIONS, tmp_path / "moved.json")
    code, _, stderr = run(torn, model_name_or_path=tmp_path / "moved", data_path=tmp_path / "moved.json")
    assert code == 2 and "moved.json" in stderr[0] and "base model" not in stderr[0]


def test_force_resume_goes_on_with_what_is_here(run, torn):
    code, stdout, _ = run(torn, "--force_resume", "True", "--lr_scheduler_type", "constant", learning_rate=1e-4)
    assert code == 0 and "changed since the checkpoint: learning_rate 0.003 -> 0.0001" in stdout
    rates = [m["learning_rate"] for m in read_metrics(torn) if "loss" in m]
    assert rates[-1] == 1e-4 and rates[0] == 3e-3, "the settings' rate, not the checkpoint's"
    code, _, stderr = run(torn, "--force_resume", "True", lora_r=8, max_steps=9)
    assert code == 2 and "this run has float32 [8, 64]" in stderr[0]


def test_force_resume_trains_a_finished_run_on(run, finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    code, stdout, _ = run(out, "--force_resume", "True", max_steps=8)
    assert code == 0 and "resuming from" in stdout and "changed since the checkpoint: max_steps 6 -> 8" in stdout
    assert [m["step"] for m in read_metrics(out) if "loss" in m] == [1, 3, 6, 8]
    for checkpoint in list_checkpoints(out):
        shutil.rmtree(checkpoint)
    before = tree(out)
    code, _, stderr = run(out, "--force_resume", "True", max_steps=10)
    assert code == 2 and "belongs to another run; changed since then: max_steps 8 -> 10" in stderr[0], (
        "nothing to go on from"
    )
    assert tree(out) == before


def test_what_does_not_change_the_weights_may_change(run, finished, torn):
    more = ["--dataloader_num_workers", 1, "--save_steps", 1, "--save_total_limit", 1, "--logging_steps", 1]
    code, _stdout, stderr = run(torn, *more)
    assert code == 0 and stderr == []
    assert [m["step"] for m in read_metrics(torn) if "loss" in m] == [1, 3, 5, 6], "the new --logging_steps holds"
    assert [path.name for path in list_checkpoints(torn)] == ["checkpoint-6"]
    name = "adapter_model.safetensors"
    assert (torn / name).read_bytes() == (finished / name).read_bytes()


def test_the_checkpoints_rows_per_step_win(run, finished, torn):
    code, stdout, _ = run(torn, per_device_train_batch_size=3, gradient_accumulation_steps=1)
    assert code == 0 and "8 conversations a step, as there" in stdout and "batch 4 -> 3" in stdout
    entries = [(m["step"], m["supervised_tokens"]) for m in read_metrics(torn) if "loss" in m]
    assert entries == [(m["step"], m["supervised_tokens"]) for m in read_metrics(finished) if "loss" in m]
    assert json.loads((torn / "run.json").read_text())["rows_per_step"] == 8


# ---- a checkpoint by its name ----


def test_a_named_checkpoint(run, finished, torn, tmp_path):
    code, stdout, _ = run(tmp_path / "new", resume_from_checkpoint=finished / "checkpoint-4")
    assert code == 0 and "resuming from" in stdout
    assert_same_run(finished, tmp_path / "new", 6)
    for name, message in (
        ("checkpoint-9", "no such directory"),
        ("checkpoint-6", "has no manifest.json"),
        ("", "is a run, not a checkpoint; name"),
    ):
        code, _, stderr = run(torn, resume_from_checkpoint=torn / name)
        assert code == 2 and len(stderr) == 1 and message in stderr[0]
    shutil.copytree(finished / "checkpoint-6", torn / "checkpoint-6", dirs_exist_ok=True)
    code, _, stderr = run(torn, resume_from_checkpoint=torn / "checkpoint-4")
    assert code == 2 and "holds later checkpoints (checkpoint-6)" in stderr[0]
    code, _, stderr = run(torn, resume_from_checkpoint=finished / "checkpoint-4")
    assert code == 2 and "holds another run" in stderr[0]


def test_checkpoints_without_a_training_state(run, tmp_path):
    out = tmp_path / "out"
    code, *_ = run(out, "--save_only_model", "True")
    assert code == 0 and not list(out.glob("checkpoint-*/training_state*"))
    tear(out)
    code, _, stderr = run(out)
    assert (
        code == 2
        and "holds results, but no checkpoint to resume from" in stderr[0]
        and "(--save_only_model)" in stderr[0]
    )


# ---- the best ----


def test_the_best_evaluation_is_the_result_and_is_kept(forks, checkpoints, tmp_path):
    # A learning rate that soon does harm.
    def command(out):
        base = words(checkpoints["untied"], out, "full", steps=6, save_steps=1)
        base[base.index("--eval_strategy") + 1] = "steps"
        base[base.index("--learning_rate") + 1] = 0.05
        return [*base, "--eval_steps", 1, "--load_best_model_at_end", "True", "--save_total_limit", 1]

    calm, killed = tmp_path / "calm", tmp_path / "killed"
    assert forks.run(*command(calm))[0] == 0
    losses = {m["step"]: m["eval_loss"] for m in read_metrics(calm) if "eval_loss" in m}
    best = min(losses, key=losses.get)
    assert best < 5, losses
    entry = json.loads((calm / "run.json").read_text())
    assert entry["best"] == {"step": best, "eval_loss": losses[best]}
    assert [path.name for path in list_checkpoints(calm)] == [f"checkpoint-{best}", "checkpoint-6"]
    name = "model.safetensors"
    assert (calm / name).read_bytes() == (calm / f"checkpoint-{best}" / name).read_bytes()

    assert forks.run(*command(killed), at=best + 1, do="SIGTERM", only="step")[0] == 143
    assert forks.run(*command(killed))[0] == 0
    assert_same_run(calm, killed, 6)

    tear(killed)
    shutil.rmtree(killed / f"checkpoint-{best}")
    code, _, stderr = forks.run(*command(killed))
    assert code == 2 and f"checkpoint-{best}, the best so far: has no manifest.json" in stderr


def test_an_evaluation_before_the_first_step_is_never_the_best(forks, checkpoints, tmp_path):
    command = words(checkpoints["untied"], tmp_path / "out", "full", steps=4)
    command[command.index("--eval_strategy") + 1] = "steps"
    command[command.index("--learning_rate") + 1] = 5
    command += ["--eval_steps", 2, "--eval_on_start", "True", "--load_best_model_at_end", "True"]
    assert forks.run(*command, at=3, do="SIGKILL", only="step")[0] == 137
    code, _, stderr = forks.run(*command)
    assert code == 0, stderr
    losses = {m["step"]: m["eval_loss"] for m in read_metrics(tmp_path / "out") if "eval_loss" in m}
    assert set(losses) == {0, 2, 4} and min(losses, key=losses.get) == 0
    assert json.loads((tmp_path / "out" / "run.json").read_text())["best"]["step"] in (2, 4)


def test_the_best_may_lie_where_the_run_came_from_and_must_be_whole(forks, checkpoints, tmp_path):
    def command(out, start="auto"):
        base = words(checkpoints["untied"], out, "full", steps=6, save_steps=1)
        base[base.index("--eval_strategy") + 1] = "steps"
        base[base.index("--learning_rate") + 1] = 0.05
        base[base.index("--resume_from_checkpoint") + 1] = start
        return [*base, "--eval_steps", 1, "--load_best_model_at_end", "True", "--save_total_limit", 9]

    first, second = tmp_path / "first", tmp_path / "second"
    assert forks.run(*command(first))[0] == 0
    best = json.loads((first / "run.json").read_text())["best"]["step"]
    assert best < 5
    start = first / f"checkpoint-{best}"
    assert forks.run(*command(second, start), at=1, do="SIGKILL", only="step")[0] == 137
    assert forks.run(*command(second, start), at=1, do="SIGTERM", only="step")[0] == 143, "nothing of value was there"
    assert forks.run(*command(second))[0] == 0
    assert_same_run(first, second, 6)
    tear(second)
    flip(first / f"checkpoint-{best}" / "training_state.safetensors")
    code, _, stderr = forks.run(*command(second))
    assert code == 2 and "the best so far: training_state.safetensors is not the file that was saved" in stderr
    assert not (second / "manifest.json").exists()


# ---- what crashes and users leave behind ----


def test_a_refused_resume_touches_nothing(run, finished):
    before = tree(finished)
    code, _, stderr = run(finished, "--force_resume", "True", lora_r=8)
    assert code == 2 and "this run has float32 [8, 64]" in stderr[0]
    assert tree(finished) == before
    for optim, kind in (("adafactor", "Adafactor"), ("sgd", "SGD")):
        code, _, stderr = run(finished, "--force_resume", "True", "--optim", optim)
        assert code == 2 and len(stderr) == 1 and f"holds the state of AdamW, and this run has {kind}" in stderr[0]
    assert tree(finished) == before


def test_a_damaged_later_checkpoint_costs_no_good_one(forks, checkpoints, finished, torn):
    shutil.copytree(finished / "checkpoint-6", torn / "checkpoint-6", dirs_exist_ok=True)
    flip(torn / "checkpoint-6" / "training_state.json")
    command = words(checkpoints["untied"], torn, "lora", steps=6)
    command[command.index("--save_total_limit") + 1] = 1
    assert forks.run(*command, at=1, do="SIGTERM", only="step")[0] == 143
    code, stdout, _ = forks.run(*command)
    assert code == 0 and f"resuming from {torn}/checkpoint-5" in stdout
    name = "adapter_model.safetensors"
    assert (torn / name).read_bytes() == (finished / name).read_bytes()


def test_a_crash_while_an_earlier_run_is_cleared_away_can_be_gone_on_from(forks, checkpoints, torn, finished):
    (torn / "checkpoint-4" / "manifest.json").rename(torn / "checkpoint-4" / ".withdrawn.tmp")
    (torn / "checkpoint-4" / "adapter_config.json").unlink()
    (torn / "checkpoint-5").write_text("a file of the user")
    code, *_ = forks.run(*words(checkpoints["untied"], torn, "lora", steps=6), at=1, do="SIGKILL")
    assert code == 137 and (torn / "run.json").exists()
    code, _, stderr = forks.run(*words(checkpoints["untied"], torn, "lora", steps=6))
    assert code == 0, stderr
    assert_same_run(finished, torn, 6)


def test_a_result_is_not_deleted_for_a_file_beside_it(run, tmp_path):
    out = tmp_path / "out"

    def run_without_checkpoints():
        return run(out, "--save_strategy", "no", save_steps=None, save_total_limit=None)

    assert run_without_checkpoints()[0] == 0
    (out / "generation_config.json").write_text((out / "generation_config.json").read_text() + " ")
    code, stdout, _ = run_without_checkpoints()
    assert code == 0 and "this run is finished" in stdout
    flip(out / "adapter_model.safetensors")
    before = tree(out)
    code, _, stderr = run_without_checkpoints()
    assert code == 2 and "holds results, but no checkpoint to resume from" in stderr[0]
    assert "adapter_model.safetensors is not the file that was saved" in stderr[0] and tree(out) == before


def test_what_a_torn_checkpoint_left_is_not_made_part_of_the_next_one(run, torn):
    (torn / "checkpoint-6" / UNFINISHED / "stale.safetensors").write_text("old")
    (torn / "checkpoint-6" / "stale.safetensors").write_text("another's")
    assert run(torn)[0] == 0
    assert not (torn / "checkpoint-6" / UNFINISHED).exists()
    assert (torn / "checkpoint-6" / "stale.safetensors").read_text() == "another's"
    assert "stale.safetensors" not in read_manifest(torn / "checkpoint-6")["files"]


@pytest.mark.parametrize("changes", [{"eval_strategy": "steps"}, {"save_strategy": "best"}])
def test_an_epochs_log_line_is_neither_lost_nor_doubled(forks, checkpoints, tmp_path, changes):
    def command(out):
        base = words(checkpoints["untied"], out, "lora", steps=14)
        base[base.index("--eval_strategy") + 1] = "steps"
        drop_option(base, "--logging_steps")
        if "save_strategy" in changes:
            drop_option(base, "--save_steps")
        best = ["--save_strategy", "best"] if "save_strategy" in changes else []
        return [*base, "--eval_steps", 7, "--logging_strategy", "epoch", *best]

    calm, hurt = tmp_path / "calm", tmp_path / "hurt"
    assert forks.run(*command(calm))[0] == 0
    plan = {"at": 9, "do": "SIGKILL", "only": "step"} if "save_strategy" in changes else {}
    code, *_ = forks.run(*command(hurt), **(plan or {"at": 3, "do": "SIGTERM", "only": "evaluate"}))
    assert code in (137, 143)
    assert forks.run(*command(hurt))[0] == 0
    assert read_metrics(hurt) == read_metrics(calm)


def test_runs_that_log_nothing(run, forks, checkpoints, tmp_path):
    quiet = ["--logging_strategy", "no", "--logging_first_step", "False"]
    code, stdout, stderr = run(tmp_path / "evaluated", *quiet, logging_steps=None)
    assert code == 0 and stderr == [] and "result:" in stdout
    silent = words(checkpoints["untied"], tmp_path / "silent", "lora", steps=6)
    drop_option(silent, "--logging_steps")
    drop_option(silent, "--save_steps")
    drop_option(silent, "--save_total_limit")
    at = silent.index("--eval_data_path")
    silent = [*silent[:at], *silent[at + 4 :], *quiet, "--save_strategy", "no"]
    code, _, stderr = forks.run(*silent)
    assert code == 0 and stderr == ""
    silent[silent.index("--output_dir") + 1] = tmp_path / "broken"
    code, _, stderr = forks.run(*silent, at=3, do="nan", only="step")
    assert code == 1 and "is not finite at step 6" in stderr and not (tmp_path / "broken" / "manifest.json").exists()


# ---- rotation ----


def make_checkpoints(root, complete=(), torn=()):
    for step in (*complete, *torn):
        unfinished = begin_result(root / f"checkpoint-{step}")
        (unfinished / "weights").write_text("x")
        if step in complete:
            write_manifest(unfinished, step=step)
            publish_result(root / f"checkpoint-{step}")


@pytest.mark.parametrize(
    ("limit", "keep", "left"),
    [
        (None, None, [2, 3, 4, 6, 10]),
        (1, None, [10]),
        (2, None, [6, 10]),
        (1, 2, [2, 10]),
        (9, None, [2, 4, 6, 10]),
    ],
)
def test_rotation_counts_complete_ones_only(tmp_path, limit, keep, left):
    make_checkpoints(tmp_path, complete=(2, 4, 6, 10), torn=(3,))
    rotate_checkpoints(tmp_path / "checkpoint-10", limit, keep=tmp_path / f"checkpoint-{keep}" if keep else None)
    assert [int(path.name.partition("-")[2]) for path in list_checkpoints(tmp_path)] == left


def test_rotation_never_deletes_the_last_complete_one(tmp_path):
    make_checkpoints(tmp_path, complete=(2,), torn=(4, 6))
    rotate_checkpoints(tmp_path / "checkpoint-2", 1, keep=None)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
