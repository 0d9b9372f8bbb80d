"""docker/: scripts with a stand-in for docker that records its words, and what the images copy and run.

No image is built here.
"""

import fnmatch
import itertools
import json
import os
import re
import shlex
import subprocess
import sys

import pytest

import chat
import serve
from tests.conftest import CONVERSATIONS, ROOT, run_python
from tests.serving import serving
from tuning.settings.arguments import parse_arguments

FOLDER = ROOT / "docker"
SCRIPTS = sorted(FOLDER.glob("docker_*.sh"))
DOCKERFILES = [FOLDER / "Dockerfile", FOLDER / "Dockerfile.cpu"]
SERVERS = {"docker_openai_api": (8000, "/v1", []), "docker_web_demo": (8901, "/", ["--page"])}
# Records its words and the key, and has the images chat-finetune:*. RUN=1: runs the command here, in place of there.
DOCKER = """#!/usr/bin/env python3
import json, os, subprocess, sys
words = sys.argv[1:]
if words[:2] == ["image", "inspect"]:
    if os.environ.get("DAEMON") == "none":
        sys.exit("Cannot connect to the Docker daemon at unix:///var/run/docker.sock. Is the docker daemon running?")
    sys.exit(0 if words[2].startswith("chat-finetune:") else f"Error response from daemon: No such image: {words[2]}")
with open(os.environ["RECORD"], "w") as file:
    json.dump({"words": words, "key": os.environ.get("SERVE_API_KEY")}, file)
if os.environ.get("RUN"):
    image = next(at for at, word in enumerate(words) if word.startswith("chat-finetune:"))
    command = words[image + 1 :]
    command[0] = {"python": os.environ["PYTHON"]}.get(command[0], command[0])
    sys.exit(subprocess.run(command, cwd=os.environ["ROOT"]).returncode)
"""


class Docker:
    """Runs the scripts where docker is the stand-in."""

    def __init__(self, directory):
        self.record = directory / "record.json"
        self.programs = directory / "bin"
        self.programs.mkdir()
        self.add("docker", DOCKER)

    def add(self, name, text):
        (self.programs / name).write_text(text)
        (self.programs / name).chmod(0o755)

    def run(self, script, *words, shell="bash", cwd=ROOT, **environment):
        self.record.unlink(missing_ok=True)
        path = f"{self.programs}:/usr/bin:/bin"
        own = {"PATH": path, "RECORD": str(self.record), "ROOT": str(ROOT), "PYTHON": sys.executable}
        return subprocess.run(
            [shell, FOLDER / f"{script}.sh", *map(str, words)], capture_output=True, text=True, cwd=cwd,
            stdin=subprocess.DEVNULL, env={**own, "OMP_NUM_THREADS": "1", **environment},
        )  # fmt: skip

    def split(self, image="chat-finetune:cpu"):
        """What docker was last called with: options, the command in the container, the key in its environment."""
        found = json.loads(self.record.read_text())
        assert found["words"][0] == "run"
        at = found["words"].index(image)
        return found["words"][1:at], found["words"][at + 1 :], found["key"]


@pytest.fixture
def docker(tmp_path):
    return Docker(tmp_path)


@pytest.fixture
def model(tmp_path):
    """A directory that looks like a model, under a name that shells and CSV would take apart."""
    directory = tmp_path / 'my, "odd" model $HOME'
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    return directory


def list_mounts(options):
    """(path, whether it is read only) of every mount, which has the same name on both sides."""
    found = []
    for flag, value in itertools.pairwise(options):
        if flag == "--mount":
            kind, source, target, *more = re.findall(r'(?:^|,)("(?:[^"]|"")*"|[^,]*)', value)
            paths = [part.strip('"').replace('""', '"').partition("=")[2] for part in (source, target)]
            assert kind == "type=bind" and paths[0] == paths[1] and more in ([], ["readonly"])
            found.append((paths[0], bool(more)))
    return found


def after(options, flag):
    return options[options.index(flag) + 1]


def check_common(options, name):
    assert after(options, "--user") == f"{os.getuid()}:{os.getgid()}" and after(options, "--pull") == "never"
    assert after(options, "--name") == name and after(options, "--security-opt") == "no-new-privileges"
    assert "--init" in options and "--privileged" not in options and not any("docker.sock" in o for o in options)


# ---- the scripts ----


def test_a_talk_in_the_terminal(docker, model):
    done = docker.run("docker_cli_demo", "-c", model, "--system", "Be $HOME 'kind'", "--max_new_tokens", "7")
    assert (done.returncode, done.stderr) == (0, "")
    options, command, _ = docker.split()
    check_common(options, "chat-cli")
    assert list_mounts(options) == [(str(model), True)]
    assert "-i" in options and "-t" not in options and "--rm" in options and "--no-healthcheck" in options
    assert command[:2] == ["python", "chat.py"]
    args = chat.build_parser().parse_args(command[2:])
    assert (args.model, args.system, args.max_new_tokens) == (str(model), "Be $HOME 'kind'", 7)


@pytest.mark.parametrize("script", SERVERS)
def test_servers(docker, model, script, monkeypatch):
    port, suffix, flags = SERVERS[script]
    done = docker.run(script, "-c", model.name, "-n", "mine", "--dtype", "bf16", cwd=model.parent)
    assert (done.returncode, done.stderr) == (0, "")
    options, command, key = docker.split()
    check_common(options, "mine")
    assert list_mounts(options) == [(str(model), True)] and after(options, "--cap-drop") == "ALL"
    assert after(options, "-p") == f"127.0.0.1:{port}:8000" and "-d" in options and "--no-healthcheck" not in options
    assert after(options, "-e") == "SERVE_API_KEY" and re.fullmatch(r"[0-9a-f]{48}", key)
    assert key not in " ".join([*options, *command])
    assert done.stdout.splitlines()[:2] == [
        f"key: {key}",
        f"started mine: http://127.0.0.1:{port}{suffix}, once the model is loaded",
    ]
    assert command[:2] == ["python", "serve.py"]
    monkeypatch.setenv("SERVE_API_KEY", key)
    args = serve.build_parser().parse_args(command[2:])
    serve.check_network(args)  # takes no other host without a key
    assert (args.model, args.host, args.port, args.dtype) == (str(model), "0.0.0.0", 8000, "bf16")
    assert args.page == bool(flags)
    healthy = read_instructions(DOCKERFILES[0])["HEALTHCHECK"][0]
    assert healthy.endswith('CMD ["python", "docker/health.py", "8000"]')


@pytest.mark.parametrize("script", SERVERS)
def test_a_key_and_an_address_of_ones_own(docker, model, script):
    done = docker.run(script, "-c", model, "--host", "0.0.0.0", "--port", "09000", SERVE_API_KEY="s3cret!")
    options, command, key = docker.split()
    assert key == "s3cret!" and after(options, "-p") == "0.0.0.0:09000:8000"
    assert "s3cret" not in done.stdout + " ".join([*options, *command])
    docker.run(script, "-c", model, "--host", "::1", SERVE_API_KEY="x")
    assert after(docker.split()[0], "-p").startswith("[::1]:")
    assert docker.run(script, "-c", model).stdout != docker.run(script, "-c", model).stdout  # another key each time


def test_an_adapter_and_its_base(docker, model, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    for script, parser in {"docker_cli_demo": chat.build_parser(), "docker_web_demo": serve.build_parser()}.items():
        done = docker.run(script, "-c", adapter)
        assert done.returncode == 2 and "is an adapter; name its base model: -b DIR" in done.stderr
        assert docker.run(script, "-c", adapter, "-b", model).returncode == 0
        options, command, _ = docker.split()
        assert list_mounts(options) == [(str(adapter), True), (str(model), True)]
        assert parser.parse_args(command[2:]).base == str(model)


def test_a_training(docker, model, tmp_path):
    (tmp_path / "data, too").mkdir()
    (tmp_path / "eval.json").write_text("[]")
    words = ["-c", model, "-d", "data, too", "-o", "new/out dir", "-r", "eval.json"]
    flags = ["--eval_data_path", str(tmp_path / "eval.json"), "--eval_strategy", "epoch", "--warmup_steps", "-1"]
    done = docker.run("docker_finetune", *words, *flags, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    options, command, _ = docker.split()
    check_common(options, "chat-finetune")
    data, out = tmp_path / "data, too", tmp_path / "new" / "out dir"
    mounts = [(str(model), True), (str(data), True), (str(tmp_path / "eval.json"), True), (str(out), False)]
    assert list_mounts(options) == mounts and out.is_dir()
    assert "--rm" in options and "--no-healthcheck" in options and "--shm-size" in options and "-d" not in options
    words = ["sh", "finetune/finetune_lora_single_gpu.sh", "-m", str(model), "-d", str(data), "-o", str(out)]
    assert command == [*words, *flags]
    planned = subprocess.run(
        [*command[:-2]], cwd=ROOT, env=os.environ | {"DRY_RUN": "1"}, capture_output=True, text=True
    )
    settings = parse_arguments(shlex.split(planned.stdout)[2:])
    assert settings.data.data_path == [str(data)] and settings.run.output_dir == str(out)
    docker.run("docker_finetune", "-c", model, "-d", data, "-o", out, "-l", "finetune/finetune_ds.sh")
    assert docker.split()[1][1] == "finetune/finetune_ds.sh"


def test_gpus(docker, model):
    docker.run("docker_cli_demo", "-c", model)
    assert "--gpus" not in docker.split()[0]
    docker.run("docker_cli_demo", "-c", model, "-g", "device=0,1")
    assert after(docker.split("chat-finetune:cuda")[0], "--gpus") == '"device=0,1"'
    docker.add("nvidia-smi", "#!/bin/sh\necho 'GPU 0: H200'\n")
    docker.run("docker_cli_demo", "-c", model)
    assert after(docker.split("chat-finetune:cuda")[0], "--gpus") == "all"
    docker.run("docker_cli_demo", "-c", model, "-g", "none")
    assert "--gpus" not in docker.split()[0]
    docker.run("docker_cli_demo", "-c", model, "-i", "chat-finetune:mine")
    assert after(docker.split("chat-finetune:mine")[0], "--gpus") == "all"


@pytest.mark.parametrize("script", [path.stem for path in SCRIPTS])
def test_help_and_mistakes(docker, model, script, tmp_path):
    done = docker.run(script, "-h", shell="sh")
    assert done.returncode == 0 and done.stdout.startswith(f"usage: bash docker/{script}.sh") and not done.stderr
    assert "See -h" not in done.stdout and len(done.stdout.splitlines()) > 8
    words = ["-c", model, *(["-d", model, "-o", tmp_path / "out"] if script == "docker_finetune" else [])]
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "config.json").symlink_to(model / "config.json")
    for wrong, message in [
        ([], "-c"),
        (["-c", "absent", *words[2:]], "-c absent: no such directory"),
        (["-c", tmp_path, *words[2:]], f"-c {tmp_path}: holds neither config.json nor adapter_config.json"),
        (["-c", tmp_path / "linked", *words[2:]], f"-c {tmp_path}/linked: holds links, which lead nowhere"),
        ([*words, "-c", model], "-c: is given twice"),
        ([*words, "-x"], "-x: unknown option"),
        ([*words, "word"], "word: unknown word"),
        ([*words, "-n"], "-n: needs a value"),
        ([*words, "-n", "-i"], "-n: needs a value"),
        ([*words, "-i", "other:1"], "no image other:1 here; build it: docker build"),
    ]:
        done = docker.run(script, *wrong)
        assert (done.returncode, done.stderr.count("\n"), done.stdout) == (2, 1, ""), done.stderr
        assert done.stderr.startswith(f"error: {message}"), done.stderr
        assert not docker.record.exists() and not (tmp_path / "out").exists()
    done = docker.run(script, *words, DAEMON="none")
    assert done.returncode == 2 and done.stderr.startswith("error: docker: Cannot connect to the Docker daemon")
    (docker.programs / "docker").unlink()
    done = docker.run(script, *words)
    assert (done.returncode, done.stderr) == (2, "error: docker is not installed\n")


@pytest.mark.parametrize("script", SERVERS)
def test_mistakes_of_servers(docker, model, script):
    for wrong, message in [
        (["--port", "0"], "--port 0: expected a number from 1 to 65535"),
        (["--port", "70000"], "--port 70000: expected"),
        (["--port", "8000:80"], "--port 8000:80: expected"),
        (["--api_key", "s3cret"], "--api_key: everyone sees it in ps; put the key into SERVE_API_KEY"),
        (["--api_key=s3cret"], "--api_key: everyone sees it"),
        (["--host=0.0.0.0"], "--host=0.0.0.0: write --host 0.0.0.0"),
        (["-d", "x"], "-d: unknown option"),
        (["-b", model], f"-b {model}: has no effect, as {model} is no adapter"),
    ]:
        done = docker.run(script, "-c", model, *wrong)
        assert done.returncode == 2 and done.stderr.startswith(f"error: {message}") and not docker.record.exists()
    for key in ("a b", "密钥", "a\nb"):
        done = docker.run(script, "-c", model, SERVE_API_KEY=key, LC_ALL="C.UTF-8")
        assert done.stderr == "error: SERVE_API_KEY: expected printable ASCII characters, without spaces\n"


def test_mistakes_of_a_training(docker, model, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    rest = ["-d", CONVERSATIONS, "-o", tmp_path / "out"]
    for wrong, message in [
        (["-c", model, "-d", CONVERSATIONS], "-c, -d and -o: say the model, the data and where the result goes"),
        (["-c", model, "-d", "absent.json", "-o", "x"], "absent.json: no such file or directory"),
        (["-c", model, *rest, "-r", "absent.json"], "absent.json: no such file or directory"),
        (["-c", model, *rest, "-l", "common.sh"], "-l common.sh: no such launcher in finetune/"),
        (["-c", tmp_path, *rest], f"-c {tmp_path}: is an adapter; name the model to train"),
    ]:
        done = docker.run("docker_finetune", *wrong)
        assert done.returncode == 2 and done.stderr.startswith(f"error: {message}"), done.stderr
        assert not docker.record.exists() and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_commands_do_run(docker, checkpoints, tmp_path):
    """Paths are the same on both sides, so the stand-in can run the command that the container would."""
    short = ["--max_steps", "1", "--per_device_train_batch_size", "2", "--save_strategy", "no"]
    words = ["-c", checkpoints["untied"], "-d", CONVERSATIONS, "-o", tmp_path / "out"]
    done = docker.run("docker_finetune", *words, *short, RUN="1", HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    words = ["-c", tmp_path / "out", "-b", checkpoints["untied"], "--prompt", "Who are you?", "--max_new_tokens", "5"]
    done = docker.run("docker_cli_demo", *words, RUN="1", HOME=str(tmp_path))
    assert done.returncode == 0 and done.stdout, done.stderr[-3000:]


# ---- the images ----


def read_instructions(dockerfile):
    """A Dockerfile's instructions by name, each with what follows it."""
    lines = [line for line in dockerfile.read_text().splitlines() if not line.startswith("#")]
    found = {}
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        if line.strip():
            name, _, rest = line.partition(" ")
            found.setdefault(name, []).append(rest)
    return found


def is_ignored(path):
    """Whether .dockerignore leaves a file out: the last line that fits it, or a folder above it, decides."""
    ignored = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!").removeprefix("**/")
        parts = path.split("/")
        fits = [fnmatch.fnmatchcase("/".join(parts[: n + 1]), pattern) for n in range(len(parts))]
        fits += [fnmatch.fnmatchcase(part, pattern) for part in parts if line.startswith("**/")]
        if line and not line.startswith("#") and any(fits):
            ignored = not line.startswith("!")
    return ignored


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_what_an_image_holds(dockerfile):
    found = read_instructions(dockerfile)
    copied = [rest.split()[:-1] for rest in found["COPY"] if not rest.startswith("--from")]
    for source in (source for sources in copied for source in sources):
        assert (ROOT / source).exists() and not is_ignored(source), source
    names = {source for sources in copied for source in sources}
    rooms = ("commands", "data_utils", "tuning", "inference", "finetune")
    needed = [*ROOT.glob("*.py"), *(path for room in rooms for path in (ROOT / room).rglob("*.*"))]
    for file in (path.relative_to(ROOT).as_posix() for path in needed if "__pycache__" not in path.parts):
        assert names & {file, file.split("/")[0]} and not is_ignored(file), file
    for secret in (".env", ".git/config", "output/x", "tests/x", "data.json", "commands/__pycache__/x.pyc"):
        assert is_ignored(secret), secret
    assert all(re.search(r":\d+\.\d+\.\d+", image) for image in found["FROM"])  # pinned
    assert found["USER"] == ["1000:1000"] and found["CMD"] == ['["python", "serve.py", "--help"]']
    install = next(rest for rest in found["RUN"] if "pip" in rest)
    assert "-r requirements_finetune.txt -r requirements_serve.txt" in install
    for package in re.findall(r"\b[\w-]+==", install):
        assert package == "torch=="  # a version stands in the requirements' files only


def test_the_images_differ_in_cuda_only():
    cuda, cpu = ([part for parts in read_instructions(path).values() for part in parts] for path in DOCKERFILES)
    assert {part for part in set(cuda) ^ set(cpu) if not re.search(r"cuda|torch|requirements_finetune", part)} == set()


@pytest.mark.parametrize("key", ["", "s3cret"])
def test_health(checkpoints, key):
    with serving(checkpoints["untied"], *(["--api_key", key] if key else [])) as served:
        port = served.url.rpartition(":")[2]
        assert run_python("docker/health.py", port, SERVE_API_KEY=key).stderr == ""
        wrong = run_python("docker/health.py", port, check=False, SERVE_API_KEY=f"{key}x")
        assert wrong.returncode == (1 if key else 0) and ("401" in wrong.stderr) == bool(key)
    gone = run_python("docker/health.py", port, check=False, SERVE_API_KEY=key)
    assert gone.returncode == 1 and "refused" in gone.stderr and len(gone.stderr.splitlines()) == 1
