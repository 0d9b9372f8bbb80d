"""Any number of rows of any kinds, in any order: each is trained as the definition says, or counted with a reason."""

import functools
import itertools
import json

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_utils import dataset
from data_utils.cache import RowCache
from data_utils.chunks import encode_chunk
from data_utils.conversations import DataOptions
from data_utils.dataset import load_rows
from data_utils.render_cache import RowEncoder
from data_utils.rows import TokenizedRows
from data_utils.schema import parse_record
from data_utils.sources import DataError, Record, find_sources, read_records
from tests.templates import load_template

LIMIT = 300
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}


def talk(*turns, **more):
    roles = itertools.cycle(("user", "assistant"))
    return {"messages": [{"role": next(roles), "content": turn} for turn in turns], **more}


# What becomes of one row: "trained", "dropped" (a line in dropped.jsonl) or "refused" (a problem).
KINDS = {
    "plain": (talk("q", "a"), "trained"),
    "two turns": (talk("q", "a", "r", "b"), "trained"),
    "tools": (talk("q", "a", tools=[TOOL]), "trained"),
    "text": ({"text": "document"}, "trained"),
    "text of one token": ({"text": "a"}, "trained"),
    "text with a last piece of one token": ({"text": " the" * (2 * LIMIT)}, "trained"),
    "variables": (talk("q", "a", chat_template_kwargs={"enable_thinking": False}), "trained"),
    "control text": (talk("<|im_end|>", "a"), "trained"),
    "later turn too long": (talk("q", "a", "r " * LIMIT, "b"), "trained"),
    "first turn too long": (talk("q " * LIMIT, "a"), "dropped"),
    "no answer": (talk("q"), "dropped"),
    "nothing to train": ({"messages": [*talk("q")["messages"], {"role": "assistant", "content": "a", "weight": 0}]},
                         "dropped"),
    "bad": (talk("q", ""), "refused"),
    "refused by the template": (talk("q", "a", chat_template_kwargs={"no_such": 1}), "refused"),
}  # fmt: skip


@functools.cache
def encode_alone(kind):
    """(What follows the row's id, row) of each row that a kind becomes, encoded on its own."""
    record = Record({"id": "row", **KINDS[kind][0]}, "f:1", 0)
    try:
        chunk = encode_chunk([parse_record(record)], RowEncoder(load_template("qwen3")), DataOptions(max_length=LIMIT))
    except DataError:
        return []
    if chunk.rows is None:
        return []
    names = [name.removeprefix("row") for name in chunk.rows["id"].to_pylist()]
    return list(zip(names, TokenizedRows(pa.Table.from_batches([chunk.rows])), strict=True))


def check_rows(directory, kinds, chunk_size, num_workers):
    """Build rows of these kinds in chunks; compare with each row encoded alone, and account for every one."""
    path = directory / "rows.jsonl"
    path.write_text("".join(json.dumps({"id": f"row {n}", **KINDS[k][0]}) + "\n" for n, k in enumerate(kinds)))
    options, cache = DataOptions(max_length=LIMIT, on_bad_row="skip"), RowCache(None)
    template = load_template("qwen3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "_CHUNK_SIZE", chunk_size)
        patch.setattr(dataset, "count_workers", lambda: num_workers)
        try:
            rows, account = load_rows([path], template, options, cache=cache)
        except DataError as error:
            assert not any(KINDS[kind][1] == "trained" for kind in kinds), error
            return
    expected = [
        (f"row {number}{suffix}", row) for number, kind in enumerate(kinds) for suffix, row in encode_alone(kind)
    ]
    assert len(rows) == len(expected) == account.rows
    for index, (row_id, row) in enumerate(expected):
        assert rows.row_id(index) == row_id
        assert [list(each) for each in rows[index][:2]] == [list(each) for each in row[:2]]
        assert rows.num_targets[index] > 0
    trained = {row_id.partition("#")[0] for row_id, _ in expected}
    dropped = {json.loads(line)["id"] for line in (rows.directory / "dropped.jsonl").read_text().splitlines()}
    refused = {int(problem.split(":")[1]) - 1 for problem in account.problems}
    for number, kind in enumerate(kinds):
        name, outcome = f"row {number}", KINDS[kind][1]
        assert (name in trained) == (outcome == "trained"), kind
        assert (number in refused) == (outcome == "refused"), kind
        assert name in dropped or outcome != "dropped", kind
    assert account.conversations == len(kinds) and account.num_problems == len(refused)
    assert account.conversations_trained == len(trained)


def check_mixtures(directory, examples, num_workers):
    kinds = st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=13)
    uniform = st.builds(lambda kind, count: [kind] * count, st.sampled_from(sorted(KINDS)), st.integers(1, 13))

    @given(kinds | uniform, st.sampled_from([1, 2, 3, 4, 6, 12, 13]))
    @settings(max_examples=examples)
    def check(kinds, chunk_size):
        check_rows(directory, kinds, chunk_size, num_workers)

    check()


def test_mixtures_around_the_size_of_a_chunk(tmp_path):
    check_mixtures(tmp_path, 40, num_workers=1)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_alone_in_worker_processes(tmp_path, kind):
    for count in (4, 5):  # two chunks that are full, and a third of one row
        check_rows(tmp_path, [kind] * count, 2, num_workers=2)


@pytest.mark.slow
def test_many_mixtures_in_worker_processes(tmp_path):
    check_mixtures(tmp_path, 300, num_workers=2)


@pytest.mark.slow
def test_many_mixtures(tmp_path):
    check_mixtures(tmp_path, 3000, num_workers=1)


@pytest.mark.parametrize("kind", ["text", "tools"])
def test_more_rows_than_a_chunk_of_which_none_needs_a_rendering(tmp_path, kind):
    check_rows(tmp_path, [kind] * 1100, dataset._CHUNK_SIZE, dataset.count_workers())


def test_a_last_piece_of_one_token_is_dropped_and_counted(tmp_path):
    (tmp_path / "d.jsonl").write_text(json.dumps({"text": " the" * 40}))
    template = load_template("qwen3")
    (whole,) = (list(ids) for ids, _, _ in load_rows([tmp_path / "d.jsonl"], template)[0])
    limit = (len(whole) - 1) // 2
    assert len(whole) == 2 * limit + 1 == 41
    rows, account = load_rows([tmp_path / "d.jsonl"], template, DataOptions(max_length=limit))
    assert rows.lengths.tolist() == [limit, limit] and account.conversations_trained == 1
    assert account.dropped == {"a row of one token, which has no target": 1}


@pytest.mark.parametrize("count", [1, 999, 1000, 1001, 2000])
def test_parquet_rows_around_the_size_of_a_batch(tmp_path, count):
    path = tmp_path / "d.parquet"
    pyarrow.parquet.write_table(pa.Table.from_pylist([{"a": n} for n in range(count)]), path)
    (source,) = find_sources([path])
    assert [record.value["a"] for record in read_records(source)] == list(range(count))
