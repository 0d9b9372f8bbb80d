"""Rows in the cache: never stale, never half-written, built once; long and bad rows as the options say."""

import json
import multiprocessing
import shutil

import numpy as np
import pyarrow as pa
import pytest

from data_utils import dataset
from data_utils.cache import RowCache
from data_utils.conversations import DataOptions
from data_utils.dataset import load_rows
from data_utils.rows import encode_row
from data_utils.sources import DataError
from data_utils.template import ChatTemplate
from data_utils.tokenizer import load_tokenizer
from tests.conftest import CONVERSATIONS
from tests.templates import load_template


@pytest.fixture(scope="module")
def template(checkpoints):
    return ChatTemplate(load_tokenizer(str(checkpoints["untied"])))


@pytest.fixture
def builds(monkeypatch):
    """How often rows were built."""
    count = []
    build = dataset.build_rows
    monkeypatch.setattr(dataset, "build_rows", lambda *a, **k: count.append(1) or build(*a, **k))
    return count


def row(question="Q", answer="A", **more):
    return {
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
        **more,
    }


def test_rows_are_those_of_the_definition(template, tmp_path):
    from data_utils.schema import parse_record
    from data_utils.sources import Record

    rows, account = load_rows([CONVERSATIONS], template, cache=RowCache(tmp_path))
    values = json.loads(CONVERSATIONS.read_text(encoding="utf-8"))
    assert len(rows) == len(values) == account.conversations
    for index, value in enumerate(values):
        (expected,) = template.encode_conversation(parse_record(Record(value, "", index)))
        input_ids, labels, weights = rows[index]
        assert input_ids.tolist() == expected.input_ids and labels.tolist() == expected.labels and weights is None
        assert rows.row_id(index) == value["id"] and rows.num_targets[index] == expected.num_supervised
        assert rows.lengths[index] == len(expected.input_ids)
    assert account.tokens == rows.lengths.sum() and account.supervised_tokens == rows.num_targets.sum()
    assert account.stopped == account.turns_trained and account.largest_token_id == max(
        max(rows[i][0]) for i in range(56)
    )
    with pytest.raises(IndexError):
        rows[56]


def test_the_same_is_built_once_and_anything_else_anew(template, checkpoints, write_json, tmp_path, builds):
    path, cache = write_json([row()]), RowCache(tmp_path / "cache")

    def load(paths=(path,), template=template, **options):
        return load_rows(paths, template, DataOptions(**options), cache=cache)

    first = load()
    second = load()
    assert len(builds) == 1 and first[1] == second[1] and np.array_equal(first[0][0][0], second[0][0][0])
    other = load_tokenizer(str(checkpoints["untied"]))
    other.chat_template += "{# changed #}"
    system = ChatTemplate(load_tokenizer(str(checkpoints["untied"])), system_message="S")
    before = len(builds)
    for number, change in enumerate(
        ({"max_length": 50}, {"supervise": "last"}, {"template": ChatTemplate(other)}, {"template": system}), start=1
    ):
        load(**change)
        assert len(builds) == before + number, change
    write_json([row(answer="B")])
    assert load()[0][0][0].tolist() != first[0][0][0].tolist() and len(builds) == before + 5
    write_json([row()])
    assert load()[1] == first[1] and len(builds) == before + 5, "the first bytes again"


def replace_ids(path, change):
    """Other token ids in a file of the same size, as a bad disk or a hand leaves them."""
    content = path.read_bytes()
    table = pa.ipc.open_file(path).read_all() if content[:6] == b"ARROW1" else pa.ipc.open_stream(path).read_all()
    (buffer,) = {b.to_pybytes() for b in table.column("input_ids").chunk(0).values.buffers() if b is not None}
    assert content.count(buffer) == 1
    path.write_bytes(content.replace(buffer, change(np.frombuffer(buffer, np.int32)).astype(np.int32).tobytes()))
    assert path.stat().st_size == len(content) and path.read_bytes() != content


def flip_byte(path, behind, offset):
    content = bytearray(path.read_bytes())
    content[content.index(behind) + offset] ^= 1
    path.write_bytes(content)


def test_a_damaged_entry_is_built_again_and_said(template, write_json, tmp_path, builds):
    said = []
    path, cache = write_json([row(), row("R")]), RowCache(tmp_path / "cache", said.append)
    rows, account = load_rows([path], template, cache=cache)
    (entry,) = (p for p in (tmp_path / "cache").iterdir() if p.is_dir())
    whole = shutil.copytree(entry, tmp_path / "whole")
    for damage in (
        lambda: (entry / "account.json").unlink(),
        lambda: (entry / "account.json").write_text('{"sizes": {'),
        lambda: (entry / "rows.arrow").write_bytes((whole / "rows.arrow").read_bytes()[:-1]),
        lambda: (entry / "rows.arrow").unlink(),
        lambda: replace_ids(entry / "rows.arrow", lambda ids: np.roll(ids, 1)),
        lambda: replace_ids(entry / "rows.arrow", lambda ids: ids * 0),
        lambda: replace_ids(entry / "rows.arrow", lambda ids: np.full_like(ids, 2**31 - 1)),  # no id of the vocabulary
        lambda: flip_byte(entry / "account.json", b'"fingerprint"', 20),
    ):
        before = len(builds)
        damage()
        again, same = load_rows([path], template, cache=cache)
        assert len(builds) == before + 1 and same == account and len(again) == 2
        assert again[0][0].tolist() == rows[0][0].tolist()
    assert len(said) == 7 and all("these tokenised data are damaged; they are built again" in line for line in said)
    assert len(rows) == 2, "what was open stays readable"


def test_a_failed_build_leaves_no_entry(template, write_json, tmp_path):
    cache = RowCache(tmp_path / "cache")
    for _ in range(2):
        with pytest.raises(DataError, match="empty assistant turn"):
            load_rows([write_json([row(), row(answer="")])], template, cache=cache)
    with pytest.raises(DataError, match="cannot keep tokenised data here"):
        load_rows([write_json([row()])], template, cache=RowCache(write_json("a file", "file") / "cache"))


def _load(checkpoint, path, cache, queue):
    template = ChatTemplate(load_tokenizer(checkpoint))
    built = []
    build = dataset.build_rows
    dataset.build_rows = lambda *a, **k: built.append(1) or build(*a, **k)
    rows, account = load_rows([path], template, cache=RowCache(cache))
    queue.put((len(built), len(rows), account.fingerprint))


def test_several_processes_build_once(checkpoints, tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    arguments = (str(checkpoints["untied"]), CONVERSATIONS, tmp_path / "cache", queue)
    processes = [context.Process(target=_load, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    found = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert (
        sum(built for built, *_ in found) == 1 and len({rest for _, *rest in map(tuple, found) for rest in rest}) == 2
    )


def test_without_a_cache_nothing_stays(template, write_json, tmp_path):
    import tempfile

    before = set(tmp_path.iterdir())
    rows, _ = load_rows([write_json([row()])], template, cache=RowCache(None))
    assert len(rows) == 1 and {p.name for p in set(tmp_path.iterdir()) - before} == {"data.json"}
    assert str(tmp_path) not in tempfile.gettempdir()


def test_long_rows_lose_turns_or_go_or_stop_the_run(template, write_json):
    long = {
        "messages": [
            *row("Q", "A")["messages"],
            *row("R", "B " * 200)["messages"],
        ]
    }
    path = write_json([row(), long, {"messages": row("Q " * 200)["messages"]}])

    def load(on_long):
        return load_rows([path], template, DataOptions(max_length=60, on_long=on_long))

    rows, account = load("drop_turns")
    assert len(rows) == 2 and account.shortened == 1 and account.too_long == 2
    assert [reason.partition(" in ")[0] for reason in account.dropped] == [
        "later turn does not fit",
        "first turn does not fit",
    ]
    rows, account = load("drop")
    assert len(rows) == 1 and list(account.dropped.values()) == [2] and account.shortened == 0
    with pytest.raises(DataError) as error:
        load("error")
    assert str(error.value).count("do not fit in 60 tokens (--model_max_length)") == 1
    with pytest.raises(DataError, match="do not fit in 60 tokens"):
        load_rows([path], template, DataOptions(max_length=60, on_long="error", on_bad_row="skip"))


def test_plain_text_is_trained_to_its_end_and_split_where_it_is_long(template, write_json):
    rows, account = load_rows([write_json([{"text": "word " * 50}])], template, DataOptions(max_length=20))
    assert len(rows) > 1 and max(rows.lengths) == 20
    assert (account.split, account.turns, account.turns_trained, account.stopped) == (0, 1, 1, 1)
    ids = np.concatenate([rows[i][0] for i in range(len(rows))])
    assert template.tokenizer.decode(ids[:-1]) == "word " * 50 and ids[-1] == template.tokenizer.eos_token_id
    assert all((rows[i][1] == rows[i][0]).all() for i in range(len(rows))) and rows.row_id(1) == "data-0#2"


def test_weights_are_kept_and_rows_without_supervision_counted(template, write_json):
    weighted = row()
    weighted["messages"][1]["weight"] = 0.25
    untrained = row()
    untrained["messages"][1]["train"] = False
    rows, account = load_rows([write_json([weighted, untrained, {"messages": row()["messages"][:1]}])], template)
    _, labels, weights = rows[0]
    assert set(weights[labels >= 0]) == {np.float32(0.25)} and set(weights[labels < 0]) == {1}
    assert account.dropped == {"no supervised turn": 1, "no assistant turn": 1} and len(rows) == 1


def test_duplicates_overlap_and_control_texts_are_counted(template, write_json):
    train = write_json([row(), row("<|im_end|>"), row(), row("x")], "train.json")
    rows, account = load_rows([train], template)
    assert account.duplicates == 1 and account.places["duplicates"] == [f"{train}:1"]
    assert account.control_texts == 1
    others, _ = load_rows([write_json([row("x"), row("new")], "eval.json")], template)
    assert dataset.count_overlap(rows, others) == 1


def test_thinking_of_an_answer_is_no_text_that_stays_text(write_json):
    thinking = row(answer="<think>\nHm.\n</think>\n\nA")
    path = write_json([thinking, row(), row(answer="<|im_end|> is a token"), row(question="<think> is a token")])
    _, account = load_rows([path], load_template("qwen3"))
    assert account.conversations_trained == 4 and account.control_texts == 2


def test_bad_rows_are_listed_at_once_or_skipped(template, write_json):
    bad = row(answer="")
    path = write_json("\n".join(map(json.dumps, [row(), bad, row(), bad])) + "\n{", "data.jsonl")
    with pytest.raises(DataError) as error:
        load_rows([path], template)
    lines = str(error.value).splitlines()
    assert [line.split(":")[1] for line in lines] == ["2", "5"] and lines[0].endswith(" (2 rows: also in line 4)")
    rows, account = load_rows([path], template, DataOptions(on_bad_row="skip"))
    assert len(rows) == 2 and len(account.problems) == 3 and "skipped: 3 bad rows, the first:" in account.describe()[-1]


def test_variables_of_a_row_reach_the_template(checkpoints):
    from tests.templates import load_template

    template = load_template("qwen3")
    from data_utils.schema import parse_record
    from data_utils.sources import Record

    thinking = parse_record(Record(row(chat_template_kwargs={"enable_thinking": False}), "f:1", 0))
    (encoded,) = template.encode_conversation(thinking)
    assert "<think>\n\n</think>" in template.tokenizer.decode(encoded.input_ids[: encoded.pieces[0][0]])
    assert encode_row(encoded).spans[0][0] == encoded.pieces[0][0]
    for name in ("no_such_variable", "tools", "tokenize"):
        bad = parse_record(Record(row(chat_template_kwargs={name: 1}), "f:1", 0))
        with pytest.raises(DataError, match=rf"f:1: chat_template_kwargs: the chat template has no variable {name}"):
            template.encode_conversation(bad)
