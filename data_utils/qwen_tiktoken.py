"""The vocabulary of the original Qwen (qwen.tiktoken) -> a fast tokenizer with the same ids.

The file has a line for each token: its bytes in base64, and its rank. A piece of text is merged pair by pair, the pair
of the lowest rank first; the two parts of every token follow from that, and are what the tokenizers library calls
merges. Special tokens follow the last rank. No code of the checkpoint runs.

Source: Qwen/Qwen-7B-Chat tokenization_qwen.py.
"""

import base64
import binascii
import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data_utils.sources import DataError
from data_utils.tiktoken_encoder import byte_letters

VOCABULARY_FILE = "qwen.tiktoken"
END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, IM_START, IM_END, *(f"<|extra_{number}|>" for number in range(205)))
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LARGEST_PADDING = 1024  # rows of the vocabulary matrix that belong to no token


def needs_conversion(directory: Path) -> bool:
    """Whether a directory has this vocabulary and no fast tokenizer, or none that belongs to an original model."""
    if not (directory / VOCABULARY_FILE).is_file():
        return False
    is_original = _read_json(directory / "config.json").get("model_type") == "qwen"
    return is_original or not (directory / "tokenizer.json").is_file()


def load_qwen_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of an original Qwen checkpoint, without a chat template.

    Its end of sequence is <|im_end|> for chat models (generation_config.json says chatml), else <|endoftext|>.

    Raises: DataError: a damaged file (file:line), or one that does not belong to the checkpoint.
    """
    file = directory / VOCABULARY_FILE
    ranks = read_ranks(file)
    tokenizer = build_tokenizer(ranks, find_merges(ranks, file))
    generation = _read_json(directory / "generation_config.json")
    _check_size(file, len(ranks), _read_json(directory / "config.json"), generation)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=IM_END if generation.get("chat_format") == "chatml" else END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def read_ranks(file: Path) -> dict[bytes, int]:
    """Rank of each token, which is its id, in the order of the file.

    Raises: DataError: a line that is none, or out of order.
    """
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(lines, 1):
        where, fields = f"{file}:{number}", line.split()
        if not fields:
            continue
        if len(fields) != 2 or not fields[1].isdigit():
            raise DataError(f"{where}: expected a token in base64 and its rank; copy the file again")
        try:
            token = base64.b64decode(fields[0], validate=True)
        except binascii.Error:
            raise DataError(f"{where}: the token is not base64; copy the file again") from None
        if fields[1] != b"%d" % len(ranks):
            rank = fields[1].decode()[:20]
            raise DataError(f"{where}: rank {rank}, where {len(ranks)} comes next; copy the file again")
        if not token or token in ranks:
            what = "an empty token" if not token else f"the token of rank {ranks[token]} again"
            raise DataError(f"{where}: {what}; copy the file again")
        ranks[token] = len(ranks)
    if lacking := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise DataError(f"{file}: no token for the byte {lacking[0]}; copy the file again")
    return ranks


def find_merges(ranks: dict[bytes, int], file: Path) -> list[tuple[bytes, bytes]]:
    """The two parts of each token of several bytes, by rank.

    Raises: DataError: a token that earlier ones do not make up, so that no text could be merged into it.
    """
    merges = []
    for token, rank in ranks.items():
        if len(token) > 1:
            parts = _merge(token, ranks, below=rank)
            if len(parts) != 2:
                raise DataError(
                    f"{file}: the token of rank {rank} is not made up of two earlier ones; copy the file again"
                )
            merges.append((parts[0], parts[1]))
    return merges


def _merge(token: bytes, ranks: dict[bytes, int], *, below: int) -> list[bytes]:
    """A token's bytes, merged by all ranks below its own."""
    parts = [token[index : index + 1] for index in range(len(token))]
    while len(parts) > 2:
        pairs = [(ranks.get(parts[i] + parts[i + 1], below), i) for i in range(len(parts) - 1)]
        rank, at = min(pairs)
        if rank >= below:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def build_tokenizer(ranks: dict[bytes, int], merges: list[tuple[bytes, bytes]]) -> Tokenizer:
    """Byte-level BPE over NFC-normalised text, with the special tokens behind the last rank."""
    letters = byte_letters()

    def write(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    vocabulary = {write(token): rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocabulary, [(write(left), write(right)) for left, right in merges]))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL_TOKENS])
    return tokenizer


def _check_size(file: Path, num_ranks: int, config: dict[str, Any], generation: dict[str, Any]) -> None:
    """Raises: DataError: a file that was cut between two lines, or of another checkpoint: all ids would be wrong."""
    num_tokens, rows = num_ranks + len(SPECIAL_TOKENS), config.get("vocab_size")
    if isinstance(rows, int) and not 0 <= rows - num_tokens <= _LARGEST_PADDING:
        raise DataError(
            f"{file}: has {num_tokens:,} tokens with the special ones, and config.json says vocab_size {rows:,}; it is "
            "cut short, or belongs to another checkpoint: copy it again"
        )
    end = generation.get("pad_token_id")
    if isinstance(end, int) and end != num_ranks:
        raise DataError(
            f"{file}: {END_OF_TEXT} would be token {num_ranks}, and generation_config.json says {end} (pad_token_id); "
            "the file is cut short, or belongs to another checkpoint: copy it again"
        )


def _read_json(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself; nothing where it says nothing (the model's loader names what is wrong)."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
