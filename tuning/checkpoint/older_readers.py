"""Old names beside new ones in a result's files, so that transformers 4 and what reads its names load it right.

transformers 5 renamed entries of config.json and tokenizer_config.json. Version 4 does not know the new names and
takes its defaults in silence: rope_theta 10000, no scaling, 128 experts. Version 5 reads both.
"""

import json
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING

from tuning.checkpoint.files import write_json

_TOKENIZER_CLASSES = {"TokenizersBackend": "PreTrainedTokenizerFast"}


def add_old_names(directory: Path) -> None:
    """Complete config.json and tokenizer_config.json of a directory, where it has them."""
    for name, complete in (("config.json", _complete_config), ("tokenizer_config.json", _complete_tokenizer)):
        path = directory / name
        if path.is_file():
            before = json.loads(path.read_text(encoding="utf-8"))
            if (after := complete(before)) != before:
                write_json(path, after)


def _complete_config(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration, and the text part's inside it, with their old names, too. Other parts stay as they are."""
    completed = {
        name: _complete_config(value) if name == "text_config" and isinstance(value, dict) else value
        for name, value in config.items()
    }
    if "dtype" in config:
        completed["torch_dtype"] = config["dtype"]
    for old, new in _find_renamed(config.get("model_type")).items():
        if new in config:
            completed[old] = config[new]
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        return completed
    whole, local = rope.get("full_attention", rope), rope.get("sliding_attention")
    if "rope_theta" in whole:
        completed["rope_theta"] = whole["rope_theta"]
    if local is not None and "rope_theta" in local:
        completed["rope_local_base_freq"] = local["rope_theta"]
    if "partial_rotary_factor" in whole:
        completed["partial_rotary_factor"] = whole["partial_rotary_factor"]
    scaling = {name: value for name, value in whole.items() if name not in ("rope_theta", "partial_rotary_factor")}
    completed["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling
    return completed


def _find_renamed(model_type: Any) -> dict[str, str]:
    """Other names that a kind of model has for entries of its configuration, of which one was the old name."""
    return dict(CONFIG_MAPPING[model_type].attribute_map) if model_type in CONFIG_MAPPING else {}


def _complete_tokenizer(config: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer's configuration with a class and a list of special tokens that version 4 knows."""
    kind = config.get("tokenizer_class")
    completed = {**config, "tokenizer_class": _TOKENIZER_CLASSES.get(kind, kind)} if kind else dict(config)
    if isinstance(config.get("extra_special_tokens"), list):
        completed["additional_special_tokens"] = completed.pop("extra_special_tokens")
    return completed
