"""--compile_layers: the same losses, compiled for the first steps only, and what is refused."""

import json
import shutil

import pytest
import torch

from tests import runs
from tests.conftest import CONVERSATIONS, run_python
from tests.test_cli import flags
from tuning.errors import SettingsError
from tuning.model.attention import RowLengths
from tuning.model.training_model import compile_layers, enable_gradient_checkpointing

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler here")


def test_row_lengths_are_a_sequence():
    lengths = RowLengths([3, 4])
    assert list(lengths) == [3, 4] and max(lengths) == 4 and lengths[1] == 4 and len(lengths) == 2


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_compiled_steps_equal_eager_ones_and_later_steps_compile_nothing(checkpoints, tmp_path, kind):
    rows, template = runs.example_rows(checkpoints["untied"])
    steps, compiled = {}, []

    class Watch:
        def __call__(self, event, trainer):
            if event == "step":
                compiled.append(torch._dynamo.utils.counters["frames"]["ok"])

    for compiles in (False, True):
        model = runs.build(checkpoints["untied"], kind, template)
        args = runs.run_arguments(tmp_path / str(compiles), kind=kind, batch=4, accumulation=2, steps=4)
        assert runs.enable_packing(model, max_length=runs.MAX_LENGTH, dtype=torch.float32) is None
        if compiles:
            compile_layers(model)
            runs.StepTrainer.observers.append(Watch())
        try:
            steps[compiles] = runs.measured(runs.train_with(args, model, rows, packed=True))
        finally:
            runs.StepTrainer.observers.clear()
    for one, other in zip(steps[False], steps[True], strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    assert compiled[0] < compiled[1] == compiled[-1], "micro-batches of other lengths compiled anew"


@pytest.mark.slow
@needs_compiler
def test_a_compiled_run_leaves_the_result_of_an_eager_one(checkpoints, tmp_path):
    losses = []
    for compiles in ("False", "True"):
        out = tmp_path / compiles
        words = flags(checkpoints["untied"], CONVERSATIONS, out, "--use_lora", "--lora_dropout", 0)
        run_python("finetune.py", *words, "--compile_layers", compiles, timeout_s=600)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines if "loss" in line])
        names = json.loads((out / "manifest.json").read_text())["files"]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and len(losses[0]) == 4
    assert "adapter_model.safetensors" in json.dumps(names)


@pytest.mark.slow
def test_without_a_compiler_it_says_so(checkpoints, tmp_path):
    words = flags(checkpoints["untied"], CONVERSATIONS, tmp_path / "out", "--use_lora", "--compile_layers", "True")
    environment = {"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = run_python("finetune.py", *words, check=False, **environment)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "--compile_layers: torch.compile does not work here" in done.stderr


def test_recomputed_layers_are_refused(checkpoints):
    _, template = runs.example_rows(checkpoints["untied"])
    model = runs.build(checkpoints["untied"], "lora", template)
    enable_gradient_checkpointing(model.causal_lm)
    with pytest.raises(SettingsError, match="recomputed"):
        compile_layers(model)
