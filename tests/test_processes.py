"""What processes do together: they agree, meet, and say which one does not."""

import json
import os
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.test_chaos import words

# A process of three, told by its rank what to do otherwise than the others.
WORKER = """
import json, os, sys
from pathlib import Path
import torch, torch.distributed as dist
from tuning.distributed import processes, startup
from tuning.errors import MachineError, SettingsError

startup._VISIBLE_S = 1
rank, root = int(os.environ["RANK"]), Path(sys.argv[1])
dist.init_process_group("gloo")

def fail():
    if rank == 1:
        raise ValueError("b.json:3: no such role")
    return rank

def crash():
    if rank == 2:
        raise KeyError("surprise")

def several():
    work = processes.RankZeroWork()
    for number in range(3):
        dist.all_reduce(torch.ones(1))
        work.do(lambda: (place / f"{number}").touch() if number != 1 else fail_first())
    work.finish()

def fail_first():
    raise SettingsError("the disk")

cases = {
    "agree": lambda: processes.check_agreement({"--seed": 1, "torch": "2.13"}),
    "disagree": lambda: processes.check_agreement({"--seed": 1, "torch": "2.12" if rank == 2 else "2.13"}),
    "lacks": lambda: processes.check_agreement({"--seed": 1} if rank == 1 else {"--seed": 1, "numpy": "2"}),
    "connection": lambda: startup.check_connection(torch.device("cpu")),
    "shared": lambda: startup.check_shared(place / "not" / "there"),
    "not shared": lambda: (os.chdir(place / ("x" if rank != 1 else "y")), startup.check_shared(Path("out"))),
    "on all": lambda: processes.on_all_ranks(lambda: rank),
    "fails on one": lambda: processes.on_all_ranks(fail),
    "crashes on one": lambda: processes.on_all_ranks(crash),
    "first": lambda: processes.on_rank_0(lambda: rank + 40),
    "first fails": lambda: processes.on_rank_0(fail_first),
    "anywhere": lambda: processes.find_anywhere("here" if rank == 2 else None),
    "in parts": several,
}
for case, function in cases.items():
    place = root / case
    try:
        outcome = ["value", function()]
    except (SettingsError, MachineError, ValueError, KeyError) as error:
        outcome = [type(error).__name__, str(error)]
    os.chdir(root)
    (place / f"{rank}.json").write_text(json.dumps(outcome))
    dist.barrier()
os._exit(0)
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """All cases, in one start of three processes. Returns: the directory with a directory for each case."""
    root = tmp_path_factory.mktemp("processes")
    (root / "worker.py").write_text(WORKER)
    for case in re.findall(r'^    "([a-z ]+)": ', WORKER, re.MULTILINE):
        for name in ("x", "y"):
            (root / case / name).mkdir(parents=True)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "3"]
    subprocess.run(
        [*launch, root / "worker.py", root],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
        timeout=120,
    )
    return root


@pytest.fixture
def together(outcomes):
    """What each process got in a case."""
    return lambda case: [json.loads((outcomes / case / f"{rank}.json").read_text()) for rank in range(3)]


@pytest.mark.dist
@pytest.mark.parametrize(
    ("case", "kind", "message"),
    [
        ("agree", "value", None),
        ("disagree", "SettingsError", "torch is 2.12 in process 2 (HOST), 2.13 in process 0"),
        ("lacks", "SettingsError", "numpy is None in process 1 (HOST), 2 in process 0"),
        ("connection", "value", None),
        ("shared", "value", None),
        (
            "not shared",
            "SettingsError",
            "--output_dir out: is not the same directory in process 1 (HOST) as in process 0",
        ),
        ("first", "value", 40),
        ("first fails", "SettingsError", "the disk"),
        ("anywhere", "value", "here"),
        ("in parts", "SettingsError", "the disk"),
    ],
)
def test_all_get_the_same(outcomes, together, case, kind, message):
    first, second, third = together(case)
    assert first == second == third
    assert first[0] == kind
    if kind == "value":
        assert first[1] == message
    else:
        assert message.replace("HOST", os.uname().nodename) in first[1]
    assert not list((outcomes / case).rglob(".*.tmp"))
    if case == "in parts":
        place = outcomes / case
        assert (place / "0").exists() and not (place / "2").exists(), "an error ends the work"


@pytest.mark.dist
def test_one_process_that_fails_is_named_in_all(together):
    host = os.uname().nodename
    first, failed, third = together("fails on one")
    assert first == third == ["SettingsError", f"process 1 ({host}): b.json:3: no such role"]
    assert failed == ["ValueError", "b.json:3: no such role"]


@pytest.mark.dist
def test_one_process_that_crashes_is_named_in_all(together):
    first, second, crashed = together("crashes on one")
    assert first == second == ["MachineError", f"process 2 ({os.uname().nodename}): KeyError('surprise')"]
    assert crashed == ["KeyError", "'surprise'"]


@pytest.mark.dist
def test_processes_with_other_settings_are_refused_before_weights_load(forks, checkpoints, tmp_path):
    command = words(checkpoints["untied"], tmp_path / "out", "lora", steps=2)
    code, stdout, stderr = forks.run(*command, processes=2, words_of={"1": ["--learning_rate", "1e-4"]})
    assert code == 2 and "parameters train" not in stdout
    (line,) = stderr.splitlines()
    host = os.uname().nodename
    assert line.startswith(f"error: the processes do not agree: --learning_rate is 0.0001 in process 1 ({host}), 0.003")
    assert not (tmp_path / "out").exists()


@pytest.mark.dist
def test_processes_with_other_data_are_refused_before_weights_load(forks, checkpoints, tmp_path):
    (tmp_path / "0").mkdir()
    (tmp_path / "1").mkdir()
    rows = json.loads((ROOT / "examples" / "conversations.json").read_text())
    for rank in (0, 1):
        (tmp_path / str(rank) / "data.json").write_text(json.dumps(rows[: 20 - rank]))
    command = words(checkpoints["untied"], tmp_path / "out", "lora", steps=2)
    command[command.index("--data_path") + 1] = "data.json"
    code, stdout, stderr = forks.run(*command, processes=2, directories=[str(tmp_path / "0"), str(tmp_path / "1")])
    assert code == 2 and "parameters train" not in stdout
    assert stderr.startswith("error: the processes do not agree: the tokenised data is ") and "in process 1" in stderr


@pytest.mark.dist
def test_data_that_one_machine_lacks_is_named_with_its_process(forks, checkpoints, tmp_path):
    (tmp_path / "1").mkdir()
    (tmp_path / "data.json").write_text((ROOT / "examples" / "conversations.json").read_text())
    command = words(checkpoints["untied"], tmp_path / "out", "lora", steps=2)
    command[command.index("--data_path") + 1] = "data.json"
    code, _, stderr = forks.run(*command, processes=2, directories=[str(tmp_path), str(tmp_path / "1")])
    assert code == 2
    assert f"error: process 1 ({os.uname().nodename}): data.json: no such file" in stderr
