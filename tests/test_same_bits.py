"""The comparison of two trees' results: equal to the last bit, or the first difference by name."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.same_bits import STEPS, compare


def write_run(directory):
    checkpoint = directory / "checkpoint-3"
    checkpoint.mkdir(parents=True)
    lines = [{"step": n, "loss": 1 / n, "grad_norm": n / 7, "learning_rate": 1e-3} for n in range(1, STEPS + 1)]
    write_metrics(directory, [*lines, {"step": STEPS, "samples": []}])
    save_file(
        {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}, directory / "m.safetensors"
    )
    save_file({"state": torch.zeros(3)}, checkpoint / "training_state.safetensors")
    return directory


def write_metrics(directory, lines):
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def read_metrics(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def runs(tmp_path):
    before = write_run(tmp_path / "before")
    shutil.copytree(before, tmp_path / "after")
    return before, tmp_path / "after"


def change_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def flip_bit(name):
    def change(tensors):
        tensors[name].view(torch.uint8)[..., 0] ^= 1

    return change


def test_equal_runs_are_the_same(runs):
    found = compare(*runs)
    assert (found.num_steps, found.num_tensors, found.difference) == (STEPS, 3, None)
    assert found.megabytes == pytest.approx((6 * 4 + 4 * 2 + 3 * 4) / 1e6)


@pytest.mark.parametrize(
    ("file", "change", "difference"),
    [
        ("m.safetensors", flip_bit("b"), "m.safetensors: b: bytes differ"),
        (
            "checkpoint-3/training_state.safetensors",
            flip_bit("state"),
            "checkpoint-3/training_state.safetensors: state: bytes differ",
        ),
        ("m.safetensors", lambda t: t.pop("a"), "m.safetensors: a: only in BEFORE"),
        ("m.safetensors", lambda t: t.update(c=t["b"].clone()), "m.safetensors: c: only in AFTER"),
        ("m.safetensors", lambda t: t.update(a=t["a"].view(3, 2)), "m.safetensors: a: [2, 3], then [3, 2]"),
        ("m.safetensors", lambda t: t.update(b=t["b"].half()), "m.safetensors: b: BF16, then F16"),
    ],
)
def test_a_changed_tensor_is_named(file, change, difference, runs):
    change_tensors(runs[1] / file, change)
    assert compare(*runs).difference == difference


def test_a_missing_file_is_named(runs):
    (runs[1] / "checkpoint-3" / "training_state.safetensors").unlink()
    assert compare(*runs).difference == "checkpoint-3/training_state.safetensors: state: only in BEFORE"


def test_measured_values_are_compared_to_the_last_bit(runs):
    lines = read_metrics(runs[1])
    lines[1]["loss"] += 2**-53
    write_metrics(runs[1], lines)
    assert compare(*runs).difference == "step 2: loss 0.5, then loss 0.5000000000000001"
    assert compare(*runs, first_step=3).difference is None
    write_metrics(runs[1], read_metrics(runs[0])[:-2])
    assert compare(*runs).difference == "step 6: only in BEFORE"


def test_two_runs_that_both_lack_something_are_not_the_same(runs):
    for run in runs:
        write_metrics(run, read_metrics(run)[:-2])
    assert compare(*runs).difference == "steps [1, 2, 3, 4, 5] instead of 1 to 6"
    for run in runs:
        write_run(shutil.rmtree(run) or run)
        shutil.rmtree(run / "checkpoint-3")
        (run / "m.safetensors").unlink()
    assert compare(*runs).difference == "no tensors"
