"""Base or chat: whether a checkpoint has learnt the chat template's control tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import cached_file

from tuning.errors import SettingsError
from tuning.model.loading import load_config, load_generation_config
from tuning.model.stop_token import list_eos_ids
from tuning.model.token_rows import find_module_name, is_tied
from tuning.model.untrusted import read_weight_map

# Tensors of a checkpoint that hold the two matrices, by the ends of their names; the model's own names come first.
_EMBEDDING = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
_OUTPUT = ("lm_head.weight", "embed_out.weight")
_NUM_SAMPLED = 4096  # rows whose norms say what a trained row looks like

RowReader = Callable[[range], Tensor]


@dataclass(frozen=True)
class Evidence:
    """Whether a checkpoint has learnt the chat template's control tokens, and what says so."""

    is_base: bool
    reasons: list[str]

    def describe(self) -> str:
        """One line for the log."""
        return f"{'base' if self.is_base else 'chat'} model: " + "; ".join(self.reasons)


def judge_base_or_chat(
    path: str,
    meta_model: PreTrainedModel | None = None,
    *,
    stop_id: int,
    stop: str,
    vocabulary_size: int,
    cache_dir: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Evidence:
    """Decide from evidence whether a checkpoint is a base model; no weights but the rows needed are read.

    Base, where the template's stop token does not end generation by the checkpoint's own configuration, or where
    its embedding or output row was never trained: near zero, or equal to the row of a token nothing ever uses.

    path: its directory or hub name. meta_model: its meta model, where one can be built: it knows the names
    of its matrices. vocabulary_size: ids from here on belong to no token (padding of the matrix). allow_pickle: read
    .bin files where there are no safetensors.
    """
    config = load_config(path, cache_dir=cache_dir, trust_remote_code=trust_remote_code)
    generation = load_generation_config(path, cache_dir)
    declared = {token_id for each in (generation, config) for token_id in list_eos_ids(each)}
    chatml = getattr(generation, "chat_format", None) == "chatml"
    ends = stop_id in declared or chatml
    if chatml:
        reasons = ["generation_config says chat_format chatml"]
    else:
        listed = ", ".join(map(str, sorted(declared))) or "none"
        reasons = [f"stop token {stop} ({stop_id}) {'ends' if ends else 'does not end'} generation (eos: {listed})"]
    untrained = False
    for name, names in _name_matrices(config, meta_model).items():
        found = _find_matrix(path, names, cache_dir, allow_pickle=allow_pickle)
        if found is None:
            reasons.append(f"its {name} row was not found in the checkpoint's files")
            continue
        num_rows, read_rows = found
        if stop_id < num_rows:  # else check_vocabulary says so
            verdict, reason = _judge_row(read_rows, num_rows, stop_id, vocabulary_size)
            untrained = untrained or verdict
            reasons.append(f"its {name} row {reason}")
    return Evidence(is_base=not ends or untrained, reasons=reasons)


def _name_matrices(config: Any, meta_model: PreTrainedModel | None) -> dict[str, tuple[str, ...]]:
    """Names that the tensors of the embedding and, where it is another matrix, of the output layer may have."""
    if meta_model is None:
        tied = bool(getattr(config.get_text_config(), "tie_word_embeddings", False))
        return {"embedding": _EMBEDDING, **({} if tied else {"output": _OUTPUT})}
    embedding, output = meta_model.get_input_embeddings(), meta_model.get_output_embeddings()
    names: dict[str, tuple[str, ...]] = {
        "embedding": (f"{find_module_name(meta_model, embedding)}.weight", *_EMBEDDING)
    }
    if not is_tied(meta_model):
        names["output"] = (f"{find_module_name(meta_model, output)}.weight", *_OUTPUT)
    return names


def _judge_row(read_rows: RowReader, num_rows: int, row: int, vocabulary_size: int) -> tuple[bool, str]:
    own = read_rows(range(row, row + 1)).float()[0]
    norm = own.norm().item()
    used = range(0, min(vocabulary_size, num_rows), max(1, vocabulary_size // _NUM_SAMPLED))
    median = read_rows(used).float().norm(dim=1).median().item()
    unused = read_rows(range(vocabulary_size, max(vocabulary_size, num_rows))).float()
    if norm < 0.01 * median:
        return True, f"is untrained: its norm {norm:.3g} is near zero (median {median:.3g})"
    if len(unused) and (unused - own).norm(dim=1).min().item() < 0.01 * norm:
        return True, "is untrained: it equals a row no token uses"
    return False, f"has norm {norm:.3g} (median {median:.3g})"


def _find_matrix(
    path: str, names: tuple[str, ...], cache_dir: str | None, *, allow_pickle: bool
) -> tuple[int, RowReader] | None:
    """The number of rows of a checkpoint's matrix, and a function that reads some of them. None: not in its files.

    Raises: SettingsError: a file that cannot be read.
    """
    kinds = [("model.safetensors", _open_safetensors)]
    if allow_pickle:
        kinds.append(("pytorch_model.bin", _open_pickle))
    for file_name, open_matrix in kinds:
        index, file = _find_file(path, f"{file_name}.index.json", cache_dir), None
        if index is not None:
            shards = read_weight_map(index)
            name = _choose_name(shards, names)
            file = _find_file(path, shards[name], cache_dir) if name else None
        else:
            file = _find_file(path, file_name, cache_dir)
        if file is None:
            continue
        try:
            return open_matrix(file, names)
        except Exception as error:  # torn files: loading would say the same, later
            raise SettingsError(f"{file}: cannot be read ({error}); copy it again") from None
    return None


def _find_file(path: str, name: str, cache_dir: str | None) -> Path | None:
    try:
        found = cached_file(path, name, cache_dir=cache_dir)
    except OSError:
        return None
    return None if found is None else Path(found)


def _choose_name(stored: Any, names: tuple[str, ...]) -> str | None:
    for name in names:
        if matching := [each for each in stored if each == name or each.endswith(f".{name}")]:
            return min(matching, key=len)
    return None


def _open_safetensors(file: Path, names: tuple[str, ...]) -> tuple[int, RowReader] | None:
    with safe_open(file, "pt") as opened:
        name = _choose_name(opened.keys(), names)
        if name is None:
            return None
        num_rows = opened.get_slice(name).get_shape()[0]

    def read_rows(rows: range) -> Tensor:
        with safe_open(file, "pt") as opened:
            matrix = opened.get_slice(name)
            if rows.step == 1:
                return matrix[rows.start : rows.stop]
            return torch.cat([matrix[row : row + 1] for row in rows])

    return num_rows, read_rows


def _open_pickle(file: Path, names: tuple[str, ...]) -> tuple[int, RowReader] | None:
    state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    name = _choose_name(state, names)
    if name is None:
        return None
    matrix = state[name]
    return len(matrix), lambda rows: matrix[rows.start : rows.stop : rows.step]
