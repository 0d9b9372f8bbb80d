"""Runs of finetune.py in forked processes: the libraries are imported once, and a run can be hurt at any event.

Other modules that train run likewise (`module`), in the processes that torchrun would start for them.

`python -m tests.forks` reads requests, a JSON object a line, and answers each with a line:

    {"module": "finetune", "words": [...], "processes": 2, "plan": {...}, "log": "DIR"}  ->  {"codes": [...]}

A plan hurts one process (rank, default 0) at an event. Events are counted from 1 over a process's whole run: the
start of every training step, the end of every backward pass, every micro-batch of an evaluation, every fsync of a save,
the start and end of every rotation.

    {"at": 17, "do": "SIGKILL"}             this process dies; the others are killed as soon as it is seen
    {"at": 17, "do": "SIGTERM"}             the signal comes to it; "again": another one at the next event
    {"at": 17, "do": "exit"}                this process dies alone
    {"at": 17, "do": "nan"}                 a weight becomes nan
    {"at": 17, "do": "full"}                from here on no file can grow beyond "bytes"
    {"at": 17, "do": "readonly"}            from here on the output directory cannot be written to
    {"do": "readonly at start"}             likewise, before anything else
    {"at": 17, "do": "kill_loader"}         a data loader process dies, "after_s"
    {"at": 17, "do": "SIGINT to all"}       the signal comes to this process and its data loaders
    "only": "step"                          counts only events of this kind
    "slow_s": 0.01                          every fsync takes that much longer
"""

import contextlib
import ctypes
import gc
import json
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from tests.conftest import ROOT, needs


class ForkServer:
    """The parent of the forked runs. Close it."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._count = 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.forks"],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=open(directory / "server.err", "w"),  # what libraries say when they are imported  # noqa: SIM115
            text=True,
        )

    def run(
        self,
        *words,
        module: str = "finetune",
        processes: int = 1,
        timeout_s: int = 120,
        words_of=None,
        directories=None,
        **plan,
    ) -> tuple[int, str, str]:
        """Run a module. Returns: exit code of rank 0 (128 + n if signal n ended it), all of stdout, of stderr.

        words_of: more words for some ranks, by rank. directories: working directories of all ranks.
        """
        if "--deepspeed" in words:
            needs("deepspeed")
        self._count += 1
        log = self._directory / str(self._count)
        log.mkdir()
        request = {
            "module": module,
            "words": [str(word) for word in words],
            "words_of": words_of or {},
            "directories": directories,
            "processes": processes,
            "plan": plan,
            "log": str(log),
            "timeout_s": timeout_s,
        }
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        codes = json.loads(self._process.stdout.readline())["codes"]
        out, err = ("".join(p.read_text() for p in sorted(log.glob(f"*.{name}"))) for name in ("out", "err"))
        self.codes = codes
        self.num_events = [int(path.read_text() or 0) for path in sorted(log.glob("*.events"))]
        return codes[0], out, err

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def serve() -> None:
    with contextlib.suppress(ImportError):  # not installed: no test asks for it
        import deepspeed  # noqa: F401
    import peft.tuners.lora  # noqa: F401
    import torch.profiler  # noqa: F401

    import commands.finetune  # noqa: F401 (imports all other libraries)

    gc.collect()
    gc.freeze()  # children need not search what was imported

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        children = []
        for rank in range(request["processes"]):
            pid = os.fork()
            if pid == 0:
                _run(request, rank, port)
            children.append(pid)
        print(json.dumps({"codes": _wait(children, request)}), file=answers, flush=True)


def _wait(children: list[int], request: dict) -> list[int]:
    kill_all = request["plan"].get("do") == "SIGKILL"
    codes: dict[int, int] = {}
    deadline = time.monotonic() + request["timeout_s"]
    while len(codes) < len(children):
        for pid in children:
            if pid not in codes and (done := os.waitpid(pid, os.WNOHANG))[0]:
                codes[pid] = os.waitstatus_to_exitcode(done[1])
        hurt = kill_all and any(code == -signal.SIGKILL for code in codes.values())
        if hurt or time.monotonic() > deadline:
            for pid in set(children) - set(codes):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    return [code if code >= 0 else 128 - code for code in (codes[pid] for pid in children)]


def _run(request: dict, rank: int, port: int) -> None:
    """In the child: become the module."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored where the tests run under nohup
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{request['log']}/{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    if request["processes"] > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(request["processes"]),
            "LOCAL_WORLD_SIZE": str(request["processes"]),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
        }
    plan = request["plan"]
    if plan.get("do") == "readonly at start":
        _make_read_only(Path(request["words"][request["words"].index("--output_dir") + 1]))
    count_events = _hook(plan if plan.get("rank", 0) == rank else {"slow_s": plan.get("slow_s")})
    sys.argv = [request["module"], *request["words"], *request["words_of"].get(str(rank), [])]
    if request["directories"]:
        os.chdir(request["directories"][rank])
    code = 0
    try:
        runpy.run_module(request["module"], run_name="__main__")
    except SystemExit as exit_:
        code = exit_.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 99
    Path(request["log"], f"{rank}.events").write_text(str(count_events()))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _hook(plan: dict):
    """Count events, and act at one. Returns: a function that says how many there were."""
    from tuning.training.trainer import StepTrainer

    fsync = os.fsync
    count = 0
    again = getattr(signal, plan["again"]) if "again" in plan else None
    current: list = []

    def event(kind: str, trainer=None) -> None:
        nonlocal count, again
        current[:] = [trainer or (current[0] if current else None)]
        if again is not None and count >= plan["at"]:
            number, again = again, None
            os.kill(os.getpid(), number)
        if plan.get("only", kind) == kind:
            count += 1
            if count == plan.get("at"):
                _hurt(plan, current[0])

    def slow_fsync(descriptor):
        event("fsync")
        time.sleep(plan.get("slow_s") or 0)
        fsync(descriptor)

    StepTrainer.observers.append(event)
    os.fsync = slow_fsync
    return lambda: count


def _hurt(plan: dict, trainer) -> None:
    action = plan["do"]
    if action.endswith(" to all"):
        for pid in (*_data_loaders(), os.getpid()):
            os.kill(int(pid), getattr(signal, action.partition(" ")[0]))
    elif action.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, action))
    elif action == "exit":
        print("boom", file=sys.stderr, flush=True)
        os._exit(3)
    elif action == "nan":
        next(p for p in trainer.model.parameters() if p.requires_grad).data.view(-1)[0] = float("nan")
    elif action == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (plan["bytes"], plan["bytes"]))
    elif action == "readonly":
        _make_read_only(Path(trainer.args.output_dir))
    elif action == "kill_loader":
        if "after_s" in plan:
            threading.Timer(plan["after_s"], _kill, (_data_loaders()[0],)).start()
        else:
            _kill(_data_loaders()[0])
    else:
        raise ValueError(action)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it had ended
        os.kill(pid, signal.SIGKILL)


def _data_loaders() -> list[int]:
    return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


def _make_read_only(directory: Path) -> None:
    directory.chmod(0o555)
    if os.geteuid() == 0:  # root may write anywhere, by two capabilities
        libc = ctypes.CDLL(None)
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)
        sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice
        assert libc.capget(header, sets) == 0
        for index in (0, 1):
            sets[index] &= ~(1 << 1 | 1 << 2)  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        assert libc.capset(header, sets) == 0


if __name__ == "__main__":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # the server goes with pytest
    serve()
