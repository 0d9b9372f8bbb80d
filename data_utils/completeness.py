"""Whether a rendering holds all that a conversation says.

A chat template may have no branch for a role, cut a text at a word, or write some parts of a message only. What it
does not write is not trained, and nobody would see it. So every text is looked for in the rendering.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

Message = dict[str, Any]

# Tags around reasoning that stands inside an answer's text.
_OPENS = r"<(?:think|thinking|thought|reasoning|reason)>|\[THINK\]"
_CLOSES = r"</(?:think|thinking|thought|reasoning|reason)>|\[/THINK\]"
_TAG = re.compile(f"({_OPENS})|({_CLOSES})")
_FUNCTION_KEYS = {"name", "description", "parameters", "strict", "type"}


def find_lost_answer(message: Message, target: str, markup: re.Pattern[str]) -> str | None:
    """The first text of an assistant's turn that its target does not hold.

    markup: texts that a template may write anew around the parts of an answer, as it does with reasoning.
    """
    texts = [text for text, _ in _segments(message["content"], markup)]
    return _first_missing([message.get("reasoning_content", ""), *texts, *_texts_of_calls(message)], target)


def find_lost_context(message: Message, prompt: str, markup: re.Pattern[str]) -> str | None:
    """The first text of an earlier turn that a prompt does not hold. Reasoning may be left out, as at inference."""
    if message["role"] != "assistant":
        return _first_missing([message["content"]], prompt)
    said = [text for text, is_reasoning in _segments(message["content"], markup) if not is_reasoning]
    return _first_missing([*said, *_texts_of_calls(message)], prompt)


def find_lost_tool(function: dict[str, Any], prompt: str) -> str | None:
    """The first text of a function's declaration that a prompt does not hold: names, descriptions, choices.

    What else a JSON schema says (titles, bounds, defaults) is not looked for: templates write it in their own way.
    """
    own = {key: value for key, value in function.items() if key not in _FUNCTION_KEYS}
    declared = [function["name"], *_texts_of_schema(function)]
    return _first_missing([*declared, *_leaves(own)], prompt)


def stands_in(text: str, rendering: str) -> bool:
    """Whether a text stands in a rendering, as it is or quoted; white space at its ends does not count."""
    text = text.strip()
    return text in rendering or any(quoted in rendering for quoted in _quote(text))


def _quote(text: str) -> Iterator[str]:
    yield json.dumps(text, ensure_ascii=False)[1:-1]
    yield json.dumps(text)[1:-1]
    for character, escape in (("\\", "\\\\"), ("'", "\\'"), ("\n", "\\n"), ("\r", "\\r")):  # as Python does
        text = text.replace(character, escape)
    yield text


def _first_missing(texts: list[str], rendering: str) -> str | None:
    return next((text for text in texts if not stands_in(text, rendering)), None)


def _segments(content: str, markup: re.Pattern[str]) -> list[tuple[str, bool]]:
    """The parts of an answer between tags and other markup, each with whether it is reasoning."""
    parts: list[tuple[str, bool]] = []
    start, opened = 0, False
    for tag in [*_TAG.finditer(content), None]:
        end = tag.start() if tag else len(content)
        closes = tag is not None and tag.group(2) is not None  # its opening tag may stand in the prompt
        parts += [(text, opened or closes) for text in markup.split(content[start:end])]
        opened = tag is not None and not closes
        start = tag.end() if tag else end
    return [(text, is_reasoning) for text, is_reasoning in parts if text.strip()]


def _texts_of_calls(message: Message) -> list[str]:
    functions = [call["function"] for call in message.get("tool_calls", ())]
    return [text for function in functions for text in (function["name"], *_leaves(function["arguments"]))]


def _texts_of_schema(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "description" and isinstance(inner, str):
                yield inner
            elif key == "properties" and isinstance(inner, dict):
                yield from inner
            if key == "enum":
                yield from _leaves(inner)
            else:
                yield from _texts_of_schema(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts_of_schema(inner)


def _leaves(value: Any) -> Iterator[str]:
    """Every text and every number inside a JSON value, keys included."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    elif isinstance(value, str):
        yield value
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield json.dumps(value)
