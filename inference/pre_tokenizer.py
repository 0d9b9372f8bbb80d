"""How a tokenizer splits text before its merges, under llama.cpp's name for it: found by its definition."""

import json
from typing import Any

from transformers import PreTrainedTokenizerBase

# As tokenizer.json has them: digits one by one; qwen35 keeps combining marks with their letters.
SPLITS = {
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
    "qwen35": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}
_NOT_PLAIN = ("dropout", "byte_fallback", "ignore_merges", "continuing_subword_prefix", "end_of_word_suffix")


def find_pre_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """llama.cpp's name of the pre-tokenizer; None where it is none of those known here."""
    definition = read_definition(tokenizer)
    merges = definition["model"]
    if merges["type"] != "BPE" or any(merges.get(name) for name in _NOT_PLAIN):
        return None
    if (definition["normalizer"] or {"type": "NFC"})["type"] != "NFC":
        return None
    splitting = definition["pre_tokenizer"] or {}
    steps = splitting.get("pretokenizers", [splitting])
    if [step.get("type") for step in steps] == ["ByteLevel"]:
        return "gpt-2" if steps[0]["use_regex"] and not steps[0]["add_prefix_space"] else None
    if [step.get("type") for step in steps] != ["Split", "ByteLevel"]:
        return None
    split, byte_level = steps
    if split["behavior"] != "Isolated" or split["invert"] or byte_level["use_regex"] or byte_level["add_prefix_space"]:
        return None
    return next((name for name, pattern in SPLITS.items() if split["pattern"] == {"Regex": pattern}), None)


def find_differences(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What llama.cpp is known to do otherwise than this tokenizer, a line each."""
    differences = []
    if (read_definition(tokenizer)["normalizer"] or {}).get("type") == "NFC":
        differences.append("llama.cpp does not bring text into Unicode's form NFC, as training did: send it in NFC")
    added = tokenizer.added_tokens_decoder.values()
    if taking := [token.content for token in added if token.lstrip or token.rstrip or token.single_word]:
        differences.append(f"{taking[0]} takes spaces or word ends beside it into account, in llama.cpp it may not")
    return differences


def read_definition(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """tokenizer.json's content."""
    definition: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return definition
