"""What a run forgets: loss and KL against plain transformers, under engines, resumed; and when it stops early."""

import json
import math
import re
import shutil

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from data_utils.conversations import DataOptions
from data_utils.dataset import load_rows
from data_utils.steps import StepDataset
from data_utils.training_data import GENERAL_FILE
from tests import runs
from tests.conftest import tear
from tests.test_chaos import read_metrics, words
from tuning.model.divergence import NUM_LIKELIEST, compare_with_base, compare_with_start, keep_start
from tuning.training.forgetting import START_FILE, ForgettingMeter
from tuning.training.outcome import count_stale, describe_general, describe_outcome


@given(st.integers(0, 9), st.integers(1, 30), st.integers(2, 120), st.integers(1, 7))
def test_divergence_in_chunks_is_the_definition(seed, num_tokens, vocabulary, chunk):
    torch.manual_seed(seed)
    logits, start = torch.randn(2, num_tokens, vocabulary, dtype=torch.float64) * 3
    targets = torch.randint(vocabulary, (num_tokens,))

    def read(hidden):
        return torch.log_softmax(hidden, -1)

    p, q = read(start), read(logits)
    kl = (q.exp() * (q - p)).sum(1)
    expected = torch.stack([F.nll_loss(q, targets, reduction="none"), F.nll_loss(p, targets, reduction="none"), kl], 1)
    assert torch.allclose(compare_with_base(logits, start, targets, read, read, chunk), expected)
    kept = keep_start(start, targets, read, chunk)
    found = compare_with_start(logits, targets, read, kept, chunk)
    assert torch.allclose(found[:, :2], expected[:, :2])
    if vocabulary <= NUM_LIKELIEST:
        assert torch.allclose(found[:, 2], kl, atol=1e-5)
    else:
        assert (found[:, 2] <= kl + 1e-6).all(), "tokens taken together cannot differ more"


@pytest.fixture(scope="module")
def general(checkpoints, tmp_path_factory):
    file = tmp_path_factory.mktemp("general") / "general.jsonl"
    lines = GENERAL_FILE.read_text(encoding="utf-8").splitlines()
    file.write_text("\n".join(lines[::40] + lines[5::40]), encoding="utf-8")
    return file


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind", ["tokens", "full"])
def test_it_measures_what_plain_transformers_does(checkpoints, general, tmp_path, kind, packed):
    rows, template = runs.example_rows(checkpoints["untied"])
    model = runs.build(checkpoints["untied"], kind, template)
    texts, _ = load_rows([general], template, DataOptions(max_length=runs.MAX_LENGTH))
    steps = StepDataset(texts, rows_per_step=4, max_tokens=4 * runs.MAX_LENGTH, packed=packed, seed=None)
    meter = ForgettingMeter(steps, torch.device("cpu"), has_adapter=kind != "full")
    args = runs.run_arguments(tmp_path, kind=kind, batch=4, accumulation=2, steps=4)
    trainer = runs.train_with(args, model, rows, packed=packed, meter=meter)
    found = trainer.general
    base = runs.load_plain(checkpoints["untied"])
    losses, base_losses, divergences = [], [], []
    for index in range(len(texts)):
        ids = torch.from_numpy(texts[index][0])[None]
        with torch.no_grad():
            q, p = (torch.log_softmax(m.eval()(ids).logits[0, :-1], -1) for m in (model.causal_lm, base))
        losses += F.nll_loss(q, ids[0, 1:], reduction="none").tolist()
        base_losses += F.nll_loss(p, ids[0, 1:], reduction="none").tolist()
        divergences += (q.exp() * (q - p)).sum(1).tolist()
    mean = {name: math.fsum(v) / len(v) for name, v in
            {"general_loss": losses, "general_base_loss": base_losses, "general_kl": divergences}.items()}  # fmt: skip
    assert found["general_loss"] == pytest.approx(mean["general_loss"], rel=1e-5)
    assert found["general_base_loss"] == pytest.approx(mean["general_base_loss"], rel=1e-5)
    assert mean["general_kl"] > 0.001
    if kind == "full":
        assert 0 < found["general_kl"] <= mean["general_kl"] * 1.0001
    else:
        assert found["general_kl"] == pytest.approx(mean["general_kl"], rel=1e-3)


def test_the_general_texts():
    rows = [json.loads(line) for line in GENERAL_FILE.read_text(encoding="utf-8").splitlines()]
    kinds = [row["id"].rpartition("-")[0] for row in rows]
    assert {kind: kinds.count(kind) for kind in kinds} == dict.fromkeys(
        ("prose-en", "prose-zh", "code", "arithmetic", "refusal"), 40
    )
    assert len({row["text"] for row in rows}) == 200 and all(row.keys() == {"id", "text"} for row in rows)


def forgetting_words(checkpoint, out, general, kind="lora", **options):
    return [
        *words(checkpoint, out, kind, steps=6, eval_steps=2, **options),
        "--forgetting",
        "True",
        "--general",
        general,
    ]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_resumed_run_measures_the_same(forks, checkpoints, general, tmp_path, kind):
    out = tmp_path / "out"
    command = forgetting_words(checkpoints["untied"], out, general, kind)
    code, stdout, stderr = forks.run(*command)
    assert code == 0, stderr
    whole, result = read_metrics(out), json.loads((out / "run.json").read_text())["general"]
    assert sum("general_kl" in line for line in whole) == 3 and "general text: loss" in stdout
    last = [line for line in whole if "general_kl" in line][-1]
    assert result["general_loss"] == last["general_loss"], "the result is the last step"
    assert (out / "checkpoint-4" / START_FILE).is_file() == (kind == "full")
    tear(out)
    shutil.rmtree(out / "checkpoint-6")
    assert forks.run(*command)[0] == 0
    assert read_metrics(out) == whole
    if kind == "full":
        tear(out)
        shutil.rmtree(out / "checkpoint-6")
        for path in (out / "checkpoint-4").glob("manifest.json"):
            manifest = json.loads(path.read_text())
            assert START_FILE in manifest["files"]


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("engine", ["ddp", "zero3", "fsdp"])
def test_engines_measure_the_same(forks, checkpoints, general, tmp_path, engine):
    found = {}
    for kind in ("lora", "full"):
        for processes, name in ((1, "ddp"), (2, engine)):
            out = tmp_path / f"{kind}-{processes}"
            command = forgetting_words(
                checkpoints["untied"], out, general, kind, dropout=0, engine=name, rows_per_process=8 // processes
            )
            code, _, stderr = forks.run(*command, processes=processes, timeout_s=300)
            assert code == 0, stderr[-3000:]
            found[kind, processes] = [line for line in read_metrics(out) if "general_kl" in line]
        for one, two in zip(found[kind, 1], found[kind, 2], strict=True):
            for key in ("general_loss", "general_base_loss", "general_kl"):
                assert two[key] == pytest.approx(one[key], rel=2e-3), (kind, key)


# ---- stopping early, and what a run says in the end ----


@given(st.lists(st.floats(0, 9)), st.floats(0, 2))
def test_stale_evaluations(losses, threshold):
    lowest, stale = math.inf, 0
    for loss in losses:  # the definition, by hand
        improves = lowest - loss > threshold if math.isfinite(lowest) else True
        stale = 0 if improves else stale + 1
        lowest = loss if improves else lowest
    assert count_stale(losses, threshold) == stale or any(
        math.isclose(abs(a - b), threshold) for a in losses for b in losses
    )


@pytest.mark.slow
def test_it_stops_early_and_a_resumed_run_does_so_at_the_same_step(forks, checkpoints, tmp_path):
    out = tmp_path / "out"
    command = words(checkpoints["untied"], out, "lora", steps=40, eval_steps=2)
    command[command.index("--learning_rate") + 1] = 0.5
    command += ["--early_stopping_patience", 2, "--early_stopping_threshold", 0.001]
    code, stdout, stderr = forks.run(*command)
    assert code == 0, stderr
    whole, run = read_metrics(out), json.loads((out / "run.json").read_text())
    step = run["steps"]
    assert run["stopped_early"] and step < 40 and f"stopped early at step {step}" in stdout
    evaluations = [line["eval_loss"] for line in whole if "eval_loss" in line]
    assert count_stale(evaluations, 0.001) == 2 and count_stale(evaluations[:-1], 0.001) == 1
    tear(out)  # killed while it wrote the result: the last checkpoint knows that nothing is left to do
    code, stdout, _ = forks.run(*command)
    assert code == 0 and read_metrics(out) == whole
    tear(out)
    shutil.rmtree(out / f"checkpoint-{step}")
    assert forks.run(*command)[0] == 0 and read_metrics(out) == whole


@pytest.mark.parametrize(
    ("losses", "evaluations", "expected"),
    [
        ([3, 2, 1], [2.0, 1.5, 1.2], ["learnt: ", "still learning"]),
        ([3, 2, 1], [2.0, 1.5, 1.9], ["learnt: ", "overfitted: the evaluation loss rose since step 2, from 1.5"]),
        ([3, 2, 1], [2.0, 1.501, 1.50, 1.502], ["learnt: ", "stopped falling: .* within 1 % of it at step 2"]),
        ([3, 2, 1], [float("nan"), 1.5, 1.2], ["learnt: ", "still learning: .* 1.2000 at step 3"]),
        ([3, 2, 1], [1.5, float("nan")], ["learnt: ", "diverged: the evaluation loss is nan; it was lowest at step 1"]),
        ([3, 3, 3], [], ["learnt nothing: "]),
    ],
)
def test_what_happened_in_words(losses, evaluations, expected):
    log = [{"step": step, "loss": loss} for step, loss in enumerate(losses, 1)]
    log += [{"step": step, "eval_loss": loss} for step, loss in enumerate(evaluations, 1)]
    lines = describe_outcome(log, None)
    assert len(lines) == len(expected)
    for line, pattern in zip(lines, expected, strict=True):
        assert re.match(pattern, line), line


@pytest.mark.parametrize(
    ("after", "kl", "verdict"), [(2.5, 0.1, "forgot"), (2.31, 0.04, "kept what it knew"), (2.3, 0.9, "moved far")]
)
def test_what_was_forgotten_in_words(after, kl, verdict):
    line = describe_general({"general_base_loss": 2.31, "general_loss": after, "general_kl": kl})
    assert line.startswith(verdict) and f"loss 2.31 -> {after:.2f}" in line
