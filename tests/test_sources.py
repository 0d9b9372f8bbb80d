import gzip
import json

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_utils.sources import DataError, find_sources, read_records


def read(path, **options):
    (source,) = find_sources([path])
    return list(read_records(source, **options))


def problems(path):
    return [str(item) for item in read(path) if isinstance(item, DataError)]


def test_json_rows_know_their_lines(write_json):
    path = write_json('[\n  {"a": 1},\n\n  {"a":\n 2}, {"a": 3}\n]\n')
    assert [(r.value["a"], r.where.rpartition(":")[2], r.index) for r in read(path)] == [
        (1, "2", 0),
        (2, "4", 1),
        (3, "5", 2),
    ]


LINES = '{"a": 1}\n\n{"a": "x\u2028y\x85z"}\r\n{"a": 3}'


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_jsonl_rows_know_their_lines_and_may_hold_unicode_line_breaks(tmp_path, suffix):
    path = tmp_path / f"data.jsonl{suffix}"
    content = LINES.encode()
    if suffix == ".gz":
        content = gzip.compress(content)
    elif suffix == ".zst":
        content = pa.compress(content, codec="zstd", asbytes=True)
    path.write_bytes(content)
    assert [(r.value["a"], r.where.rpartition(":")[2]) for r in read(path)] == [
        (1, "1"),
        ("x\u2028y\x85z", "3"),
        (3, "4"),
    ]
    if suffix == ".gz":
        path.write_bytes(content[:-12])
        assert "the compressed file is damaged or cut short" in problems(path)[-1]


def test_parquet_rows_lack_what_is_null(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "Q", "tool_calls": None}]}, {"messages": [], "tools": "[]"}]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    first, second = read(tmp_path / "data.parquet")
    assert first.value == {"messages": [{"role": "user", "content": "Q"}]} and first.where.endswith("data.parquet:1")
    assert second.index == 1
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    assert "not a readable parquet file" in problems(tmp_path / "bad.parquet")[0]


def test_a_byte_order_mark_is_no_text(tmp_path):
    for name, text in (("bom.json", b'[{"a": 1}]'), ("bom.jsonl", b'{"a": 1}')):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text)
        assert [r.value for r in read(tmp_path / name)] == [{"a": 1}]


@pytest.mark.parametrize(
    ("text", "name", "messages"),
    [
        ("", "d.json", ["d.json: empty file"]),
        ("[]", "d.json", ["d.json: no rows in it"]),
        ("\n\n", "d.jsonl", ["d.jsonl: no rows in it"]),
        ('{"conversations": []}', "d.json", ["d.json:1: not a JSON list; put the row in [ ]"]),
        ('"text"', "d.json", ["d.json:1: not a JSON list"]),
        ('[{"a": 1},\n {"b": }]', "d.json", ["d.json:2:8: invalid JSON: Expecting value"]),
        ('[{"a": 1},\n]', "d.json", ["d.json:2:1: invalid JSON: Expecting value"]),
        ('[{"a": 1}', "d.json", ["d.json:1:10: invalid JSON: expected ',' or ']'"]),
        ('[{"a": 1} {"a": 2}]', "d.json", ["d.json:1:11: invalid JSON: expected ',' or ']'"]),
        ('[{"a": 1}]\n[', "d.json", ["d.json:2:1: invalid JSON: text after the end"]),
        ('[{"a": NaN}]', "d.json", ["d.json:1:2: invalid JSON: NaN is no JSON value"]),
        ('{"a": NaN}\n{"a": 1}\n{"a": 1', "d.jsonl", ["d.jsonl:1: invalid JSON: NaN", "d.jsonl:3:8: invalid JSON"]),
        ("[" + "1" * 5000 + "]", "d.json", ["d.json:1:2: invalid JSON: Exceeds the limit"]),
        ("[" * 100_000, "d.json", ["d.json:1:2: invalid JSON: maximum recursion depth"]),
        ("[" * 100_000, "d.jsonl", ["d.jsonl:1: invalid JSON: maximum recursion depth"]),
    ],
)
def test_bad_rows_are_named_with_line_and_column_and_the_rest_is_read(write_json, text, name, messages):
    found = problems(write_json(text, name))
    assert len(found) == len(messages)
    for message, expected in zip(found, messages, strict=True):
        assert expected in message


def test_missing_files_directories_and_other_encodings(tmp_path):
    for name, message in (
        ("absent.json", "no such file"),
        ("d.xml", "unknown format '.xml'"),
        ("empty", "no data file in this directory"),
        ("rows.json#many", "after # stands how many rows"),
        ("rows.json#0", "after # stands how many rows"),
        ("rows.json#" + "9" * 200, "after # stands how many rows"),
        ("x" * 300 + ".json", "File name too long"),
    ):
        (tmp_path / "d.xml").write_text("a,b")
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(DataError, match=message):
            find_sources([tmp_path / name])
    (tmp_path / "latin.json").write_bytes('[\n"é"]'.encode("latin-1"))
    assert "latin.json:2: not UTF-8" in problems(tmp_path / "latin.json")[0]
    (tmp_path / "latin.jsonl").write_bytes(b'{"a": 1}\n"\xe9"\n{"a": 2}')
    first, bad, second = read(tmp_path / "latin.jsonl")
    assert "latin.jsonl:2: not UTF-8" in str(bad) and (first.index, second.index) == (0, 2)


def test_directories_hold_many_files_and_samples_are_seeded(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.jsonl", "a.jsonl", "sub/c.jsonl"):
        (tmp_path / name).write_text("".join(f'{{"a": {i}}}\n' for i in range(50)))
    (tmp_path / "README.md").write_text("no data")
    assert [source.path.name for source in find_sources([tmp_path])] == ["a.jsonl", "b.jsonl", "c.jsonl"]
    sample = [r.value["a"] for r in read(f"{tmp_path}/a.jsonl#10", seed=1)]
    assert len(sample) == 10 and sample == sorted(sample)
    assert sample == [r.value["a"] for r in read(f"{tmp_path}/a.jsonl#10", seed=1)]
    assert sample != [r.value["a"] for r in read(f"{tmp_path}/a.jsonl#10", seed=2)]
    with pytest.raises(DataError, match="has only 50 rows"):
        read(f"{tmp_path}/a.jsonl#51")
    (tmp_path / "odd#name.jsonl").write_text('{"a": 1}')
    assert len(read(tmp_path / "odd#name.jsonl")) == 1


def test_a_line_of_100_megabytes(tmp_path):
    (tmp_path / "long.jsonl").write_text(json.dumps({"a": "x" * 100_000_000}) + '\n{"a": 2}')
    first, second = read(tmp_path / "long.jsonl")
    assert len(first.value["a"]) == 100_000_000 and second.where.endswith(":2")


NAMES = st.sampled_from([".json", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"])


def never_a_traceback(directory, content, suffix):
    path = directory / f"any{suffix}"
    path.write_bytes(content)
    assert read(path), "a record or a problem, never nothing"


@given(st.binary(max_size=200), NAMES)
@settings(max_examples=200)
def test_no_bytes_give_a_traceback(tmp_path_factory, content, suffix):
    never_a_traceback(tmp_path_factory.getbasetemp(), content, suffix)


@pytest.mark.slow
@given(st.binary(max_size=400), NAMES)
@settings(max_examples=10_000)
def test_no_bytes_at_all_give_a_traceback(tmp_path_factory, content, suffix):
    never_a_traceback(tmp_path_factory.getbasetemp(), content, suffix)
