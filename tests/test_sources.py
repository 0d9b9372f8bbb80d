import pytest

from data_utils.sources import DataError, read_records


def test_json_rows_know_their_lines(write_json):
    path = write_json('[\n  {"a": 1},\n\n  {"a":\n 2}, {"a": 3}\n]\n')
    records = list(read_records(path))
    assert [(r.value["a"], r.where.rpartition(":")[2], r.index) for r in records] == [
        (1, "2", 0),
        (2, "4", 1),
        (3, "5", 2),
    ]


def test_jsonl_rows_know_their_lines_and_may_hold_unicode_line_breaks(write_json):
    path = write_json('{"a": 1}\n\n{"a": "x\u2028y\x85z"}\r\n', "data.jsonl")
    assert [(r.value["a"], r.where.rpartition(":")[2]) for r in read_records(path)] == [
        (1, "1"),
        ("x\u2028y\x85z", "3"),
    ]


def test_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "bom.json"
    path.write_bytes(b'\xef\xbb\xbf[{"a": 1}]')
    assert [r.value for r in read_records(path)] == [{"a": 1}]


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("", "d.json", "d.json: empty file"),
        ("[]", "d.json", "d.json: no rows in it"),
        ("\n\n", "d.jsonl", "d.jsonl: no rows in it"),
        ('{"conversations": []}', "d.json", "d.json:1: not a JSON list; put the row in [ ]"),
        ('"text"', "d.json", "d.json:1: not a JSON list"),
        ('[{"a": 1},\n {"b": }]', "d.json", "d.json:2:8: invalid JSON: Expecting value"),
        ('[{"a": 1},\n]', "d.json", "d.json:2:1: invalid JSON: Expecting value"),
        ('[{"a": 1}', "d.json", "d.json:1:10: invalid JSON: expected ',' or ']'"),
        ('[{"a": 1} {"a": 2}]', "d.json", "d.json:1:11: invalid JSON: expected ',' or ']'"),
        ('[{"a": 1}]\n[', "d.json", "d.json:2:1: invalid JSON: text after the end"),
        ('{"a": 1}\n{"a": 1', "d.jsonl", "d.jsonl:2:8: invalid JSON: Expecting"),
        ("[" + "1" * 5000 + "]", "d.json", "d.json:1:2: invalid JSON: Exceeds the limit"),
        ("[" * 100_000, "d.json", "d.json:1:2: invalid JSON: maximum recursion depth"),
        ("[" * 100_000, "d.jsonl", "d.jsonl:1: invalid JSON: maximum recursion depth"),
        ("a,b", "d.csv", "d.csv: unknown format '.csv'"),
    ],
)
def test_bad_files_are_named_with_line_and_column(write_json, text, name, message):
    with pytest.raises(DataError) as error:
        list(read_records(write_json(text, name)))
    assert message in str(error.value)


def test_missing_files_directories_and_other_encodings(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        list(read_records(tmp_path / "absent.json"))
    with pytest.raises(DataError, match="is a directory"):
        list(read_records(tmp_path))
    (tmp_path / "latin.json").write_bytes('[\n"é"]'.encode("latin-1"))
    with pytest.raises(DataError, match=r"latin.json:2: not UTF-8"):
        list(read_records(tmp_path / "latin.json"))
