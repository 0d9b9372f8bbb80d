"""Special tokens that a user adds for markers in the text: reading the list, adding them, and what they replace.

Such a token is meant to stand in conversations, so its text is parsed as the token in every role, unlike the control
tokens of the chat template, which stay text. Which tokens these are is saved with the tokenizer (CONTENT_TOKENS in
tokenizer_config.json), so that inference parses the same. A token that the chat template itself writes follows the
template's rules instead. Standard library only, until a tokenizer is given.
"""

import json
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data_utils.sources import DataError, printable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTENT_TOKENS = "content_tokens"
_FLAG = "--add_special_tokens"
_LONGEST = 100  # characters of a token
_FILES = (".txt", ".json")


def read_new_tokens(words: Sequence[str]) -> list[str]:
    """The tokens of --add_special_tokens: the words themselves, or what a file has, one a line or as a JSON list.

    Raises: DataError: no such file, no tokens, or texts that cannot be tokens.
    """
    if len(words) == 1 and _is_path(words[0]):
        tokens = _read_file(words[0])
        where = f"{_FLAG} {words[0]}"
    else:
        tokens, where = list(words), _FLAG
    if not tokens:
        raise DataError(f"{where}: no tokens in it")
    for token in tokens:
        if mistake := _find_fault(token):
            raise DataError(f"{where}: {printable(repr(token)):.{_LONGEST}}: {mistake}")
    if doubled := next((token for token in tokens if tokens.count(token) > 1), None):
        raise DataError(f"{where}: {doubled} stands twice")
    return tokens


def _is_path(word: str) -> bool:
    """Whether a word is meant as a file, be it there or not. Tokens such as </tool> are none."""
    path = Path(word)
    looks_like_one = "/" in word and "<" not in word and path.parent.is_dir()
    return path.exists() or word.endswith(_FILES) or looks_like_one


def _read_file(path: str) -> list[str]:
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{_FLAG} {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{_FLAG} {path}: not UTF-8 ({error.reason})") from None
    if not path.endswith(".json") and not text.lstrip().startswith('["'):
        return [line.strip("\r") for line in text.split("\n") if line.strip()]
    try:
        tokens = json.loads(text)
    except ValueError as error:
        raise DataError(f"{_FLAG} {path}: invalid JSON: {error}") from None
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise DataError(f"{_FLAG} {path}: expected a JSON list of texts, such as {json.dumps(['<|tool|>'])}")
    return tokens


def _find_fault(token: str) -> str | None:
    """Why a text cannot be a token."""
    if not token.strip():
        return "is empty or white space, which would be a token everywhere"
    if token != token.strip():
        return "begins or ends with white space; take it away"
    if "," in token:
        return "holds a comma; write tokens as separate words, without commas"
    if any(unicodedata.category(character) in ("Cc", "Cf", "Co", "Cs", "Zl", "Zp") for character in token):
        return "holds a control character, or one that nothing shows"
    if unicodedata.normalize("NFC", token) != token:
        return "is not in Unicode's normal form (NFC), so tokenizers would not find it"
    if len(token) > _LONGEST:
        return f"is longer than {_LONGEST} characters"
    return None


def add_new_tokens(tokenizer: "PreTrainedTokenizerBase", tokens: Sequence[str]) -> None:
    """Give a tokenizer new special tokens, which conversations may use.

    Raises: DataError: one that is a token already, that is read when plain text is, or that would break another token.
    """
    from tokenizers import AddedToken

    vocabulary = tokenizer.get_vocab()
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.content.strip()]
    for token in tokens:
        if token in added:
            raise DataError(
                f"{_FLAG}: {token} is a token of this tokenizer already ({vocabulary[token]}); leave it out"
            )
        if token in vocabulary:
            raise DataError(
                f"{_FLAG}: {token} is a piece of ordinary words in this vocabulary ({vocabulary[token]}), and they "
                f"would all change; mark it off: <|{token}|>"
            )
        for other in added:
            if why := _explain_clash(token, other):
                raise DataError(f"{_FLAG}: {token} {why} {other}; choose another text")
    if empty := [token for token, ids in zip(tokens, find_pieces(tokenizer, tokens), strict=True) if not ids]:
        raise DataError(f"{_FLAG}: {empty[0]} has no encoding in this tokenizer, so its row would begin from nothing")
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens], special_tokens=True)
    for token in tokens:  # byte-level decoders take letters such as é inside a token for bytes
        if (written := tokenizer.decode(tokenizer.convert_tokens_to_ids([token]))) != token:
            raise DataError(f"{_FLAG}: {token} would be written as {printable(written)!r} by this tokenizer; use ASCII")
    tokenizer.init_kwargs[CONTENT_TOKENS] = [*list_content_tokens(tokenizer), *tokens]


def _explain_clash(token: str, other: str) -> str | None:
    """How a new token would break another one: tokens are found from the left, the longest first."""
    if token in other:
        return "is a part of the token"
    if other in token:
        return "holds the token"
    if any(other.startswith(token[start:]) for start in range(1, len(token))):
        return "ends as a token begins, and would swallow the beginning of"
    return None


def list_content_tokens(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """The tokens that were added for conversations. Raises: DataError: what the tokenizer was saved with is no list."""
    found = tokenizer.init_kwargs.get(CONTENT_TOKENS, [])
    if not isinstance(found, list) or not all(isinstance(token, str) for token in found):
        raise DataError(f"{tokenizer.name_or_path}/tokenizer_config.json: {CONTENT_TOKENS}: expected a list of texts")
    return found


def read_saved_tokens(directory: Path) -> list[str]:
    """The tokens that were added for conversations, by the tokenizer_config.json of a result; none without it."""
    try:
        found = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8")).get(CONTENT_TOKENS, [])
    except (OSError, ValueError, AttributeError, RecursionError):
        return []
    return [token for token in found if isinstance(token, str)] if isinstance(found, list) else []


def find_pieces(tokenizer: "PreTrainedTokenizerBase", tokens: Sequence[str]) -> list[list[int]]:
    """Ids of the pieces that each token's text is made of, for a tokenizer that does not know these tokens."""
    from tokenizers import Tokenizer

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in tokens]
    plain = Tokenizer.from_str(json.dumps(state))
    plain.no_truncation()
    plain.no_padding()
    return [plain.encode(token, add_special_tokens=False).ids for token in tokens]
