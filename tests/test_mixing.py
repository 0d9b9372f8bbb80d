"""FILE*W: rows of a file more or less often than once an epoch."""

import json
import shutil
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_utils.dataset import load_rows
from data_utils.layout import Layout, count_epoch, mix_rows, order_rows
from data_utils.sources import DataError, find_sources, split_weight
from data_utils.steps import StepDataset
from tests import runs
from tests.conftest import tear
from tests.test_chaos import words
from tests.test_row_recorder import read

FILES = st.lists(st.tuples(st.integers(1, 9), st.floats(0.12, 3.5)), min_size=1, max_size=4)


def make_groups(files):
    groups, first = [], 0
    for number, weight in files:
        groups.append((list(range(first, first + number)), weight))
        first += number
    return groups, first


@given(FILES, st.integers(0, 99))
def test_every_row_comes_as_often_as_its_file_says(files, seed):
    groups, _ = make_groups(files)
    counts: Counter[int] = Counter()
    for epoch in range(6):
        mixed = mix_rows(groups, seed, epoch)
        assert len(mixed) == count_epoch(groups) and mixed == mix_rows(groups, seed, epoch)
        counts.update(mixed)
        for rows, weight in groups:
            assert sum(row in rows for row in mixed) == round(len(rows) * weight)
            assert all(int(weight) <= mixed.count(row) <= int(weight) + 1 for row in rows)
    for rows, _ in groups:  # the part that is over goes round
        assert max(counts[row] for row in rows) - min(counts[row] for row in rows) <= 1


@given(FILES, st.integers(0, 99), st.integers(1, 7), st.integers(1, 3))
def test_steps_of_any_layout_have_the_epoch(files, seed, rows_per_step, num_ranks):
    groups, num_rows = make_groups(files)
    options = {"rows_per_step": rows_per_step, "num_ranks": num_ranks, "max_tokens": 50, "packed": True, "seed": seed}
    if not count_epoch(groups):
        return
    layout = Layout([5] * num_rows, groups=groups, **options)
    for epoch in range(2):
        steps = range(epoch * layout.steps_per_epoch, (epoch + 1) * layout.steps_per_epoch)
        planned = [row for step in steps for rank in layout.plan(step) for batch in rank for row in batch]
        assert sorted(planned) == sorted(mix_rows(groups, seed, epoch))
    plain, weighed = Layout([5] * num_rows, **options), Layout([5] * num_rows, groups=[(range(num_rows), 1)], **options)
    assert [plain.plan(s) for s in range(3)] == [weighed.plan(s) for s in range(3)], "weight 1 changes nothing"
    assert plain.rows_of(0) == order_rows(num_rows, seed, 0)[:rows_per_step]


@pytest.mark.parametrize("text", ["a*0", "a*-1", "a*x", "a*1e3", "a*1001", "a*", "a*nan", "a*²", "a*1.0000001"])
def test_what_is_no_weight(text):
    with pytest.raises(DataError, match=r"after \* stands how often"):
        split_weight(text)


def write_files(tmp_path):
    for name, number in (("a", 4), ("b", 6)):
        rows = [{"prompt": f"{name}{index}", "completion": f"{index}"} for index in range(number)]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    return tmp_path / "a.json", tmp_path / "b.json"


def test_files_their_samples_and_directories(tmp_path, checkpoints):
    a, b = write_files(tmp_path)
    (starred := tmp_path / "c*2.json").write_text(a.read_text())  # a name that is one
    assert find_sources([starred])[0].weight == 1
    starred.unlink()
    assert [source.weight for source in find_sources([f"{tmp_path}*3"])] == [3, 3]
    _, template = runs.example_rows(checkpoints["untied"])
    rows, account = load_rows(
        [
            f"{a}*2.5",
            f"{b}#3*2",
        ],
        template,
        weighted=True,
    )
    assert [weight for _, weight in rows.groups] == [2.5, 2] and account.rows == 7
    assert f"an epoch has 16 rows: {a} 4 x 2.5, {b}#3 3 x 2" in account.describe()
    steps = StepDataset(rows, rows_per_step=4, max_tokens=400, packed=True, seed=1)
    assert len(steps) == 4
    trained = Counter(row for step in range(4) for batch in steps[step]["row_ids"] for row in batch)
    assert sum(trained[f"a-{i}"] for i in range(4)) == 10 and {n for r, n in trained.items() if r[0] == "b"} == {2}
    held = rows.split(0.3, 0)[0]
    assert sum(len(indices) for indices, _ in held.groups) == len(held) < 7
    for paths, message in (
        ([f"{a}*2", str(a)], "is named twice"),
        ([f"{a}*0.1", str(b)], "leaves none of its 4 rows"),
    ):
        with pytest.raises(DataError, match=message):
            load_rows(paths, template, weighted=True)
    with pytest.raises(DataError, match="on training data only"):
        load_rows([f"{a}*2"], template)


@pytest.mark.slow
def test_a_run_of_weighted_files_is_resumed_and_refused_with_others(forks, checkpoints, tmp_path):
    a, b = write_files(tmp_path)

    def run(out, weight, steps):
        command = words(checkpoints["untied"], out, "lora", steps=steps, save_steps=2)
        at = command.index("--data_path") + 1
        command[at : at + 1] = [f"{a}*{weight}", b]
        return forks.run(*command)

    out = tmp_path / "out"
    code, stdout, _ = run(out, 2.5, 6)
    assert code == 0 and "an epoch has 16 rows" in stdout.replace("\n", " ")
    recorded = (out / "rows.parquet").read_bytes()
    first = [row for row in read(out) if row["epoch"] == 0]
    assert Counter(row["row_id"][0] for row in first) == {"a": 10, "b": 6}
    tear(out)
    shutil.rmtree(out / "checkpoint-6")
    code, _, stderr = run(out, 1.5, 6)
    assert code == 2 and "belongs to another run" in stderr and "*2.5" in stderr
    assert run(out, 2.5, 6)[0] == 0
    assert (out / "rows.parquet").read_bytes() == recorded
