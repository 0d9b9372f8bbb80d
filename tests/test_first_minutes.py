"""What a newcomer meets first: data with mistakes, commands that end at once, the commands when installed."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import chat
import merge_lora
from data_utils.__main__ import main as data_main
from data_utils.conversations import DataOptions, read_conversations, read_names
from data_utils.dataset import load_rows
from data_utils.model_path import explain_unreachable_model
from data_utils.report import Account, DataErrors, group_problems
from data_utils.rows import cut_row, cut_to_length, encode_row
from data_utils.sources import DataError, find_sources
from data_utils.template import ChatTemplate
from data_utils.tokenizer import load_tokenizer
from tests.conftest import CONVERSATIONS, ROOT, run_python
from tests.runs import example_rows
from tests.templates import FAMILIES, load_template
from tests.test_cli import flags

QUESTION, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ---- problems ----


def test_one_cause_is_one_line_with_its_count_and_first_places():
    problems = [f"d.jsonl:{n}: messages[{n % 2}].role: 'bot' is not a role (user)" for n in range(3, 194)]
    problems.insert(5, "d.jsonl:99: text: empty")
    assert group_problems(problems) == [
        "d.jsonl:3: messages[1].role: 'bot' is not a role (user) (191 rows: also in lines 4, 5, 6 and 187 more)",
        "d.jsonl:99: text: empty",
    ]
    assert group_problems(["a.json:1: x 5", "b.json:1: x 6", "no place"]) == [
        "a.json:1: x 5",
        "b.json:1: x 6",
        "no place",
    ]
    assert str(DataErrors(problems)).count("\n") == 1


@pytest.mark.parametrize(
    ("named", "key", "meant"), [("bot", "from", "gpt"), ("bot", "role", "assistant"), ("Human", "from", "human"),
                                ("customer", "role", "user"), ("zebra", "role", None)],
)  # fmt: skip
def test_a_role_that_is_none_is_guessed_where_it_can_be(tmp_path, named, key, meant):
    turn = {key: named, {"from": "value", "role": "content"}[key]: "x"}
    path = write_rows(tmp_path / "d.jsonl", [{{"from": "conversations", "role": "messages"}[key]: [turn]}])
    account = Account()
    assert not list(read_conversations(find_sources([path])[0], DataOptions(), account))
    assert account.problems[0].endswith(f"did you mean {meant}?" if meant else ")")


def test_mistakes_that_take_no_tokenizer_are_told_first_and_all_are_told(run_script, checkpoints, tmp_path, capfd):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    rows = [{"messages": [QUESTION, ANSWER], "tools": tools}] * 191 + [{"messages": [{"role": "bot", "content": "x"}]}]
    path = write_rows(tmp_path / "d.jsonl", rows)
    code, _, stderr = run_script("finetune.py", *flags(checkpoints["untied"], path, tmp_path / "out"))
    first, second = stderr.splitlines()
    assert code == 2 and "d.jsonl:192: messages[0].role: 'bot' is not a role" in first
    assert second == (
        f"error: {path}:1: the chat template cannot express tools; --chat_template chatml-tools can "
        "(191 rows: also in lines 2, 3, 4 and 187 more)"
    )
    assert not (tmp_path / "out").exists()
    more = ["--chat_template", "chatml-tools", "--on_bad_row", "skip", "--model_max_length", 400]
    code, _, stderr = run_script("finetune.py", *flags(checkpoints["untied"], path, tmp_path / "out", *more))
    assert code == 0, stderr
    (skipped,) = map(json.loads, (tmp_path / "out" / "dropped.jsonl").read_text().splitlines())
    assert skipped["where"] == f"{path}:192" and "'bot' is not a role" in skipped["reason"]


# ---- names and tables ----


def read_all(path, **options):
    account = Account()
    found = [c for source in find_sources([path]) for c in read_conversations(source, DataOptions(**options), account)]
    return found, account.problems


def test_other_names_for_keys_and_roles(tmp_path):
    turns = [{"speaker": "client", "text": "Q"}, {"speaker": "bot", "text": "A"}]
    path = write_rows(tmp_path / "d.jsonl", [{"dialog": turns}, {"dialog": turns, "messages": turns}])
    names = read_names(["messages=dialog", "role=speaker", "content=text", "assistant=bot", "user=client"])
    (found,), problems = read_all(path, names=names)
    assert [(m["role"], m["content"]) for m in found.messages] == [("user", "Q"), ("assistant", "A")]
    assert problems == [f"{path}:2: both 'messages' and 'messages', which --map says is the same; keep one"]


def test_tables(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('instruction,input,output\n"Say\n""hi""",,Hi\nonly,two\nQ,I,"x, y"\n', encoding="utf-8-sig")
    found, problems = read_all(path)
    assert [[m["content"] for m in c.messages] for c in found] == [['Say\n"hi"', "Hi"], ["Q\nI", "x, y"]]
    assert [c.where for c in found] == [f"{path}:2", f"{path}:5"]
    assert problems == [f"{path}:4: 2 cells, but the first line has 3 names"]
    (tmp_path / "b.tsv").write_text(f"id\tmessages\n7\t{json.dumps([QUESTION, ANSWER])}\n8\t[oops\n")
    (found,), problems = read_all(tmp_path / "b.tsv")
    assert found.id == "7" and len(found.messages) == 2 and "messages: expected a list of turns as JSON" in problems[0]
    for text, message in (
        ("a;b\n1;2\n", "one column alone; its cells are divided by ';'"),
        ("a,a\n1,2\n", "the name 'a' stands twice"),
        ('text\n"open\n', "unexpected end of data"),
        ("", "no rows in it"),
        ("text\n", "no rows in it"),
    ):
        path.write_text(text)
        assert message in read_all(path)[1][0]
    path.write_bytes(b"text\n\xff\xfe\n")
    assert "not UTF-8" in read_all(path)[1][0]
    path.write_text("text\nabc\n")
    assert read_all(path)[0][0].text == "abc"


@pytest.mark.parametrize("seed", range(200))
def test_a_table_of_any_texts_gives_them_back(tmp_path, seed):
    import csv

    chance = random.Random(seed)
    texts = ["".join(chance.choices("a,\"\n\t;'|é你\u2028 ", k=chance.randint(1, 12))) + "." for _ in range(6)]
    for suffix, delimiter in ((".csv", ","), (".tsv", "\t")):
        with open(tmp_path / f"t{suffix}", "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter=delimiter)
            writer.writerow(["instruction", "output"])
            writer.writerows([texts[:2], texts[2:4], texts[4:]])
        found, problems = read_all(tmp_path / f"t{suffix}")
        assert not problems and [m["content"] for c in found for m in c.messages] == texts


def test_placeholders_that_were_not_filled_in_are_counted(tmp_path, capsys, monkeypatch):
    rows = [
        {"messages": [{"role": "user", "content": text}, ANSWER]} for text in ("Hi {{name}}!", "{{ 1 }}", "{x}", "ok")
    ]
    path = write_rows(tmp_path / "d.jsonl", rows)
    monkeypatch.setattr(sys, "argv", ["data_utils", "check", str(path)])
    assert data_main() == 0
    assert f"1 of them hold {{{{placeholders}}}} that were not filled in ({path}:1)" in capsys.readouterr().out


# ---- evaluation share ----


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.999])
def test_a_share_is_held_back_by_conversation(checkpoints, share):
    template = ChatTemplate(load_tokenizer(str(checkpoints["untied"])))
    rows, _ = load_rows([CONVERSATIONS, CONVERSATIONS], template)
    train, held_back = rows.split(share, seed=3)
    conversations = set(rows.conversations().tolist())
    ours, theirs = set(train.conversations().tolist()), set(held_back.conversations().tolist())
    assert ours | theirs == conversations and not ours & theirs
    assert len(theirs) == min(max(1, round(share * len(conversations))), len(conversations) - 1)
    assert len(train) + len(held_back) == len(rows)
    assert sorted([*map(train.row_id, range(len(train))), *map(held_back.row_id, range(len(held_back)))]) == sorted(
        map(rows.row_id, range(len(rows)))
    )
    for view in (train, held_back):
        for index in range(len(view)):
            assert len(view[index][0]) == view.lengths[index]
            assert int((view[index][1][1:] != -100).sum()) == view.num_targets[index]
    # By the conversations and the seed alone: the same with rows in another order, another with another seed.
    order = np.random.default_rng(0).permutation(len(rows))
    assert set(rows.select(order).split(share, seed=3)[1].conversations().tolist()) == theirs
    if share in (0.1, 0.5):
        assert set(rows.split(share, seed=4)[1].conversations().tolist()) != theirs


def test_one_conversation_cannot_be_divided(checkpoints):
    rows, _ = example_rows(checkpoints["untied"])
    with pytest.raises(DataError, match=r"--eval_share 0\.5: 1 different conversations cannot be divided"):
        rows.select(np.array([0, 0])).split(0.5, seed=1)


# ---- check and show ----


@pytest.mark.parametrize("limit", [20, 60, 100])
def test_show_cuts_rows_as_training_does(limit):
    from data_utils.schema import parse_record
    from data_utils.sources import Record

    template = load_template("qwen2_5")
    for number, row in enumerate(json.loads(CONVERSATIONS.read_text())):
        for whole in template.encode_conversation(parse_record(Record(row, f"f:{number}", number))):
            expected = encode_row(whole) if len(whole.input_ids) <= limit else cut_to_length(encode_row(whole), limit)
            cut = cut_row(whole, limit)
            assert len(cut) == (expected is not None)
            if cut and expected is not None:
                assert encode_row(cut[0]).spans == expected.spans and cut[0].ends == expected.ends
                assert cut[0].input_ids == expected.input_ids.tolist() and cut[0].pieces[-1][0] == len(cut[0].input_ids)


def test_a_page_has_places_totals_and_a_filter(checkpoints, tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.html"
    words = ["show", str(CONVERSATIONS), "--model", str(checkpoints["untied"]), "--html", str(page), "--num", "2"]
    monkeypatch.setattr(sys, "argv", ["data_utils", *words])
    assert data_main() == 0
    text = page.read_text()
    assert "<p>2 rows, " in text and f"{CONVERSATIONS}:2</span>" in text
    assert '<input id="filter"' in text and text.count("<section>") == 2


@pytest.mark.parametrize("name", sorted({"qwen2_5", "qwen3"} & FAMILIES.keys()))
def test_the_template_for_tools_writes_what_models_of_the_family_write(name):
    """Calls and results as Qwen's own templates write them, so that servers' parsers read them."""
    from data_utils.model_path import find_template

    template = load_template(name)
    call = {"type": "function", "function": {"name": "tide", "arguments": {"port": "Husum", "n": 1}}}
    turns = [
        {"role": "system", "content": "S"}, {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "", "tool_calls": [call, call]},
        {"role": "tool", "content": "r1"}, {"role": "tool", "content": "r2"}, {"role": "assistant", "content": "A"},
    ]  # fmt: skip
    expected = template.tokenizer.apply_chat_template(turns, tokenize=False)
    found = template.tokenizer.apply_chat_template(
        turns, tokenize=False, chat_template=find_template("chatml-tools").read_text()
    )
    assert found == expected.replace("<think>\n\n</think>\n\n", "")


# ---- ends ----


SCRIPTS = {
    "finetune": lambda models, out: ["finetune.py", *flags(models, CONVERSATIONS, out, "--use_lora")],
    "chat": lambda models, out: ["chat.py", models, "--prompt", "x", "--max_new_tokens", 4],
    "check": lambda models, out: ["-m", "data_utils", "check", CONVERSATIONS, "--model", models],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("seed", range(12))
def test_ctrl_c_while_libraries_are_imported_is_one_line(checkpoints, tmp_path, name, seed):
    words = SCRIPTS[name](checkpoints["untied"], tmp_path / "out")
    program = subprocess.Popen(
        [sys.executable, *map(str, words)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    time.sleep(random.Random(f"{name} {seed}").uniform(0.3, 3.0))
    program.send_signal(signal.SIGINT)
    _, stderr = program.communicate(timeout=60)
    assert len(stderr.splitlines()) <= 1, stderr
    assert stderr.startswith("interrupted") or program.returncode == 0 or not stderr


@pytest.mark.parametrize("words", [["--help"], ["--help-all"]])
def test_help_is_short_and_has_the_real_defaults(words):
    shown = run_python("finetune.py", *words).stdout
    lines = shown.splitlines()
    assert max(map(len, lines)) <= 120
    assert "--lora_r                    rank of the adapters [64]" in shown
    if words == ["--help"]:
        assert len(lines) < 70 and shown.count("\n  --") <= 26 and "--help-all" in lines[-1]
    else:
        assert "push_to_hub" not in shown and "--lora-r" not in shown
        assert "[bf16 where the GPU has it, else fp16; fp32 on a CPU]" in " ".join(shown.split())


@pytest.mark.parametrize(
    "script",
    ["merge_lora.py", "chat.py", "serve.py", "quantize.py", "evaluate.py", "examples/tiny_model.py", "examples/ask.py"],
)
def test_every_script_has_help(script):
    assert run_python(script, "--help").stdout.startswith("usage: ")


def test_a_hub_that_cannot_be_reached(monkeypatch, tmp_path):
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "HF_HUB_OFFLINE", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    line = explain_unreachable_model("acme/chat")
    assert line.startswith("acme/chat: no such directory, and the hub cannot be reached")
    assert "hf download acme/chat --local-dir chat" in line and "HF_ENDPOINT" in line
    with pytest.raises(ValueError, match="acme/chat: no such directory, and the hub cannot be reached"):
        chat.main(["acme/chat", "--prompt", "x"])
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text('{"base_model_name_or_path": "acme/chat"}')
    with pytest.raises(ValueError, match="it is the adapter's base model: name it with --base"):
        merge_lora.main([str(tmp_path / "a"), str(tmp_path / "out")])
    (tmp_path / "models--acme--chat").mkdir()
    assert explain_unreachable_model("acme/chat") is None and os.environ.pop("HF_HUB_OFFLINE") == "1"


@pytest.mark.slow
def test_installed_commands_work_from_anywhere(checkpoints, tmp_path):
    source, target = tmp_path / "source", tmp_path / "site"
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in filter(None, names):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        str(target),
        ".",
    ]
    subprocess.run(pip, cwd=source, check=True, capture_output=True)

    def run(command, *words):
        return subprocess.run(
            [sys.executable, str(target / "bin" / command), *map(str, words)], cwd=tmp_path, capture_output=True,
            text=True, env=os.environ | {"PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"}, timeout=300,
        )  # fmt: skip

    done = run(
        "finetune", *flags(checkpoints["untied"], CONVERSATIONS, "out", "--use_lora", "--chat_template", "chatml-tools")
    )
    assert done.returncode == 0, done.stderr
    assert run("finetune-merge", "out", "merged").returncode == 0
    assert run("finetune-chat", "merged", "--prompt", "Hi", "--max_new_tokens", 4).returncode == 0
    assert "problems: 0" in run("finetune-data", "check", CONVERSATIONS).stdout
    assert run("finetune-quantize", "--help").returncode == 0


def test_the_lines_for_python_in_readme_work(checkpoints, tmp_path):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code = text[text.index("```python\nimport finetune") :].split("```")[1].removeprefix("python\n")
    for name, value in (
        ("OUTPUT", tmp_path / "out"), ("MERGED", tmp_path / "merged"), ("MODEL", checkpoints["untied"]),
        ("DATA.json", CONVERSATIONS),
    ):  # fmt: skip
        code = code.replace(f'"{name}"', f'"{value}"')
    code = code.replace('"use_lora": True', '"use_lora": True, "max_steps": 1, "model_max_length": 160')
    done = run_python("-c", f"{code}\nassert record['status'] == 'finished'")
    assert done.stdout.count("merge verified") == 1 and (tmp_path / "merged" / "model.safetensors").exists()


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think", "qwen3_6", "glm4moe", "qwen2_5", "llama3_2"])
def test_targets_that_teach_not_to_think_are_counted(name, tmp_path):
    """As the definition's targets have them: with an empty think block, or with reasoning."""
    reasoned = {"role": "assistant", "content": "A", "reasoning_content": "because"}
    rows = [{"messages": [QUESTION, ANSWER, QUESTION, ANSWER]}] * 3
    thinks = name not in ("qwen2_5", "llama3_2")
    rows += [{"messages": [QUESTION, reasoned]}] * 2 if thinks else []
    path = write_rows(tmp_path / "d.jsonl", rows)
    _, account = load_rows([path], load_template(name))
    assert (account.empty_thinking, account.with_thinking) == ((6, 2) if thinks else (0, 0))
    (line,) = [line for line in account.describe() if "think block" in line] or [""]
    if thinks:
        assert line.startswith(
            "6 of 8 targets begin with an empty think block, which teaches the model not to think; 2 "
        )
        assert "--chat_template_kwargs '{\"enable_thinking\": false}'" in line
    else:
        assert not line


def test_the_switch_moves_the_empty_block_into_the_prompt(checkpoints, tmp_path):
    tokenizer = load_template("qwen3").tokenizer
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    path = write_rows(tmp_path / "d.jsonl", [{"messages": [QUESTION, ANSWER]}])
    switched = load_tokenizer(str(tmp_path / "tokenizer"), chat_template_kwargs='{"enable_thinking": false}')
    rows, account = load_rows([path], ChatTemplate(switched))
    assert account.empty_thinking == 0
    input_ids, labels, _ = rows[0]
    assert switched.decode(labels[labels != -100]) == "A<|im_end|>"
    assert "<think>\n\n</think>" in switched.decode(input_ids)
