"""How well one answer meets what was expected. Standard library only.

Reasoning before `</think>` is no part of an answer here: two ways to one answer are equally good.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

# Of held-out conversations, and whether more of it is better; None: neither.
DATA_METRICS: dict[str, bool | None] = {
    "loss": False,
    "perplexity": False,
    "exact_match": True,
    "rouge_l": True,
    "tool_call_f1": True,
    "stopped": True,
    "answer_tokens": None,
}

# Han, kana and hangul are written without spaces between words, so each character counts as one.
_TOKEN = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff]|[^\W_]+")
_SPACELESS = re.compile(r"([\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff])")


def find_said(text: str) -> str:
    """What an answer says, without reasoning and outer white space."""
    return text.rpartition("</think>")[2].strip()


def match_exactly(answer: Mapping[str, Any], expected: Mapping[str, Any]) -> bool:
    """Whether two messages say the same and call the same tools, in whatever order."""
    calls, expected_calls = list_calls(answer), list_calls(expected)
    return find_said(answer["content"]) == find_said(expected["content"]) and calls == expected_calls


def measure_rouge_l(answer: str, expected: str) -> float:
    """ROUGE-L: F1 of the longest common subsequence of words, lower case; of Chinese, of characters.

    Example: "the cat sat", "the cat" -> 0.8
    """
    found, wanted = split_words(find_said(answer)), split_words(find_said(expected))
    if not found or not wanted:
        return float(found == wanted)
    return 2 * count_common(found, wanted) / (len(found) + len(wanted))


def split_words(text: str) -> list[str]:
    """Words in lower case, without punctuation; characters where no spaces are written.

    Example: "LoRA 是什么?" -> ["lora", "是", "什", "么"]
    """
    return _TOKEN.findall(_SPACELESS.sub(r" \1 ", text.lower()))


def count_common(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence, a bit of one number for each place of `first`.

    Source: H. Hyyrö, Bit-parallel LCS-length computation revisited (2004).
    """
    places: dict[str, int] = {}
    for index, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << index
    ones = (1 << len(first)) - 1
    row = ones
    for word in second:
        matches = row & places.get(word, 0)
        row = ((row + matches) | (row - matches)) & ones
    return len(first) - row.bit_count()


def list_calls(message: Mapping[str, Any]) -> Counter[str]:
    """Calls of tools in a message, each as one text: name and arguments as JSON, whose keys have no order."""
    functions = [call["function"] for call in message.get("tool_calls") or ()]
    return Counter(
        json.dumps([each["name"], _as_json(each["arguments"])], sort_keys=True, ensure_ascii=False)
        for each in functions
    )


def count_calls(answer: Mapping[str, Any], expected: Mapping[str, Any]) -> tuple[int, int]:
    """Twice the calls that are right, and the calls of both sides: sums of them give F1 over conversations."""
    found, wanted = list_calls(answer), list_calls(expected)
    return 2 * (found & wanted).total(), found.total() + wanted.total()


def _as_json(value: Any) -> Any:
    """The value with 1.0 as 1, which are one number in JSON."""
    if isinstance(value, Mapping):
        return {str(key): _as_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
