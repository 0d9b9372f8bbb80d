"""A GGUF file held against the checkpoint that it was made of."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from inference.pre_tokenizer import find_pre_tokenizer, read_definition
from tuning.checkpoint.tensor_files import StoredTensor, list_tensors
from tuning.errors import SettingsError

# llama.cpp computes with these checkpoints' numbers as they are; others get some of theirs in another form.
_UNCHANGED = ("llama", "qwen2", "qwen2moe", "qwen3", "qwen3moe")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_LANGUAGE_MODEL = re.compile(r"^(?:model\.)?language_model\.(?:model\.)?(?=embed_tokens|layers|norm)")  # beside a tower
# At these texts llama.cpp ends an answer in every model: llama-vocab.cpp, special_eog_ids.
_ALWAYS_STOP = {
    *("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|end_of_text|>", "<end_of_turn>"),
    *("<|return|>", "<|call|>", "</s>", "<EOT>", "<eos>", "<end_of_utterance>", "<｜end▁of▁sentence｜>"),
}


@dataclass
class Comparison:
    """What came of a checkpoint's tensors, by their names.

    equal: the same numbers, after rounding to the file's dtype. reordered: the same rows in another order. changed:
    other numbers, which the converter makes on purpose. absent: not found under a name of their own.
    """

    equal: list[str] = field(default_factory=list)
    reordered: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)

    def describe(self, after: str = "") -> list[str]:
        """A line, and one for what could not be compared. after: what was done to the checkpoint's numbers."""
        lines = [f"{len(self.equal)} tensors are equal{after}"]
        if self.reordered:
            lines[0] += f", {len(self.reordered)} but for the order of their rows"
        for names, what in ((self.changed, "changed by the converter"), (self.absent, "not compared")):
            if names:
                lines.append(f"{what}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if names[3:] else ''}")
        return lines


def open_file(file: Path) -> Any:
    """A reader of a GGUF file, which also changes it in place. It takes some seconds for a large vocabulary."""
    import gguf

    return gguf.GGUFReader(file, "r+")


def choose_eos(tokenizer: PreTrainedTokenizerBase, stop_id: int) -> int:
    """The token that the file calls eos: the one that answers were trained to end with.

    But where the chat template writes {{ eos_token }} for another one, it is that, as an engine puts it in there.

    Raises: SettingsError: then llama.cpp would not stop at the trained one.
    """
    if "eos_token" not in tokenizer.get_chat_template() or tokenizer.eos_token_id == stop_id:
        return stop_id
    if (stop := tokenizer.convert_ids_to_tokens(stop_id)) not in _ALWAYS_STOP:
        raise SettingsError(
            f"answers end with {stop}, but the chat template writes eos_token, which is {tokenizer.eos_token}: a GGUF "
            "holds one of them; write that token's text into chat_template.jinja"
        )
    return int(tokenizer.eos_token_id)


def set_ends(reader: Any, eos_id: int) -> None:
    """Write where answers end, and that no tokens are put around prompts.

    The chat template writes the token that prompts begin with, where there is one: a second one was never trained.

    Raises: SettingsError: the file has no field for it.
    """
    for name, value in (("eos_token_id", eos_id), ("add_bos_token", False), ("add_eos_token", False)):
        entry = reader.get_field(f"tokenizer.ggml.{name}")
        if entry is not None:
            entry.parts[entry.data[0]][0] = value
        elif name == "eos_token_id":
            raise SettingsError(f"the GGUF file has no {name}; give the checkpoint's tokenizer an eos_token")
    reader.data.flush()


def check_tokenizer(
    reader: Any, tokenizer: PreTrainedTokenizerBase, *, stop_ids: Sequence[int], num_rows: int | None = None
) -> list[str]:
    """Hold the file's vocabulary, chat template and stop token against a tokenizer.

    stop_ids: tokens that end generation, the trained one first. num_rows: of the embedding matrix, if it has more rows
    than there are tokens.

    Returns: what an engine that reads the file may do otherwise, a line each.

    Raises: SettingsError: something differs.
    """
    read = partial(_read_field, reader)
    if read("tokenizer.chat_template") != tokenizer.get_chat_template():
        raise SettingsError("the GGUF file holds another chat template than the checkpoint")
    if (eos_id := read("tokenizer.ggml.eos_token_id")) != choose_eos(tokenizer, stop_ids[0]):
        raise SettingsError(f"the GGUF file stops at token {eos_id}, trained is {stop_ids[0]}")
    if read("tokenizer.ggml.add_bos_token") is not False:
        raise SettingsError("the GGUF file does not say that no token goes before prompts (add_bos_token)")
    _check_vocabulary(tokenizer, read, num_rows or len(tokenizer))
    expected = find_pre_tokenizer(tokenizer)
    if expected is not None and read("tokenizer.ggml.pre") != expected:
        raise SettingsError(
            f"the GGUF file splits text as {read('tokenizer.ggml.pre')}, but the tokenizer does so as {expected}"
        )
    texts = [str(tokenizer.convert_ids_to_tokens(i)) for i in stop_ids[1:]]
    if more := [text for text in texts if text not in _ALWAYS_STOP]:
        return [f"{more[0]} ends an answer in generation_config.json, too; a GGUF file holds one stop token"]
    return []


def _read_field(reader: Any, name: str) -> Any:
    entry = reader.get_field(name)
    return None if entry is None else entry.contents()


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, read: Any, num_rows: int) -> None:
    tokens, kinds = read("tokenizer.ggml.tokens") or [], read("tokenizer.ggml.token_type") or []
    if len(tokens) != num_rows:
        raise SettingsError(f"the GGUF file has {len(tokens):,} tokens, the checkpoint {num_rows:,}")
    added = tokenizer.added_tokens_decoder
    for token_id, text in enumerate(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))):
        if text is not None and tokens[token_id] != text:
            raise SettingsError(
                f"the GGUF file's token {token_id} is {tokens[token_id]!r}, the tokenizer's is {text!r}"
            )
        if token_id in added and added[token_id].special and kinds[token_id] != 3:  # of gguf.TokenType: CONTROL
            raise SettingsError(f"{text} is no control token in the GGUF file, as it is in the tokenizer")
    merges = read_definition(tokenizer)["model"].get("merges")
    if merges and (written := read("tokenizer.ggml.merges")) is not None:
        own = [
            merge if isinstance(merge, str) else " ".join(part.replace(" ", "Ġ") for part in merge) for merge in merges
        ]
        if written != own:
            raise SettingsError("the GGUF file merges other pieces of text than the tokenizer")


def compare_tensors(reader: Any, checkpoint: Path) -> Comparison:
    """Hold every tensor of a checkpoint against the file's.

    Raises: SettingsError: numbers differ where the file should have the checkpoint's own.
    """
    import gguf

    architecture = _read_field(reader, "general.architecture")
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, _read_field(reader, f"{architecture}.block_count"))
    written = {tensor.name: tensor for tensor in reader.tensors}
    result = Comparison()
    for stored in list_tensors(checkpoint).values():
        expert = _EXPERT.search(stored.name)
        plain = _LANGUAGE_MODEL.sub("model.", _EXPERT.sub(".experts.", stored.name))
        name = names.get_name(plain, try_suffixes=(".weight", ".bias"))
        tensor = written.get(name) if name else None
        if tensor is None:
            # A tied output layer is in the file once, as the embedding.
            is_tied_copy = name == "output.weight" and "output.weight" not in written
            result.absent += [] if is_tied_copy else [stored.name]
            continue
        if name == "token_embd.weight" and tensor.shape[-1] != stored.shape[0]:
            raise SettingsError(
                f"the GGUF file has {tensor.shape[-1]:,} rows of tokens, the checkpoint {stored.shape[0]:,}"
            )
        getattr(result, _compare(stored, tensor, None if expert is None else int(expert.group(1)))).append(stored.name)
    if result.changed and architecture in _UNCHANGED:
        raise SettingsError(f"{result.changed[0]} has other numbers in the GGUF file than in {checkpoint}")
    return result


def _compare(stored: StoredTensor, tensor: Any, expert: int | None) -> str:
    """The list of a Comparison that a tensor belongs to. expert: which of the file's tensor's parts it is."""
    from gguf import quants

    shape = tuple(int(size) for size in reversed(tensor.shape))
    if (shape if expert is None else shape[1:]) != stored.shape:
        return "absent"
    found = np.asarray(tensor.data if expert is None else tensor.data[expert])
    expected = quants.quantize(stored.read(torch.float32).numpy(), tensor.tensor_type)
    found, expected = (each.reshape(stored.shape[0], -1).view(np.uint8) for each in (found, expected))
    if np.array_equal(found, expected):
        return "equal"
    same_rows = sorted(row.tobytes() for row in found) == sorted(row.tobytes() for row in expected)
    return "reordered" if same_rows else "changed"
