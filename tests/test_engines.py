"""One trajectory: one process, DDP, ZeRO-2, ZeRO-3 and FSDP2 train the same model, and save the same result."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests import runs
from tests.conftest import run_python
from tuning.checkpoint.adapter import adapter_state

ENGINES = ["ddp", "zero2", "zero3", "fsdp"]
KINDS = ["full", "lora", "tokens"]
QUANTIZED = ["nf4/packed", "nf4/padded"]  # under all engines but ZeRO-3
ARMS = [f"{kind}/{layout}" for kind in KINDS for layout in ("packed", "padded")]


def train_arms(engine, checkpoint, out, steps, arms) -> None:
    """Each arm asserts by its objects that it is what it is called (tests/engines.py)."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2] if engine != "single" else []
    run_python(*torchrun, "-m", "tests.engines", checkpoint, out / engine, engine, steps, *arms)


def read(directory):
    return json.loads((directory / "measured.json").read_text())


def updates(checkpoint, directory) -> torch.Tensor:
    """What training changed, as one vector."""
    before, kind = load_file(checkpoint / "model.safetensors"), directory.parent.name
    if kind != "full":
        fresh = runs.build(checkpoint, kind, runs.example_rows(checkpoint)[1])
        before |= {name: tensor.detach() for name, tensor in adapter_state(fresh.model, fresh.token_rows).items()}
    after = load_file(next(directory.glob("*model.safetensors")))
    return torch.cat([(after[name] - before[name]).flatten().double() for name in sorted(after)])


def assert_same(checkpoint, one, other, steps):
    measured, expected = read(one), read(other)
    assert len(measured) == len(expected) == steps
    for (loss, norm), (expected_loss, expected_norm) in zip(measured, expected, strict=True):
        assert loss == pytest.approx(expected_loss, abs=1e-5)
        assert norm == pytest.approx(expected_norm, rel=1e-4)
    logits, fresh = (
        [runs.probe_logits(checkpoint, d) for d in (one, other)],
        runs.probe_logits(checkpoint, checkpoint),
    )
    assert (logits[0] - logits[1]).abs().max() < 1e-4 < (logits[0] - fresh).abs().max()
    ours, theirs = updates(checkpoint, one), updates(checkpoint, other)
    assert (ours - theirs).norm() < 1e-3 * theirs.norm()


@pytest.fixture(scope="module")
def single(checkpoints, tmp_path_factory):
    """(checkpoint, steps, arms) -> directory of what one process trained, once."""
    known = {}

    def get(name, steps, arms):
        if (name, steps, *arms) not in known:
            known[name, steps, *arms] = out = tmp_path_factory.mktemp("single")
            train_arms("single", checkpoints[name], out, steps, arms)
        return known[name, steps, *arms] / "single"

    return get


@pytest.mark.dist
@pytest.mark.parametrize("engine", ENGINES)
def test_one_step_is_the_same(checkpoints, single, tmp_path, engine):
    arms = ["full/packed", "tokens/padded", *(QUANTIZED[:1] if engine != "zero3" else [])]
    train_arms(engine, checkpoints["untied"], tmp_path, 1, arms)
    for arm in arms:
        assert_same(checkpoints["untied"], tmp_path / engine / arm, single("untied", 1, arms) / arm, 1)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("name", ["untied", "tied"])
@pytest.mark.parametrize("engine", ENGINES)
def test_six_steps_are_the_same(checkpoints, single, tmp_path, engine, name):
    arms = ARMS if name == "untied" else ["full/packed", "tokens/packed", "matrices/packed", "loraplus/packed"]
    arms = arms + (QUANTIZED if engine != "zero3" else [])
    train_arms(engine, checkpoints[name], tmp_path, 6, arms)
    for arm in arms:
        assert_same(checkpoints[name], tmp_path / engine / arm, single(name, 6, arms) / arm, 6)


@pytest.mark.slow
def test_one_process_is_plain_transformers(checkpoints, single):
    for kind in KINDS:
        rows, template = runs.example_rows(checkpoints["untied"])
        fresh = runs.build(checkpoints["untied"], kind, template)
        expected = runs.reference(checkpoints["untied"], kind, fresh, rows)
        for (loss, norm), (expected_loss, expected_norm) in zip(
            read(single("untied", 6, ARMS) / f"{kind}/packed"), expected, strict=True
        ):
            assert loss == pytest.approx(expected_loss, abs=1e-5)
            assert norm == pytest.approx(expected_norm, rel=1e-4)
