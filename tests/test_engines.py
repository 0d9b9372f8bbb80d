"""One trajectory: one process, DDP, ZeRO-2, ZeRO-3 and FSDP2 train the same model, and save the same result."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests import runs
from tests.conftest import needs
from tuning.checkpoint.adapter import adapter_state

ENGINES = ["ddp", "zero2", "zero3", "fsdp"]
KINDS = ["full", "lora", "tokens"]
QUANTIZED, QUANTIZED_ENGINES = ["nf4/packed", "nf4/padded"], ["ddp", "zero2", "fsdp"]  # ZeRO-3 is refused
ARMS = [f"{kind}/{layout}" for kind in KINDS for layout in ("packed", "padded")]


def train_arms(forks, engine, checkpoint, out, steps, arms) -> None:
    """Each arm asserts by its objects that it is what it is called (tests/engines.py)."""
    if engine.startswith("zero"):
        needs("deepspeed")
    if any(arm.startswith("nf4") for arm in arms):
        needs("bitsandbytes")
    command = [checkpoint, out / engine, engine, steps, *arms]
    processes = 1 if engine == "single" else 2
    code, _, stderr = forks.run(*command, module="tests.engines", processes=processes, timeout_s=300)
    assert code == 0, stderr[-3000:]


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


ONE_STEP = ["full/packed", "tokens/padded"]
SIX_STEPS = {
    "untied": ARMS,
    "tied": ["full/packed", "tokens/packed", "matrices/packed", "loraplus/packed"],
    "moe": ["full/packed", "lora/packed", "lora/padded", "tokens/packed"],
}


@pytest.fixture(scope="module")
def single(forks, checkpoints, tmp_path_factory):
    """(checkpoint, steps, arms) -> directory of what one process trained, once."""
    known = {}

    def get(name, steps, arms):
        key = (name, steps, *arms)
        if key not in known:
            out = tmp_path_factory.mktemp("single")
            train_arms(forks, "single", checkpoints[name], out, steps, arms)
            known[key] = out
        return known[key] / "single"

    return get


def check_arms(forks, checkpoint, single, out, engine, steps, arms):
    alone = single(checkpoint.name, steps, arms)
    if engine == "zero3" and checkpoint.name == "moe":  # adapters of experts do not train under it
        arms = [arm for arm in arms if arm.startswith("full")]
    train_arms(forks, engine, checkpoint, out, steps, arms)
    for arm in arms:
        assert_same(checkpoint, out / engine / arm, alone / arm, steps)


@pytest.mark.dist
@pytest.mark.parametrize("engine", ENGINES)
def test_one_step_is_the_same(forks, checkpoints, single, tmp_path, engine):
    check_arms(forks, checkpoints["untied"], single, tmp_path, engine, 1, ONE_STEP)


@pytest.mark.dist
@pytest.mark.parametrize("engine", QUANTIZED_ENGINES)
def test_one_step_on_quantised_weights_is_the_same(forks, checkpoints, single, tmp_path, engine):
    check_arms(forks, checkpoints["untied"], single, tmp_path, engine, 1, QUANTIZED[:1])


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("name", SIX_STEPS)
@pytest.mark.parametrize("engine", ENGINES)
def test_six_steps_are_the_same(forks, checkpoints, single, tmp_path, engine, name):
    check_arms(forks, checkpoints[name], single, tmp_path, engine, 6, SIX_STEPS[name])


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("name", ["untied", "tied"])
@pytest.mark.parametrize("engine", QUANTIZED_ENGINES)
def test_six_steps_on_quantised_weights_are_the_same(forks, checkpoints, single, tmp_path, engine, name):
    check_arms(forks, checkpoints[name], single, tmp_path, engine, 6, QUANTIZED)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["untied", "moe"])
def test_one_process_is_plain_transformers(checkpoints, single, name):
    for kind in KINDS:
        rows, template = runs.example_rows(checkpoints[name])
        fresh = runs.build(checkpoints[name], kind, template)
        expected = runs.reference(checkpoints[name], kind, fresh, rows)
        for (loss, norm), (expected_loss, expected_norm) in zip(
            read(single(name, 6, SIX_STEPS[name]) / f"{kind}/packed"), expected, strict=True
        ):
            assert loss == pytest.approx(expected_loss, abs=1e-5)
            assert norm == pytest.approx(expected_norm, rel=1e-4)
