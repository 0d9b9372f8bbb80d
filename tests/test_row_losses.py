"""What the losses of rows say, against rules written out row by row; and ten planted bad answers, found."""

import hashlib
import itertools
import json
import math
import random
import statistics

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from commands.report_page import row_losses
from commands.report_page.row_losses import (
    RowLosses,
    choose_rows,
    find_disagreeing,
    judge,
    rank_excess,
    read_row_losses,
)
from commands.report_page.verdicts import SORTS, VERDICTS
from examples.tiny_model import build_tokenizer
from tests.conftest import SHARED, build_model, run_python
from tuning.errors import SettingsError

LOSS = st.one_of(st.sampled_from([0.0, 0.01, 0.1, 1.0, 2.0, 2.1, 5.0]), st.floats(0, 8))


@st.composite
def tables(draw):
    """Losses [R, E]: NaN where a row was not trained, at least once a row; now and then infinite."""
    epochs = draw(st.integers(1, 5))
    cell = st.one_of(LOSS, LOSS, LOSS, st.just(math.nan), st.just(math.inf) if draw(st.booleans()) else LOSS)
    rows = draw(st.lists(st.lists(cell, min_size=epochs, max_size=epochs), min_size=1, max_size=8))
    return np.array([row if not all(map(math.isnan, row)) else [1.0] * epochs for row in rows])


def of(losses, tokens=None, hashes=None):
    rows, epochs = losses.shape
    names = np.array([f"r{n}" for n in range(rows)], dtype=object)
    places = np.array([f"d.json:{n}" for n in range(rows)], dtype=object)
    tokens = np.full(rows, 9) if tokens is None else np.array(tokens)
    return RowLosses(names, places, tokens, np.arange(epochs), losses, hashes)


def median(values):
    return statistics.median(values) if values else math.nan


@given(tables())
def test_verdicts_are_the_rules(losses):
    seen = [[loss for loss in row if not math.isnan(loss)] for row in losses.tolist()]
    good = [row for row in seen if all(map(math.isfinite, row))]
    first, last = median([row[0] for row in good]), median([row[-1] for row in good])
    rows = of(losses)
    assert rows.first.tolist() == [row[0] for row in seen] and rows.last.tolist() == [row[-1] for row in seen]
    found = rows.verdicts
    assert found.keys() == VERDICTS.keys()
    for number, row in enumerate(seen):
        finite = all(map(math.isfinite, row))
        pairs = list(itertools.pairwise(row))
        expected = {
            "not finite": not finite,
            "never fell": finite and len(row) > 1 and min(row[1:]) >= 0.9 * row[0] and row[-1] > last,
            "spiked": finite and any(b > 2 * a and b - a > first / 10 for a, b in pairs),
            "forgotten": finite and row[-1] > 1.5 * min(row) and row[-1] - min(row) > first / 10,
            "known from the start": finite and row[0] < first / 5,
            "disagrees": False,
        }
        assert {name: bool(mask[number]) for name, mask in found.items()} == expected, row


def test_rows_that_are_what_the_verdicts_say():
    ordinary = [[2.0 + n / 10, 1.0, 0.5] for n in range(10)]
    odd = {
        "never fell": [2.0, 2.1, 1.9],
        "spiked": [2.0, 0.4, 1.4],
        "forgotten": [2.0, 0.4, 1.4],
        "known from the start": [0.1, 0.1, 0.1],
        "not finite": [2.0, math.inf, 0.5],
    }
    rows = of(np.array([*ordinary, *odd.values()]))
    for number, name in enumerate(odd, len(ordinary)):
        assert name in rows.verdicts_of(number)
    assert not any(rows.verdicts_of(number) for number in range(len(ordinary)))


def test_one_epoch_has_no_trajectories():
    found = judge(np.array([[1.0], [9.0]]), np.array([1.0, 9.0]), np.array([1.0, 9.0]))
    assert not (found["never fell"] | found["spiked"] | found["forgotten"]).any()


@given(st.lists(st.tuples(st.integers(-2, 2), st.integers(-2, 2)), min_size=1, max_size=12))
def test_rows_disagree_where_a_prompt_has_two_answers(pairs):
    prompts, answers = (np.array(each) for each in zip(*pairs, strict=True))
    expected = [any(p == q and a != b for q, b in pairs) for p, a in pairs]
    assert find_disagreeing(prompts, answers).tolist() == expected


def test_rows_that_disagree_stand_together():
    prompts, answers = np.array([7, 8, 7, 9, 8, 7]), np.array([1, 1, 2, 1, 2, 3])
    rows = of(np.array([[1.0], [5.0], [3.0], [9.0], [2.0], [4.0]]), hashes=(prompts, answers))
    assert choose_rows(rows, sort="loss", verdict="disagrees") == [1, 4, 5, 2, 0]


def test_plain_text_has_no_prompt_to_disagree_on():
    nothing = int.from_bytes(hashlib.blake2b(b"", digest_size=8).digest(), "little", signed=True)
    assert not find_disagreeing(np.array([nothing, nothing]), np.array([1, 2])).any()


@given(st.lists(st.tuples(LOSS, st.integers(1, 40)), min_size=1, max_size=130))
def test_excess_is_the_distance_from_rows_of_like_length(pairs):
    losses, tokens = (np.array(each) for each in zip(*pairs, strict=True))
    found = rank_excess(losses, tokens)
    order = sorted(range(len(pairs)), key=lambda n: tokens[n])
    for place, row in enumerate(order):
        start = min(max(0, place - 25), max(0, len(pairs) - 51))
        near = [losses[other] for other in order[start : start + 51]]
        usual = statistics.median(near)
        spread = statistics.median(abs(loss - usual) for loss in near)
        assert found[row] == pytest.approx((losses[row] - usual) / max(spread, 1e-6), rel=1e-9, abs=1e-9)


def test_excess_in_chunks(monkeypatch):
    losses, tokens = np.random.default_rng(0).random((2, 300))
    whole = rank_excess(losses, tokens)
    monkeypatch.setattr(row_losses, "_CHUNK", 7)
    assert (rank_excess(losses, tokens) == whole).all()


def test_a_bad_row_counts_by_its_first_epochs():
    """One that is learnt by heart later stays among the worst."""
    ordinary = np.linspace(1.0, 1.2, 30)[:, None] * np.array([[2.0, 1.5, 1.0, 0.1, 0.1, 0.1]])
    rows = of(np.vstack([ordinary, [[5.0, 4.0, 3.0, 0.01, 0.01, 0.01]]]))
    assert choose_rows(rows)[0] == 30 and choose_rows(rows, sort="loss")[-1] == 30
    late = of(np.array([[math.nan, 4.0, math.nan, 2.0, 3.0, 100.0], [1.0, 1.0, 1.0, 100.0, 0.0, 0.0]]))
    assert late.early.tolist() == [3.0, 1.0], "the first three that had it"


def test_orders_and_an_earlier_epoch():
    rows = of(np.array([[3.0, 1.0, 1.5], [2.0, 2.0, 0.1], [1.0, math.nan, 1.2]]), tokens=[5, 9, 7])
    assert [choose_rows(rows, sort=name) for name in SORTS if name != "excess"] == [
        [0, 2, 1],
        [0, 2, 1],
        [0, 1, 2],
        [1, 2, 0],
        [0, 1, 2],
    ]
    assert rows.until(1).last.tolist() == [1.0, 2.0, 1.0] and rows.until(2).losses is not None
    with pytest.raises(SettingsError, match="epochs 0 to 2"):
        rows.until(3)
    late = of(np.array([[math.nan, 1.0], [2.0, 1.0]]))
    assert late.until(0).row_ids.tolist() == ["r1"], "the other was not trained yet"


# ---- reading ----


def write(path, visits, **columns):
    """visits: (row, epoch, loss)."""
    rows, epochs, losses = zip(*visits, strict=True) if visits else ((), (), ())
    table = {
        "row_id": pa.array([f"r{row}" for row in rows], pa.string()),
        "source": pa.array([f"d.json:{row + 1}" for row in rows], pa.string()),
        "row": pa.array(rows, pa.int32()),
        "epoch": pa.array(epochs, pa.int32()),
        "loss": pa.array(losses, pa.float32()),
        "tokens": pa.array([row + 1 for row in rows], pa.int32()),
    }
    pq.write_table(pa.table({**table, **columns}), path)
    return path


def test_visits_become_rows_and_epochs(tmp_path):
    visits = [(5, 0, 4.0), (2, 0, 1.0), (5, 0, 2.0), (2, 2, 0.5), (5, 2, math.nan)]
    rows = read_row_losses(write(tmp_path / "rows.parquet", visits))
    assert rows.row_ids.tolist() == ["r2", "r5"] and rows.place(1) == ("d.json:6", "r5")
    assert rows.epochs.tolist() == [0, 2] and rows.tokens.tolist() == [3, 6] and rows.hashes is None
    np.testing.assert_array_equal(rows.losses, [[1.0, 0.5], [3.0, math.inf]])
    assert rows.verdicts_of(1) == ["not finite"] and choose_rows(rows)[0] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.write_bytes(b"PAR1 nothing"), "cannot be read"),
        (lambda path: path.write_bytes(path.read_bytes()[:-40]), "cannot be read"),
        (lambda path: pq.write_table(pa.table({"row": [1]}), path), "columns epoch, loss, row_id"),
        (lambda path: write(path, []), "no row in it"),
        (lambda path: write(path, [(1, 0, 1.0)], row=pa.array([None], pa.int32())), "column row has empty cells"),
        (lambda path: write(path, [(1, 0, 1.0)], loss=pa.array(["x"])), "column loss holds string"),
    ],
)
def test_damaged_files_are_one_line(tmp_path, change, message):
    path = write(tmp_path / "rows.parquet", [(0, 0, 1.0)] * 50)
    change(path)
    with pytest.raises(SettingsError, match=message) as raised:
        read_row_losses(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


# ---- planted ----


@pytest.mark.slow
def test_ten_shuffled_answers_are_among_the_worst_twenty(tmp_path):
    """Four hundred real rows whose right answers the model knows, ten of them with each other's answers.

    A tiny model knows nothing but what it was shown, so it is shown the right answers first, as a large one has read
    of them; one that has not cannot tell (docs/report.md).
    """
    source = SHARED / "data" / "alpaca_en.json"
    if not source.is_file():
        pytest.skip("the real data are not beside the project")
    rows = [row for row in json.loads(source.read_text(encoding="utf-8")) if 30 <= len(row["output"]) <= 500]
    right = random.Random(0).sample(rows, 400)
    bad = random.Random(5).sample(range(400), 10)
    planted = [dict(row) for row in right]
    for here, there in zip(bad, [*bad[1:], bad[0]], strict=True):
        planted[here]["output"] = right[there]["output"]
    for name, data in (("right", right), ("planted", planted)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data), encoding="utf-8")

    tokenizer = build_tokenizer([row[key] for row in right for key in ("instruction", "input", "output")])
    changes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "initializer_range": 0.05}
    build_model(tokenizer, tied=True, **changes).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")

    def train(model, data, out, epochs, rate):
        run_python(
            *("finetune.py", "--model_name_or_path", tmp_path / model, "--data_path", tmp_path / data),
            *("--output_dir", tmp_path / out, "--num_train_epochs", epochs, "--learning_rate", rate),
            *("--per_device_train_batch_size", 8, "--model_max_length", 512, "--lr_scheduler_type", "cosine"),
            *(
                "--adam_beta2",
                0.95,
                "--warmup_steps",
                0.1,
                "--logging_steps",
                50,
                "--save_strategy",
                "no",
                "--no_cache",
            ),
            timeout_s=600,
        )

    train("base", "right.jsonl", "knows", 11, 3e-3)
    train("knows", "planted.jsonl", "out", 3, 5e-4)
    listed = run_python("-m", "tuning.report", tmp_path / "out", "--rows", "--json").stdout.splitlines()
    worst = {json.loads(line)["source"] for line in listed}
    assert len(worst) == 20
    assert worst >= {f"{tmp_path / 'planted.jsonl'}:{row + 1}" for row in bad}
