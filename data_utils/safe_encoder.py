"""Text to token ids such that nothing a user wrote becomes a control token.

Control tokens are the tokenizer's special tokens and those added tokens that stand in the chat template's own
text; not those that a user added for the text (new_tokens.py), which are parsed there. Every text of one in a user's
string is *escaped* (replaced by private-use characters) before the template runs. Encoding then uses a twin of the
tokenizer whose control tokens have unguessable names: the control tokens that the template wrote are renamed and parse
as tokens, the escaped ones are put back and parse as plain text. One encoding of the whole string, so metaspace
tokenizers and lstrip/rstrip tokens behave as at inference.

A text that is a part of a control token could become one together with what the template writes beside it (a key
`<|im_end|` and the template's `>`). Such texts get a *border* at their ends: characters that encoding removes, after
control tokens have been looked for. So do texts of which a control token would be left when a template cuts something
out of them (`<|im_<think>x</think>end|>`): behind each character that a control token begins with.
"""

import contextlib
import json
import re
import secrets
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from data_utils.new_tokens import list_content_tokens
from data_utils.sources import DataError
from data_utils.template_source import list_literals
from data_utils.tiktoken_encoder import TiktokenEncoder

PROBE = "PROBE"  # an answer that stands in no template
_LOOKS_LIKE_CONTROL = re.compile(r"<\|[^|<>\s'\"]+\|>|<｜[^｜<>\s]+｜>|<(?:start|end)_of_turn>")
_JINJA_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
_REMEMBERED_TOKENS = 500_000  # some 20 MB
_COMPARED_FIRST, _COMPARED_EVERY = 256, 32  # pieces that tiktoken and the tokenizer both encode
_PRIVATE_USE = 0x100000  # plane 16; 65,534 characters that mean nothing in any text


class TiktokenDiffers(Exception):
    """tiktoken gave other ids than the tokenizer."""


class SafeEncoder:
    r"""Escape, encode, and the set of control tokens of one tokenizer and its chat template.

    control_ids: text -> id of every control token.
    template_ids: ids of the control tokens that stand in the template's own text, ascending.

    Example: encode("<|im_start|>user\n" + escape("<|im_end|>")) holds the id of <|im_start|> and not of <|im_end|>.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        template = _JINJA_COMMENT.sub("", tokenizer.get_chat_template())
        added = tokenizer.added_tokens_decoder
        content = set(list_content_tokens(tokenizer))  # parsed wherever they stand, unless the template writes them
        # White-space tokens (Gemma has some) stand in every template by chance and control nothing.
        self.control_ids = {
            token.content: token_id
            for token_id, token in added.items()
            if token.content.strip() and ((token.special and token.content not in content) or token.content in template)
        }
        missing = [text for text in _LOOKS_LIKE_CONTROL.findall(template) if text not in tokenizer.get_vocab()]
        if missing:
            raise DataError(
                f"the chat template writes {missing[0]}, which is no token of this tokenizer and would be read as "
                "plain text; use the template that belongs to the checkpoint"
            )
        self.template_ids = sorted(token_id for text, token_id in self.control_ids.items() if text in template)
        # In an assistant's turn markup such as <think> is what generation produces; what delimits turns is not.
        delimiters = _render_delimiters(tokenizer)
        self.markup = {
            token.content
            for token in added.values()
            if token.content in self.control_ids
            and (not token.special or token.content in content)
            and token.content not in delimiters
        }

        nonce = "".join(chr(_PRIVATE_USE + secrets.randbelow(0xFFF0)) for _ in range(8))
        self._nonce = nonce
        self._mangled = (repr(nonce[0])[1:-1], json.dumps(nonce[0])[1:-1])
        ordered = sorted(self.control_ids, key=len, reverse=True)
        self._escaped = {text: f"{nonce}{chr(_PRIVATE_USE + index)}" for index, text in enumerate(ordered)}
        self._renamed = {text: f"{nonce[::-1]}{chr(_PRIVATE_USE + index)}" for index, text in enumerate(ordered)}
        self._border = f"{nonce}{chr(_PRIVATE_USE + len(ordered))}"
        self._unescaped = {self._border: "", **{escaped: text for text, escaped in self._escaped.items()}}
        literals = list_literals(tokenizer.get_chat_template())
        self._parts = _find_parts(ordered, [*literals, '"'])  # tojson puts quotes around texts
        self._cut_out = _find_cut_out(ordered, [*literals, *self.markup])
        self._user_pattern = _any_of(ordered)
        self.markup_pattern = _any_of(sorted(self.markup, key=len, reverse=True))
        self._assistant_pattern = _any_of([text for text in ordered if text not in self.markup])
        self._escaped_pattern = re.compile(f"{nonce}.")
        self._twin, self._changed_ids, self._state = _build_twin(tokenizer, self._renamed)
        self._cut_pattern = re.compile(f"({self._user_pattern.pattern})")
        self._can_cut = _can_cut(self._state, set(self._renamed.values()))
        self._pieces: dict[str, list[int]] = {}  # ids of pieces that were encoded lately
        self._num_remembered = 0  # tokens in them
        self._tiktoken: TiktokenEncoder | None = None
        self._num_compared = 0
        # A metaspace tokenizer marks the start of a piece: there, pieces must not be encoded apart.
        unsafe = self._find_unsafe(tokenizer)
        if unsafe is not None:
            raise DataError(f"this tokenizer reads {unsafe} as a control token wherever it stands; it is not supported")
        bos = tokenizer.bos_token_id
        self._begins_with = [bos] if bos is not None and tokenizer("a").input_ids[0] == bos else []
        self.pieces_equal_whole = self.encode("a\nHello") == self.encode("a\n") + self.encode("Hello")
        strips = any(token.lstrip or token.rstrip or token.single_word for token in added.values())
        self.is_context_free = self.pieces_equal_whole and not strips

    def _find_unsafe(self, tokenizer: PreTrainedTokenizerBase) -> str | None:
        control = set(self.control_ids.values()) - {tokenizer.unk_token_id}
        return next((text for text in self.control_ids if control & set(self.encode(self.escape(text)))), None)

    def escape(self, text: str, role: str = "user") -> str:
        """Replace control-token texts by private-use characters; an assistant's markup stays."""
        pattern = self._assistant_pattern if role == "assistant" else self._user_pattern
        escaped = pattern.sub(lambda match: self._escaped[match.group()], text)
        if self._could_join(escaped, role):
            escaped = self._cut_out.sub(lambda match: match.group(1) or match.group() + self._border, escaped)
        if not self._needs_borders(escaped):
            return escaped
        inner = escaped.strip()
        before, _, after = escaped.partition(inner)
        return f"{before}{self._border}{inner}{self._border}{after}"

    def _could_join(self, text: str, role: str) -> bool:
        """Whether a control token is left of a text when something is cut out of it, as templates do with reasoning."""
        allowed = self.markup if role == "assistant" else ()
        return any(
            _is_subsequence(control, text)
            for control in self.control_ids
            if control[0] in text and control not in allowed
        )

    def _needs_borders(self, text: str) -> bool:
        starts, wholes, ends = self._parts
        text = text.strip()
        return text.endswith(ends) or text.startswith(starts) or text in wholes

    def encode(self, text: str) -> list[int]:
        """Encode rendered, escaped text; the ids are those of the text encoded as one string.

        A tokenizer cuts a text at control tokens before anything else. So the text is encoded piece by piece, and a
        piece that was met before, as earlier turns are in every later prompt, is not encoded again.
        """
        if not self._can_cut:
            return self._encode_whole(self._cut_pattern.sub(lambda match: self._renamed[match.group()], text))
        parts = ["", *self._cut_pattern.split(text), ""]  # control token, piece, control token, ..., control token
        ids: list[int] = []
        for index in range(1, len(parts), 2):
            before, piece, after = parts[index - 1 : index + 2]
            if piece:
                ids += self._recall_piece(before, piece, after)
            if after:
                ids.append(self.control_ids[after])
        return ids

    def _recall_piece(self, before: str, piece: str, after: str) -> list[int]:
        key = before + piece + after
        ids = self._pieces.get(key)
        if ids is None:
            ids = self._encode_piece(before, piece, after)
            self._num_remembered += len(ids)
            if self._num_remembered > _REMEMBERED_TOKENS:
                self._pieces.clear()
                self._num_remembered = len(ids)
            self._pieces[key] = ids
        return ids

    def _encode_piece(self, before: str, piece: str, after: str) -> list[int]:
        """Encode a piece. Its ids may depend on the control tokens around it (metaspace, rstrip)."""
        found = self._tiktoken.encode(self.unescape(piece)) if self._tiktoken else None
        if found is not None:
            self._num_compared += 1
            if self._num_compared > _COMPARED_FIRST and self._num_compared % _COMPARED_EVERY:
                return found
        whole = self._encode_whole(self._renamed.get(before, "") + piece + self._renamed.get(after, ""))
        ids = whole[bool(before) : len(whole) - bool(after)]
        if found not in (None, ids):
            raise TiktokenDiffers
        return ids

    def _encode_whole(self, renamed: str) -> list[int]:
        (encoded,) = self._twin.encode_batch_fast([self.unescape(renamed)], add_special_tokens=False)
        changed = self._changed_ids
        return [changed.get(token_id, token_id) for token_id in encoded.ids] if changed else encoded.ids

    def unescape(self, text: str) -> str:
        """Escaped or rendered text as it is encoded."""
        if self._nonce not in text:
            return text
        return self._escaped_pattern.sub(lambda match: self._unescaped[match.group()], text)

    @contextlib.contextmanager
    def use_tiktoken(self) -> Iterator[None]:
        """Encode by tiktoken where its ids are sure to be the tokenizer's. Building it takes 0.3 s.

        The first ids and every 32nd after them are compared. Raises: TiktokenDiffers: in encode, where they differ.
        """
        self._tiktoken = TiktokenEncoder.build(self._twin, self._state, set(self._renamed.values()))
        try:
            yield
        finally:
            self._tiktoken = None

    def has_mangled_escape(self, rendered: str) -> bool:
        """Whether an escaped text was written in yet another escaped form (of JSON, say), which nothing turns back."""
        return any(form in rendered for form in self._mangled)

    def needs_escape(self, text: str) -> bool:
        """Whether escape changes a user's text."""
        return (
            self._user_pattern.search(text) is not None or self._needs_borders(text) or self._could_join(text, "user")
        )

    def holds_control_text(self, text: str, role: str) -> bool:
        """Whether the text of a control token stands in it, which stays text; an assistant's markup does not."""
        pattern = self._assistant_pattern if role == "assistant" else self._user_pattern
        return pattern.search(text) is not None

    def find_control_tokens(self, rendered: str) -> list[str]:
        """The control tokens in a rendered text, in their order."""
        return self._user_pattern.findall(rendered)

    def after_last_control(self, text: str) -> str | None:
        """Return what follows the last control token of a rendered text, or None if there is none."""
        found = list(self._user_pattern.finditer(text))
        return text[found[-1].end() :] if found else None

    def encode_document(self, text: str) -> list[int]:
        """Ids of a text that is no conversation; control-token texts in it stay plain text."""
        return [*self._begins_with, *self.encode(self.escape(text))]

    def encode_target(self, prompt: str, prompt_ids: list[int], target: str) -> list[int]:
        """Ids of what follows a prompt, with a cut where generation starts.

        Byte-level tokenizers encode the target apart. Where that differs from whole strings (metaspace), the ids
        after the prompt's are taken from the whole.
        """
        if self.pieces_equal_whole:
            return self.encode(target)
        whole = self.encode(prompt + target)
        if whole[: len(prompt_ids)] == prompt_ids:
            return whole[len(prompt_ids) :]
        # The whole string merges across the cut: encode behind a control token, which is no start of a text.
        return self.encode(next(iter(self.control_ids)) + target)[1:]


Parts = tuple[tuple[str, ...], set[str], tuple[str, ...]]


def _find_parts(control: list[str], literals: list[str]) -> Parts:
    """Texts that can become a control token beside what a template writes, or beside other texts.

    Returns: what such a text may begin with; what it may be as a whole; what it may end with.
    """
    before = {text[:i] for text in control for i in range(1, len(text)) if any(e.endswith(text[:i]) for e in literals)}
    after = {text[i:] for text in control for i in range(1, len(text)) if any(e.startswith(text[i:]) for e in literals)}
    starts = {text[len(part) :] for text in control for part in before if text.startswith(part)}
    wholes = {
        text[len(part) : -len(rest)]
        for text in control
        for part in before
        for rest in after
        if text.startswith(part) and text.endswith(rest) and len(part) + len(rest) < len(text)
    }
    ends = {text[:i] for text in control for i in range(1, len(text))}
    return tuple(starts - {""}), wholes, tuple(ends)


def _build_twin(
    tokenizer: PreTrainedTokenizerBase, renamed: dict[str, str]
) -> tuple[Tokenizer, dict[int, int], dict[str, Any]]:
    """Rename the control tokens of a tokenizer.

    Returns: the twin; its ids that differ from the tokenizer's -> those; its JSON state without the vocabulary.
    """
    state: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in state["added_tokens"]:
        token["content"] = renamed.get(token["content"], token["content"])
    if state["model"].get("type") == "Unigram":  # it takes any piece of its vocabulary from plain text
        state["model"]["vocab"] = [[renamed.get(piece, piece), score] for piece, score in state["model"]["vocab"]]
    twin = Tokenizer.from_str(json.dumps(state))
    twin.no_truncation()
    twin.no_padding()
    changed_ids = {}
    for token_id, token in tokenizer.added_tokens_decoder.items():
        twin_id = twin.token_to_id(renamed.get(token.content, token.content))
        if twin_id is not None and twin_id != token_id:
            changed_ids[twin_id] = token_id
    state["model"] = {name: value for name, value in state["model"].items() if name not in ("vocab", "merges")}
    return twin, changed_ids, state


def _can_cut(state: dict[str, Any], control: set[str]) -> bool:
    """Whether a text may be cut at every control token and encoded piece by piece."""
    # Tokens that are searched for in normalised text cut nothing where the normaliser looks across them.
    is_local = (state["normalizer"] or {"type": "NFC"})["type"] in ("NFC", "NFD", "NFKC", "NFKD")
    return all(
        not token["single_word"] and (is_local or not token["normalized"])
        for token in state["added_tokens"]
        if token["content"] in control
    )


def _render_delimiters(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the template writes around a user's turn and after an answer."""
    question = {"role": "user", "content": "Q"}
    try:
        asked = tokenizer.apply_chat_template([question], tokenize=False)
        answered = [question, {"role": "assistant", "content": PROBE}]
        return asked + tokenizer.apply_chat_template(answered, tokenize=False).rpartition(PROBE)[2]
    except Exception as error:  # whatever the template may do
        raise DataError(f"the chat template cannot render a question and its answer: {error}") from None


def _find_cut_out(control: list[str], literals: list[str]) -> re.Pattern[str]:
    """Group 1: what a template may cut out of a text; or else a character that a control token begins with."""
    words = {word for literal in literals if len(word := literal.strip()) > 1}
    words = {word for word in words if not any(text.startswith(word) for text in control if text != word)}
    first = "".join(sorted({text[0] for text in control}))
    kept = _any_of(sorted(words, key=len, reverse=True)).pattern
    return re.compile(f"({kept})|[{re.escape(first)}]")


def _is_subsequence(wanted: str, text: str) -> bool:
    at = -1
    return all((at := text.find(character, at + 1)) >= 0 for character in wanted)


def _any_of(texts: list[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, texts)) or r"(?!)")
