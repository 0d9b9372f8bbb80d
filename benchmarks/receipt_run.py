"""Runs the jobs of a receipt within its minutes, each in a process of its own, and keeps what they give."""

import contextlib
import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.receipt_schema import FORMAT
from benchmarks.receipt_stages.jobs import list_jobs, list_libraries
from benchmarks.receipt_table import draw_receipt

SCRIPT = Path(__file__).resolve().parent / "gpu_receipt.py"
JOB_S = 180  # the longest a job may take
LEAST_S = 5  # no job is begun with less left
# Of the minutes; what a stage leaves goes to the next ones, and what is left in the end to all in their order.
SHARES = {"environment": 0.05, "correctness": 0.2, "training": 0.5, "qlora": 0.15, "profile": 0.1}
NO_TIME = "no time"
Receipt = dict[str, Any]
Entry = dict[str, Any]


class ReceiptError(Exception):
    """A mistake of the user, in one line."""


def make_receipt(
    earlier: Receipt | None, minutes: float, stages: list[str], keep: Callable[[Receipt], None]
) -> Receipt:
    """Measure what is not in an earlier receipt yet.

    keep: writes the receipt; called after each job.

    Raises: ReceiptError: the earlier one is of another device, program or environment; or nothing runs here.
    """
    began = time.monotonic()
    deadline = began + 60 * minutes
    found = run_job("environment", list_jobs("environment")[0], None, time.monotonic() + JOB_S)
    if found[0]["status"] != "ok":
        raise ReceiptError(f"nothing can be measured here: {found[0].get('error') or found[0]['reason']}")
    receipt = _begin(found[0]["figures"], minutes)
    entries = {(entry["stage"], entry["name"]): entry for entry in found}
    if earlier is not None:
        _check_same(earlier, receipt)
        kept = [entry for entry in earlier["entries"] if entry["status"] != "not run"]
        entries = {(entry["stage"], entry["name"]): entry for entry in kept} | entries
    todo = [(stage, job) for stage in stages for job in list_jobs(stage) if stage != "environment"]
    for stage, job in todo:
        for name in job:
            entries.setdefault((stage, name), _not_run(stage, name))
    keep({**receipt, "entries": list(entries.values())})
    longest = dict.fromkeys(stages, float(LEAST_S))  # seconds of a job
    for stage, until in list_ends([stage for stage in stages if stage != "environment"], time.monotonic(), deadline):
        for job in [job for of, job in todo if of == stage]:
            # Again where the process ended before its last entry.
            while (begun := time.monotonic()) <= until - longest[stage] and (left := _list_left(entries, stage, job)):
                done = run_job(stage, left, _choose_profiled(entries), deadline)
                longest[stage] = max(longest[stage], time.monotonic() - begun)
                entries |= {(stage, entry["name"]): entry for entry in done}
                _tell(done)
                keep({**receipt, "entries": list(entries.values())})
    return {**receipt, "entries": list(entries.values())}


def list_ends(stages: list[str], start: float, deadline: float) -> list[tuple[str, float]]:
    """Stages and when each must end: by their shares, then once more by the deadline alone, for the time that is left.

    Example: training and profile from 0 to 60 -> training 50, profile 60, training 60, profile 60
    """
    parts = list(itertools.accumulate(SHARES[stage] for stage in stages))
    ends = [start + (deadline - start) * part / parts[-1] for part in parts]
    return [*zip(stages, ends, strict=True), *((stage, deadline) for stage in stages)]


def _begin(facts: dict[str, Any], minutes: float) -> Receipt:
    device = {name: facts[name] for name in ("name", "memory_gib", "driver", "capability", "gpus", "cuda")}
    mark = "version of "
    versions = {name.removeprefix(mark): facts[name] for name in facts if name.startswith(mark)}
    return {
        "format": FORMAT,
        "date": date.today().isoformat(),
        "git": describe_git(),
        "minutes": minutes,
        "rehearsal": facts["rehearsal"],
        "device": device,
        "versions": {"python": facts["python"], **versions},
    }


def _list_left(entries: dict[tuple[str, str], Entry], stage: str, job: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in job if entries[stage, name]["status"] == "not run")


def _tell(done: list[Entry]) -> None:
    for entry in done:
        why = entry.get("error") or entry.get("reason") or f"{entry['wall_s']} s"
        print(f"{entry['stage']}: {entry['name']}: {entry['status']} ({why})", file=sys.stderr, flush=True)


def describe_git() -> str:
    """The commit, with "-dirty" where files were changed; "unknown" without git."""
    try:
        commit, changed = (
            subprocess.run(["git", *words], cwd=SCRIPT.parent, capture_output=True, text=True, check=True).stdout
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.strip() + ("-dirty" if changed.strip() else "")


def _check_same(earlier: Receipt, now: Receipt) -> None:
    """Raises: ReceiptError: figures of two machines or programs would stand in one receipt."""
    for name in ("device", "versions", "git"):
        if earlier[name] != now[name]:
            raise ReceiptError(
                f"the receipt that is there was begun with another {name} ({earlier[name]}, now {now[name]}); move it "
                "away, or name another file with --out"
            )


def _choose_profiled(entries: dict[tuple[str, str], Entry]) -> tuple[str, bool]:
    """(name, gradient checkpointing) of our cell with the lowest share of the device's rate; NeMo's without any."""
    figures = {
        name: entry["figures"]
        for (stage, name), entry in entries.items()
        if stage == "training" and name.endswith("/ours") and entry["status"] == "ok"
    }
    if not figures:
        return "nemo/ours", False
    slowest = min(figures, key=lambda name: figures[name]["matmul_share"])
    return slowest, figures[slowest]["gradient_checkpointing"]


def run_job(stage: str, names: tuple[str, ...], profiled: tuple[str, bool] | None, deadline: float) -> list[Entry]:
    """Entries of one process, whatever becomes of it: those it did not come to are "not run".

    profiled: what the profile is of. deadline: of time.monotonic().
    """
    with tempfile.TemporaryDirectory() as directory:
        lines, log = Path(directory, "lines"), Path(directory, "log")
        command = [sys.executable, str(SCRIPT), "--stage", stage, "--names", json.dumps(names), "--out", str(lines)]
        if stage == "profile":
            command += ["--cell", json.dumps(profiled)]
        own_limit = time.monotonic() + JOB_S
        status = _run(command, log, min(own_limit, deadline))
        text = lines.read_text(encoding="utf-8") if lines.exists() else ""
        # A process that was killed may have left half a line.
        done = {entry["name"]: entry for entry in map(json.loads, text.split("\n")[:-1])}
        left = [name for name in names if name not in done]
        done |= {name: _not_run(stage, name) for name in left}
        error = None
        if status is None and own_limit <= deadline:
            error = f"took more than {JOB_S} s"
        elif status:
            error = _last_line(log) or f"ended with status {status}"
        if left and error:  # it ended in the first that is missing
            done[left[0]] = {"stage": stage, "name": left[0], "status": "failed", "error": error}
    return [done[name] for name in names]


def _not_run(stage: str, name: str) -> Entry:
    """An entry before it is measured: that cannot be where a library is not here."""
    for library in list_libraries(stage, name):
        if importlib.util.find_spec(library) is None:
            return {"stage": stage, "name": name, "status": "skipped", "reason": f"{library} is not installed"}
    return {"stage": stage, "name": name, "status": "not run", "reason": NO_TIME}


def _run(command: list[str], log: Path, until: float) -> int | None:
    """Run a command with all it starts. Returns: its status; None where it was stopped for its time."""
    # NVIDIA's images round the inputs of fp32 products to TF32, which would be no reference.
    exact = {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "0"}
    environment = {**os.environ, **exact, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    with log.open("w", encoding="utf-8") as file:
        # The other end of its standard input closes when this process ends, however it does (end_with_parent).
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=file, stderr=file, env=environment, start_new_session=True
        )
        try:
            return process.wait(max(0.1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    if any("out of memory" in line.lower() for line in lines):
        return "out of memory"
    return lines[-1][:300] if lines else ""


def write_receipt(out: Path, receipt: Receipt) -> None:
    """The JSON and its table, each whole or as it was before."""
    out.parent.mkdir(parents=True, exist_ok=True)
    for path, text in ((out, json.dumps(receipt, indent=1)), (out.with_suffix(".md"), draw_receipt(receipt))):
        half = path.with_name(f".{path.name}.part")
        half.write_text(text + "\n", encoding="utf-8")
        half.replace(path)
