"""The part of Go's template language that ollama_template.py writes, and nothing else of it.

Text, {{ value }}, {{ if }} with {{ else if }} and {{ else }}, {{ range $i, $_ := value }}, and the functions eq, ne,
and, or, not, len and slice, without trim markers, pipes and definitions. A test compares it with Go's own.
Language: https://pkg.go.dev/text/template
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

_ACTION = re.compile(r"\{\{ ((?:\"(?:[^\"\\]|\\.)*\"|[^\"}])*) \}\}")
_WORD = re.compile(r'\s*(\(|\)|"(?:[^"\\]|\\.)*"|\d+|\$?\.?\w*(?:\.\w+)*)')
_ESCAPE = re.compile(r"\\u([0-9a-f]{4})|\\U([0-9a-f]{8})")
_RANGE = re.compile(r"range (\$\w+), \$_ := (.+)")
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "not": lambda a: not a,
    "and": lambda *values: next((value for value in values if not value), values[-1]),
    "or": lambda *values: next((value for value in values if value), values[-1]),
    "len": len,
    "slice": lambda values, start: values[start:],
}
Data = Mapping[str, Any]
Node = Callable[[Any, dict[str, Any]], str]  # of the value of `.` and the variables


def render(template: str, data: Data) -> str:
    """Execute a template. data: what `.` and `$` are: fields by their names; messages are such mappings, too.

    Raises: ValueError: what is not in the part of the language that is known here.
    """
    pieces = _ACTION.split(template)
    nodes, end = _parse_list(pieces, 0)
    if end != len(pieces):
        raise ValueError(f"{{{{ {pieces[end]} }}}}: without its beginning")
    return "".join(node(data, {"$": data}) for node in nodes)


def _parse_list(pieces: list[str], at: int) -> tuple[list[Node], int]:
    """Nodes up to an else or end that is not theirs. pieces: text and actions in turn. Returns: them, and its place."""
    nodes: list[Node] = []
    while at < len(pieces):
        if at % 2 == 0:
            if "{{" in pieces[at]:
                raise ValueError(f"{pieces[at]!r}: cannot be read")
            nodes.append(lambda dot, names, text=pieces[at]: text)  # type: ignore[misc]
            at += 1
            continue
        action = pieces[at]
        if action == "end" or action.startswith("else"):
            return nodes, at
        if action.startswith("if "):
            node, at = _parse_if(pieces, at, action.removeprefix("if "))
        elif match := _RANGE.fullmatch(action):
            body, at = _parse_list(pieces, at + 1)
            node, at = _loop(match.group(1), match.group(2), body), at + 1
        else:
            node, at = (lambda dot, names, text=action: str(_evaluate(text, dot, names))), at + 1  # type: ignore[misc]
        nodes.append(node)
    return nodes, at


def _parse_if(pieces: list[str], at: int, condition: str) -> tuple[Node, int]:
    chosen, at = _parse_list(pieces, at + 1)
    otherwise: list[Node] = []
    if pieces[at].startswith("else if "):
        node, at = _parse_if(pieces, at, pieces[at].removeprefix("else if "))
        otherwise = [node]
    else:
        if pieces[at] == "else":
            otherwise, at = _parse_list(pieces, at + 1)
        at += 1  # the end

    def node_if(dot: Any, names: dict[str, Any]) -> str:
        return "".join(node(dot, names) for node in (chosen if _evaluate(condition, dot, names) else otherwise))

    return node_if, at


def _loop(variable: str, source: str, body: list[Node]) -> Node:
    def node_range(dot: Any, names: dict[str, Any]) -> str:
        turns = enumerate(_evaluate(source, dot, names))
        return "".join(node(each, names | {variable: index}) for index, each in turns for node in body)

    return node_range


def _evaluate(text: str, dot: Any, names: dict[str, Any]) -> Any:
    words = [word for word in _WORD.findall(text) if word]
    values: list[list[Any]] = [[]]
    for word in words:
        if word == "(":
            values.append([])
        elif word == ")":
            inner = values.pop()
            values[-1].append(_apply(inner))
        else:
            values[-1].append(_read(word, dot, names))
    return _apply(values[0])


def _apply(values: list[Any]) -> Any:
    return values[0](*values[1:]) if callable(values[0]) else values[0]


def _read(word: str, dot: Any, names: dict[str, Any]) -> Any:
    if word.startswith('"'):
        return _ESCAPE.sub(lambda match: chr(int(match[1] or match[2], 16)), word[1:-1])
    if word.isdigit():
        return int(word)
    if word in _FUNCTIONS:
        return _FUNCTIONS[word]
    first, *fields = word.split(".")
    value = names[first] if first else dot
    for field in fields:
        value = value[field]
    return value
