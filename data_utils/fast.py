"""The fast way to the rows that template.ChatTemplate.encode_conversation defines; tests hold the two equal.

Conversations of one *shape* (roles, and which turns are trained) differ only in their texts. A shape's rendering is
computed once, with marks in place of the texts: its *skeleton*. A conversation then costs one direct rendering, which
must equal the filled skeleton, and one encoding of each stretch of text, in batches. Whatever could make a template or
a tokenizer act on the text itself goes the slow way: tools, variables of a row, texts that hold control tokens or words
the template looks for, white space at an end, tokenizers whose pieces depend on what stands before.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2.nodes
import numpy as np
from jinja2.sandbox import ImmutableSandboxedEnvironment
from numpy.typing import NDArray

from data_utils.schema import Conversation
from data_utils.sources import DataError
from data_utils.template import IGNORE_INDEX, ChatTemplate, Row

_TEXTS = ("content", "reasoning_content", "thinking")
_MARK = re.compile(r"Zqx(\d+)xqZ")
_CONTINUATIONS = ("", "a", "A", " a", "1", ".", "\n", "中", "'s", "<")
Parts = list[str | int]  # literals, and numbers of texts


@dataclass
class EncodedRow:
    """A row in the form that is stored.

    input_ids: int32. spans: (start, end, weight of the loss) of each trained stretch, ascending.
    ends: the index after each supervised turn.
    """

    input_ids: NDArray[np.int32]
    spans: list[tuple[int, int, float]]
    ends: list[int]


@dataclass
class _Skeleton:
    """check: the rendering of the first num_messages messages. rows: prompt and target parts of each turn.

    cuts: what stands before each text that begins a target in the middle of a row: (text number, literal before it).
    """

    texts: list[tuple[int, str]]
    num_messages: int
    check: Parts
    rows: list[list[tuple[Parts, Parts]]]
    cuts: list[tuple[int, str]]


@dataclass
class _Plan:
    """rows: (number of a stretch in the batch, whether it is trained) of each."""

    rows: list[list[tuple[int, int]]]


@dataclass
class Batch:
    """Conversations on their way: stretches of text to encode, and for each conversation how rows are made of them.

    plans: that; or the rows where they are known already, or the error.
    """

    stretches: list[str] = field(default_factory=list)
    conversations: list[Conversation] = field(default_factory=list)
    plans: list[_Plan | list[EncodedRow] | DataError] = field(default_factory=list)


class FastEncoder:
    """prepare -> encode -> finish; encode may run in another thread."""

    def __init__(self, template: ChatTemplate):
        self._template = template
        self._encoder = template.encoder
        self._skeletons: dict[Any, _Skeleton | None] = {}
        self._safe_cuts: dict[tuple[str, str], bool] = {}
        self._looked_for = _find_looked_for(template.tokenizer.get_chat_template())
        self._is_fast = template.label_mask == "assistant" and self._encoder.pieces_equal_whole

    def prepare(self, conversations: Sequence[Conversation]) -> Batch:
        """Plan rows and collect the stretches of text to encode, each once."""
        batch = Batch(conversations=list(conversations))
        numbers: dict[str, int] = {}
        for conversation in conversations:
            plan = self._plan(conversation, numbers) if self._is_fast else None
            batch.plans.append(self._encode_slowly(conversation) if plan is None else plan)
        batch.stretches = list(numbers)
        return batch

    def encode(self, batch: Batch) -> list[NDArray[np.int32]]:
        """Ids of every stretch."""
        return self._encoder.encode_batch(batch.stretches)

    def finish(self, batch: Batch, encoded: list[NDArray[np.int32]]) -> list[list[EncodedRow] | DataError]:
        """Rows of every conversation, or why it has none."""
        return [
            _assemble(done, encoded, conversation) if isinstance(done, _Plan) else done
            for done, conversation in zip(batch.plans, batch.conversations, strict=True)
        ]

    def _encode_slowly(self, conversation: Conversation) -> list[EncodedRow] | DataError:
        try:
            return [encode_row(row) for row in self._template.encode_conversation(conversation)]
        except DataError as error:
            return error

    def _plan(self, conversation: Conversation, numbers: dict[str, int]) -> _Plan | None:
        if conversation.text is not None or conversation.tools or conversation.template_kwargs:
            return None
        messages = self._template.with_system_message(list(conversation.messages))
        added = len(messages) - len(conversation.messages)
        turns = tuple(turn + added for turn in conversation.supervised_turns)
        if not turns:
            return _Plan([])
        shape = (turns, *((m["role"], *m) for m in messages))
        if shape not in self._skeletons:
            self._skeletons[shape] = self._build_skeleton(messages, turns)
        skeleton = self._skeletons[shape]
        if skeleton is None:
            return None
        texts = [messages[index][name] for index, name in skeleton.texts]
        if not all(map(self._is_harmless, texts)):
            return None
        if not all(self._is_safe_cut(before, texts[number][0]) for number, before in skeleton.cuts):
            return None
        if self._render_or_none(messages[: skeleton.num_messages]) != _fill(skeleton.check, texts):
            return None
        return _Plan(
            [
                [
                    (numbers.setdefault(_fill(parts, texts), len(numbers)), trained)
                    for turn in row
                    for trained, parts in enumerate(turn)
                ]
                for row in skeleton.rows
            ]
        )

    def _is_harmless(self, text: str) -> bool:
        """Whether a text is to template and tokenizer like any other."""
        if not text or text[0].isspace() or text[-1].isspace():
            return False
        return not self._looked_for.search(text) and not self._encoder.holds_control_text(text)

    def _is_safe_cut(self, before: str, first: str) -> bool:
        """Whether text that begins with this character is encoded alike behind `before` and on its own."""
        key = (before, first)
        if key not in self._safe_cuts:
            encode = self._encoder.encode
            self._safe_cuts[key] = all(
                encode(before + first + more) == encode(before) + encode(first + more)
                for more in (*_CONTINUATIONS, first)
            )
        return self._safe_cuts[key]

    def _render_or_none(self, messages: list[dict[str, Any]]) -> str | None:
        try:
            return self._template.render(messages)
        except Exception:  # the slow way says what is wrong
            return None

    def _build_skeleton(self, messages: list[dict[str, Any]], turns: tuple[int, ...]) -> _Skeleton | None:
        texts = [(index, name) for index, message in enumerate(messages) for name in _TEXTS if name in message]
        if any(set(message) - {"role", *_TEXTS} for message in messages):
            return None
        marked = [dict(message) for message in messages]
        for number, (index, name) in enumerate(texts):
            marked[index][name] = f"Zqx{number}xqZ"
        for message in marked:
            if "thinking" in message:
                message["thinking"] = message["reasoning_content"]  # one text under two names
        rows: list[list[tuple[Parts, Parts]]] = []
        cuts: list[tuple[int, str]] = []
        so_far = ""
        try:
            for turn in turns:
                prompt, target = self._template.place_turn(marked, turn, "", {})
                in_place = bool(rows) and prompt.startswith(so_far)
                if in_place:
                    prompt = prompt[len(so_far) :]
                    cut = self._find_cut(*rows[-1][-1])
                    if cut is None:
                        return None
                    cuts += cut
                    so_far += prompt + target
                else:
                    rows.append([])
                    so_far = prompt + target
                rows[-1].append((_split(prompt), _split(target)))
            last = turns[-1] + 1
            check = _split(self._template.render(marked[:last]))
        except Exception:  # the slow way says what is wrong, with the text that is
            return None
        for row in rows:
            for turn_parts in row:
                for parts in turn_parts:
                    parts[:] = [self._encoder.swap(part) if isinstance(part, str) else part for part in parts]
        return _Skeleton(texts, last, check, rows, cuts)

    def _find_cut(self, prompt: Parts, target: Parts) -> list[tuple[int, str]] | None:
        """What has to be safe where a target begins, since the row goes on behind it; None where it is not."""
        before = prompt[-1]
        if isinstance(before, int):
            return None
        tail = self._encoder.after_last_control(before)
        if tail is None:
            return None  # no control token between a text and the cut
        if not tail:
            return []
        first = target[0]
        if isinstance(first, int):
            return [(first, tail)]
        encode = self._encoder.encode
        return [] if encode(tail + first) == encode(tail) + encode(first) else None


def encode_row(row: Row) -> EncodedRow:
    """The stored form of a row."""
    labels = np.array(row.labels)
    trained = np.concatenate([[False], labels != IGNORE_INDEX, [False]])
    edges = np.flatnonzero(trained[1:] != trained[:-1]).reshape(-1, 2).tolist()
    spans, weights = [], iter(row.weights)
    if len(edges) == len(row.ends) == len(row.weights):
        spans = [(start, end, weight) for (start, end), weight in zip(edges, weights, strict=True)]
    else:  # the original recipe trains more than answers, and all alike
        spans = [(start, end, 1.0) for start, end in edges]
    return EncodedRow(np.array(row.input_ids, dtype=np.int32), spans, list(row.ends))


def cut_to_length(row: EncodedRow, max_length: int) -> EncodedRow | None:
    """The row without the last turns that do not fit in max_length tokens; None where the first does not fit."""
    ends = [end for end in row.ends if end <= max_length]
    if not ends:
        return None
    spans = [(start, min(end, ends[-1]), weight) for start, end, weight in row.spans if start < ends[-1]]
    return EncodedRow(row.input_ids[: ends[-1]], spans, ends)


def _assemble(plan: _Plan, encoded: list[NDArray[np.int32]], conversation: Conversation) -> list[EncodedRow]:
    weights = iter(conversation.weights[turn] for turn in conversation.supervised_turns)
    rows = []
    for stretches in plan.rows:
        position, spans = 0, []
        for number, trained in stretches:
            start, position = position, position + len(encoded[number])
            if trained:
                spans.append((start, position, next(weights)))
        ids = np.concatenate([encoded[number] for number, _ in stretches])
        rows.append(EncodedRow(ids, spans, [end for _, end, _ in spans]))
    return rows


def _split(text: str) -> Parts:
    parts: Parts = list(_MARK.split(text))
    parts[1::2] = [int(number) for number in parts[1::2]]
    return [part for part in parts if part != ""] or [""]


def _fill(parts: Parts, texts: list[str]) -> str:
    return "".join([texts[part] if isinstance(part, int) else part for part in parts])


def _find_looked_for(template: str) -> re.Pattern[str]:
    """Texts that a template searches for in other texts, or splits or replaces them at."""
    plain = re.sub(r"\{%-?\s*(?:end)?generation\s*-?%\}", "", template)  # transformers' own statement
    tree = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
    nodes: list[Any] = []
    for compare in tree.find_all(jinja2.nodes.Compare):
        if any(operand.op in ("in", "notin") for operand in compare.ops):
            nodes.append(compare.expr)
    for call in tree.find_all((jinja2.nodes.Call, jinja2.nodes.Filter, jinja2.nodes.Test)):
        nodes += call.args  # type: ignore[attr-defined]
    found = {node.value for node in nodes if isinstance(node, jinja2.nodes.Const) and isinstance(node.value, str)}
    # White space at the ends is not harmless anyway, and single words such as "content" are names of fields.
    found = {text for text in found if text.strip() and not text.isalnum() and text.strip() not in ("_", "-")}
    return re.compile("|".join(map(re.escape, sorted(found))) or r"(?!)")
