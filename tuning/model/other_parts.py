"""Checkpoints with parts beside the language model, such as a vision tower: they are loaded whole, and frozen.

AutoModelForCausalLM would take the language model out of them, and lose the rest without a word. So they are loaded in
their own class, whose names adapters and results then have.
"""

from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def choose_auto_class(config: PretrainedConfig) -> Any:
    """Transformers' class that loads all of a checkpoint."""
    names = getattr(config, "architectures", None) or [""]
    is_whole = config.get_text_config() is config or names[0].endswith("ForCausalLM")
    if is_whole or getattr(config, "auto_map", None) or type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForCausalLM
    return AutoModelForImageTextToText


def find_other_parts(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Names and modules of the largest parts of a model that hold nothing of its language model."""
    inside = {id(p) for part in (model.get_decoder(), model.get_output_embeddings()) for p in part.parameters()}
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        parameters = list(module.parameters())
        if not parameters or f"{name}.".startswith(tuple(f"{other}." for other in found)):
            continue
        if not any(id(p) in inside for p in parameters):
            found[name] = module
    return found


def freeze_other_parts(model: PreTrainedModel) -> None:
    """Leave what is beside the language model as it is."""
    for part in find_other_parts(model).values():
        part.requires_grad_(False)
