"""Byte-level BPE through tiktoken, several times faster than the tokenizers library on the same vocabulary.

Taken only for tokenizers that are byte-level BPE and nothing else, and for texts of common scripts: there the two
libraries' tables of letters are the same. The first texts of a set and every 32nd after them are encoded by the
tokenizer, too; one difference, and the set is encoded again without this.
"""

import importlib.util
import re
import sys
import unicodedata
from typing import Any

from tokenizers import Tokenizer

# What every version of Unicode in use agrees on: no letters that are new, none that fold into ASCII ones.
_UNCOMMON = re.compile(
    "[^\x00-\u017e\u0180-\u024f\u0370-\u0373\u0386-\u03ff\u0400-\u052f\u05d0-\u05ea\u0621-\u064a\u2000-\u206f\u20a0-\u20b9"
    "\u2190-\u23f3\u2460-\u27bf\u3000-\u303f\u3041-\u3096\u309b-\u30ff\u3400-\u4db5\u4e00-\u9fa5\uac00-\ud7a3"
    "\uff01-\uffbe\U0001f300-\U0001faff\U00100000-\U0010fffd]"
)


class Differs(Exception):
    """tiktoken gave other ids than the tokenizer."""


class FastBPE:
    """One tokenizer's vocabulary in tiktoken."""

    def __init__(self, encoding: Any, special: set[str]):
        self._encode = encoding.encode
        self._special = special

    def takes(self, text: str) -> bool:
        """Whether ids of this text are sure to be the tokenizer's."""
        return text.isascii() or (not _UNCOMMON.search(text) and unicodedata.is_normalized("NFC", text))

    def encode(self, text: str) -> list[int] | None:
        """Ids, where they are sure to be the tokenizer's; added tokens in the text are parsed."""
        if not self.takes(text):
            return None
        try:
            return self._encode(text, allowed_special=self._special, disallowed_special=())
        except ValueError:  # a million spaces are too much for its regular expressions
            return None


class ByteLevelBPE:
    """What tiktoken needs to know of a tokenizer: its vocabulary, how it splits texts, its added tokens."""

    def __init__(self, pattern: str, vocabulary: dict[str, int], added: list[dict[str, Any]]):
        self._pattern = pattern
        self._vocabulary = vocabulary
        self._added = added

    @classmethod
    def find(cls, state: dict[str, Any]) -> "ByteLevelBPE | None":
        """state: of the tokenizer as JSON. None: tiktoken is of no use, or it is more than byte-level BPE."""
        pattern = _find_pattern(state)
        # It pays in forked processes alone (benchmarks/LOG.md), and those are safe on Linux alone.
        if pattern is None or importlib.util.find_spec("tiktoken") is None or sys.platform != "linux":
            return None
        return cls(pattern, state["model"]["vocab"], state["added_tokens"])

    def build(self, tokenizer: Tokenizer, never_written: set[str]) -> FastBPE | None:
        """The same tokenizer in tiktoken; None: its added tokens are more than their texts.

        never_written: added tokens that no text holds.
        """
        import tiktoken

        added = [token for token in self._added if token["content"] not in never_written]
        names = [token["content"] for token in added]
        plain = not any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in added)
        if not plain or any(one != other and other.startswith(one) for one in names for other in names):
            return None
        letters = {ord(letter): byte for byte, letter in _byte_letters().items()}
        known = {token["content"] for token in self._added}
        try:
            ranks = {
                piece.translate(letters).encode("latin-1"): rank
                for piece, rank in self._vocabulary.items()
                if piece not in known
            }
            vocabulary = tokenizer.get_vocab(with_added_tokens=True)
            special = {name: vocabulary[name] for name in names}
            encoding = tiktoken.Encoding("fast", pat_str=self._pattern, mergeable_ranks=ranks, special_tokens=special)
        except (UnicodeEncodeError, ValueError):
            return None
        return FastBPE(encoding, set(names))


def _find_pattern(state: dict[str, Any]) -> str | None:
    model, splitter, normalizer = state["model"], state["pre_tokenizer"] or {}, state["normalizer"]
    odd = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback", "ignore_merges")
    if model.get("type") != "BPE" or any(model.get(name) for name in odd):
        return None
    if normalizer is not None and normalizer != {"type": "NFC"}:
        return None
    steps = splitter.get("pretokenizers", [])
    if [step["type"] for step in steps] != ["Split", "ByteLevel"]:
        return None
    split, bytes_step = steps
    if bytes_step["add_prefix_space"] or bytes_step["use_regex"] or split["behavior"] != "Isolated" or split["invert"]:
        return None
    return split["pattern"].get("Regex")


def _byte_letters() -> dict[int, str]:
    """The letter that stands for each byte in byte-level vocabularies (GPT-2's table)."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(0x100) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(0x100 + index) for index, byte in enumerate(hidden)}
