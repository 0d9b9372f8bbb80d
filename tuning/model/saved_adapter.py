"""Saved adapters, ours and others': whether one fits a model, and giving it to the model."""

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import peft
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from tuning.errors import SettingsError, explain_bad_files
from tuning.model.loading import hide_gptqmodel
from tuning.model.lora_linear import fuse_lora_forward
from tuning.model.new_tokens import resize_for_adapter
from tuning.model.token_rows import PEFT_SUFFIX, TokenRows, is_tied

_MOVE = "_move_adapter_to_device_of_base_layer"


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter directory that was read (checkpoint.adapter.read_adapter)."""

    directory: Path
    config: LoraConfig
    state: dict[str, Tensor]


def attach_lora(
    model: PreTrainedModel, adapter: SavedAdapter, *, values: bool = False
) -> tuple[PeftModel, TokenRows | None]:
    """Give a model the adapters (and trained rows) of a saved adapter, ready to train further.

    Where the adapter has rows of new tokens, the model's vocabulary matrices are made as large.
    A model on the meta device takes no values, or those of adapters and whole matrices alone (values), in float32;
    everything else is checked with it, too.

    Raises: SettingsError: it does not fit the model.
    """
    directory, config, state = adapter.directory, copy.deepcopy(adapter.config), adapter.state
    resize_for_adapter(model, config, state)
    is_meta = model.get_input_embeddings().weight.is_meta
    row_state = {name: value for name, value in state.items() if name.endswith(PEFT_SUFFIX)}
    other_state = {name: value for name, value in state.items() if name not in row_state}
    ids = find_row_ids(model, adapter)
    rows = TokenRows(model, ids) if any(ids.values()) else None
    if odd := next(iter(row_state), None) if rows is None else None:
        raise SettingsError(f"{directory}: holds {odd}, but its configuration names no trainable_token_indices")
    config.trainable_token_indices = None
    config.inference_mode = False
    if is_meta and isinstance(config.init_lora_weights, str):
        config.init_lora_weights = False  # some look at the weights
    hide_gptqmodel()
    stays = adapters_off_meta() if values else contextlib.nullcontext()
    with (
        stays,
        explain_bad_files(f"{directory}/adapter_config.json: peft {peft.__version__} cannot apply it to this model"),
    ):
        peft_model = get_peft_model(model, config, low_cpu_mem_usage=values)
    assert isinstance(peft_model, PeftModel)
    with explain_bad_files(f"{directory}: peft {peft.__version__} cannot apply its tensors to this model"):
        # Of transformers 4 an adapter has a pair of matrices for every expert.
        other_state = convert_peft_adapter_state_dict_for_transformers(
            model=peft_model,
            peft_config=peft_model.peft_config["default"],
            adapter_state_dict=other_state,
            adapter_name="default",
        )
    if rows is not None:
        _load_rows(directory, rows, ids, row_state)
    _check_tensors(directory, peft_model, other_state)
    if is_tied(model) and any(isinstance(m, LoraLayer) for m in _vocabulary_layers(model)):
        raise SettingsError(
            f"{directory}: adapts the embedding or the output layer, which share one matrix: it could not be merged"
        )
    if not is_meta:  # else there is no storage to load values into
        set_peft_model_state_dict(peft_model, other_state)
    elif values:
        in_float32 = {name: value.float() for name, value in other_state.items()}
        with adapters_off_meta():
            set_peft_model_state_dict(peft_model, in_float32, low_cpu_mem_usage=True)
    fuse_lora_forward(peft_model)
    return peft_model, rows


@contextlib.contextmanager
def adapters_off_meta() -> Iterator[None]:
    """Inside, peft does not move an adapter to the device of its base, which is the meta device."""
    before = {kind: kind.__dict__[_MOVE] for kind in (BaseTunerLayer, ParamWrapper) if _MOVE in kind.__dict__}
    for kind in before:
        setattr(kind, _MOVE, lambda *_, **__: None)
    try:
        yield
    finally:
        for kind, function in before.items():
            setattr(kind, _MOVE, function)


def find_row_ids(model: PreTrainedModel, adapter: SavedAdapter) -> dict[str, list[int]]:
    """The token ids whose rows an adapter trained, of "embedding" and of "output"; of tied matrices "embedding" alone.

    Raises: SettingsError: ids without a row, or rows of another module.
    """
    indices, where = adapter.config.trainable_token_indices, f"{adapter.directory}: trainable_token_indices"
    ids: dict[str, list[int]] = {"embedding": [], "output": []}
    if indices is None:
        return ids
    modules = dict(zip(ids, _vocabulary_layers(model), strict=True))
    names = {part: name for part, module in modules.items() for name, m in model.named_modules() if m is module}
    by_key = indices if isinstance(indices, dict) else {names["embedding"]: indices}
    for key, values in by_key.items():
        part = next((part for part, name in names.items() if f".{name}".endswith(f".{key}")), None)
        if part is None:
            raise SettingsError(f"{where}: {key} is neither the embedding nor the output layer")
        num_rows = _num_rows(modules[part])
        if not isinstance(values, list) or not all(type(each) is int and 0 <= each < num_rows for each in values):
            raise SettingsError(f"{where}: expected a list of token ids below {num_rows:,}, the rows of {names[part]}")
        ids[part] = values
    if is_tied(model) and ids["output"]:
        if ids["output"] != ids["embedding"]:
            raise SettingsError(f"{where}: trains other rows of the output layer, which is the embedding in this model")
        ids["output"] = []
    return ids


def _load_rows(directory: Path, rows: TokenRows, ids: dict[str, list[int]], state: dict[str, Tensor]) -> None:
    """Put saved rows in their places."""
    wanted = {f"base_model.model.{rows.names[part]}.{PEFT_SUFFIX}": part for part in ids if ids[part]}
    if odd := next(iter(state.keys() ^ wanted.keys()), None):
        raise SettingsError(f"{directory}: the adapter does not fit this model: {odd}")
    for name, part in wanted.items():
        needed = [len(ids[part]), getattr(rows, part).shape[1]]
        if [*state[name].shape] != needed:
            raise SettingsError(f"{directory}: {name} has the shape {[*state[name].shape]}, {needed} is needed")
        rows.load(part, state[name])


def _check_tensors(directory: Path, peft_model: PeftModel, state: dict[str, Tensor]) -> None:
    """Raises: SettingsError: other tensors, or of other shapes, than this model takes."""
    needed = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    # peft saves whole vocabulary matrices beside an adapter where it thinks that they were changed.
    beside = get_peft_model_state_dict(peft_model, save_embedding_layers=True)
    shapes = {name: tensor.shape for name, tensor in beside.items()}
    num_rows = _num_rows(peft_model.get_input_embeddings())
    for name, tensor in state.items():
        if name not in shapes:
            raise SettingsError(f"{directory}: the adapter does not fit this model: it has {name}")
        if tensor.shape != shapes[name]:
            there, here = [*tensor.shape], [*shapes[name]]
            if there[1:] == here[1:] and here[0] == num_rows:
                raise SettingsError(
                    f"{directory}: the adapter has {there[0]:,} rows ({name}), the base model {here[0]:,}: the "
                    f"vocabulary was resized; resize the base's first (resize_token_embeddings({there[0]}))"
                )
            raise SettingsError(f"{directory}: {name} has the shape {there}, the base model needs {here}")
    if missing := needed.keys() - state.keys():
        raise SettingsError(f"{directory}: the adapter does not fit this model: it has no {min(missing)}")


def _num_rows(layer: nn.Module) -> int:
    assert isinstance(layer.weight, Tensor)
    return len(layer.weight)


def _vocabulary_layers(model: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
    return model.get_input_embeddings(), model.get_output_embeddings()
