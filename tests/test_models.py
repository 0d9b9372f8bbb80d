"""docs/models.md: what is done with which architecture. The table is written from what happens here.

WRITE_DOCS=1 python -m pytest tests/test_models.py -m slow
"""

import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import merge_lora
from data_utils.tokenizer import load_tokenizer
from tests import runs
from tests.architectures import ARCHITECTURES, write
from tests.conftest import CONVERSATIONS, ROOT, needs
from tests.test_cli import flags
from tuning.checkpoint.result import ResultWriter
from tuning.checkpoint.run_record import RunFacts
from tuning.errors import SettingsError
from tuning.model.build import freeze_other_parts
from tuning.model.loading import identify_checkpoint, load_model
from tuning.model.packing import enable_packing
from tuning.model.quantization import dequantize
from tuning.model.training_model import TrainingModel, check_loss_path

DOCS = ROOT / "docs" / "models.md"
COLUMNS = ("full", "LoRA", "Q-LoRA", "packed", "merged", "resumed")
STEPS = 2
BEGIN, END = "<!-- written by tests/test_models.py -->\n", "<!-- until here -->\n"


def save(training_model, checkpoint, out):
    """Write a result as a run does. Returns: the logits of the model in memory."""
    out.mkdir(parents=True)
    base = SimpleNamespace(identity=identify_checkpoint(str(checkpoint)), compute_dtype=torch.float32)
    causal_lm, tokenizer = training_model.causal_lm, load_tokenizer(str(checkpoint))
    facts = RunFacts({}, {}, "", {}, None)
    writer = ResultWriter(training_model, tokenizer, causal_lm.generation_config, base=base, facts=facts)
    writer.write(out, writer.collect())
    writer.seal(out, step=STEPS)
    ids = torch.tensor([[1022, 40, 41, 1023, 5, 1022, 7, 8, 1023, 1021]])
    with torch.no_grad():
        return training_model.eval().causal_lm(input_ids=ids).logits


def check_losses(trainer, expected):
    for (loss, norm), (expected_loss, expected_norm) in zip(runs.measured(trainer), expected, strict=True):
        assert loss == pytest.approx(expected_loss, abs=1e-5)
        assert norm == pytest.approx(expected_norm, rel=1e-3)


def check_logits(found, expected):
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max().clamp(min=1)


def can_pack(checkpoint):
    probe = TrainingModel(load_model(str(checkpoint), dtype=torch.float32))
    return enable_packing(probe, max_length=runs.MAX_LENGTH, dtype=torch.float32)


def check_kind(checkpoint, kind, folder, *, packed):
    """Train, compare with plain transformers, save, load elsewhere."""
    rows, template = runs.example_rows(checkpoint)
    model = runs.build(checkpoint, kind, template)
    if kind == "full":
        freeze_other_parts(model.causal_lm)
    check_loss_path(model)
    reference = checkpoint
    if kind == "nf4":
        reference = folder / "dequantised"
        dequantize(load_model(str(checkpoint), dtype=torch.float32, quantization=runs.NF4)).save_pretrained(reference)
        shutil.copytree(checkpoint, reference, ignore=shutil.ignore_patterns("*.safetensors*"), dirs_exist_ok=True)
    expected = runs.reference(reference, kind, model, rows, steps=STEPS)
    trainer = runs.train(
        model.train(), rows, folder / "run", kind=kind, batch=4, accumulation=2, steps=STEPS, packed=packed
    )
    check_losses(trainer, expected)
    logits = save(model, checkpoint, folder / "out")
    check_logits(runs.probe_logits(reference, folder / "out"), logits)


def check_resume(run_script, checkpoint, folder):
    def run(out, *more):
        words = flags(checkpoint, CONVERSATIONS, out, "--use_lora", "--lora_r", 4, *more)
        code, _, stderr = run_script("finetune.py", *words)
        assert code == 0, stderr

    run(folder / "whole", "--save_steps", 2)
    (folder / "torn").mkdir()  # as a kill after the first save leaves it
    shutil.copytree(folder / "whole" / "checkpoint-2", folder / "torn" / "checkpoint-2")
    for name in ("run.json", "metrics.jsonl"):
        shutil.copy(folder / "whole" / name, folder / "torn")
    run(folder / "torn", "--save_steps", 2, "--resume_from_checkpoint", "auto")
    whole, torn = (load_file(folder / each / "adapter_model.safetensors") for each in ("whole", "torn"))
    assert whole.keys() == torn.keys() and all(torch.equal(whole[name], torn[name]) for name in whole)


def try_all(name, tokenizer, root, run_script) -> dict[str, str]:
    """What each column says; a refusal begins with "refused: "."""
    checkpoint = write(name, tokenizer, root / "base")
    obstacle = can_pack(checkpoint)
    packed = obstacle is None
    checks = {
        "full": lambda: check_kind(checkpoint, "full", root / "full", packed=packed),
        "LoRA": lambda: check_kind(checkpoint, "lora", root / "lora", packed=packed),
        "Q-LoRA": lambda: check_kind(checkpoint, "nf4", root / "nf4", packed=packed),
        "packed": lambda: None,
        "merged": lambda: merge_lora.main([str(root / "lora" / "out"), str(root / "merged")]),
        "resumed": lambda: check_resume(run_script, checkpoint, root),
    }
    marks = {}
    for column, check in checks.items():
        try:
            check()
            marks[column] = "yes"
        except SettingsError as error:
            marks[column] = f"refused: {str(error).replace(str(checkpoint), 'MODEL')}"
    if not packed:
        marks["packed"] = f"padded: {obstacle}"
    if marks["merged"] == "yes":
        adapted = runs.probe_logits(checkpoint, root / "lora" / "out")
        check_logits(runs.probe_logits(checkpoint, root / "merged"), adapted)
    return marks


FOUND: dict[str, dict[str, str]] = {}


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.xdist_group("models")
def test_an_architecture(name, tokenizer, tmp_path, run_script):
    needs("bitsandbytes")
    FOUND[name] = try_all(name, tokenizer, tmp_path, run_script)
    row = format_row(name, FOUND[name])
    if "WRITE_DOCS" not in os.environ:
        assert row in DOCS.read_text(encoding="utf-8").splitlines()
    elif len(FOUND) == len(ARCHITECTURES):
        text = DOCS.read_text(encoding="utf-8")
        before, after = text.partition(BEGIN)[0], text.partition(END)[2]
        DOCS.write_text(before + BEGIN + format_table(FOUND) + END + after, encoding="utf-8")


def test_every_architecture_has_its_row_and_qwens_are_not_refused():
    """What a refusal may be for the Qwen family: experts in 4 bits."""
    rows = [line for line in DOCS.read_text(encoding="utf-8").splitlines() if line.startswith("| ")][1:]
    cells = {row.split("|")[1].strip(): [cell.strip() for cell in row.split("|")[2:-1]] for row in rows}
    assert cells.keys() == ARCHITECTURES.keys()
    for name, marks in cells.items():
        if name.startswith("Qwen"):
            allowed = {"Q-LoRA"} if "MoE" in name or "Next" in name else set()
            refused = {column for column, mark in zip(COLUMNS, marks, strict=True) if mark != "yes"}
            assert refused <= allowed, name


def format_row(name: str, marks: dict[str, str]) -> str:
    return f"| {name} | {' | '.join(mark.partition(':')[0] for mark in marks.values())} |"


def format_table(found: dict[str, dict[str, str]]) -> str:
    lines = [f"| architecture | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines += [format_row(name, found[name]) for name in ARCHITECTURES]
    reasons: dict[str, list[str]] = {}
    for name in ARCHITECTURES:
        for column, mark in found[name].items():
            if mark != "yes":
                reasons.setdefault(f"{column}: {_general(mark)}", []).append(name)
    said = [f"- {', '.join(names)}. {reason}" for reason, names in reasons.items()]
    return "\n".join([*lines, "", "What is refused, and why:", "", *said]) + "\n"


def _general(reason: str) -> str:
    """Without numbers and names of one tiny model."""
    import re

    return re.sub(
        r"\([\d,]+ parameters\)", "(all their parameters)", re.sub(r"\(model\.\S+\)", "(mlp.experts)", reason)
    )
