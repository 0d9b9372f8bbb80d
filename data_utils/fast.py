"""The fast way to the rows that template.ChatTemplate.encode_conversation defines; tests hold the two equal.

Conversations of one *shape* (roles, and which turns are trained) differ only in their texts. A shape's rendering is
computed once, with marks in place of the texts: its *skeleton*. What the template asked about the texts meanwhile is
known (tracking.py): texts that answer alike fill the skeleton, and each stretch is encoded once, in batches. Whatever
may come out differently goes the slow way: tools, variables of a row, texts that hold control tokens or words the
template looks for, white space at an end, tokenizers whose pieces depend on what stands before. Where a template asks
more than can be known, every filled skeleton is held against a direct rendering; elsewhere the first few of a shape.
"""

import multiprocessing
import os
import re
import signal
from collections.abc import Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_utils.schema import Conversation
from data_utils.sources import DataError
from data_utils.template import IGNORE_INDEX, ChatTemplate, Row
from data_utils.tokenizer import SafeEncoder
from data_utils.tracking import TrackedTemplate

_TEXTS = ("content", "reasoning_content", "thinking")
# In quotes, brackets and lines, so that a template that escapes or splits texts does not leave it whole.
_MARK = re.compile(r'Zqx"\\<(\d+)>&\'\nxqZ')
_CHECKED = 4  # conversations of a shape that are rendered, where a template asks nothing unknown
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
    looked_for: re.Pattern[str]
    equals: set[str]
    checks_left: float


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
    """prepare -> encode -> finish; encode may run beside the rest (open_pool, encode_in_pool, collect)."""

    def __init__(self, template: ChatTemplate):
        self._template = template
        self._encoder = template.encoder
        self._skeletons: dict[Any, _Skeleton | None] = {}
        self._safe_cuts: dict[tuple[str, str], bool] = {}
        self._tracked = TrackedTemplate(template.tokenizer)
        self._is_fast = (
            template.label_mask == "assistant"
            and self._encoder.pieces_equal_whole
            and not self._encoder.strips
            and not self._tracked.opaque
        )

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

    def open_pool(self) -> Executor:
        """Where encode_in_pool runs: other processes for the library that is faster on one core, else a thread."""
        if not self._encoder.can_be_fast:
            return ThreadPoolExecutor(1)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        context = multiprocessing.get_context("fork")
        return ProcessPoolExecutor(min(8, cores), context, _adopt, (self._encoder,))

    def encode_in_pool(self, pool: Executor, batch: Batch) -> Future[Any]:
        """Start encoding; collect() waits for it."""
        if isinstance(pool, ThreadPoolExecutor):
            return pool.submit(self._encoder.encode_batch, batch.stretches)
        return pool.submit(_encode_here, batch.stretches)

    def collect(self, future: Future[Any]) -> list[NDArray[np.int32]]:
        """Ids of every stretch. Raises: Differs: see SafeEncoder.encode_batch_fast."""
        found = future.result()
        if isinstance(found, list):
            return found
        flat, ends = found
        return np.split(flat, ends[:-1])

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
        if not all(self._is_harmless(text, skeleton) for text in texts):
            return None
        if not all(self._is_safe_cut(before, texts[number][0]) for number, before in skeleton.cuts):
            return None
        if skeleton.checks_left > 0:
            skeleton.checks_left -= 1
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

    def _is_harmless(self, text: str, skeleton: _Skeleton) -> bool:
        """Whether a text is to template and tokenizer like any other."""
        if not text or text[0].isspace() or text[-1].isspace():
            return False
        if text in skeleton.equals or skeleton.looked_for.search(text):
            return False
        return not self._encoder.holds_control_text(text)

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
            marked[index][name] = f"Zqx\"\\<{number}>&'\nxqZ"
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
            check = self._template.render(marked[:last])
            words, equals, is_open = self._ask(marked, texts, turns)
        except Exception:  # the slow way says what is wrong, with the text that is
            return None
        for row in rows:
            for turn_parts in row:
                for parts in turn_parts:
                    parts[:] = [self._encoder.swap(part) if isinstance(part, str) else part for part in parts]
        parts = _split(check)
        unseen = {number for number, (_, name) in enumerate(texts) if name != "thinking"} - set(parts)
        checks = float("inf") if is_open or unseen else _CHECKED
        looked_for = re.compile("|".join(map(re.escape, sorted(words))) or r"(?!)")
        return _Skeleton(texts, last, parts, rows, cuts, looked_for, equals, checks)

    def _ask(
        self, marked: list[dict[str, Any]], texts: list[tuple[int, str]], turns: tuple[int, ...]
    ) -> tuple[set[str], set[str], bool]:
        """What the template asks about texts in any rendering that the skeleton is made of."""
        words: set[str] = set()
        equals: set[str] = set()
        is_open = False
        for turn in turns:
            for count, prompts in ((turn, True), (turn + 1, False)):
                rendered, questions = self._tracked.ask(marked[:count], texts, add_generation_prompt=prompts)
                words |= questions.words
                equals |= questions.equals
                plain = self._template.render(marked[:count], add_generation_prompt=prompts)
                is_open |= questions.open or rendered != plain
        return words, equals, is_open

    def _find_cut(self, prompt: Parts, target: Parts) -> list[tuple[int, str]] | None:
        """What has to be safe where a target begins, since the row goes on behind it; None where it is not."""
        before = prompt[-1]
        if isinstance(before, int):
            return None
        tail = self._encoder.after_last_control(before)
        if tail is None or (tail and not tail.endswith("\n")):
            return None  # no control token or no end of a line, behind which texts begin anew
        if not tail:
            return []
        first = target[0]
        if isinstance(first, int):
            return [(first, tail)]
        encode = self._encoder.encode
        return [] if encode(tail + first) == encode(tail) + encode(first) else None


_ENCODER: SafeEncoder | None = None  # of a process in the pool


def _adopt(encoder: SafeEncoder) -> None:
    global _ENCODER
    _ENCODER = encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads did not come along
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business


def _encode_here(stretches: list[str]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """All ids in one array, which travels faster, and where each stretch ends."""
    assert _ENCODER is not None
    found = _ENCODER.encode_batch_fast(stretches)
    return np.concatenate(found), np.cumsum([len(ids) for ids in found])


def encode_row(row: Row) -> EncodedRow:
    """The stored form of a row."""
    if len(row.pieces) == 2 * len(row.ends):  # each turn's context, and the turn
        edges = [(row.pieces[i][0], row.pieces[i + 1][0]) for i in range(0, len(row.pieces), 2)]
    else:
        trained = np.concatenate([[False], np.array(row.labels) != IGNORE_INDEX, [False]])
        pairs = np.flatnonzero(trained[1:] != trained[:-1]).reshape(-1, 2)
        edges = [(int(start), int(end)) for start, end in pairs]
    # The original recipe trains more than answers, and all alike.
    weights = row.weights if len(edges) == len(row.weights) else [1.0] * len(edges)
    spans = [(start, end, weight) for (start, end), weight in zip(edges, weights, strict=True)]
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
