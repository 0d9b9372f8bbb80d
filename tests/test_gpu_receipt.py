"""Receipts of GPUs: every stage at a tiny size, whatever becomes of a job, and what counts as a receipt."""

import copy
import json
import re
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch

from benchmarks import gpu_receipt, receipt_run
from benchmarks.arms import RowsInMemory
from benchmarks.cells import Cell
from benchmarks.random_models import make_rows
from benchmarks.receipt_run import NO_TIME, list_ends, make_receipt, run_job
from benchmarks.receipt_schema import STAGES, find_faults
from benchmarks.receipt_stages import correctness, environment, jobs, profiled, training

from benchmarks.receipt_stages.one_job import CheckError, run_job as run_in_here  # isort: skip
from benchmarks.receipt_table import draw_receipt, draw_table
from data_utils.rows import Row, TokenizedRows
from data_utils.steps import StepDataset
from tests.conftest import ROOT, run_python

FACTS = {
    "name": "GPU", "memory_gib": 80.0, "driver": "1", "capability": "9.0", "gpus": 1, "cuda": "13", "rehearsal": False,
    "python": "3.12", **{f"version of {name}": "1" for name in ("torch", "transformers", "peft", "accelerate")},
}  # fmt: skip
TRAINED = {
    "tokens_per_s": 14_000.0, "matmul_share": 0.5, "peak_gib": 30.0, "gradient_checkpointing": False,
    **{f"s_per_step_{each}": 1.0 for each in ("mean", "min", "max")},
}  # fmt: skip


def entry(stage, name, figures=None, **other):
    found = {"stage": stage, "name": name, "status": "ok", "figures": figures or {"x": 1.0}, "wall_s": 1.0}
    return found | other


@pytest.fixture
def receipt():
    entries = [
        entry("environment", "device", FACTS),
        entry("correctness", "merge", {"merge_error": 1e-8}),
        entry("training", "nemo/ours", TRAINED),
        entry("training", "7b-r16-2048/ours", TRAINED | {"matmul_share": 0.4}),
        {"stage": "qlora", "name": "7b-nf4-2048/ours", "status": "failed", "error": "out of memory"},
        {"stage": "profile", "name": jobs.PROFILE, "status": "not run", "reason": NO_TIME},
    ]
    return receipt_run._begin(FACTS, 10) | {"entries": entries}


@pytest.fixture
def fake_jobs(monkeypatch):
    """Jobs that give entries at once; what was run is in the list."""
    ran = []

    def run(stage, names, profiled, deadline):
        ran.append((stage, names, profiled))
        if stage == "environment":
            return [entry(stage, "device", FACTS), *(entry(stage, name) for name in names[1:])]
        return [entry(stage, name, TRAINED) for name in names]

    monkeypatch.setattr(receipt_run, "run_job", run)
    return ran


# ---- the stages, tiny ----


def test_the_device_is_described_and_measured(tmp_path):
    assert tuple(environment.list_checks()) == jobs.ENVIRONMENT
    facts = environment.describe_device()
    assert facts["rehearsal"] is not torch.cuda.is_available()
    # A package's metadata need not have the build (+cu130) that torch says.
    assert facts["version of torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert environment.measure_memory()["copy_gb_per_s"] > 0
    assert all(rate > 0 for rate in environment.measure_matrix_products().values())


def test_every_check_of_correctness_has_a_name_in_the_list():
    assert sorted(correctness.list_checks()) == sorted(jobs.CORRECTNESS)


@pytest.mark.parametrize("name", [n if "fp32" in n or n == "merge" else pytest.param(n, marks=pytest.mark.slow)
                                  for n in jobs.CORRECTNESS])  # fmt: skip
def test_what_is_computed_here_is_close_to_fp32(name):
    figures = correctness.list_checks()[name]()
    errors = {key: value for key, value in figures.items() if key.endswith("_error")}
    assert errors and all(0 <= value < 0.2 for value in errors.values())


@pytest.mark.parametrize("name, fault", [("packed, fp32", "packed_starts"), ("windows, fp32", "sliding_window")])
def test_a_check_finds_attention_that_is_wrong(name, fault, monkeypatch):
    """Rows that see each other, and a window that is left out."""
    from tuning.model import attention

    attend = attention.attend

    def wrong(*args, **options):
        if options.get("packed_lengths") is not None and fault == "packed_starts":
            options["packed_lengths"] = [sum(options["packed_lengths"])]
        return attend(*args, **{**options, **({"sliding_window": None} if fault == "sliding_window" else {})})

    from transformers import AttentionInterface

    monkeypatch.setattr(
        correctness, "enable_packing", lambda model, **_: model.causal_lm.set_attn_implementation("wrong")
    )
    monkeypatch.setitem(AttentionInterface._global_mapping, "wrong", wrong)
    with pytest.raises(CheckError, match="at most") as raised:
        correctness.list_checks()[name]()
    assert raised.value.figures["gradient_error"] > 1e-3


@pytest.mark.parametrize("part", ["lora", "norm", "rotary"])
def test_a_check_finds_a_part_of_ours_that_is_wrong(part, monkeypatch):
    """What it compares with is not ours as well."""
    from tuning.model import norm_rotary
    from tuning.model.lora_linear import FusedLoraLinear

    owner, name = {
        "lora": (FusedLoraLinear, "forward"), "norm": (norm_rotary, "rms_norm"), "rotary": (norm_rotary, "_turn"),
    }[part]  # fmt: skip
    right = getattr(owner, name)
    correctness.list_checks()["packed, fp32"]()  # what it leaves in transformers' modules takes no part either
    if part == "rotary":  # after the trial
        from transformers.models.qwen3 import modeling_qwen3

        assert isinstance(modeling_qwen3.apply_rotary_pos_emb, norm_rotary._Rotary)
    monkeypatch.setattr(owner, name, lambda *inputs: right(*inputs) * 1.01)
    if part == "norm":
        monkeypatch.setattr(norm_rotary, "_find_offset", lambda module, eps: 0.0)
    with pytest.raises(CheckError, match="at most"):
        correctness.list_checks()["packed, fp32"]()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nemo/ours", "8b-r64-512/ours", "8b-r64-8192/plain", "7b-r64-4096/trl"])
def test_a_training_cell_is_planned_and_trained(name):
    figures = training.run("training", name)
    assert figures["s_per_step_min"] <= figures["s_per_step_mean"] <= figures["s_per_step_max"]
    assert figures["shape"].startswith("tiny") and 0 < figures["matmul_share"] < 1
    assert ("planned_gib" in figures) == name.endswith("ours")
    assert figures["supervised"] == (1.0 if name.startswith("nemo") else 0.5)


def test_an_arm_that_runs_out_of_memory_is_trained_with_less(monkeypatch):
    def run_cell(cell, arm):
        if not cell.lean or arm == "trl":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"peak_gib": 30.0}

    monkeypatch.setattr(training, "run_cell", run_cell)
    found = training.run("training", "7b-r16-512/ours")
    assert found["ran_out_of_memory"] and found["gradient_checkpointing"] and found["planned_gib"] > 0
    with pytest.raises(torch.OutOfMemoryError):
        training.run("training", "7b-r16-512/trl")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in jobs.list_cells("qlora") if "-2048" in name])
def test_a_quantised_cell_is_trained(name):
    assert not find_faults_of(entry("qlora", name, training.run("qlora", name)))


def find_faults_of(one):
    return find_faults(receipt_run._begin(FACTS, 1) | {"entries": [one]})


@pytest.mark.slow
def test_a_step_is_profiled():
    cell = jobs.find_cell("training", "7b-r16-512/ours", rehearsal=True)
    figures = profiled.run(cell, "7b-r16-512/ours")
    assert figures["launches"] > 100 and 0 < figures["busy_ms"] <= figures["span_ms"]
    assert 0 < sum(each["share"] for each in figures["kernels"]) <= 1.001
    assert not find_faults_of(entry("profile", jobs.PROFILE, figures))


def test_gaps_and_overlaps_of_kernels_by_hand():
    figures = profiled.summarise([("b", 3000, 5000), ("a", 0, 1000), ("a", 4000, 6000)])
    assert figures["span_ms"] == 6 and figures["busy_ms"] == 4 and figures["longest_gap_ms"] == 2
    assert figures["idle_share"] == pytest.approx(1 / 3, abs=1e-4)
    assert figures["kernels"][0] == {"name": "a", "calls": 2, "ms": 3.0, "share": 0.6}


def test_rows_in_memory_are_those_of_the_program():
    cell = Cell("tiny", "lora", 16, rows=2, micro_batches=2, supervised=1.0)
    pairs = make_rows(cell, 100)
    rows = [(str(number), Row(ids, labels, [16], [1.0])) for number, (ids, labels) in enumerate(pairs)]
    ours, theirs = RowsInMemory(pairs), TokenizedRows.from_rows(rows)
    assert ours.lengths.tolist() == theirs.lengths.tolist() and ours.num_targets.tolist() == [15] * 4
    assert len(ours) == len(theirs) and ours.groups == theirs.groups and ours.row_id(3) == theirs.row_id(3)
    # All of a row's tokens are labels here, but for the first, which nothing predicts.
    assert all(np.array_equal(ours[i][0], theirs[i][0]) for i in range(4))
    assert all(np.array_equal(ours[i][1][1:], theirs[i][1][1:]) and theirs[i][2] is None for i in range(4))
    steps = [StepDataset(each, rows_per_step=4, max_tokens=32, packed=True, seed=0)[0] for each in (ours, theirs)]
    for one, other in zip(*(step["micro_batches"] for step in steps), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in ("input_ids", "target_index", "targets"))


def test_cells_fill_their_micro_batches_and_are_named_once():
    for stage in ("training", "qlora"):
        for name, cell in jobs.list_cells(stage).items():
            assert cell.rows * cell.length == jobs.MICRO_BATCH, name
    assert (jobs.NEMO.rank, jobs.NEMO.length, jobs.NEMO.rows, jobs.NEMO.supervised) == (16, 4096, 2, 1.0)


# ---- jobs and their time ----


def test_stages_share_the_time_and_what_is_there_is_not_measured_again(fake_jobs, tmp_path):
    kept = []
    made = make_receipt(None, 1, ["correctness", "training", "profile"], kept.append)
    assert not find_faults(made) and made["entries"] == kept[-1]["entries"]
    assert [stage for stage, *_ in fake_jobs][:2] == ["environment", "correctness"]
    assert len(fake_jobs) == len(kept) and fake_jobs[-1][2] == ("nemo/ours", False)
    fake_jobs.clear()
    part = copy.deepcopy(made)
    redo = next(e for e in part["entries"] if e["name"] == "nemo/plain")
    redo |= {"status": "not run", "reason": NO_TIME}
    again = make_receipt(part, 1, list(STAGES), kept.append)
    assert [job for job in fake_jobs if job[0] == "training"] == [("training", ("nemo/plain",), ("nemo/ours", False))]
    assert {job[0] for job in fake_jobs} == {"environment", "training", "qlora"} and not find_faults(again)


def test_a_stage_ends_when_its_share_is_over():
    ends = list_ends(["training", "profile"], 0.0, 60.0)
    assert ends == [("training", 50.0), ("profile", 60.0), ("training", 60.0), ("profile", 60.0)]
    assert list_ends([], 0.0, 60.0) == []


def test_no_job_is_begun_that_would_not_end(fake_jobs, monkeypatch):
    """Jobs of 20 s each in a minute: two of training, whose share is 50 s, and the profile."""
    now = [0.0]
    run = receipt_run.run_job

    def slow(stage, names, profiled, deadline):
        now[0] += 20 if stage in ("training", "profile") else 0
        return run(stage, names, profiled, deadline)

    monkeypatch.setattr(receipt_run, "run_job", slow)
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    made = make_receipt(None, 1, ["training", "profile"], lambda _: None)
    assert [stage for stage, *_ in fake_jobs] == ["environment", "training", "training", "profile"]
    assert now[0] == 60 and not find_faults(made)


def test_without_time_nothing_is_begun_and_the_receipt_is_valid(fake_jobs, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)  # all libraries are there
    made = make_receipt(None, 0.01, list(STAGES), lambda _: None)
    assert [stage for stage, *_ in fake_jobs] == ["environment"] and not find_faults(made)
    assert {e["status"] for e in made["entries"]} == {"ok", "not run"}
    assert NO_TIME in draw_receipt(made)


@pytest.mark.parametrize("name", ["device", "versions", "git"])
def test_a_receipt_of_another_machine_or_program_does_not_go_on(fake_jobs, name):
    made = make_receipt(None, 0.01, ["profile"], lambda _: None)
    made[name] = "other" if name == "git" else made[name] | {"name": "other"}
    with pytest.raises(receipt_run.ReceiptError, match=f"another {name}"):
        make_receipt(made, 0.01, ["profile"], lambda _: None)


def test_what_a_library_is_missing_for_is_skipped(fake_jobs, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    made = make_receipt(None, 1, ["correctness", "training"], lambda _: None)
    found = {e["name"]: e for e in made["entries"]}
    assert found["NF4, bf16"]["reason"] == "bitsandbytes is not installed"
    assert found["nemo/trl"]["reason"] == "trl is not installed" and found["nemo/plain"]["status"] == "ok"


STAND_IN = """
import json, sys, time, os
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
names = json.loads(words["--names"])
with open(words["--out"], "w") as file:
    for name in names:
        if name == "dies":
            print("RuntimeError: a kernel broke", file=sys.stderr, flush=True); os._exit(7)
        if name == "memory":
            print("torch.OutOfMemoryError: CUDA out of memory\\nmore", file=sys.stderr, flush=True); os._exit(1)
        if name == "hangs":
            file.write('{"half'); file.flush(); time.sleep(60)
        if name == "leaves":
            sys.exit(0)
        figures = {"x": 1}
        file.write(json.dumps({"stage": "correctness", "name": name, "status": "ok", "figures": figures, "wall_s": 1}))
        file.write("\\n"); file.flush()
"""


@pytest.mark.parametrize(
    ("names", "statuses", "error"),
    [
        (("a", "dies", "b"), ["ok", "failed", "not run"], "RuntimeError: a kernel broke"),
        (("memory", "b"), ["failed", "not run"], "out of memory"),
        (("a", "hangs", "b"), ["ok", "failed", "not run"], "took more than 1 s"),
        (("a", "leaves"), ["ok", "not run"], None),
    ],
)
def test_a_job_that_fails_leaves_what_it_had_and_its_error(names, statuses, error, tmp_path, monkeypatch):
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    monkeypatch.setattr(receipt_run, "SCRIPT", script)
    monkeypatch.setattr(receipt_run, "JOB_S", 1 if "hangs" in names else 60)
    found = run_job("correctness", names, None, time.monotonic() + 60)
    assert [e["status"] for e in found] == statuses
    assert [e["error"] for e in found if e["status"] == "failed"] == ([error] if error else [])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_job_outlives_a_command_that_is_killed(number, tmp_path):
    """It would hold the device, and falsify what the next command measures."""
    words = [sys.executable, "benchmarks/gpu_receipt.py", "--out", tmp_path / "receipt.json", "--minutes", "1"]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: psutil.Process(process.pid).children())
        (job,) = psutil.Process(process.pid).children()
        process.send_signal(number)
        process.wait(30)
        wait_until(lambda: not job.is_running() or job.status() == psutil.STATUS_ZOMBIE)
    finally:
        process.kill()


def wait_until(condition, timeout_s=60):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_job_that_the_minutes_cut_short_was_not_run(tmp_path, monkeypatch):
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    monkeypatch.setattr(receipt_run, "SCRIPT", script)
    (found,) = run_job("correctness", ("hangs",), None, time.monotonic() + 0.5)
    assert (found["status"], found["reason"]) == ("not run", NO_TIME)


def test_a_check_that_is_off_keeps_its_figures_and_the_next_goes_on(tmp_path, monkeypatch):
    def off():
        raise CheckError("error 1, at most 0.1", {"error": 1.0})

    def short():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    checks = {"a": off, "b": short, "c": lambda: {"x": 1}}
    monkeypatch.setattr(correctness, "list_checks", lambda: checks)
    run_in_here("correctness", list(checks), tmp_path / "lines", None)
    a, b, c = map(json.loads, (tmp_path / "lines").read_text().splitlines())
    assert a["status"] == "failed" and a["figures"] == {"error": 1.0} and "at most 0.1" in a["error"]
    assert b["error"] == "out of memory" and c["status"] == "ok"


@pytest.mark.slow
def test_the_command_stopped_and_started_again_makes_a_valid_rehearsal(tmp_path):
    out = tmp_path / "receipt.json"
    words = ["benchmarks/gpu_receipt.py", "--stages", "correctness", "profile", "--out", out, "--minutes"]
    run_python(*words, 0.01)
    first = json.loads(out.read_text())
    assert {e["status"] for e in first["entries"] if e["stage"] != "environment"} <= {"not run", "skipped"}
    run_python(*words, 3)
    made = json.loads(out.read_text())
    assert not find_faults(made) and made["rehearsal"] is not torch.cuda.is_available()
    assert {e["status"] for e in made["entries"]} <= {"ok", "skipped"}
    assert out.with_suffix(".md").read_text().startswith("# Rehearsal")
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".part"]


# ---- mistakes ----


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--minutes", "0"], "--minutes 0"),
        (["--out", "receipt.txt"], "ends with .json"),
        (["--table", "missing.json"], "missing.json: cannot be read"),
    ],
)
def test_mistakes_are_one_line(words, said, capsys):
    assert gpu_receipt.main(words) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_file_that_is_no_receipt_is_left_as_it_is(tmp_path, capsys):
    out = tmp_path / "mine.json"
    out.write_text('{"my": "data"}')
    assert gpu_receipt.main(["--out", str(out)]) == 2
    assert out.read_text() == '{"my": "data"}' and "no valid receipt" in capsys.readouterr().err


def test_the_command_needs_no_torch_until_a_job_runs():
    code = "import sys; from benchmarks import gpu_receipt; print('torch' in sys.modules, 'rich' in sys.modules)"
    assert run_python("-c", code).stdout.split() == ["False", "False"]


@pytest.mark.slow
def test_jobs_need_no_other_library(tmp_path):
    """With what an image of a GPU's vendor may lack taken away."""
    blocked = ("rich", "bitsandbytes", "deepspeed", "matplotlib", "datasets", "trl", "gptqmodel", "pyarrow", "pandas")
    code = f"""
import sys
sys.modules.update(dict.fromkeys({blocked!r}))
from pathlib import Path
from benchmarks.receipt_stages.one_job import run_job
for stage, names in (("correctness", ["packed, fp32", "merge"]), ("training", ["7b-r16-512/ours"])):
    run_job(stage, names, Path(sys.argv[1]), None)
"""
    run_python("-c", code, tmp_path / "lines")
    found = [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()]
    assert [e["status"] for e in found] == ["ok"] * 3, found


# ---- the schema and the table ----


def test_a_receipt_is_valid_and_each_fault_in_it_is_named(receipt):
    assert not find_faults(receipt)
    assert find_faults([]) and find_faults({})
    changes = {
        "format": lambda r: r.update(format=2),
        "date": lambda r: r.update(date="yesterday"),
        "receipt.rehearsal": lambda r: r.pop("rehearsal"),
        "device.memory_gib": lambda r: r["device"].update(memory_gib="80"),
        "versions.torch": lambda r: r["versions"].pop("torch"),
        "not an object": lambda r: r["entries"].append("x"),
        "stage is none of": lambda r: r["entries"].append(entry("other", "a")),
        "stands there twice": lambda r: r["entries"].append(entry("correctness", "merge")),
        "status 'good'": lambda r: r["entries"][1].update(status="good"),
        "figures: missing": lambda r: r["entries"][1].pop("figures"),
        "error: missing": lambda r: r["entries"][4].pop("error"),
        "reason: missing": lambda r: r["entries"][5].pop("reason"),
        "not finite": lambda r: r["entries"][1]["figures"].update(merge_error=float("nan")),
        "tokens_per_s: expected a number": lambda r: r["entries"][2]["figures"].update(tokens_per_s=0),
        "peak_gib: expected a number": lambda r: r["entries"][2]["figures"].pop("peak_gib"),
    }
    for said, change in changes.items():
        broken = copy.deepcopy(receipt)
        change(broken)
        assert any(said in fault for fault in find_faults(broken)), said


def test_the_table_has_what_was_measured_and_where(receipt):
    lines = draw_table([receipt]).splitlines()
    measured = [line for line in lines if "not measured" not in line][2:]
    assert len(measured) == 2 and all("| GPU, 20" in line for line in measured)
    assert "| ours |  |  | 14,000 (50%) |  |" in measured[0] and "| ours |  | 14,000 (40%) |  |  |" in measured[1]
    assert draw_table([receipt | {"rehearsal": True}]) == draw_table([])
    assert draw_table([]).count("not measured") == 8


def test_a_receipt_as_text_names_every_entry(receipt):
    text = draw_receipt(receipt)
    assert all(e["name"] in text for e in receipt["entries"][1:]) and "out of memory" in text
    assert draw_receipt(receipt | {"rehearsal": True}).startswith("# Rehearsal, no measurement")


RECEIPTS = sorted((ROOT / "docs" / "receipts").glob("*.json"))


def test_receipts_of_others_are_valid_measurements():
    for path in RECEIPTS:
        found = json.loads(path.read_text(encoding="utf-8"))
        assert not find_faults(found) and not found["rehearsal"], path


@pytest.mark.parametrize("name", ["README.md", "README_CN.md"])
def test_the_readmes_have_the_table_of_the_receipts(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    (table,) = re.findall(r"<!-- receipts -->\n(.*?)\n<!-- /receipts -->", text, flags=re.S)
    assert table == draw_table([json.loads(path.read_text(encoding="utf-8")) for path in RECEIPTS])
