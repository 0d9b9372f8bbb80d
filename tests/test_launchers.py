"""Launchers: their commands parse, under sh and bash; one of each engine trains, as SLURM's script and mpirun do."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import CONVERSATIONS, ROOT, needs
from tuning.checkpoint.manifest import find_fault
from tuning.settings.arguments import parse_arguments
from tuning.settings.deepspeed_json import read_deepspeed_config

LAUNCHERS = sorted((ROOT / "finetune").glob("finetune_*.sh"))
ENGINES = {
    "finetune_lora_single_gpu": "single",
    "finetune_full_single_gpu": "single",
    "finetune_ds": "zero3",
    "finetune_lora_ds": "zero2",
    "finetune_fsdp": "fsdp",
    "finetune_lora_fsdp": "fsdp",
    "finetune_qlora_single_gpu": "single",
    "finetune_qlora_ds": "zero2",
    "finetune_qlora_fsdp": "fsdp",
}


def dry_run(shell, launcher, *words, cwd=ROOT, **environment):
    return subprocess.run(
        [shell, launcher, *words],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={"DRY_RUN": "1", "PATH": "/usr/bin:/bin", **environment},
    )


def find_recipe(launcher):
    method = launcher.stem.split("_")[1]
    return ROOT / "finetune" / "recipes" / f"{method if method in ('lora', 'qlora') else 'full'}.yaml"


def split_command(line):
    """Words before and behind finetune.py."""
    words = shlex.split(line)
    at = words.index(str(ROOT / "finetune.py"))
    return words[1:at], words[at + 1 :]


@pytest.mark.parametrize("shell", ["sh", "bash"])
@pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda p: p.stem)
def test_flags_parse_and_pass_through(shell, launcher, tmp_path):
    (tmp_path / "my data.json").write_text("[]")
    words = ["-m", "org/model", "--max_steps", "8", "-d", "my data.json", "-o", "out dir"]
    done = dry_run(shell, launcher, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    torchrun, words = split_command(done.stdout)
    engine = ENGINES[launcher.stem]
    if engine == "single":
        assert torchrun == []
    else:
        assert torchrun == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
        flag, value = words[7:9]  # behind the recipe, -m, -d and -o
        del words[7:9]  # needs processes to parse
        if engine == "fsdp":
            assert (flag, value) == ("--fsdp", "full_shard")
        else:
            assert (flag, value) == ("--deepspeed", str(ROOT / "finetune" / f"ds_config_{engine}.json"))
    assert words[0] == str(find_recipe(launcher))
    arguments = parse_arguments(words)
    assert arguments.model.model_name_or_path == "org/model"
    assert arguments.data.data_path == [str(tmp_path / "my data.json")]
    assert arguments.run.output_dir == str(tmp_path / "out dir")
    assert arguments.run.max_steps == 8
    assert arguments.lora.use_lora == ("lora" in launcher.stem)
    assert arguments.run.learning_rate == (3e-4 if arguments.lora.use_lora else 1e-5)
    assert arguments.run.per_device_train_batch_size * arguments.run.gradient_accumulation_steps == 16
    # Nothing but the recipe, the engine and the user's flags: the launcher itself sets no more.
    paths = ["--model_name_or_path", "org/model", "--data_path", str(tmp_path / "my data.json")]
    assert words[1:] == [*paths, "--output_dir", str(tmp_path / "out dir"), "--max_steps", "8"]


@pytest.mark.parametrize("shell", ["sh", "dash", "bash"])
def test_paths_stay_as_they_are(shell, tmp_path):
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell}")
    names = {"-d": "a\\nb\\tc.json", "-m": "model\\n", "-o": "out\\t 'x' $HOME"}
    (tmp_path / "here" / names["-d"]).parent.mkdir()
    (tmp_path / "here" / names["-d"]).write_text("[]")
    (tmp_path / "here" / names["-m"]).mkdir()
    (tmp_path / "there" / "here").mkdir(parents=True)
    launcher = ROOT / "finetune" / "finetune_lora_single_gpu.sh"
    words = [word for flag, name in names.items() for word in (flag, f"here/{name}")]
    done = dry_run(shell, launcher, *words, cwd=tmp_path, CDPATH=str(tmp_path / "there"))
    assert done.returncode == 0 and done.stderr == "", done.stderr
    _, command = split_command(done.stdout)
    for flag, name in zip(("--data_path", "--model_name_or_path", "--output_dir"), names.values(), strict=True):
        assert command[command.index(flag) + 1] == str(tmp_path / "here" / name)
    relative = dry_run(shell, "finetune/finetune_lora_single_gpu.sh", CDPATH="/tmp:/")
    assert str(ROOT / "finetune.py") in shlex.split(relative.stdout), relative.stdout + relative.stderr


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda p: p.stem)
def test_defaults_help_and_mistakes(launcher):
    words = shlex.split(dry_run("sh", launcher).stdout)
    assert str(ROOT / "examples" / "conversations.json") in words
    assert str(ROOT / "examples" / "tiny-qwen3-base") in words
    usage = dry_run("sh", launcher, "-h").stdout
    assert usage.startswith("usage:")
    settings = [line for line in find_recipe(launcher).read_text().splitlines() if not line.startswith("#")]
    assert "".join(f"  {line}\n" for line in settings) in usage and all(" # " in line for line in settings)
    assert ("NPROC_PER_NODE" in usage) == (ENGINES[launcher.stem] != "single") and "CUDA_VISIBLE_DEVICES" in usage
    for wrong in (["-x"], ["-m"], ["-d", ""], ["-m", "-d", "x"], ["-d", "a", "-d", "b"]):
        done = dry_run("sh", launcher, *wrong)
        assert done.returncode == 2 and done.stderr.startswith("error:") and done.stderr.count("\n") == 1
    quoted = shlex.split(dry_run("sh", launcher, "--system_message", 'it\'s $HOME "x"').stdout)
    assert quoted[-1] == 'it\'s $HOME "x"'


MACHINES = [
    ({"NPROC_PER_NODE": "3"}, "--standalone --nproc_per_node 3"),
    ({"CUDA_VISIBLE_DEVICES": "0,2,5,7"}, "--standalone --nproc_per_node 4"),
    ({"CUDA_VISIBLE_DEVICES": ""}, "--standalone --nproc_per_node 1"),
    (
        {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "first", "NPROC_PER_NODE": "8"},
        "--nnodes 2 --node_rank 1 --master_addr first --master_port 29500 --nproc_per_node 8",
    ),
    ({"MASTER_PORT": "1234"}, "--nnodes 1 --node_rank 0 --master_addr localhost --master_port 1234 --nproc_per_node 1"),
    ({"NNODES": "2"}, "error: NNODES=2: needs MASTER_ADDR, the host of NODE_RANK=0"),
    ({"NNODES": "2", "MASTER_ADDR": "x"}, "error: NNODES=2: needs NODE_RANK, this machine's number from 0"),
    ({"NPROC_PER_NODE": "two"}, "error: NPROC_PER_NODE=two: must be a number"),
]


@pytest.mark.parametrize(("environment", "expected"), MACHINES, ids=lambda value: "-".join(value))
def test_machines_and_processes(environment, expected):
    for launcher in (path for path in LAUNCHERS if ENGINES[path.stem] != "single"):
        done = dry_run("sh", launcher, **environment)
        if expected.startswith("error"):
            assert done.returncode == 2 and done.stderr == f"{expected}\n" and not done.stdout
        else:
            assert " ".join(split_command(done.stdout)[0]) == f"-m torch.distributed.run {expected}"


SHORT = ["--max_steps", "3", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"]


# One of each engine. The others pair the same recipes and engines otherwise, which the tests above hold
# them to; tests/test_engines.py trains each method under each engine.
TRAINED = [
    "finetune_qlora_single_gpu",
    "finetune_lora_ds",
    "finetune_ds",
    "finetune_lora_fsdp",
]


@pytest.mark.dist
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name == "finetune_ds" else []) for name in TRAINED]
)
def test_a_launcher_of_every_engine_trains(name, checkpoints, tmp_path):
    assert {ENGINES[trained] for trained in TRAINED} == set(ENGINES.values())
    needs(*(["bitsandbytes"] if "qlora" in name else []), *(["deepspeed"] if "ds" in name.split("_") else []))
    out = tmp_path / "out"
    launcher = ROOT / "finetune" / f"{name}.sh"
    done = subprocess.run(
        ["bash", launcher, "-m", checkpoints["untied"], "-d", CONVERSATIONS, "-o", out, *SHORT, "--save_steps", "2"],
        env=os.environ | {"NPROC_PER_NODE": "2", "OMP_NUM_THREADS": "1", "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    run = json.loads((out / "run.json").read_text())
    engine = ENGINES[launcher.stem]
    assert (run["engine"], run["status"], run["steps"]) == (engine, "finished", 3)
    assert run["processes"] == (1 if engine == "single" else 2)
    assert find_fault(out) is None and find_fault(out / "checkpoint-2") is None
    assert done.stdout.count("the training loss ") == 1
    # Not the launcher's word: run.json's comes from the settings, the log's from the start of training.
    assert ("processes, " in done.stdout) == (engine != "single")


# ---- DeepSpeed's JSON ----

CONFIGS = sorted((ROOT / "finetune").glob("ds_config_*.json"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_shipped_json_says_nothing_that_a_flag_says(path):
    assert {p.stem for p in CONFIGS} == {"ds_config_zero2", "ds_config_zero3"}
    shipped = json.loads(path.read_text())
    assert not {"optimizer", "scheduler"} & shipped.keys()
    settings = parse_arguments(["--model_name_or_path", "m", "--data_path", "d", "--output_dir", "o", "--use_cpu"]).run
    config = read_deepspeed_config(str(path), settings)
    assert config["zero_optimization"]["stage"] == int(path.stem[-1])
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        assert shipped[key] == config[key] == "auto"
    assert shipped["bf16"]["enabled"] == shipped["fp16"]["enabled"] == "auto"


WRONG = [
    ({"scheduler": {"type": "WarmupLR"}}, "scheduler WarmupLR, but --lr_scheduler_type linear says the learning rate"),
    ({"optimizer": {"type": "AdamW"}}, "optimizer AdamW, but --optim adamw_torch_fused builds the optimizer; delete"),
    ({"train_micro_batch_size_per_gpu": 7}, "train_micro_batch_size_per_gpu 7, but --per_device_train_batch_size is 8"),
    ({"gradient_accumulation_steps": 3}, "gradient_accumulation_steps 3, but --gradient_accumulation_steps is 1"),
    ({"train_batch_size": 9}, "train_batch_size 9, but batch x accumulation x processes is 8; write"),
    ({"gradient_clipping": 0.5}, 'gradient_clipping 0.5, but --max_grad_norm is 1.0; write "auto" there'),
    ({"bf16": {"enabled": True}}, "bf16.enabled true, but --bf16 is false"),
    ({"fp16": {"enabled": True}}, "fp16.enabled true, but --fp16 is false"),
    ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage 0: must be 1, 2 or 3"),
    ({"zero_optimization": None}, "zero_optimization.stage is missing: must be"),
    ({"zero_optimisation": {}}, "zero_optimisation: unknown, or not supported here; did you mean zero_optimization?"),
    ({"pipeline": {}}, "pipeline: unknown, or not supported here; delete it"),
    (
        {"zero_optimization": {"stage": 2, "stage3_prefech_bucket_size": 5}},
        "zero_optimization.stage3_prefech_bucket_size: Extra inputs are not permitted",
    ),
    ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}, "zero_hpz_partition_size: not supported"),
    (
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/x"}}},
        "zero_optimization.offload_param.device nvme: not supported; say cpu",
    ),
    ({"amp": {"enabled": True}}, "amp block, but --bf16 and --fp16 say the precision"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_a_json_that_contradicts_a_flag_is_refused_with_both_values(change, message, write_json):
    if "Extra inputs" in message:
        needs("deepspeed")  # it knows the keys
    path = write_json(json.loads(CONFIGS[0].read_text()) | change)
    settings = parse_arguments(["--model_name_or_path", "m", "--data_path", "d", "--output_dir", "o", "--use_cpu"]).run
    with pytest.raises(ValueError) as error:
        read_deepspeed_config(str(path), settings)
    assert str(error.value).startswith(f"--deepspeed {path}: ") and message in str(error.value)


def test_equal_values_are_no_contradiction(write_json):
    same = {"train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 1, "gradient_clipping": 1.0}
    path = write_json({"zero_optimization": {"stage": 2}, **same})
    settings = parse_arguments(["--model_name_or_path", "m", "--data_path", "d", "--output_dir", "o", "--use_cpu"]).run
    assert read_deepspeed_config(str(path), settings)["zero_optimization"] == {"stage": 2}


@pytest.mark.parametrize(
    ("content", "message"), [(None, "No such file"), ("{", ":1: not valid JSON"), ("[]", "object")]
)
def test_a_file_that_is_none(content, message, tmp_path, write_json):
    path = tmp_path / "absent.json" if content is None else write_json(content)
    settings = parse_arguments(["--model_name_or_path", "m", "--data_path", "d", "--output_dir", "o", "--use_cpu"]).run
    with pytest.raises(ValueError, match=message):
        read_deepspeed_config(str(path), settings)


# ---- schedulers ----

SLURM = sorted((ROOT / "examples" / "slurm").glob("*.sbatch"))
STUBS = {
    # One process on this machine for each node.
    "srun": 'while [ "${1#--}" != "$1" ]; do shift; done\n: > "$STATE/pids"\n'
    'for node in $(seq 0 $((SLURM_JOB_NUM_NODES - 1))); do SLURM_NODEID=$node "$@" & echo $! >> "$STATE/pids"; done\n'
    'code=0; for pid in $(cat "$STATE/pids"); do wait "$pid" || code=$?; done; exit $code',
    "scancel": 'echo "$@" > "$STATE/scancelled"; kill -TERM $(cat "$STATE/pids")',
    "scontrol": 'case $1 in show) echo localhost ;; *) echo "$@" > "$STATE/requeued" ;; esac',
}


@pytest.mark.parametrize("script", SLURM, ids=lambda p: p.stem)
def test_slurm_scripts_parse(script):
    subprocess.run(["bash", "-n", script], check=True)
    options = [line.split()[1] for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
    assert all(option.startswith("--") for option in options) and "--requeue" in options


@pytest.mark.dist
@pytest.mark.slow
def test_slurm_saves_requeues_and_goes_on(checkpoints, tmp_path):
    for name, body in STUBS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    out = tmp_path / "out"
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "STATE": str(tmp_path),
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "nodes[0-1]",
        "SLURM_JOB_ID": str(os.getpid()),
        "LAUNCHER": "finetune/finetune_lora_fsdp.sh",
        "OMP_NUM_THREADS": "1",
        "PYTHON": sys.executable,
    }
    words = ["-m", checkpoints["untied"], "-d", CONVERSATIONS, "-o", out, *SHORT, "--max_steps", "120"]

    def start():
        return subprocess.Popen(
            ["bash", SLURM[0], *words], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    job = start()
    while not (out / "metrics.jsonl").exists():
        assert job.poll() is None, job.stderr.read()
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    stdout, stderr = job.communicate(timeout=60)
    (checkpoint,) = out.glob("checkpoint-*")
    assert find_fault(checkpoint) is None, stderr
    assert "stopped by SIGTERM at step" in stdout
    assert (tmp_path / "scancelled").read_text() == f"--signal=TERM {os.getpid()}.0\n"
    assert (tmp_path / "requeued").read_text() == f"requeue {os.getpid()}\n"
    stdout, stderr = start().communicate(timeout=120)
    assert f"resuming from {checkpoint}" in stdout and "step 120/120" in stdout, stderr
    run = json.loads((out / "run.json").read_text())
    assert (run["status"], run["processes"], run["engine"]) == ("finished", 2, "fsdp")


@pytest.mark.dist
@pytest.mark.parametrize(
    "engine",
    [
        pytest.param([], id="ddp"),
        pytest.param(["--deepspeed", ROOT / "finetune" / "ds_config_zero2.json"], id="ds", marks=pytest.mark.slow),
    ],
)
def test_mpirun(engine, checkpoints, tmp_path):
    needs("mpi4py", *(["deepspeed"] if engine else []))
    mpirun = Path(sys.executable).with_name("mpirun")
    if not mpirun.is_file():
        pytest.skip("mpirun is not installed")
    out = tmp_path / "out"
    words = ["--model_name_or_path", checkpoints["untied"], "--data_path", CONVERSATIONS, "--output_dir", out]
    roots = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    done = subprocess.run(
        [mpirun, "-np", "2", "--oversubscribe", sys.executable, "finetune.py", *words, "--use_lora", *SHORT, *engine],
        cwd=ROOT,
        env=os.environ | roots | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    run = json.loads((out / "run.json").read_text())
    assert (run["processes"], run["rows_per_step"], run["status"]) == (2, 8, "finished")
    assert run["engine"] == ("zero2" if engine else "ddp") and done.stdout.count("the training loss ") == 1
