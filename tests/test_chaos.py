"""A run that is killed at any moment, saves included, ends bit-equal to one that was not."""

import json
import random
from pathlib import Path

import pytest

from tests.conftest import CONVERSATIONS, ROOT
from tests.runs import MAX_LENGTH, probe_logits

TIMINGS = {"tokens_per_s", "supervised_tokens_per_s", "eval_runtime", "train_s", "elapsed_s", "peak_gib"}


ENGINES = {
    "ddp": [],
    "zero2": ["--deepspeed", ROOT / "finetune" / "ds_config_zero2.json"],
    "zero3": ["--deepspeed", ROOT / "finetune" / "ds_config_zero3.json"],
    "fsdp": ["--fsdp", "full_shard"],
}


def words(
    checkpoint, out, kind, *, steps, rows_per_process=8, dropout=0.1, save_steps=2, engine="ddp", eval_steps=None
):
    batch = rows_per_process // 2
    lora = ["--lora_r", 4, "--lora_dropout", dropout] if kind != "full" else []
    lora += {"full": [], "lora": ["--use_lora"], "qlora": ["--q_lora"]}[kind]
    evaluate = ["--eval_strategy", "steps", "--eval_steps", eval_steps] if eval_steps else ["--eval_strategy", "epoch"]
    return [
        *("--model_name_or_path", checkpoint, "--data_path", CONVERSATIONS, "--output_dir", out, "--report_to", "none"),
        *("--per_device_train_batch_size", batch, "--gradient_accumulation_steps", 2, "--model_max_length", MAX_LENGTH),
        *("--learning_rate", 3e-3 if lora else 1e-3, "--max_steps", steps, "--lr_scheduler_type", "cosine"),
        *("--logging_steps", 3, "--save_steps", save_steps, "--save_total_limit", 2, *lora),
        *("--eval_data_path", CONVERSATIONS, *evaluate, "--resume_from_checkpoint", "auto"),
        *ENGINES[engine],
    ]


def without_timings(value):
    if isinstance(value, dict):
        return {name: without_timings(v) for name, v in value.items() if name not in TIMINGS}
    return [without_timings(v) for v in value] if isinstance(value, list) else value


def read_metrics(out: Path) -> list[dict]:
    return [without_timings(json.loads(line)) for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(one: Path, other: Path, last_step: int) -> None:
    assert read_metrics(one) == read_metrics(other)
    weights = sorted(path.name for path in one.glob("*.safetensors"))
    assert weights
    for name in weights:
        assert (one / name).read_bytes() == (other / name).read_bytes()
    state = f"checkpoint-{last_step}/training_state"
    assert (one / f"{state}.safetensors").read_bytes() == (other / f"{state}.safetensors").read_bytes()
    states = [without_timings(json.loads((out / f"{state}.json").read_text())) for out in (one, other)]
    assert states[0] == states[1]


def kill_and_resume(
    forks, checkpoint, tmp_path, kind, processes, *, kills, steps, seed, engine="ddp", flags=(), **more
):
    """Train uninterrupted, then again with kills (their number, or where they fall); both must end alike."""
    chance = random.Random(seed)
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    rows_per_process = 8 // processes
    options = {"steps": steps, "rows_per_process": rows_per_process, "engine": engine, **more}
    calm_words = [*words(checkpoint, calm, kind, **options), *flags]
    code, _, stderr = forks.run(*calm_words, processes=processes)
    assert code == 0, stderr
    num_events = forks.num_events  # of each rank

    killed_words = [*words(checkpoint, killed, kind, **options), *flags]
    torn = 0
    plans = kills if isinstance(kills, list) else []
    for _ in range(0 if plans else kills):
        # Within the first four steps of a life (two saves), so that it gets about one save further.
        rank = chance.randrange(processes)
        plans.append({"at": chance.randint(1, 4 * num_events[rank] // steps), "rank": rank})
    for plan in plans:
        code, stdout, stderr = forks.run(*killed_words, processes=processes, do="SIGKILL", slow_s=0.001, **plan)
        assert 137 in forks.codes, (forks.codes, stderr)
        torn += "skipped" in stdout
    code, stdout, stderr = forks.run(*killed_words, processes=processes)
    assert code == 0, stderr
    assert "resuming from" in stdout and stdout.count("finished") == 0
    assert_same_run(calm, killed, steps)
    assert json.loads((killed / "run.json").read_text())["engine"] == ("single" if processes == 1 else engine)
    return torn


@pytest.mark.parametrize(("kind", "processes"), [("lora", 1), ("full", 1), ("lora", 2)])
def test_three_kills(forks, checkpoints, tmp_path, kind, processes):
    kill_and_resume(
        forks, checkpoints["untied"], tmp_path, kind, processes, kills=3, steps=10, seed=kind + str(processes)
    )


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_twenty_kills(forks, checkpoints, tmp_path, kind, processes):
    torn = kill_and_resume(
        forks, checkpoints["untied"], tmp_path, kind, processes, kills=20, steps=60, seed=kind + str(processes)
    )
    assert torn > 0, "no kill fell into a save"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("engine", ["zero2", "zero3", "fsdp"])
def test_kills_under_every_engine(forks, checkpoints, tmp_path, engine, kind):
    plan = {"kills": 5, "steps": 20, "seed": kind + engine}
    kill_and_resume(forks, checkpoints["untied"], tmp_path, kind, 2, engine=engine, **plan)


@pytest.mark.parametrize(
    ("engine", "kind"),
    [
        *(("zero2", "lora"), ("zero3", "lora"), ("fsdp", "lora")),
        pytest.param("zero3", "full", marks=pytest.mark.slow),
    ],
)
def test_one_kill_under_every_engine(forks, checkpoints, tmp_path, engine, kind):
    # It resumes behind an evaluation, so a step without dropout (or with it in evaluation) would show.
    plan = {"kills": [{"at": 4, "only": "step", "rank": 1}], "steps": 5, "seed": engine, "eval_steps": 2}
    kill_and_resume(forks, checkpoints["untied"], tmp_path, kind, 2, engine=engine, **plan)


@pytest.mark.parametrize("engine", ["zero3", "fsdp"])
def test_the_best_comes_back_in_shards(forks, checkpoints, tmp_path, engine):
    out = tmp_path / "out"
    command = words(checkpoints["untied"], out, "full", steps=4, rows_per_process=4, engine=engine)
    wild = {"learning_rate": 0.5, "lr_scheduler_type": "constant", "eval_strategy": "steps"}
    for flag, value in wild.items():
        command[command.index(f"--{flag}") + 1] = value
    command += ["--eval_steps", 1, "--load_best_model_at_end", "True", "--eval_on_start", "True"]
    at = command.index("--save_steps")
    command[at : at + 2] = [
        "--save_strategy",
        "best",
    ]  # so that nothing is saved between the last evaluation and the end
    code, _, stderr = forks.run(*command, processes=2)
    assert code == 0, stderr
    best = json.loads((out / "run.json").read_text())["best"]
    assert best["step"] < 4, "the last is the best: this shows nothing"
    ours, there = ((p / "model.safetensors").read_bytes() for p in (out, out / f"checkpoint-{best['step']}"))
    assert ours == there


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_from_any_engine_to_any_other_and_to_more_processes(forks, checkpoints, tmp_path, kind):
    calm, moved = tmp_path / "calm", tmp_path / "moved"
    options = {"steps": 36, "dropout": 0.0, "save_steps": 50}
    code, *_ = forks.run(*words(checkpoints["untied"], calm, kind, rows_per_process=8, **options))
    assert code == 0
    engines = [
        ("zero2", 2),
        ("fsdp", 2),
        ("zero3", 2),
        ("ddp", 1),
        ("zero3", 3),
        ("zero3", 4),
        ("zero2", 4),
        ("fsdp", 4),
        ("ddp", 2),
    ]
    for number, (engine, processes) in enumerate(engines):
        plan = {"at": 3, "do": "SIGTERM", "only": "step"} if number < len(engines) - 1 else {}
        launched = words(checkpoints["untied"], moved, kind, rows_per_process=4, engine=engine, **options)
        code, stdout, stderr = forks.run(*launched, processes=processes, **plan)
        assert code == (143 if plan else 0), stderr
    assert "engine fsdp -> ddp" in stdout and "processes 4 -> 2" in stdout
    for one, other in zip(read_metrics(moved), read_metrics(calm), strict=True):
        assert one.get("loss") == pytest.approx(other.get("loss"), abs=1e-5)
    calm_logits, moved_logits = (probe_logits(checkpoints["untied"], out) for out in (calm, moved))
    assert (calm_logits - moved_logits).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_from_two_processes_to_one_and_back(forks, checkpoints, tmp_path, kind):
    calm, moved = tmp_path / "calm", tmp_path / "moved"
    options = {"steps": 12, "dropout": 0.0, "save_steps": 50}
    code, *_ = forks.run(*words(checkpoints["untied"], calm, kind, rows_per_process=8, **options))
    assert code == 0
    for processes, stop_at in ((2, 3), (1, 4), (2, None)):
        # Another number of processes with the same flags would make another number of rows a step.
        plan = {"at": stop_at, "do": "SIGTERM", "only": "step"} if stop_at else {}
        launched = words(checkpoints["untied"], moved, kind, rows_per_process=4, **options)
        code, stdout, stderr = forks.run(*launched, processes=processes, **plan)
        assert code == (143 if stop_at else 0), stderr
    assert "8 conversations a step, as there" in stdout and "processes 1 -> 2" in stdout
    assert [m["step"] for m in read_metrics(moved)] == [m["step"] for m in read_metrics(calm)]
    for one, other in zip(read_metrics(moved), read_metrics(calm), strict=True):
        assert one.get("loss") == pytest.approx(other.get("loss"), abs=1e-5)
        assert one.get("supervised_tokens") == other.get("supervised_tokens")
    fresh, calm_logits, moved_logits = (
        probe_logits(checkpoints["untied"], out) for out in (checkpoints["untied"], calm, moved)
    )
    assert (calm_logits - moved_logits).abs().max() < 1e-5 < (calm_logits - fresh).abs().max()
