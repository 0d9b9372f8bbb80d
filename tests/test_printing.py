"""What data, names and errors may hold, and what of it reaches the terminal: printable text of bounded length."""

import contextlib
import io
import json
import os
import sys
import tempfile
import unicodedata
from datetime import date
from pathlib import Path
from unittest import mock

import hypothesis.strategies as st
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings

from commands import conversation
from data_utils.__main__ import main
from data_utils.sources import DataError, as_line, find_sources, printable, read_records
from tests.conftest import needs
from tests.test_cli import flags
from tuning.entry import run_entry
from tuning.errors import MachineError, SettingsError

GOOD = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
HIDING = "\x1b[8mhidden\x1b[0m\x1b]0;title\x07\r\x08\x9b31m\u202eback\u2066\u200fx\x7f"
TEXTS = st.text(st.characters(), max_size=5)
VALUES = st.recursive(
    TEXTS | st.integers() | st.none(),
    lambda each: st.dictionaries(TEXTS, each, max_size=3) | st.lists(each, max_size=3),
)


def unprintable(text):
    return {c for c in text if c != "\n" and c != "\t" and unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")} | (
        set(text) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f\u061c")
    )


@pytest.fixture
def model(checkpoints):
    return checkpoints["untied"]


@pytest.fixture
def run_main(capfd, monkeypatch):
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["data_utils", *map(str, words)])
        return main(), *capfd.readouterr()

    return run


@given(st.text(st.characters(categories=["Cc", "Cs", "Cf", "Zl", "Zp", "L", "Po"]), max_size=30))
def test_printable_holds_nothing_that_a_terminal_obeys(text):
    assert not unprintable(printable(text))
    printable(text).encode("utf-8")  # half a surrogate pair would raise
    assert not unprintable(as_line(text, 20)) and "\n" not in as_line(text, 20) and len(as_line(text, 20)) < 200


@pytest.mark.parametrize("command", ["check", "show", "show --json", "show --ids", "check --json"])
def test_escapes_in_data_are_shown_and_not_obeyed(run_main, write_json, model, command):
    rows = [
        {"id": HIDING, "messages": [{"role": "user", "content": HIDING}, {"role": "assistant", "content": HIDING}]},
        {"messages": [{"role": HIDING, "content": "x"}]},
        {"messages": [{**GOOD[0], HIDING: 1}, GOOD[1]]},
        {"messages": GOOD, HIDING: 1},
        {"instruction": "Q", "output": ""},
    ]
    if command in ("show", "show --ids"):
        needs("rich")
    path = write_json("\n".join(map(json.dumps, rows)), "data.jsonl")
    name, *more = command.split()
    code, out, err = run_main(name, path, "--model", model, *more)
    assert code in (0, 1, 2) and "hidden" in out + err
    assert not unprintable(out + err)
    assert "\\u001b[8m" in out + err


def test_escapes_in_errors_of_every_entry_are_shown_and_not_obeyed(capfd):
    for error, code in ((SettingsError, 2), (DataError, 2), (MachineError, 1)):

        def fail(error=error):
            raise error(f"first {HIDING}\nsecond \ud800")

        with pytest.raises(SystemExit) as exit_:
            run_entry(fail, mistakes=(DataError,), interrupted="")
        out, err = capfd.readouterr()
        assert exit_.value.code == code and not unprintable(out + err) and "\\u001b[8mhidden" in err


def test_escapes_in_answers_are_shown_and_not_obeyed(capfd):
    conversation._write(HIDING)
    out, _ = capfd.readouterr()
    assert not unprintable(out) and "hidden" in out


def test_half_a_surrogate_pair_in_a_key_is_one_bad_row(run_main, run_script, write_json, model, tmp_path):
    rows = [{"messages": GOOD}, {"messages": GOOD, "\ud800": 1}, {"messages": [{**GOOD[0], "\udfff": "x"}, GOOD[1]]}]
    path = write_json("\n".join(map(json.dumps, rows)), "data.jsonl")
    code, out, err = run_main("check", path, "--model", model)
    assert code in (0, 1) and not unprintable(out + err) and "3 conversations" in out
    words = flags(model, path, tmp_path / "out", "--on_bad_row", "skip", "--dry_run")
    code, out, err = run_script("finetune.py", *words)
    assert code == 0, err
    assert not unprintable(out + err)


def test_messages_have_a_bounded_length(run_main, run_script, write_json, model, tmp_path):
    huge = "x" * 2_000_000
    rows = [
        {"messages": [{"role": huge, "content": "x"}]},
        {"messages": [{**GOOD[0], huge: 1}, GOOD[1]]},
        {huge: 1},
        {"messages": huge},
        {"messages": GOOD, "tools": huge},
        {"messages": [GOOD[0], {"role": "assistant", "tool_calls": huge}]},
    ]
    path = write_json("\n".join(map(json.dumps, rows)), "data.jsonl")
    code, out, err = run_main("check", path, "--model", model)
    assert code == 1 and max(map(len, (out + err).splitlines())) < 2200
    many = write_json("\n".join([json.dumps({"messages": GOOD}), *['{"messages": 1}'] * 3000]), "many.jsonl")
    out_directory = tmp_path / "out"
    words = flags(model, many, out_directory, "--on_bad_row", "skip", "--dry_run")
    code, out, err = run_script("finetune.py", *words)
    assert code == 0 and "3,000" in out, err
    assert (out_directory / "plan.json").stat().st_size < 50_000 and len(out) < 10_000


def test_a_file_name_that_is_no_utf8_is_shown_escaped(run_main, tmp_path):
    path = os.fsencode(tmp_path) + b"/da\xffta.jsonl"
    with open(path, "wb") as file:
        file.write(b'{"messages": 1}\n')
    code, out, err = run_main("check", os.fsdecode(path))
    assert code == 1 and "da\\udcffta.jsonl:1" in out and not unprintable(out + err)


def test_leftovers_of_editors_in_a_data_directory_are_passed_over(tmp_path):
    (tmp_path / "data.json").write_text(json.dumps([{"messages": GOOD}]))
    for name in (".ipynb_checkpoints/data-checkpoint.json", "._data.json", "below/._data.json", "below/.git/x.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"\x00\x05\x16\x07")
    assert [source.path for source in find_sources([tmp_path])] == [tmp_path / "data.json"]


@pytest.mark.parametrize(
    "times",
    [
        pa.array([0, 2**31 - 1], pa.int32()).cast(pa.date32()),
        pa.array([0, -(2**31)], pa.int32()).cast(pa.date32()),
        *(pa.array([0, sign * 2**52], pa.timestamp(unit)) for unit in ("s", "ms") for sign in (1, -1)),
        pa.array([0, 2**62], pa.timestamp("us")),
        pa.array([0, 2**52], pa.timestamp("s", tz="UTC")),
        pa.array([0, 2**62], pa.duration("s")),
        pa.array([date(2026, 1, 1), None]),
    ],
    ids=lambda array: str(array.type),
)
@pytest.mark.parametrize("column", ["when", "system", "messages"])
def test_dates_beyond_what_python_holds_are_kept_or_refused_by_name(tmp_path, run_main, times, column):
    path = tmp_path / "data.parquet"
    pq.write_table(pa.table({"messages": [GOOD, GOOD], column: times}), path)
    records = list(read_records(find_sources([path])[0]))
    assert len(records) == 2
    code, out, _ = run_main("check", path)
    named = [line for line in out.splitlines() if line.startswith(f"{path}:")]
    assert code == bool(named) and f"problems: {len(named)}" in out


@settings(max_examples=30, deadline=None)
@given(VALUES)
def test_no_row_makes_an_unprintable_message(value):
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "data.jsonl"
        path.write_text(json.dumps(value) + "\n" + json.dumps({"messages": value}) + "\n")
        out = io.StringIO()
        with contextlib.redirect_stdout(out), mock.patch.object(sys, "argv", ["data_utils", "check", str(path)]):
            assert main() in (0, 1)
        assert not unprintable(out.getvalue())
