"""Rows of plain conversations without rendering each one: the chat template's output is cached per conversation shape.

Conversations of one *shape* (roles, and which turns are supervised) differ only in their texts. For each shape the
template is rendered once with placeholders for the texts, under taint tracking (taint_tracking.py), which records what
the template tests about them. Texts that pass every test alike are filled into the placeholders. All others go through
ChatTemplate.encode_conversation, the definition: rows with tools or template variables, texts with control tokens or
words the template searches for, white space at an end, tokenizers whose ids depend on what stands before a text. If
the template tests something that cannot be recorded, each filled rendering is compared with a direct one; otherwise
only the first few of a shape are.
"""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_utils.rows import EncodedRow, encode_row
from data_utils.safe_encoder import TiktokenDiffers
from data_utils.schema import Conversation
from data_utils.taint_tracking import TrackedTemplate
from data_utils.template import ChatTemplate, Message

_TEXTS = ("content", "reasoning_content", "thinking")
# With quotes, brackets and a line end: a template that escapes or splits texts does not leave it whole.
_PLACEHOLDER = re.compile(r'Zqx"\\<(\d+)>&\'\nxqZ')
_NUM_COMPARED = 4  # conversations of a shape that are also rendered directly
_CONTINUATIONS = ("", "a", "A", " a", "1", ".", "\n", "中", "'s", "<")
Parts = list[str | int]  # literal texts, and numbers of placeholders


@dataclass
class _Rendering:
    """The cached rendering of one shape.

    texts: (message index, key) of each placeholder. num_messages: up to the last supervised turn.
    whole: the rendering of those messages. rows: (prompt, target) of each turn of each row; the prompt without what
        the row holds already. cuts: (placeholder, literal before it) where a target begins inside a row.
    words, equals: what the template searches texts for, and compares them with.
    compares_left: how many more conversations to compare with a direct rendering.
    """

    texts: list[tuple[int, str]]
    num_messages: int
    whole: Parts
    rows: list[list[tuple[Parts, Parts]]]
    cuts: list[tuple[int, str]]
    words: re.Pattern[str]
    equals: set[str]
    compares_left: float


class RowEncoder:
    """Encodes conversations to the rows that template.encode_conversation defines, by cached renderings if possible."""

    def __init__(self, template: ChatTemplate):
        self.template = template
        self._encoder = template.encoder
        self._renderings: dict[Any, _Rendering | None] = {}
        self._safe_cuts: dict[tuple[str, str], bool] = {}
        self._tracked = TrackedTemplate(template.tokenizer)
        self._can_cache = (
            template.label_mask == "assistant" and self._encoder.is_context_free and not self._tracked.opaque
        )

    def encode(self, conversation: Conversation) -> list[EncodedRow]:
        """Rows of a conversation. Raises: DataError: as template.encode_conversation."""
        rows = self.encode_cached(conversation)
        return [encode_row(row) for row in self.template.encode_conversation(conversation)] if rows is None else rows

    def encode_cached(self, conversation: Conversation) -> list[EncodedRow] | None:
        """Rows by the cached rendering; None if it does not apply to this conversation."""
        if not self._can_cache or conversation.text is not None or conversation.tools or conversation.template_kwargs:
            return None
        messages = self.template.with_system_message(list(conversation.messages))
        added = len(messages) - len(conversation.messages)
        turns = tuple(turn + added for turn in conversation.supervised_turns)
        if not turns:
            return []
        shape = (turns, *((m["role"], *m) for m in messages))
        if shape not in self._renderings:
            self._renderings[shape] = self._render_shape(messages, turns)
        rendering = self._renderings[shape]
        if rendering is None:
            return None
        texts = [messages[index][name] for index, name in rendering.texts]
        if not all(self._is_harmless(text, rendering) for text in texts):
            return None
        if not all(self._is_safe_cut(before, texts[number][0]) for number, before in rendering.cuts):
            return None
        if rendering.compares_left > 0:
            rendering.compares_left -= 1
            if self._render_or_none(messages[: rendering.num_messages]) != _fill(rendering.whole, texts):
                return None
        weights = iter(conversation.weights[turn] for turn in conversation.supervised_turns)
        return [self._fill_row(row, texts, weights) for row in rendering.rows]

    def _fill_row(self, turns: list[tuple[Parts, Parts]], texts: list[str], weights: Any) -> EncodedRow:
        ids: list[int] = []
        spans = []
        for prompt, target in turns:
            ids += self._encoder.encode(_fill(prompt, texts))
            start = len(ids)
            ids += self._encoder.encode(_fill(target, texts))
            spans.append((start, len(ids), next(weights)))
        return EncodedRow(np.array(ids, dtype=np.int32), spans, [end for _, end, _ in spans])

    def _is_harmless(self, text: str, rendering: _Rendering) -> bool:
        """Whether template and tokenizer treat a text like any other."""
        if not text or text[0].isspace() or text[-1].isspace():
            return False
        if text in rendering.equals or rendering.words.search(text):
            return False
        return not self._encoder.needs_escape(text)

    def _is_safe_cut(self, before: str, first: str) -> bool:
        """Whether text that begins with this character has the same ids after `before` as on its own."""
        key = (before, first)
        if key not in self._safe_cuts:
            encode = self._encoder.encode
            self._safe_cuts[key] = all(
                encode(before + first + more) == encode(before) + encode(first + more)
                for more in (*_CONTINUATIONS, first)
            )
        return self._safe_cuts[key]

    def _render_or_none(self, messages: list[Message]) -> str | None:
        try:
            return self.template.render(messages)
        except Exception:  # the definition reports what is wrong
            return None

    def _render_shape(self, messages: list[Message], turns: tuple[int, ...]) -> _Rendering | None:
        texts = [(index, name) for index, message in enumerate(messages) for name in _TEXTS if name in message]
        if any(set(message) - {"role", *_TEXTS} for message in messages):
            return None
        marked = [dict(message) for message in messages]
        for number, (index, name) in enumerate(texts):
            marked[index][name] = f"Zqx\"\\<{number}>&'\nxqZ"
        for message in marked:
            if "thinking" in message:
                message["thinking"] = message["reasoning_content"]  # one text under two names
        try:
            found = self._place_turns(marked, turns)
            whole = _split(self.template.render(marked[: turns[-1] + 1]))
            words, equals, is_open = self._record_tests(marked, texts, turns)
        except TiktokenDiffers:
            raise
        except Exception:  # the definition reports what is wrong, with the text that is
            return None
        if found is None or not _hold_everything(found[0], texts, turns):
            return None
        unseen = {number for number, (_, name) in enumerate(texts) if name != "thinking"} - set(whole)
        return _Rendering(
            texts=texts,
            num_messages=turns[-1] + 1,
            whole=whole,
            rows=found[0],
            cuts=found[1],
            words=re.compile("|".join(map(re.escape, sorted(words))) or r"(?!)"),
            equals=equals,
            compares_left=float("inf") if is_open or unseen else _NUM_COMPARED,
        )

    def _place_turns(
        self, marked: list[Message], turns: tuple[int, ...]
    ) -> tuple[list[list[tuple[Parts, Parts]]], list[tuple[int, str]]] | None:
        """Rows and cuts of a shape, as in _Rendering; None where a cut would change ids."""
        rows: list[list[tuple[Parts, Parts]]] = []
        cuts: list[tuple[int, str]] = []
        so_far = ""
        for turn in turns:
            prompt, target = self.template.place_turn(marked, turn, "", {})
            if rows and prompt.startswith(so_far):
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
        return rows, cuts

    def _record_tests(
        self, marked: list[Message], texts: list[tuple[int, str]], turns: tuple[int, ...]
    ) -> tuple[set[str], set[str], bool]:
        """What the template tests about texts in any rendering of this shape: words, equal texts, anything else."""
        words: set[str] = set()
        equals: set[str] = set()
        is_open = False
        for turn in turns:
            for count, prompts in ((turn, True), (turn + 1, False)):
                rendered, tests = self._tracked.render(marked[:count], texts, add_generation_prompt=prompts)
                words |= tests.words
                equals |= tests.equals
                plain = self.template.render(marked[:count], add_generation_prompt=prompts)
                is_open |= tests.open or rendered != plain
        return words, equals, is_open

    def _find_cut(self, prompt: Parts, target: Parts) -> list[tuple[int, str]] | None:
        """What must be a safe cut where this target begins, since the row goes on after it; None if it cannot be."""
        before = prompt[-1]
        if isinstance(before, int):
            return None
        tail = self._encoder.after_last_control(before)
        if tail is None or (tail and not tail.endswith("\n")):
            return None  # pre-tokenizers split texts after a control token and after a line end only
        if not tail:
            return []
        first = target[0]
        if isinstance(first, int):
            return [(first, tail)]
        encode = self._encoder.encode
        return [] if encode(tail + first) == encode(tail) + encode(first) else None


def _hold_everything(
    rows: list[list[tuple[Parts, Parts]]], texts: list[tuple[int, str]], turns: tuple[int, ...]
) -> bool:
    """Whether every row holds all that is said up to its last turn, but for reasoning that it does not train."""
    remaining = iter(turns)
    for row in rows:
        trained = [next(remaining) for _ in row]
        seen = {part for pieces in row for parts in pieces for part in parts}
        for number, (index, name) in enumerate(texts):
            needed = index <= trained[-1] if name == "content" else name == "reasoning_content" and index in trained
            if needed and number not in seen:
                return False
    return True


def _split(text: str) -> Parts:
    parts: Parts = list(_PLACEHOLDER.split(text))
    parts[1::2] = [int(number) for number in parts[1::2]]
    return [part for part in parts if part != ""] or [""]


def _fill(parts: Parts, texts: list[str]) -> str:
    return "".join([texts[part] if isinstance(part, int) else part for part in parts])
