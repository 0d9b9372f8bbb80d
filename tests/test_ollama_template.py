"""Chat templates in Ollama's language: what they render, compared with the chat template and with Go's own renderer."""

import copy
import json
import random
import shutil
import subprocess

import hypothesis.strategies as st
import jinja2
import pytest
from hypothesis import example, given, settings
from transformers import GenerationConfig

from data_utils.template import ChatTemplate
from data_utils.tokenizer import load_tokenizer, plain_chatml
from inference import go_template
from inference.modelfile import list_parameters, write_modelfile
from inference.ollama_template import Frames, Untranslatable, as_ollama_has_them, compare, find_frames, translate, write
from tests.templates import load_template
from tuning.errors import SettingsError

TRANSLATED = ("qwen2_5", "qwen3", "qwen3_instruct_2507", "qwen3_5_think", "qwen3_6")
ROLES = ("system", "user", "assistant")
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    [
        '"""',
        "{{",
        "}}",
        "{{ .System }}",
        "{",
        '"',
        "\\",
        "\n",
        "\r\n",
        "\u3000",
        "\ufeff",
        "\x00",
        "<|im_end|>",
        "🙂\u200d",
    ]
)


@st.composite
def conversations(draw, roles=ROLES):
    """A system turn or not, a question, then roles in any order, none twice in turn, and no answer at the end."""
    order = [*draw(st.sampled_from([[], ["system"]])), "user"]
    for _ in range(draw(st.integers(0, 4))):
        order.append(draw(st.sampled_from([role for role in roles if role != order[-1]])))
    if order[-1] == "assistant":
        order.append("user")
    return [{"role": role, "content": draw(TEXT)} for role in order]


@st.composite
def frames(draw):
    return Frames(
        opening=draw(TEXT),
        before={role: draw(TEXT) for role in ROLES},
        after={role: draw(TEXT) for role in ROLES},
        before_first_system=draw(TEXT),
        generation=draw(TEXT),
        generation_on=draw(TEXT),
        generation_off=draw(TEXT),
        around_reasoning=draw(st.none() | st.tuples(TEXT, TEXT)),
        trims=False,
    )


def put_together(frames, messages, think):
    """The slow, obvious definition."""
    text = ""
    for index, message in enumerate(messages):
        role = message["role"]
        if index == 0 and role != "system":
            text += frames.opening
        text += frames.before_first_system if index == 0 and role == "system" else frames.before[role]
        if role == "assistant" and frames.around_reasoning and index == len(messages) - 1:
            opened, closed = frames.around_reasoning
            text += opened + message.get("reasoning_content", "") + closed
        text += message["content"] + frames.after[role]
    if think is None or (frames.around_reasoning is None and frames.generation_on != frames.generation_off):
        return text + frames.generation
    return text + (frames.generation_on if think else frames.generation_off)


@given(frames(), conversations(), st.none() | st.booleans())
def test_what_is_written_renders_as_its_definition(frames, messages, think):
    if frames.around_reasoning is None:  # Ollama does not ask models without reasoning whether they shall reason
        think = None
    assert go_template.render(write(frames), as_ollama_has_them(messages, think)) == put_together(
        frames, messages, think
    )


@pytest.fixture(scope="module")
def plain(tokenizer, tmp_path_factory):
    """The template that a tokenizer without one gets."""
    path = tmp_path_factory.mktemp("plain")
    tokenizer.save_pretrained(path)
    return ChatTemplate(load_tokenizer(str(path)))


@pytest.mark.parametrize("name", ["plain", *TRANSLATED])
def test_prompts_are_those_of_the_chat_template(name, plain):
    template = plain if name == "plain" else load_template(name)
    translated, notes = translate(template)
    trims = find_frames(template).trims
    assert trims == any("spaces and line ends" in note for note in notes)

    @settings(max_examples=40)
    @given(conversations())
    @example([{"role": "system", "content": ""}, {"role": "user", "content": ""}])
    def check(messages):
        if trims:
            messages = [{**message, "content": message["content"].strip()} for message in messages]
        try:
            expected = template.render(messages, add_generation_prompt=True)
        except jinja2.TemplateError:  # Qwen3.5's refuses system turns that are not the first
            assert "system" in [message["role"] for message in messages[1:]]
        else:
            assert go_template.render(translated, as_ollama_has_them(messages)) == expected

    check()


def test_reasoning_is_where_ollama_looks_for_it():
    """Ollama takes the texts first and last in the innermost block around .Thinking as the marks of reasoning."""
    template = load_template("qwen3")
    translated, _ = translate(template)
    assert "}}<think>\n{{ .Thinking }}\n</think>\n\n{{ end }}" in translated
    question = [{"role": "user", "content": "Q"}]
    for think in (True, False):
        expected = template.render(question, add_generation_prompt=True, enable_thinking=think)
        assert go_template.render(translated, as_ollama_has_them(question, think)) == expected


@pytest.mark.parametrize("name", ["gemma3", "phi3", "gptoss", "glm4moe", "llama3_2"])
def test_other_templates_are_refused_in_one_line(name):
    with pytest.raises(Untranslatable, match=r"^--to ollama: the chat template [^\n]+\Z"):
        translate(load_template(name))


@pytest.mark.parametrize(
    "loop",
    [
        "{{ '<|im_start|>' + m['role'] + loop.index0|string + m['content'] + '<|im_end|>' }}",
        "{{ '<|im_start|>' + m['role'] + m['content'][:20] + '<|im_end|>' }}",
        "{{ '<|im_start|>' + m['role'] + m['content'] + ('<|im_end|>' if m['content'] else '') }}",
        "{{ '<|im_start|>' + m['role'] + m['content']|replace('\n\n', '\n') + '<|im_end|>' }}",
        "{% if m['content'] %}{{ '<|im_start|>' + m['role'] + m['content'] + '<|im_end|>' }}{% endif %}",
    ],
)
def test_what_no_translation_can_say_is_found_out(tokenizer, loop, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    own = load_tokenizer(str(tmp_path))
    own.chat_template = (
        "{% for m in messages %}" + loop + "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
    )
    with pytest.raises(Untranslatable):
        translate(ChatTemplate(own))


def test_a_wrong_translation_is_shown_where_it_goes_wrong(plain):
    translated, _ = translate(plain)
    frames = find_frames(plain)
    for piece, other in (("helpful", "harmful"), ("user\n", "user"), ("{{ end }}{{ end }}", "{{ end }}{{ end }}\n")):
        with pytest.raises(Untranslatable, match=r"it has .*, the translation"):
            compare(translated.replace(piece, other), plain, frames)


def unquote(text):
    for mark in ('"""', '"'):
        if text.startswith(mark):
            closed = len(text) >= 2 * len(mark) and text.endswith(mark)
            return text[len(mark) : -len(mark)] if closed else None
    return text


def read_modelfile(text):
    """As Ollama reads it, character by character (parser.go): what is not printable is lost, values end with a line."""
    commands, state, name, read = [], "name", "", ""
    for c in text:
        if state != "value":
            if c in " \t" and read:
                name, read = read, ""
                state = "parameter" if (state, name) == ("name", "PARAMETER") else "value"
            elif c not in " \t\n":
                read += c
        elif c in " \t\r\n":
            value = unquote(read.strip())
            if value is None or c in " \t":
                read += c
            else:
                commands.append((name, value))
                state, read = "name", ""
        elif c.isprintable():
            read += c
    assert not read
    return commands


@given(frames())
@example(Frames('"""', {"user": '""', "assistant": ""}, {"user": '"', "assistant": '"'}, "", '""', "", "", None, False))
def test_a_template_survives_in_a_modelfile(frames):
    assert read_modelfile(f'FROM x\nTEMPLATE """{write(frames)}"""\n')[1] == ("TEMPLATE", write(frames))


@settings(max_examples=15)
@given(st.lists(TEXT, max_size=4).map("".join))
@example('Say "yes".\n\n\tOr "no"')
def test_a_modelfile_says_what_was_written(plain, system):
    template = copy.copy(plain)
    template.system_message = system
    try:
        text, _ = write_modelfile("m.gguf", template, stops=["<|im_end|>", "</s>"], generation_config=None)
    except SettingsError as error:
        assert '"""' in system or any(not c.isprintable() for c in system)
        assert "\n" not in str(error)
    else:
        assert read_modelfile(text) == [
            ("FROM", "./m.gguf"),
            ("TEMPLATE", translate(template)[0]),
            ("SYSTEM", system),
            ("stop", "<|im_end|>"),
            ("stop", "</s>"),
            ("temperature", "0"),
            ("repeat_penalty", "1.0"),
        ]


def test_decoding_is_that_of_the_generation_config():
    assert list_parameters(GenerationConfig()) == {"temperature": 0, "repeat_penalty": 1.0}
    sampling = GenerationConfig(do_sample=True, temperature=0.7, top_p=0.8, repetition_penalty=1.05)
    assert list_parameters(sampling) == {
        **{"temperature": 0.7, "top_k": 50, "top_p": 0.8, "min_p": 0.0},
        **{"repeat_penalty": 1.05, "repeat_last_n": -1},
    }


def test_tools_that_are_not_exported_are_named(plain):
    def list_notes(template):
        return write_modelfile("m.gguf", template, stops=[], generation_config=None)[1]

    assert any(note.startswith("tools: not exported") for note in list_notes(load_template("qwen2_5")))
    assert not list_notes(plain)


GO_PROGRAM = """
package main

import ("encoding/json"; "os"; "strings"; "text/template")

type Message struct { Role, Content, Thinking string }
type Case struct { Template string; Messages []*Message; Think, IsThinkSet bool }

func main() {
	var cases []Case
	if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil { panic(err) }
	rendered := []string{}
	for _, c := range cases {
		parsed, err := template.New("").Option("missingkey=zero").Parse(c.Template)
		if err != nil { panic(err) }
		var text strings.Builder
		data := map[string]any{"Messages": c.Messages, "Think": c.Think, "IsThinkSet": c.IsThinkSet, "System": ""}
		if err := parsed.Execute(&text, data); err != nil { panic(err) }
		rendered = append(rendered, text.String())
	}
	if err := json.NewEncoder(os.Stdout).Encode(rendered); err != nil { panic(err) }
}
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("go") is None, reason="Go is not installed")
def test_gos_own_renderer_agrees(plain, tmp_path):
    cases = []

    @settings(max_examples=400, database=None)
    @given(frames(), conversations(), st.none() | st.booleans(), st.integers(0, 2**32))
    def collect(frames, messages, think, seed):
        if random.Random(seed).random() < 0.5 and messages[-1]["role"] != "assistant":
            messages = [*messages, {"role": "assistant", "content": "A", "reasoning_content": "B"}]
        cases.append({"Template": write(frames), **as_ollama_has_them(messages, think)})

    collect()
    templates = [plain, *map(load_template, TRANSLATED)]
    for template in templates:
        for think in (None, True, False):
            messages = [{"role": role, "content": f" {role} é🙂\n"} for role in ("system", "user", "assistant", "user")]
            for these in (messages, messages[1:], messages[:2], messages[:3]):
                cases.append({"Template": translate(template)[0], **as_ollama_has_them(these, think)})
    program = tmp_path / "render.go"
    program.write_text(GO_PROGRAM, encoding="utf-8")
    done = subprocess.run(
        ["go", "run", str(program)], input=json.dumps(cases), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for case, rendered in zip(cases, json.loads(done.stdout), strict=True):
        assert go_template.render(case["Template"], case) == rendered


def test_plain_chatml_is_what_is_translated(plain):
    assert plain.tokenizer.chat_template == plain_chatml("You are a helpful assistant.")
