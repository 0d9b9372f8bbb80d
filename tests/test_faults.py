"""What can happen to a run: what is said, the exit code, and what lies in the directory afterwards."""

import json
import os
import pty
import random
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import CONVERSATIONS, ROOT
from tests.test_chaos import ENGINES, assert_same_run, read_metrics, words
from tests.test_cli import flags
from tuning.checkpoint.manifest import find_fault
from tuning.training.stopping import StopRequest

RESUME_HINT = "resume with the same command and --resume_from_checkpoint auto"


@pytest.fixture(scope="module")
def calm(forks, checkpoints, tmp_path_factory):
    """A run of 6 steps that nothing happens to."""
    out = tmp_path_factory.mktemp("calm") / "out"
    code, _, stderr = forks.run(*words(checkpoints["untied"], out, "lora", steps=6))
    assert code == 0 and stderr == ""
    return out


@pytest.fixture
def hurt(forks, checkpoints, tmp_path):
    """Run 6 steps (saves at 2, 4, 6), hurt. Returns: exit code, stdout, stderr lines, checkpoints that are complete."""

    def run(*more, processes=1, **plan):
        out = tmp_path / "out"
        command = words(checkpoints["untied"], out, "lora", steps=6, rows_per_process=8 // processes)
        code, stdout, stderr = forks.run(*command, *more, processes=processes, **plan)
        complete = [p.name for p in sorted(out.glob("checkpoint-*")) if find_fault(p) is None]
        assert complete == sorted(p.name for p in out.glob("checkpoint-*")), "nothing torn is left"
        return code, stdout, stderr.splitlines(), complete

    return run


def status(out):
    return json.loads((out / "run.json").read_text())["status"]


@pytest.mark.parametrize(("name", "number"), [("SIGTERM", 15), ("SIGINT", 2), ("SIGHUP", 1)])
def test_a_signal_saves_and_says_how_to_go_on(hurt, calm, tmp_path, name, number):
    code, stdout, stderr, complete = hurt(at=3, do=name, only="step")
    assert code == 128 + number
    assert stderr == [f"{name}: saving at the end of this step; a second signal stops at once"]
    assert stdout.splitlines()[-1] == f"stopped by {name} at step 3 of 6; {RESUME_HINT}"
    assert complete == ["checkpoint-2", "checkpoint-3"]
    assert status(tmp_path / "out") == f"stopped by {name}" and not (tmp_path / "out" / "manifest.json").exists()
    code, stdout, stderr, _ = hurt()
    assert (
        code == 0 and stderr == [] and f"resuming from {tmp_path / 'out' / 'checkpoint-3'}; 8 conversations" in stdout
    )
    assert_same_run(calm, tmp_path / "out", 6)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_second_signal_stops_at_once(hurt, tmp_path, name):
    number = getattr(signal, name)
    code, _, stderr, complete = hurt(at=3, do=name, only="step", again=name)
    assert code == 128 + number and len(stderr) == 1
    assert complete == ["checkpoint-2"] and status(tmp_path / "out") == "running"


def test_a_signal_to_one_process_stops_all_at_the_same_step(forks, hurt, calm, tmp_path):
    _code, stdout, _, complete = hurt(processes=2, rank=1, at=3, do="SIGTERM", only="step")
    assert forks.codes == [143, 143] and "stopped by SIGTERM at step 4 of 6" in stdout
    assert complete == ["checkpoint-2", "checkpoint-4"]


def test_a_signal_before_the_first_step(hurt, tmp_path):
    code, stdout, stderr, complete = hurt("--eval_on_start", "True", at=1, do="SIGTERM", only="evaluate")
    assert code == 143 and len(stderr) == 1 and complete == []
    assert "stopped by SIGTERM at step 0 of 6" in stdout
    assert hurt("--eval_on_start", "True")[0] == 0


def test_a_full_disk_at_the_very_end_of_two_processes(forks, hurt):
    _code, _, stderr, complete = hurt(processes=2, at=6, do="full", bytes=50_000, only="rotate")
    assert set(forks.codes) == {1} and complete == ["checkpoint-4", "checkpoint-6"]
    assert len(stderr) == 1 and "/out: could not be written" in stderr[0]


@pytest.mark.parametrize("at", [4, 5])
def test_an_evaluation_that_a_signal_cut_off_is_made_up_for(forks, checkpoints, tmp_path, at):
    # 56 rows, 8 a step: the epoch ends at step 7, and the evaluation after it is an event of its own.
    def run(name, **plan):
        command = words(checkpoints["untied"], tmp_path / name, "lora", steps=8)
        return forks.run(*command, "--per_device_eval_batch_size", 8, **plan)

    assert run("calm")[0] == 0
    evaluations = [m["step"] for m in read_metrics(tmp_path / "calm") if "eval_loss" in m]
    assert evaluations == [7, 8]
    # In step 7: the stop comes before its evaluation. In the evaluation: it ends there.
    plan = {"at": 7, "only": "step"} if at == 4 else {"at": 3, "only": "evaluate"}
    code, stdout, _ = run("cut", do="SIGTERM", **plan)
    assert code == 143 and "stopped by SIGTERM at step 7 of 8" in stdout
    assert not [m for m in read_metrics(tmp_path / "cut") if "eval_loss" in m]
    assert run("cut")[0] == 0
    assert_same_run(tmp_path / "calm", tmp_path / "cut", 8)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_full_disk(forks, hurt, calm, tmp_path, processes):
    code, _, stderr, complete = hurt(processes=processes, at=3, do="full", bytes=50_000, only="step")
    assert set(forks.codes) == {1} and complete == ["checkpoint-2"]
    assert len(stderr) == 1 and re.fullmatch(
        rf"error: .*/out/checkpoint-4: could not be written: .*File too large.*; make room, then {RESUME_HINT}; "
        "earlier checkpoints are untouched",
        stderr[0],
    )
    assert status(tmp_path / "out").startswith("failed: ")
    if processes == 1:
        code, stdout, *_ = hurt()
        assert code == 0 and "resuming from" in stdout
        assert_same_run(calm, tmp_path / "out", 6)


@pytest.mark.parametrize("engine", ["zero2", "zero3", "fsdp"])
def test_a_full_disk_while_shards_come_together(forks, hurt, engine):
    # The first process cannot write any more; all go on bringing tensors together, then all end.
    _, _, stderr, complete = hurt(*ENGINES[engine], processes=2, at=3, do="full", bytes=50_000, only="step")
    assert set(forks.codes) == {1} and complete == ["checkpoint-2"]
    assert len(stderr) == 1 and "/out/checkpoint-4: could not be written: " in stderr[0]


@pytest.mark.parametrize("engine", ["zero3", "fsdp"])
def test_a_process_that_dies_takes_every_engine_down(forks, hurt, engine):
    _, _, stderr, complete = hurt(*ENGINES[engine], processes=2, at=3, do="exit", rank=1, only="step")
    assert forks.codes == [1, 3] and complete == ["checkpoint-2"]
    assert "error: the connection to another process of this run broke" in "\n".join(stderr)


def test_a_full_disk_at_the_very_end(hurt, calm, tmp_path):
    # After the last rotation only the result is written.
    code, _, stderr, complete = hurt(at=6, do="full", bytes=50_000, only="rotate")
    assert code == 1 and complete == ["checkpoint-4", "checkpoint-6"]
    assert len(stderr) == 1 and "could not be written" in stderr[0] and "/out: " in stderr[0]
    assert not (tmp_path / "out" / "manifest.json").exists()
    code, stdout, *_ = hurt()
    assert code == 0 and "checkpoint-6; 8 conversations a step, as there" in stdout
    assert_same_run(calm, tmp_path / "out", 6)


def test_a_directory_that_becomes_read_only(hurt, tmp_path):
    code, _, stderr, complete = hurt(
        "--logging_steps", 50, "--logging_first_step", False, at=3, do="readonly", only="step"
    )
    (tmp_path / "out").chmod(0o755)
    assert code == 1 and complete == ["checkpoint-2"]
    assert len(stderr) == 1 and "checkpoint-4: could not be written: Permission denied; make it writable" in stderr[0]


def test_a_directory_that_is_read_only_from_the_start(hurt, tmp_path):
    (tmp_path / "out").mkdir()
    code, _, stderr, _ = hurt(do="readonly at start")
    assert code == 2 and len(stderr) == 1 and "--output_dir" in stderr[0] and "cannot be written to" in stderr[0]
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("processes", [1, 2])
def test_a_gradient_that_is_no_number_names_its_rows(forks, hurt, tmp_path, processes):
    _code, _, stderr, complete = hurt(processes=processes, rank=processes - 1, at=4, do="nan", only="step")
    assert set(forks.codes) == {1} and complete == ["checkpoint-2"]
    assert len(stderr) == 1 and re.match(
        r"error: the gradient norm is nan at step 4 \(conversations demo-\d\d(, demo-\d\d)*\)", stderr[0]
    )
    assert "Nothing after the last checkpoint is saved" in stderr[0]
    assert status(tmp_path / "out").startswith("failed: the gradient norm is nan")
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_a_process_that_dies_takes_the_run_down(forks, hurt):
    _code, _, stderr, complete = hurt(processes=2, rank=1, at=4, do="exit", only="step")
    assert forks.codes == [1, 3] and complete == ["checkpoint-2"]
    assert "boom" in stderr and any("the connection to another process of this run broke" in line for line in stderr)


def test_a_data_loader_that_dies_takes_the_run_down(hurt):
    code, _, stderr, complete = hurt("--dataloader_num_workers", 1, at=3, do="kill_loader", only="step")
    assert code == 1 and "checkpoint-2" in complete
    assert len(stderr) == 1 and "error: a data loader process died (DataLoader worker (pid" in stderr[0]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_a_data_loader_that_dies_at_any_moment(hurt, calm, tmp_path, seed):
    """Where it was still needed the run ends with one line; where it was not, the result is that of a calm run."""
    choose = random.Random(seed)
    plan = {"at": choose.randrange(1, 7), "after_s": choose.choice([0, 0.01, 0.05, 0.1, 0.2, 0.4])}
    code, _, stderr, _ = hurt("--dataloader_num_workers", 1, do="kill_loader", only="step", **plan)
    if code:
        assert code == 1 and len(stderr) == 1 and "error: a data loader process died" in stderr[0]
        assert hurt()[0] == 0
    else:
        assert stderr == []
    assert_same_run(calm, tmp_path / "out", 6)


def test_data_loaders_leave_signals_to_the_run(hurt, calm, tmp_path):
    # Ctrl-C reaches the whole process group.
    code, stdout, stderr, _ = hurt("--dataloader_num_workers", 1, at=3, do="SIGINT to all", only="step")
    assert code == 130 and len(stderr) == 1 and "stopped by SIGINT at step 3 of 6" in stdout
    assert hurt()[0] == 0
    assert_same_run(calm, tmp_path / "out", 6)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_torchrun_passes_a_signal_on_and_is_not_read_as_finished(checkpoints, tmp_path, name):
    out = tmp_path / "out"
    command = words(checkpoints["untied"], out, "lora", steps=3000, rows_per_process=4, save_steps=10_000)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "finetune.py"]
    process = subprocess.Popen(
        [*torchrun, *map(str, command)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not (out / "metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(getattr(signal, name))
    stdout, _ = process.communicate(timeout=30)  # torchrun kills its workers after that
    assert process.returncode not in (0, None)
    (checkpoint,) = out.glob("checkpoint-*")
    assert find_fault(checkpoint) is None
    assert f"stopped by {name} at step {checkpoint.name.partition('-')[2]} of 3,000; {RESUME_HINT}" in stdout


def test_conversations_are_where_the_epochs_of_these_tests_think():
    assert len(json.loads(CONVERSATIONS.read_text())) == 56


@pytest.mark.parametrize("lost", ["pipe", "terminal"])
def test_a_run_whose_output_nobody_reads_goes_on(checkpoints, tmp_path, lost):
    """A closed pipe (EPIPE) and a terminal that is gone (EIO), where it prints lines and where it has a live one."""
    ours, theirs = os.pipe() if lost == "pipe" else pty.openpty()
    out = tmp_path / "out"
    program = subprocess.Popen(
        [sys.executable, *map(str, ("finetune.py", *flags(checkpoints["untied"], CONVERSATIONS, out)))],
        cwd=ROOT, stdout=theirs, stderr=theirs, stdin=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    assert os.read(ours, 1)
    os.close(ours)
    assert program.wait(timeout=120) == 0
    assert find_fault(out) is None and status(out) == "finished"


def test_nohup_outlives_its_terminal():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as request:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not request.agreed()
    finally:
        signal.signal(signal.SIGHUP, before)
