"""chat.py --prompts: conversations of a file, in batches of like length, in order, resumed."""

import fcntl
import itertools
import json
import random
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

import chat
import commands.prompts as prompts_module
import merge_lora
from commands.prompts import read_prompts
from data_utils.sources import DataError
from data_utils.template import ChatTemplate
from inference.batches import plan_batches
from inference.generate import generate_answers
from tests.test_saved import write_result
from tests.tool_model import ANSWER, ASKED, CALLED, RESULT, TOOL, write_tool_model


@pytest.fixture(scope="module")
def merged(checkpoints, tmp_path_factory):
    root = tmp_path_factory.mktemp("many")
    write_result(checkpoints["untied"], "tokens", root / "adapter")
    merge_lora.main([str(root / "adapter"), str(root / "merged")])
    return root / "merged"


@pytest.fixture(scope="module")
def caller(tokenizer, tmp_path_factory):
    return write_tool_model(tokenizer, tmp_path_factory.mktemp("many-tools") / "caller")


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read_rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


ROWS = [
    {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]},
    {
        "messages": [
            {"role": "user", "content": "A long one. " * 9},
            {"role": "assistant", "content": "Said <|im_end|>"},
            {"role": "user", "content": "And?"},
        ]
    },
    {"conversations": [{"from": "user", "value": "你好"}, {"from": "assistant", "value": "您好"}]},
    {"prompt": "plain"},
    {"instruction": "Say", "input": "it", "output": "it"},
]


def test_conversations_are_answered_as_one_by_one_and_stay_data(merged, tmp_path, capsys):
    file, out = write_rows(tmp_path / "rows.jsonl", ROWS), tmp_path / "out.jsonl"
    words = [str(merged), "--prompts", str(file), "--max_new_tokens", "8"]
    chat.main([*words, "--batch_size", "2", "--out", str(out)])
    capsys.readouterr()
    found = read_rows(out)
    assert [row["source"] for row in found] == [f"{file}:{line}" for line in range(1, 6)]
    assert [row.get("expected") for row in found] == [None, None, "您好", None, "it"]
    for number, row in enumerate(found):
        assert row["messages"][-1] == {"role": "assistant", "content": row["answer"]}
        one = write_rows(tmp_path / f"{number}.jsonl", [{"messages": row["messages"][:-1]}])
        chat.main([str(merged), "--prompts", str(one), "--max_new_tokens", "8"])
        assert json.loads(capsys.readouterr().out)["answer"] == row["answer"]
    answered = read_prompts(str(out))  # its own output, read as data
    assert [p.expected for p in answered] == [row["answer"] for row in found]


def test_a_system_turn_of_the_command_line_is_for_rows_without_one(merged, tmp_path, monkeypatch, capsys):
    seen = []
    encode = ChatTemplate.encode_prompt
    monkeypatch.setattr(
        ChatTemplate, "encode_prompt", lambda self, messages, **k: seen.append(messages) or encode(self, messages, **k)
    )
    file = write_rows(tmp_path / "rows.jsonl", ROWS[:2])
    chat.main([str(merged), "--prompts", str(file), "--max_new_tokens", "1", "--system", "S"])
    assert [messages[0]["content"] for messages in seen] == ["Be kind.", "S"]


def test_tools_of_a_row(caller, tmp_path):
    rows = [{"messages": [ASKED], "tools": [TOOL]}]
    rows.append({"messages": [ASKED, CALLED, RESULT], "tools": [TOOL]})
    rows.append({"messages": [ASKED, CALLED], "tools": [TOOL]})
    out = tmp_path / "out.jsonl"
    chat.main([str(caller), "--prompts", str(write_rows(tmp_path / "r.jsonl", rows)), "--out", str(out)])
    found = read_rows(out)
    assert found[0]["messages"][-1] == CALLED and found[2]["expected"] == CALLED
    assert found[1]["messages"][-1] == {"role": "assistant", "content": ANSWER}
    assert all(row["tools"] == [TOOL] and row["ended_by"] == "stop" for row in found)
    (tmp_path / "tools.json").write_text(json.dumps([TOOL]))
    again = tmp_path / "again.jsonl"
    plain = write_rows(tmp_path / "p.jsonl", [{"messages": [ASKED]}])
    chat.main([str(caller), "--prompts", str(plain), "--tools", str(tmp_path / "tools.json"), "--out", str(again)])
    assert read_rows(again)[0]["messages"][-1] == CALLED


@given(st.lists(st.integers(1, 50), max_size=200), st.integers(1, 5))
def test_batches_hold_each_prompt_once_and_like_lengths(lengths, batch_size):
    batches = list(plan_batches(lengths, batch_size))
    assert sorted(itertools.chain(*batches)) == list(range(len(lengths)))
    assert all(0 < len(batch) <= batch_size for batch in batches)
    window = 32 * batch_size
    for batch in batches:
        assert len({index // window for index in batch}) == 1
    for before, after in itertools.pairwise(batches):
        if before[0] // window == after[0] // window:
            assert min(lengths[i] for i in before) >= max(lengths[i] for i in after)


def test_whatever_was_written_the_file_becomes_the_same(merged, tmp_path, capsys):
    """Killed at any byte, with sampling: who goes on gets what was due."""
    chance = random.Random(0)
    prompts = ["word " * chance.randrange(1, 20) for _ in range(11)]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
    words = [str(merged), "--prompts", str(tmp_path / "prompts.txt"), "--max_new_tokens", "5", "--batch_size", "2"]
    words += ["--temperature", "2", "--seed", "3", "--out"]
    chat.main([*words, str(tmp_path / "whole")])
    whole = (tmp_path / "whole").read_bytes()
    assert len({row["answer"] for row in read_rows(tmp_path / "whole")}) > 5
    settings = (tmp_path / "whole.settings.json").read_text()
    for end in [0, *(chance.randrange(len(whole)) for _ in range(4)), len(whole) - 1, len(whole)]:
        cut = tmp_path / f"cut{end}"
        cut.write_bytes(whole[:end])
        (tmp_path / f"{cut.name}.settings.json").write_text(settings)
        chat.main([*words, str(cut)])
        assert cut.read_bytes() == whole, end
    capsys.readouterr()


def test_a_file_of_other_answers_is_left_alone(merged, tmp_path, run_script):
    out = tmp_path / "out.jsonl"
    (tmp_path / "a.txt").write_text("a\nb")
    (tmp_path / "b.txt").write_text("a\nc")
    words = ["chat.py", merged, "--max_new_tokens", 2, "--out", out, "--prompts"]
    assert run_script(*words, tmp_path / "a.txt")[0] == 0
    before = out.read_bytes()
    for more, message in (
        ([tmp_path / "a.txt", "--temperature", 0.5], f"--out {out}: was begun with --temperature None (now 0.5); use"),
        ([tmp_path / "b.txt"], f"--out {out}:2: answers another prompt; name another file"),
    ):
        code, _, stderr = run_script(*words, *more)
        assert code == 2 and message in stderr and len(stderr.splitlines()) == 1
    shutil.copytree(merged, tmp_path / "other")
    template = tmp_path / "other" / "chat_template.jinja"
    words[1] = tmp_path / "other"
    out = words[5] = tmp_path / "changed.jsonl"
    assert run_script(*words, tmp_path / "a.txt")[0] == 0
    template.write_text(template.read_text().replace("assistant.", "pirate."))
    code, _, stderr = run_script(*words, tmp_path / "a.txt")
    assert code == 2 and f"--out {out}: was begun with --files" in stderr
    words[1], words[5] = merged, tmp_path / "out.jsonl"
    out = words[5]
    (tmp_path / "out.jsonl.settings.json").unlink()
    code, _, stderr = run_script(*words, tmp_path / "a.txt")
    assert (code, stderr) == (2, f"error: --out {out}: is there, and was not made by this; name another file\n")
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"messages": [{"role": "system", "content": "x"}]}], "nothing is asked"),
        ([{"text": "x"}], "--raw continues it"),
        ([{"a": 1}, {"messages": [{"role": "bot", "content": "x"}]}], "no 'conversations'"),
        ([{"prompt": 3}], "expected a list of turns"),
    ],
)
def test_rows_that_are_no_prompts(tmp_path, rows, message):
    with pytest.raises(DataError, match=message) as error:
        read_prompts(str(write_rows(tmp_path / "rows.jsonl", rows)))
    assert len(str(error.value).splitlines()) == len(rows) and "rows.jsonl:1: " in str(error.value)


def test_raw_rows_are_texts(tmp_path):
    assert read_prompts(str(write_rows(tmp_path / "t.jsonl", [{"text": "x y"}])), raw=True)[0].text == "x y"
    with pytest.raises(DataError, match="which --raw cannot continue"):
        read_prompts(str(write_rows(tmp_path / "m.jsonl", ROWS)), raw=True)


def test_sorting_changes_no_answer(merged):
    """Greedy answers in batches of like length are those of the plain loop."""
    from inference import load
    from inference.batches import answer_in_order

    model = load(str(merged))
    ids = [model.template.encode_prompt([{"role": "user", "content": "x" * n}]) for n in (3, 40, 1, 17, 9)]
    options = {"max_new_tokens": 6, "do_sample": False}
    plain = list(generate_answers(model.model, model.tokenizer, ids, batch_size=1, **options))
    assert list(answer_in_order(model.model, model.tokenizer, ids, batch_size=2, **options)) == plain
    assert list(answer_in_order(model.model, model.tokenizer, ids, batch_size=2, first=3, **options)) == plain[3:]


def test_files_of_data_are_data_whatever_their_path(tmp_path):
    """Not lines, which would be asked as JSON: in a directory with #, a directory itself, with an odd suffix."""
    (tmp_path / "a#b").mkdir()
    file = write_rows(tmp_path / "a#b" / "rows.jsonl", ROWS)
    asked = [prompt.asked.messages for prompt in read_prompts(str(file))]
    assert len(asked) == len(ROWS)
    assert [prompt.asked.messages for prompt in read_prompts(str(file.parent))] == asked
    assert len(read_prompts(f"{file}#2")) == 2
    for name, message in ((f"{file}*2", "has an effect on training data only"), ("ROWS.JSONL", "unknown format")):
        write_rows(tmp_path / "ROWS.JSONL", ROWS)
        with pytest.raises(DataError, match=message):
            read_prompts(str(tmp_path / name))


def test_settings_of_another_program_are_left_alone(merged, tmp_path, run_script):
    file, beside = write_rows(tmp_path / "rows.jsonl", ROWS), tmp_path / "out.settings.json"
    beside.write_text('{"mine": 1}')
    code, _, stderr = run_script("chat.py", merged, "--prompts", file, "--out", tmp_path / "out")
    assert code == 2 and f"{beside} is there, and was not made by this; name another file\n" in stderr
    assert beside.read_text() == '{"mine": 1}' and not (tmp_path / "out").exists()


def test_two_processes_do_not_write_one_file(merged, tmp_path, run_script):
    (tmp_path / "a.txt").write_text("a\nb")
    (tmp_path / "out").write_text("")
    (tmp_path / "out.settings.json").write_text(json.dumps(dict.fromkeys(prompts_module._SETTINGS)))
    with open(tmp_path / "out.settings.json") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        code, _, stderr = run_script("chat.py", merged, "--prompts", tmp_path / "a.txt", "--out", tmp_path / "out")
    assert code == 2 and "another process is writing these answers" in stderr
    assert (tmp_path / "out").read_text() == ""
