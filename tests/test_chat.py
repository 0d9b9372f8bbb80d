"""chat.py: one answer, many, and a session in a terminal."""

import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import chat
import commands.chat
import merge_lora
from data_utils.template import ChatTemplate
from data_utils.tokenizer import load_tokenizer
from inference.decoding import SETTINGS
from tests.conftest import ROOT
from tests.test_saved import write_result


@pytest.fixture(scope="module")
def models(checkpoints, tmp_path_factory):
    """An adapter directory with trained rows, and the same merged."""
    root = tmp_path_factory.mktemp("chat")
    write_result(checkpoints["untied"], "tokens", root / "adapter")
    merge_lora.main([str(root / "adapter"), str(root / "merged")])
    return root


def plain_answer(model_dir, prompt, max_new_tokens):
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    messages = [{"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)[0]
    return tokenizer.decode(output[inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_one_prompt_is_answered_as_plain_transformers_does(models, capsys, kind):
    chat.main([str(models / kind), "--prompt", "Who are you? 你好", "--max_new_tokens", "12"])
    shown = capsys.readouterr().out
    assert shown.startswith(plain_answer(models / "merged", "Who are you? 你好", 12))


def test_many_prompts_in_batches_are_answered_as_one_by_one(models, tmp_path, capsys):
    prompts = ["Hi", "A much longer question, so that the short one is padded", "你好", "x"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
    words = [str(models / "merged"), "--prompts", str(tmp_path / "prompts.txt"), "--max_new_tokens", "10"]
    chat.main([*words, "--batch_size", "3"])
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["prompt"] for answer in answers] == prompts
    assert [answer["answer"] for answer in answers] == [plain_answer(models / "merged", p, 10) for p in prompts]
    assert {answer["ended_by"] for answer in answers} <= {"stop", "length"}


def make_chat(models, *more):
    return commands.chat.Chat(chat.build_parser().parse_args([str(models / "adapter"), *more]))


def test_history_is_part_of_the_next_prompt_and_text_stays_text(models):
    session = make_chat(models, "--system", "Be kind.", "--max_new_tokens", "4")
    session.ask("first <|im_end|>")
    assert [m["role"] for m in session.history] == ["user", "assistant"]
    session.history[1]["content"] = "said"
    ids = session.encode("second")
    text = session.tokenizer.decode(ids)
    assert text == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nfirst <|im_end|><|im_end|>\n"
        "<|im_start|>assistant\nsaid<|im_end|>\n<|im_start|>user\nsecond<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ids.count(session.template.stop_id) == 4


def test_commands(models):
    session = make_chat(models)
    assert ":conf" in session.command(":help")
    assert session.command(":conf").endswith("(greedy: the likeliest token each time; temperature=0.7 samples)")
    said = session.command(":conf temperature=0.7 top_k=5")
    assert said == "max_new_tokens=512  temperature=0.7  top_k=5  (samples at temperature 0.7)"
    assert session.options["do_sample"] and session.options["temperature"] == 0.7
    session.command(":conf temperature=0")
    assert session.options["do_sample"] is False
    for wrong in (":conf temperature=__import__('os')", ":conf temperature", ":conf top_k=1.5"):
        assert "expected" in session.command(wrong)
    assert "not a setting" in session.command(":conf speed=3")
    before = dict(session.settings)
    for name in SETTINGS:
        for value in ("nan", "inf", "-inf", "-1", "1e400", "1" * 5000, "²", "", "1e-300", "1e300"):
            assert "\n" not in session.command(f":conf {name}={value}")
            assert session.settings == before, (name, value)
    for wrong in ("²", "1" * 5000, "x", "", "1.5", "nan"):
        assert "expected a whole number" in session.command(f":seed {wrong}")
    assert session.command(":seed -1") == "seed -1" and session.command(":seed 7") == "seed 7"
    first = torch.rand(1)
    session.command(":seed 7")
    assert torch.rand(1) == first
    session.history = [{"role": "user", "content": "Q"}]
    assert session.command(":history") == "user: Q"
    assert session.command(":system Be brief.") == "system: Be brief." and session.history == []
    assert session.command(":clear") == "conversation forgotten"
    assert "not a command" in session.command(":go")


def test_temperature_and_seed_of_the_command_line(models, capfd):
    session = make_chat(models, "--seed", "7")
    first = torch.rand(1)
    session.command(":seed 7")
    assert torch.rand(1) == first
    words = [str(models / "merged"), "--prompt", "Who are you?", "--max_new_tokens", "8"]
    answers = []
    for more in (
        ["--temperature", "5", "--seed", "1"],
        ["--temperature", "5", "--seed", "1"],
        ["--temperature", "0"],
        [],
    ):
        chat.main([*words, *more])
        answers.append(capfd.readouterr().out)
    assert answers[0] == answers[1] != answers[2] == answers[3]
    for wrong in ("nan", "-1", "1e-9", "x"):
        with pytest.raises(ValueError, match=f"--temperature {wrong}: "):
            chat.main([*words, f"--temperature={wrong}"])


def test_pieces_are_whole_characters(models):
    from inference.generate import TextPieces

    tokenizer = AutoTokenizer.from_pretrained(models / "merged")
    pieces: list[str] = []
    streamer = TextPieces(tokenizer, pieces.append)
    text = "héllo 🦄 𝒳 你好"
    streamer.put(torch.tensor([[1, 2, 3]]))
    for token_id in tokenizer(text)["input_ids"]:
        streamer.put(torch.tensor([token_id]))
    streamer.end()
    assert "".join(pieces) == text and len([p for p in pieces if p]) > 4
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


@pytest.mark.parametrize(
    ("words", "message"),
    [(["/nowhere"], "no such checkpoint directory"), (["tests"], "no tokenizer in this directory")],
)
def test_mistakes(words, message):
    with pytest.raises(ValueError, match=message):
        chat.main([*words, "--prompt", "x"])


def test_the_saved_template_and_its_arguments_are_used(checkpoints, tmp_path):
    template = tmp_path / "t.jinja"
    template.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% if not enable_thinking %}-{% endif %}{% endif %}"
    )
    source = str(checkpoints["untied"])
    options = {"chat_template": str(template), "chat_template_kwargs": '{"enable_thinking": true}'}
    tokenizer = load_tokenizer(source, **options)
    tokenizer.save_pretrained(tmp_path / "saved")
    messages = [{"role": "user", "content": "Q"}]
    for loaded in (tokenizer, AutoTokenizer.from_pretrained(tmp_path / "saved")):
        prompt = ChatTemplate(loaded).render(messages, add_generation_prompt=True)
        assert prompt == "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    override = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert override.endswith("assistant\n-"), "a server that passes a value wins"
    for kwargs, message in [
        ("{", "invalid JSON"), ("[]", "expected a JSON object"), ('{"other": 1}', "has no variable other"),
        ('{"enable_thinking": []}', "expected a name with true, false"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            load_tokenizer(source, chat_template=str(template), chat_template_kwargs=kwargs)
    template.write_text("{% for m in messages %}")
    with pytest.raises(ValueError, match=r"t.jinja:1: "):
        load_tokenizer(source, chat_template=str(template))
    with pytest.raises(ValueError, match="cannot be read"):
        load_tokenizer(source, chat_template=str(tmp_path / "absent"))


class Terminal:
    """A program in a pseudo-terminal."""

    def __init__(self, *words):
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, *map(str, words)], cwd=ROOT, stdin=slave, stdout=slave, stderr=slave, close_fds=True,
            start_new_session=True,
            # Ignored where the tests run in a shell's background; a program in a terminal gets it.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            env=os.environ | {"TERM": "xterm", "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"},
        )  # fmt: skip
        os.close(slave)
        self.shown = self.all = ""

    def type(self, text):
        os.write(self.master, text.encode())

    def paste(self, text):
        """Paste as a terminal does: in brackets only where the program has asked for them."""
        on, off = (self.all.rfind(f"\x1b[?2004{mode}") for mode in "hl")
        self.type(f"\x1b[200~{text}\x1b[201~" if on > off else text)

    def wait_for(self, pattern, timeout_s=60):
        """Read until the pattern appears behind what was already matched. Returns: the text up to its end."""
        deadline = time.monotonic() + timeout_s
        while not (match := re.search(pattern, self.shown)):
            assert time.monotonic() < deadline, f"{pattern!r} did not come: {self.shown[-500:]!r}"
            if select.select([self.master], [], [], 0.2)[0]:
                try:
                    read = os.read(self.master, 65536).decode(errors="replace").replace("\r", "")
                    self.shown, self.all = self.shown + read, self.all + read
                except OSError:
                    break
        assert match, f"{pattern!r} did not come: {self.shown[-500:]!r}"
        text, self.shown = self.shown[: match.end()], self.shown[match.end() :]
        return text


def test_a_session_in_a_terminal(models, tmp_path):
    shutil.copytree(models / "merged", model := tmp_path / "endless")  # Ctrl-C must find it at work
    settings = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": None}))
    terminal = Terminal("chat.py", model, "--max_new_tokens", "400")
    try:
        terminal.wait_for(r":exit leaves")
        terminal.wait_for("> ")
        terminal.type(":conf max_new_tokens=5\n")
        terminal.wait_for(r"max_new_tokens=5 .*\n.*> ")
        terminal.type("你好 é\n")
        terminal.wait_for(r"\n.*> ")
        terminal.type(":history\n")
        terminal.wait_for(r"user: 你好 é\n")
        terminal.wait_for(r"assistant: ")
        terminal.wait_for("> ")
        # A paste of two lines is one question.
        terminal.type(":clear\n")
        terminal.wait_for("forgotten")
        terminal.wait_for("> ")
        terminal.paste("line one\nline two")
        terminal.type("\r")
        terminal.wait_for("line two")
        terminal.wait_for(r"\n.*> ")
        terminal.type(":history\n")
        terminal.wait_for(r"user: line one\nline two\n")
        terminal.wait_for("> ")
        # Ctrl-C stops the answer, not the program.
        terminal.type(":conf max_new_tokens=100000\n")
        terminal.wait_for("max_new_tokens=100000 .*\n")
        terminal.wait_for("> ")
        terminal.type("go on\n")
        terminal.wait_for("go on\n")
        terminal.wait_for("(?s)..........")
        os.killpg(terminal.process.pid, signal.SIGINT)
        terminal.wait_for(r"\[stopped\]\n")
        terminal.wait_for("> ")
        terminal.type(":quit\n")
        assert terminal.process.wait(timeout=30) == 0
    finally:
        terminal.process.kill()
