"""A chat template in Ollama's language: found by what it renders, and compared with it before it is used.

Ollama renders prompts by a Go template over .Messages (https://docs.ollama.com/template), in which turns of one role
that follow each other are one. Every chat template that puts fixed texts around the turns can be said in it.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jinja2

from data_utils.safe_encoder import PROBE
from data_utils.template import ChatTemplate, Message
from inference import go_template
from tuning.errors import SettingsError

_ROLES = ("system", "user", "assistant")
_TEXTS = (
    *(
        "",
        " ",
        "\n",
        "Q",
        "你好，世界！",
        "e\u0301 \u00e9",
        "🙂\u200d↔️ \u3000x\u00a0",
        "  between spaces \n",
        '"""',
        "\\n",
    ),
    *("<|im_end|>\n<|im_start|>system\nNo.", "<|endoftext|>", "</s>[INST]", "{{ .System }}", "{% if x %}{{ y }}", "}}"),
    *("a\nb\n\n", "<tool_call>\n{}\n</tool_call>", "<b>&amp;'</b>", "1" * 50),
)
_NUM_CONVERSATIONS = 300


class Untranslatable(SettingsError):
    """A chat template that Ollama's language cannot express, or that is none known here."""

    def __init__(self, why: str):
        super().__init__(
            f"--to ollama: the chat template cannot be said in Ollama's language: {why}; export it --to gguf: that "
            "file holds the chat template itself, which Ollama takes from version 0.30 on (docs/serving.md)"
        )


@dataclass(frozen=True)
class Frames:
    """The texts around turns.

    opening: before a first turn that is no system turn: a default system turn, or what prompts begin with.
    before, after: a turn, by its role. before_first_system: instead, where a system turn is the first.
    generation: after the last turn; on, off: likewise, where reasoning was asked for, or not wanted.
    around_reasoning: of an assistant turn that is the last one; None where the template writes none. trims: spaces and
    line ends around turns are left out, which Ollama's language cannot do.
    """

    opening: str
    before: dict[str, str]
    after: dict[str, str]
    before_first_system: str
    generation: str
    generation_on: str
    generation_off: str
    around_reasoning: tuple[str, str] | None
    trims: bool


def translate(template: ChatTemplate) -> tuple[str, list[str]]:
    """The chat template in Ollama's language, and what it leaves to who asks, a line each.

    Raises: Untranslatable: with the first difference.
    """
    if "strftime_now" in template.tokenizer.get_chat_template():
        raise Untranslatable("it writes the day's date")
    try:
        frames = find_frames(template)
    except (jinja2.TemplateError, LookupError) as error:
        raise Untranslatable(f"{error}") from None
    translated = write(frames)
    compare(translated, template, frames)
    notes = []
    if frames.trims:
        notes.append("the chat template takes spaces and line ends off around turns, Ollama does not: send none")
    if frames.around_reasoning is None and _leaves_out_reasoning(template):
        notes.append("the chat template leaves reasoning out of earlier answers, Ollama does not: send answers without")
    return translated, notes


def find_frames(template: ChatTemplate) -> Frames:
    """Find the texts around turns in renderings of a few conversations.

    Raises: LookupError: they are not the same everywhere. jinja2.TemplateError: it refuses a plain conversation.
    """
    system, user, assistant = ({"role": role, "content": f"{PROBE}_{role}"} for role in _ROLES)
    end = {"role": "user", "content": f"{PROBE}_end"}
    opening_user, after_user = _gaps(template, [user])
    last = _gaps(template, [user, assistant])
    inside = _gaps(template, [user, assistant, end])
    after = {"user": after_user, "assistant": last[-1]}
    before = {
        "user": _without(inside[2], after["assistant"]),
        "assistant": _without(inside[1], after_user),
    }
    around_reasoning = None
    if last[1] != inside[1]:  # reasoning, or an empty block of it, before the last answer
        reasoned = [user, {**assistant, **dict.fromkeys(("reasoning_content", "thinking"), f"{PROBE}_why")}]
        between = template.render(reasoned).partition(user["content"])[2].partition(assistant["content"])[0]
        opened, found, closed = _without(between, inside[1]).partition(f"{PROBE}_why")
        if not found:
            raise LookupError("its last answer is written otherwise than the earlier ones")
        around_reasoning = opened, closed
    before_first_system = ""
    if template.writes_system:
        before_first_system, between, _ = _gaps(template, [system, user])
        after["system"] = _before_end(between, before["user"])
        try:
            before["system"] = _without(_gaps(template, [user, system, end])[1], after_user)
        except (jinja2.TemplateError, LookupError):  # only the first turn can be a system turn
            before["system"] = before_first_system
    switch = template.thinking_switch
    on, off = ({} if switch is None else {switch: value} for value in (True, False))
    return Frames(
        opening=_before_end(opening_user, before["user"]),
        before=before,
        after=after,
        before_first_system=before_first_system,
        generation=_generation(template, user),
        generation_on=_generation(template, user, **on),
        generation_off=_generation(template, user, **off),
        around_reasoning=around_reasoning,
        trims=template.render([user]) == template.render([{**user, "content": f"\n {user['content']} \n"}]),
    )


def _leaves_out_reasoning(template: ChatTemplate) -> bool:
    answer = {"role": "assistant", "content": f"<think>\n{PROBE}_why\n</think>\n\nA"}
    return f"{PROBE}_why" not in template.render(
        [{"role": "user", "content": "Q"}, answer, {"role": "user", "content": "Q"}]
    )


def _gaps(template: ChatTemplate, messages: list[Message]) -> list[str]:
    """The texts before, between and behind the messages' contents."""
    gaps, rest = [], template.render(messages)
    for message in messages:
        gap, found, rest = rest.partition(message["content"])
        if not found:
            raise LookupError(f"it does not write every {message['role']} turn in its place")
        gaps.append(gap)
    return [*gaps, rest]


def _generation(template: ChatTemplate, user: Message, **variables: Any) -> str:
    prompt = template.render([user], add_generation_prompt=True, **variables)
    return _without(prompt, template.render([user], **variables))


def _without(text: str, beginning: str) -> str:
    if not text.startswith(beginning):
        raise LookupError(f"expected {beginning!r} at the beginning of {text!r}")
    return text.removeprefix(beginning)


def _before_end(text: str, end: str) -> str:
    if not text.endswith(end):
        raise LookupError(f"expected {end!r} at the end of {text!r}")
    return text.removesuffix(end)


def write(frames: Frames) -> str:
    """The template in Ollama's language."""
    text = "{{ range $i, $_ := .Messages }}"
    if frames.opening:
        text += '{{ if and (eq $i 0) (ne .Role "system") }}' + quote(frames.opening) + "{{ end }}"
    word = "if"
    for role in frames.before:
        before = quote(frames.before[role])
        if role == "system" and frames.before[role] != frames.before_first_system:
            before = "{{ if eq $i 0 }}" + quote(frames.before_first_system) + "{{ else }}" + before + "{{ end }}"
        if role == "assistant" and frames.around_reasoning is not None:
            # Ollama reads the texts around .Thinking in this block to tell reasoning from the answer.
            opened, closed = map(quote, frames.around_reasoning)
            before += "{{ if eq (len (slice $.Messages $i)) 1 }}" + opened + "{{ .Thinking }}" + closed + "{{ end }}"
        text += f'{{{{ {word} eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{quote(frames.after[role])}'
        word = "else if"
    text += "{{ end }}{{ end }}"
    generation, on, off = map(quote, (frames.generation, frames.generation_on, frames.generation_off))
    if frames.around_reasoning is None or generation == on == off:
        return text + generation
    if generation == on:
        return text + "{{ if and .IsThinkSet (not .Think) }}" + off + "{{ else }}" + on + "{{ end }}"
    choice = "{{ if .IsThinkSet }}{{ if .Think }}" + on + "{{ else }}" + off + "{{ end }}"
    return text + choice + "{{ else }}" + generation + "{{ end }}"


def quote(text: str) -> str:
    """Text as a template writes it. Modelfiles lose characters that are not printable, and end at three quotes."""
    quoted = "".join(c if c in "\n\t" or (c.isprintable() and c != "{") else _as_string(c) for c in text)
    return quoted.replace('"""', '"{{ "" }}"{{ "" }}"')


def _as_string(c: str) -> str:
    code = ord(c)
    return '{{ "' + ("{" if c == "{" else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}") + '" }}'


def compare(translated: str, template: ChatTemplate, frames: Frames) -> None:
    """Render conversations by both. Raises: Untranslatable: the first difference."""
    for messages, think in list_conversations(frames):
        variables = {} if think is None or template.thinking_switch is None else {template.thinking_switch: think}
        try:
            expected = template.render(messages, add_generation_prompt=True, **variables)
        except jinja2.TemplateError:  # it was never trained on such a conversation
            continue
        found = go_template.render(translated, as_ollama_has_them(messages, think))
        if found != expected:
            at = next(i for i, (a, b) in enumerate(zip(found + "\0", expected + "\1", strict=False)) if a != b)
            raise Untranslatable(
                f"after {expected[:at][-40:]!r} it has {expected[at : at + 40]!r}, the translation "
                f"{found[at : at + 40]!r}"
            )


def list_conversations(frames: Frames) -> Iterator[tuple[list[Message], bool | None]]:
    """Conversations that begin with a question, after a system turn or not, and do not end with an answer.

    Yields: the messages, and whether reasoning is asked for.
    """
    generator = random.Random(0)
    texts = [text.strip() for text in _TEXTS] if frames.trims else _TEXTS
    thinks = (None,) if frames.around_reasoning is None else (None, True, False)
    for number in range(_NUM_CONVERSATIONS):
        roles = ["system", "user"] if number % 2 and "system" in frames.before else ["user"]
        for _ in range(generator.choice((0, 0, 1, 2, 3, 6))):
            roles.append(generator.choice([role for role in frames.before if role != roles[-1]]))
        if roles[-1] == "assistant":
            roles.append("user")
        yield [{"role": role, "content": generator.choice(texts)} for role in roles], generator.choice(thinks)
    if frames.around_reasoning is not None:
        answer = {"role": "assistant", "content": "A", **dict.fromkeys(("reasoning_content", "thinking"), "B\n\nC")}
        yield [{"role": "user", "content": "Q"}, answer], None


def as_ollama_has_them(messages: list[Message], think: bool | None = None) -> dict[str, Any]:
    """What Ollama gives to a template. messages: no two of one role in turn."""
    return {
        "Messages": [
            {"Role": m["role"], "Content": m["content"], "Thinking": m.get("reasoning_content", "")} for m in messages
        ],
        "Think": bool(think),
        "IsThinkSet": think is not None,
    }
