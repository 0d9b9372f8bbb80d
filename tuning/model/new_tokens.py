"""Rows for new tokens: larger vocabulary matrices, and what the rows begin with.

A base checkpoint's matrices have V rows. New tokens beyond them need more: N, the next multiple of 64 (matrices that
have spare rows stay as they are). The row of a new token begins as the mean of the rows of the pieces that its text was
made of, in the embedding and in the output layer alike. All other added rows are zero, as they belong to no token. So
the larger matrices follow from the base and N alone: an adapter holds the trained rows (or whole matrices), and whoever
merges it appends zeros to the base's matrices and writes those in.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tuning.errors import SettingsError
from tuning.model.token_rows import find_module_name, is_tied

_MULTIPLE = 64


@dataclass(frozen=True)
class NewTokens:
    """Tokens that were added to the tokenizer. ids: theirs. pieces: for each the ids that its text had before."""

    ids: tuple[int, ...]
    pieces: tuple[tuple[int, ...], ...]


def count_rows(num_rows: int, largest_id: int) -> int:
    """Rows that a matrix of num_rows must have for a token id: as many, or the next multiple of 64."""
    return num_rows if largest_id < num_rows else (largest_id // _MULTIPLE + 1) * _MULTIPLE


def append_rows(matrix: Tensor, num_rows: int) -> Tensor:
    """The larger matrix [N, H] of a base's matrix [V, H] (or bias [V]): zeros behind its rows."""
    if num_rows <= len(matrix):
        return matrix
    larger = matrix.new_zeros(num_rows, *matrix.shape[1:])
    larger[: len(matrix)] = matrix
    return larger


@torch.no_grad()
def resize_model(model: PreTrainedModel, num_rows: int) -> None:
    """Give a model matrices of num_rows rows, if they have fewer; tied ones stay tied. Also on the meta device.

    Raises: SettingsError: a model with other tables of tokens beside these.
    """
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    before = len(embedding.weight)
    if num_rows <= before:
        return
    _check_no_other_table(model, before)
    tied = is_tied(model)
    for layer, size in ((embedding, "num_embeddings"), (output, "out_features")):
        if not isinstance(layer.weight, Tensor) or len(layer.weight) != before or layer.weight.dtype.itemsize < 2:
            raise SettingsError(
                f"--add_special_tokens: {type(model).__name__} keeps its table of tokens ({type(layer).__name__}) in a "
                "form that cannot be resized"
            )
        if layer is output and tied:
            layer.weight = embedding.weight
        else:
            layer.weight = nn.Parameter(append_rows(layer.weight.data, num_rows), layer.weight.requires_grad)
        if isinstance(bias := getattr(layer, "bias", None), nn.Parameter):
            layer.bias = nn.Parameter(append_rows(bias.data, num_rows), bias.requires_grad)
        setattr(layer, size, num_rows)
    for config in (model.config, model.config.get_text_config()):
        if getattr(config, "vocab_size", None) == before:
            config.vocab_size = num_rows
    for module in model.modules():  # classes keep a copy for their own loss
        if getattr(module, "vocab_size", None) == before:
            module.vocab_size = num_rows


def _check_no_other_table(model: PreTrainedModel, num_rows: int) -> None:
    own = {id(layer.weight) for layer in (model.get_input_embeddings(), model.get_output_embeddings())}
    for name, module in model.named_modules():
        weight: Any = getattr(module, "weight", None)
        positions = any(word in name for word in ("position", "wpe"))
        if isinstance(module, nn.Embedding) and id(weight) not in own and len(weight) >= num_rows and not positions:
            raise SettingsError(
                f"--add_special_tokens: {type(model).__name__} has a second table of tokens ({name}), which cannot be "
                "resized"
            )


@torch.no_grad()
def add_rows(model: PreTrainedModel, new: NewTokens) -> None:
    """Give new tokens their rows: matrices that are large enough, and means of the rows of what they were made of."""
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    resize_model(model, count_rows(len(embedding.weight), max(new.ids)))
    layers = [embedding] if is_tied(model) else [embedding, output]
    for layer in layers:
        weight = layer.weight
        if weight.is_meta:
            continue
        means = [weight[list(pieces)].float().mean(0) for pieces in new.pieces]
        for token_id, mean in zip(new.ids, means, strict=True):
            weight[token_id] = mean.to(weight)
    if isinstance(bias := getattr(output, "bias", None), Tensor) and not bias.is_meta:
        for token_id, pieces in zip(new.ids, new.pieces, strict=True):
            bias[token_id] = bias[list(pieces)].float().mean().to(bias)


def resize_for_adapter(model: PreTrainedModel, config: Any, state: Mapping[str, Tensor]) -> None:
    """Give a base the rows that an adapter was trained on with new tokens, where the adapter has all of them.

    It has them where it holds the rows of both matrices without a gap from the base's last one on, or both matrices
    whole. Others are refused where they are read (saved_adapter), as nothing says what is missing. Does nothing where
    the base is large enough.

    config, state: the adapter's LoraConfig and tensors.
    """
    num_rows, tied = len(model.get_input_embeddings().weight), is_tied(model)
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    names = [find_module_name(model, layer).rpartition(".")[2] for layer in layers]
    kept = set(config.modules_to_save or ())
    is_whole = names[0] in kept and (tied or names[1] in kept)
    needed = _find_whole_rows(state, names, num_rows) if is_whole else _find_rows(config, num_rows, tied=tied)
    if needed is not None:
        resize_model(model, needed)


def _find_rows(config: Any, num_rows: int, *, tied: bool) -> int | None:
    """Rows that a base needs for an adapter's token rows; None where they are not all of the new ones."""
    indices = config.trainable_token_indices
    by_matrix = list(indices.values()) if isinstance(indices, dict) else [indices]
    if not all(isinstance(ids, list) and all(type(each) is int for each in ids) for ids in by_matrix):
        return None
    beyond = [sorted(each for each in ids if each >= num_rows) for ids in by_matrix]
    without_gap = all(ids == list(range(num_rows, num_rows + len(ids))) and ids == beyond[0] for ids in beyond)
    if not beyond or not beyond[0] or not without_gap or len(beyond) < (1 if tied else 2):
        return None
    return count_rows(num_rows, beyond[0][-1])


def _find_whole_rows(state: Mapping[str, Tensor], names: list[str], num_rows: int) -> int | None:
    """Rows of both matrices in an adapter, where they have more than the base's."""
    sizes = [
        len(tensor)
        for name, tensor in state.items()
        if tensor.ndim == 2 and name.split(".")[-2:] in ([each, "weight"] for each in names) and len(tensor) > num_rows
    ]
    return sizes[0] if len(sizes) == 2 and sizes[0] == sizes[1] else None
