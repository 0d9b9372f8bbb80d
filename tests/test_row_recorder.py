"""rows.parquet: every row's loss each time it was trained, against plain transformers, in any layout, resumed."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F

from data_utils.conversations import DataOptions
from data_utils.dataset import load_rows
from tests import runs
from tests.conftest import CONVERSATIONS, tear
from tests.test_chaos import words
from tuning.training.row_recorder import ROWS_FILE, RowRecorder
from tuning.training.trainer import StepTrainer


def read(directory):
    return pq.read_table(directory / ROWS_FILE).to_pylist()


def by_visit(table):
    return {(row["step"], row["row"]): row["loss"] for row in table}


def train(checkpoint, output, rows, template, monkeypatch, *, batch, accumulation, packed, kind="tokens"):
    """Returns: what was recorded, and the plain losses of every step's rows before that step."""
    model = runs.build(checkpoint, kind, template)
    recorder = RowRecorder(rows.num_targets, rows.describe, -(-len(rows) // 8))
    plain = {}

    def measure(event, trainer):
        if event != "step":
            return
        step = trainer.state.global_step
        for index in trainer.train_dataset.layout.rows_of(step):
            ids, labels, _ = rows[index]
            with torch.no_grad():
                logits = trainer._training_model.causal_lm.eval()(torch.from_numpy(ids)[None]).logits[0, :-1]
            plain[step + 1, index] = F.cross_entropy(logits, torch.from_numpy(labels[1:])).item()
        trainer._training_model.causal_lm.train()

    monkeypatch.setattr(StepTrainer, "observers", [measure])
    args = runs.run_arguments(output, kind=kind, batch=batch, accumulation=accumulation, steps=9)
    runs.train_with(args, model, rows, packed=packed, recorder=recorder)
    recorder.gather()
    recorder.write(output)
    return read(output), plain


@pytest.mark.parametrize(("batch", "accumulation", "packed"), [(8, 1, True), (2, 4, False)])
def test_losses_are_those_of_plain_transformers(checkpoints, tmp_path, monkeypatch, batch, accumulation, packed):
    rows, template = runs.example_rows(checkpoints["untied"])
    recorded, plain = train(
        checkpoints["untied"], tmp_path, rows, template, monkeypatch,
        batch=batch, accumulation=accumulation, packed=packed,
    )  # fmt: skip
    losses = by_visit(recorded)
    assert losses.keys() == plain.keys() and len(losses) == 8 * 7 + 2 * 8, "an epoch of 7 steps, and two more"
    for visit, loss in plain.items():
        assert losses[visit] == pytest.approx(loss, rel=2e-5), visit
    assert [row["step"] for row in recorded] == sorted(row["step"] for row in recorded)
    for row in recorded:
        assert row["epoch"] == (row["step"] - 1) // 7 and row["tokens"] == rows.num_targets[row["row"]]
        assert row["row_id"] == rows.row_id(row["row"]) and row["source"] == f"{CONVERSATIONS}:{row['row'] + 2}"


def test_weights_of_turns_do_not_count(checkpoints, tmp_path, monkeypatch):
    texts = ["a", "b", "c", "d"]
    data = [
        {
            "messages": [
                {"role": "user", "content": text},
                {"role": "assistant", "content": text * 3, "weight": 0.5},
                {"role": "user", "content": text},
                {"role": "assistant", "content": text * 5},
            ]
        }
        for text in texts
    ] * 2
    (tmp_path / "data.json").write_text(json.dumps(data))
    _, template = runs.example_rows(checkpoints["untied"])
    rows, _ = load_rows([tmp_path / "data.json"], template, DataOptions(max_length=runs.MAX_LENGTH))
    recorded, plain = train(
        checkpoints["untied"], tmp_path, rows, template, monkeypatch, batch=8, accumulation=1, packed=True
    )
    for visit, loss in by_visit(recorded).items():
        assert loss == pytest.approx(plain[visit], rel=2e-5)


def test_hashes_tell_prompts_and_answers(checkpoints, tmp_path):
    pairs = [("Q", "one"), ("Q", "two"), ("R", "one"), ("Q", "one")]
    data = [{"prompt": q, "completion": a} for q, a in pairs]
    (tmp_path / "data.json").write_text(json.dumps(data))
    _, template = runs.example_rows(checkpoints["untied"])
    rows, _ = load_rows([tmp_path / "data.json"], template, DataOptions())
    found = rows.describe(np.array([0, 1, 2, 3]))
    prompts, answers = (found[name].to_pylist() for name in ("prompt_hash", "answer_hash"))
    assert prompts[0] == prompts[1] == prompts[3] != prompts[2]
    assert answers[0] == answers[2] == answers[3] != answers[1]
    chosen = rows.select(np.array([3, 1])).describe(np.array([1, 0]))
    assert chosen["answer_hash"].to_pylist() == [answers[1], answers[3]]


@pytest.fixture(scope="module")
def finished(forks, checkpoints, tmp_path_factory):
    out = tmp_path_factory.mktemp("recorded") / "out"
    code, _, stderr = forks.run(*words(checkpoints["untied"], out, "lora", steps=6))
    assert code == 0, stderr
    return out


def test_a_resumed_run_writes_the_same_file(forks, checkpoints, finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    whole = (out / ROWS_FILE).read_bytes()
    tear(out)
    assert not (out / ROWS_FILE).exists()
    shutil.rmtree(out / "checkpoint-6")
    assert len(read(out / "checkpoint-4")) < len(read(finished))
    code, stdout, _ = forks.run(*words(checkpoints["untied"], out, "lora", steps=6))
    assert code == 0 and "resuming from" in stdout
    assert (out / ROWS_FILE).read_bytes() == whole


@pytest.mark.dist
@pytest.mark.slow
def test_two_processes_record_the_same_rows(forks, checkpoints, tmp_path):
    for name, processes in (("one", 1), ("two", 2)):
        command = words(
            checkpoints["untied"], tmp_path / name, "lora", steps=6, dropout=0, rows_per_process=8 // processes
        )
        code, _, stderr = forks.run(*command, processes=processes, timeout_s=300)
        assert code == 0, stderr[-3000:]
    one, two = by_visit(read(tmp_path / "one")), by_visit(read(tmp_path / "two"))
    assert one.keys() == two.keys()
    for visit, loss in one.items():
        assert two[visit] == pytest.approx(loss, rel=1e-4), visit


@pytest.mark.slow
def test_it_can_be_left_out(forks, checkpoints, tmp_path):
    out = tmp_path / "out"
    code, _, _ = forks.run(*words(checkpoints["untied"], out, "lora", steps=2), "--record_rows", "False")
    assert code == 0 and not list(out.rglob(ROWS_FILE))


def test_a_row_that_an_epoch_has_twice_counts_once():
    """Its loss is the mean of its visits, as on the report's page; and it is named once."""
    targets = np.array([2, 2, 2, 2], np.int32)
    recorder = RowRecorder(targets, lambda rows: {"source": pa.array([f"a:{row}" for row in rows])}, 2)
    # Row 0 comes at each of an epoch's two steps.
    for step, (other, sums) in enumerate(((1, [6.0, 4.0]), (2, [8.0, 2.0]), (1, [4.0, 6.0]), (2, [1.0, 3.0])), 1):
        recorder.add(step, [0, other], torch.tensor(sums))
    recorder.gather()
    found = recorder.summarize(1)
    # Row 0: 3.5 -> 1.25 fell; row 1: 2 -> 3 rose; row 2: 1 -> 1.5 rose.
    assert (found.fell, found.compared) == (1, 3)
    assert found.highest == [("a:1", 3.0), ("a:2", 1.5), ("a:0", 1.25)]
