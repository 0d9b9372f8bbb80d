"""Byte-level BPE by tiktoken, several times faster than the tokenizers library on the same vocabulary.

Used only for tokenizers that are byte-level BPE and nothing else, and for texts in common scripts: the two libraries
may have the Unicode tables of different versions. SafeEncoder compares a sample of the ids with the tokenizer's.
"""

import importlib.util
import re
import unicodedata
from typing import Any

from tokenizers import Tokenizer

# Outside these ranges Unicode versions disagree about letters, or letters fold into ASCII ones.
_UNCOMMON = re.compile(
    "[^\x00-\u017e\u0180-\u024f\u0370-\u0373\u0386-\u03ff\u0400-\u052f\u05d0-\u05ea\u0621-\u064a\u2000-\u206f\u20a0-\u20b9"
    "\u2190-\u23f3\u2460-\u27bf\u3000-\u303f\u3041-\u3096\u309b-\u30ff\u3400-\u4db5\u4e00-\u9fa5\uac00-\ud7a3"
    "\uff01-\uffbe\U0001f300-\U0001faff\U00100000-\U0010fffd]"
)


class TiktokenEncoder:
    """A tokenizer's vocabulary in tiktoken, for texts without control tokens."""

    def __init__(self, encoding: Any, special: set[str]):
        self._encoding = encoding
        self._special = special

    @classmethod
    def build(cls, tokenizer: Tokenizer, state: dict[str, Any], control: set[str]) -> "TiktokenEncoder | None":
        """Build it for a tokenizer and its JSON state (without the vocabulary).

        control: added tokens that no text to encode holds.
        Returns: None if tiktoken is not installed, or the tokenizer is more than byte-level BPE.
        """
        pattern = find_pattern(state)
        if pattern is None or importlib.util.find_spec("tiktoken") is None:
            return None
        import tiktoken

        names = [token["content"] for token in state["added_tokens"] if token["content"] not in control]
        strips = any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in state["added_tokens"])
        if strips or any(one != other and other.startswith(one) for one in names for other in names):
            return None
        letters = {ord(letter): byte for byte, letter in byte_letters().items()}
        added = {token["content"] for token in state["added_tokens"]}
        ids = tokenizer.get_vocab(with_added_tokens=True)
        try:
            ranks = {
                piece.translate(letters).encode("latin-1"): rank for piece, rank in ids.items() if piece not in added
            }
            special = {name: ids[name] for name in names}
            encoding = tiktoken.Encoding("fast", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
        except (UnicodeEncodeError, ValueError):
            return None
        return cls(encoding, set(names))

    def is_common(self, text: str) -> bool:
        """Whether both libraries are sure to encode this text alike."""
        return text.isascii() or (not _UNCOMMON.search(text) and unicodedata.is_normalized("NFC", text))

    def encode(self, text: str) -> list[int] | None:
        """Encode a text; added tokens in it are parsed. Returns: None if the tokenizer must encode it."""
        if not self.is_common(text):
            return None
        try:
            if not self._special:  # twice as fast
                return self._encoding.encode_ordinary(text)
            return self._encoding.encode(text, allowed_special=self._special, disallowed_special=())
        except ValueError:  # its regular expressions fail on a million spaces
            return None


def find_pattern(state: dict[str, Any]) -> str | None:
    """Return the regular expression that splits texts; None if the tokenizer is more than byte-level BPE."""
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


def byte_letters() -> dict[int, str]:
    """The letter that stands for each byte in byte-level vocabularies (GPT-2's table)."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(0x100) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(0x100 + index) for index, byte in enumerate(hidden)}
