"""`python -m data_utils check` and `show`, and finetune.py's refusal of the same file."""

import json
import re
import sys

import pytest

from data_utils.__main__ import main
from tests.conftest import CONVERSATIONS, SHARED, needs
from tests.templates import FOLDER
from tests.test_cli import flags

GOOD = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}
FAULTS = {
    2: ("{", "data.jsonl:2:2: invalid JSON"),
    4: ("[1]", "data.jsonl:4: a row must be an object"),
    5: ({"txt": 1}, "data.jsonl:5: no 'conversations' or 'messages' in the row"),
    7: ({"messages": []}, "data.jsonl:7: messages: expected a list of turns"),
    8: ({"messages": [{"role": "robot", "content": "x"}]}, "data.jsonl:8: messages[0].role: 'robot' is not a role"),
    10: (
        {"messages": [GOOD["messages"][0], {"role": "assistant", "content": ""}]},
        "data.jsonl:10: messages[1].content: empty assistant turn",
    ),
    11: ({"messages": [GOOD["messages"][1]]}, "data.jsonl:11: messages[0].role: a conversation cannot begin with"),
    13: ({**GOOD, "tools": "{"}, "data.jsonl:13: tools: expected a list of tools as JSON"),
    14: ({"instruction": "Q"}, "data.jsonl:14: no 'output' in the row"),
    15: ({**GOOD, "tools": [{"name": "f"}]}, "data.jsonl:15: the chat template cannot express tools"),
}


@pytest.fixture
def faulty(tmp_path):
    lines = [FAULTS.get(line, (GOOD,))[0] for line in range(1, 17)]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


@pytest.fixture
def run_main(capfd, monkeypatch):
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["data_utils", *map(str, words)])
        code = main()
        return code, *capfd.readouterr()

    return run


def test_ten_faults_give_ten_lines_and_finetune_refuses_the_same(
    faulty,
    run_main,
    run_script,
    checkpoints,
    tmp_path,
):
    code, stdout, _ = run_main("check", faulty, "--model", checkpoints["untied"])
    found = [line for line in stdout.splitlines() if line.startswith(str(faulty))]
    assert code == 1 and stdout.splitlines()[-1] == "problems: 10"
    named = [int(number) for line in found for number in re.findall(r"(?:jsonl:|also in line )(\d+)", line)]
    assert sorted(named) == sorted(FAULTS)
    for line in found:
        assert FAULTS[int(line.split(":")[1])][1] in line
    out = tmp_path / "out"
    code, _, stderr = run_script("finetune.py", *flags(checkpoints["untied"], faulty, out))
    assert code == 2 and sorted(stderr.splitlines()) == sorted(f"error: {line}" for line in found)
    assert not out.exists()
    code, stdout, stderr = run_script("finetune.py", *flags(checkpoints["untied"], faulty, out, "--on_bad_row", "skip"))
    assert code == 0 and "skipped: 10 bad rows, the first:" in stdout, stderr
    assert len(json.loads((out / "run.json").read_text())["data"]["problems"]) == 10


def test_a_clean_file_and_what_is_in_both(run_main, checkpoints, write_json):
    code, stdout, _ = run_main(
        *("check", CONVERSATIONS, "--model", checkpoints["untied"], "--model_max_length", 200),
        *("--eval_data_path", CONVERSATIONS),
    )
    assert code == 0 and "targets that end with the stop token: 100 %" in stdout
    assert "rows longer than 200 tokens: 0" in stdout and "conversations in both: 56" in stdout
    code, stdout, _ = run_main("check", CONVERSATIONS)
    assert code == 0 and "56 conversations: 56 with 68 supervised turns" in stdout
    assert "without --model no token was counted and no chat template tried" in stdout
    code, stdout, _ = run_main("check", CONVERSATIONS, "--model", checkpoints["untied"], "--json")
    assert json.loads(stdout)["account"]["conversations"] == 56 and json.loads(stdout)["problems"] == []
    code, stdout, _ = run_main(
        "check", write_json([{"messages": GOOD["messages"][:1]}]), "--model", checkpoints["untied"]
    )
    assert code == 0 and "not trained: 1 x no assistant turn" in stdout


def test_mistakes_of_the_command_line(run_main, checkpoints):
    for words, message in (
        (["check", "absent.json"], "error: absent.json: no such file"),
        (["check"], "error: the following arguments are required: data"),
        (["show", CONVERSATIONS, "--model", checkpoints["untied"], "--index", 99], "--index 99: no such conversation"),
        (["show", CONVERSATIONS, "--model", checkpoints["untied"], "--id", "x"], "--id x: no such conversation"),
        (["show", CONVERSATIONS, "--num", 1, "--all"], "not allowed with"),
        (["show", CONVERSATIONS, "--model", checkpoints["untied"], "--num", 0], "--num: at least 1"),
        (["show", CONVERSATIONS, "--model", checkpoints["untied"], "--html", "/nowhere/x.html"], "cannot be written"),
        (["check", CONVERSATIONS, "--model", checkpoints["untied"], "--model_max_length", 0], "must be at least 2"),
    ):
        code, _, stderr = run_main(*words)
        assert code == 2 and message in stderr and stderr.count("\n") == 1


def test_dropped_rows_are_listed_in_a_file(run_script, checkpoints, write_json, tmp_path):
    long = {"id": "long", "messages": [{"role": "user", "content": "Q " * 300}, GOOD["messages"][1]]}
    out = tmp_path / "out"
    code, stdout, _ = run_script("finetune.py", *flags(checkpoints["untied"], write_json([GOOD, long]), out))
    assert code == 0 and "not trained: 1 x first turn does not fit" in stdout
    (line,) = (out / "dropped.jsonl").read_text().splitlines()
    assert json.loads(line)["id"] == "long" and json.loads(line)["where"].endswith("data.json:1")


@pytest.fixture
def shown_words(checkpoints, write_json):
    """What `show` is told, of two rows."""
    row = {
        "id": "one",
        "messages": [
            {"role": "user", "content": "Q <|im_end|>"},
            {"role": "assistant", "content": "A", "weight": 0},
            {"role": "user", "content": "R"},
            {"role": "assistant", "content": "B", "weight": 0.5},
        ],
    }
    return ["show", write_json([GOOD, row]), "--model", checkpoints["untied"]]


def test_show_tells_control_prompt_and_trained_tokens_apart(run_main, shown_words):
    needs("rich")
    code, stdout, _ = run_main(*shown_words, "--id", "one")
    assert code == 0 and stdout.startswith("--- one: ")
    assert "«<|im_start|>»user\nQ <|im_end|>«<|im_end|>»" in stdout, "a text that looks like a control token is text"
    assert "[[B«<|im_end|>»]]" in stdout and "[[A" not in stdout
    assert "turn 1 (assistant, not to be trained), turn 2 (user)" in stdout
    assert "trained: turn 3 (assistant), up to its stop token, its loss times 0.5" in stdout
    code, stdout, _ = run_main(*shown_words, "--index", 1, "--ids")
    assert code == 0 and "«<|im_end|>» [" in stdout and "--- data-0" not in stdout


def test_show_writes_json_and_a_page(run_main, shown_words, tmp_path):
    code, stdout, _ = run_main(*shown_words, "--all", "--json", "--system_message", "S")
    first, second = map(json.loads, stdout.splitlines())
    assert first["id"] == "data-0" and second["id"] == "one"
    assert "".join(piece["text"] for piece in second["pieces"])[:10] == "<|im_start"
    assert second["pieces"][-1]["end"] == len(second["input_ids"]) == len(second["labels"])
    code, *_ = run_main(*shown_words, "--html", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert code == 0 and page.startswith("<!doctype html>") and page.count("<h3>") == 2 and "&lt;|im_end|&gt;" in page
    assert 'class=trained title="trained: turn 3' in page


@pytest.mark.parametrize("name", ["alpaca_en", "alpaca_zh", "glaive_toolcall_en"])
def test_real_files_are_accounted_for(run_main, real_tokenizer_path, name):
    template = FOLDER / "qwen3.jinja"
    code, stdout, _ = run_main(
        *("check", SHARED / "data" / f"{name}.json", "--model", real_tokenizer_path, "--chat_template", template),
        *("--model_max_length", 2048, "--json"),
    )
    account = json.loads(stdout)["account"]
    assert code == 0 and account["conversations"] == len(
        json.loads((SHARED / "data" / f"{name}.json").read_text("utf-8"))
    )
    assert account["stopped"] == account["turns_trained"] and account["tokens"] > 50_000
    lost = sum(account["dropped"].values())
    assert account["conversations"] - account["conversations_trained"] <= lost
