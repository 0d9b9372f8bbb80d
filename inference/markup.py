"""Markup in answers: calls of tools and reasoning, told from what is said, as the text comes.

transformers' response parser does it (transformers.utils.chat_parsing), with its templates of the Qwen families; which
of them fits is not told by the model's name, but by a call that the chat template writes.
"""

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import jinja2
from transformers.utils.chat_parsing import ResponseParser

from data_utils.template import ChatTemplate

_FAMILIES = ("qwen3", "qwen3_5")  # calls as JSON, and as <function=NAME><parameter=KEY>
_CALL = {"name": "probe_name", "arguments": {"probe_key": "probe value"}}
_TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>")


@dataclass(frozen=True)
class Piece:
    """A part of an answer. kind: "content", "reasoning" or "call"; arguments: of a call, as JSON text."""

    kind: str
    text: str
    arguments: str = ""


@dataclass(frozen=True)
class Markup:
    """What a chat template writes calls and reasoning with.

    calls: the response template that reads its calls; None: none does. reasoning: of answers without tools; None: the
    template knows no reasoning. shown: special tokens that are part of the markup.
    """

    calls: dict[str, Any] | None
    reasoning: dict[str, Any] | None
    shown: frozenset[str]

    def choose(self, *, has_tools: bool) -> dict[str, Any] | None:
        """The response template for an answer; None: it is said as it is."""
        return self.calls if has_tools else self.reasoning


def find_markup(template: ChatTemplate) -> Markup:
    """Try which response template reads back a call that the chat template writes."""
    special = {token.content for token in template.tokenizer.added_tokens_decoder.values() if token.special}
    thinks = "<think>" in str(template.tokenizer.get_chat_template())
    candidates = list(map(_family_template, _FAMILIES))
    reasoning = {**candidates[0], "fields": {**candidates[0]["fields"]}}
    reasoning["fields"].pop("tool_calls")
    written = _write_call(template.for_tools)
    calls = next((each for each in candidates if written is not None and _reads(each, written)), None)
    return Markup(calls, reasoning if thinks else None, frozenset(special & set(_TAGS)))


def _family_template(family: str) -> dict[str, Any]:
    """The response template of a family in transformers, for text without control tokens, in which nothing raises."""
    from transformers.cli.serving.utils import get_response_template

    found = get_response_template(SimpleNamespace(), SimpleNamespace(config=SimpleNamespace(model_type=family)))
    assert found is not None
    found = copy.deepcopy(found)
    found["fields"]["content"] = {"content": "text"}
    if found["fields"]["tool_calls"]["content"] == "json":
        found["fields"]["tool_calls"]["content_args"] = {"allow_non_json": True}
    return found


def _write_call(template: ChatTemplate) -> str | None:
    question = {"role": "user", "content": "Q"}
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": _CALL}]}
    if not template.writes_calls:
        return None
    try:
        messages = template.escape_messages([question, call])
        prompt = template.render(messages[:1], add_generation_prompt=True)
        return template.render(messages).removeprefix(prompt).partition(template.stop)[0]
    except jinja2.TemplateError:
        return None


def _reads(response_template: dict[str, Any], written: str) -> bool:
    parser = MessageParser(response_template, prompt="")
    pieces = [piece for piece in [*parser.feed(written), *parser.finish()] if piece.kind == "call"]
    return [(p.text, json.loads(p.arguments)) for p in pieces] == [(_CALL["name"], _CALL["arguments"])]


class MessageParser:
    """Generated text to pieces. A call that cannot be read is content, as it was written.

    prompt: text before the answer, which may have opened a think block. tools: of the request; arguments take the
    types of their parameters where the markup has none.
    """

    def __init__(self, response_template: dict[str, Any], prompt: str, tools: Sequence[dict[str, Any]] = ()):
        self._parser = ResponseParser(response_template, prefix=prompt, tools=list(tools))
        self._ended = False
        self._raw = ""  # of the call that is open
        self._held = ""  # white space that is only written if text follows
        self._trims = False  # what a block was closed with belongs to neither side
        self._read(self._parser.initial_events)  # said by the prompt

    def feed(self, text: str) -> list[Piece]:
        """Take more text."""
        return self._read(self._parser.feed(text))

    def finish(self) -> list[Piece]:
        """The answer has ended."""
        self._ended = True
        return self._read(self._parser.finalize()[1])

    def _read(self, events: list[dict[str, Any]]) -> list[Piece]:
        pieces: list[Piece] = []
        for event in events:
            kind, name = event["type"], event["field"]
            if name == "tool_calls":
                pieces += self._read_call(event)
            elif kind == "region_chunk":
                pieces += self._trim(event["text"], "content" if name == "content" else "reasoning")
            elif name != "content":  # reasoning begins or ends: "thinking" in transformers 5.17
                self._trims, self._held = True, ""
        return pieces

    def _trim(self, text: str, kind: str) -> list[Piece]:
        if self._trims:
            text = text.lstrip()
            self._trims = not text
        if kind == "reasoning":
            text = self._held + text
            self._held = text[len(text.rstrip()) :]
            text = text.rstrip()
        return [Piece(kind, text)] if text else []

    def _read_call(self, event: dict[str, Any]) -> list[Piece]:
        if event["type"] == "region_open":
            self._raw = ""
        elif event["type"] == "region_chunk":
            self._raw += event["text"]
        else:
            value = event["value"]
            function = value.get("function") if isinstance(value, dict) else None
            if isinstance(function, dict) and isinstance(name := function.get("name"), str) and name:
                arguments = function.get("arguments", {})
                if isinstance(arguments, dict):
                    self._trims = True
                    return [Piece("call", name, json.dumps(arguments, ensure_ascii=False))]
            return [Piece("content", f"<tool_call>{self._raw}{'' if self._ended else '</tool_call>'}")]
        return []
