"""What comes with a model and could run code: looked for before a library is handed the directory."""

import json
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from tuning.errors import SettingsError, read_json_object

_COPIED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)


def check_no_kernel(path: str, config: Any) -> None:
    """Raises: SettingsError: the configuration asks for attention code from the hub."""
    wanted = getattr(config, "_attn_implementation", None)
    if "/" in json.dumps(wanted, default=str):
        raise SettingsError(
            f"{path}: config.json: attn_implementation {wanted!r} is code from the hub, which does not run without "
            "--trust_remote_code; take the entry out"
        )


def check_no_pickle(path: str, config: Any, cache_dir: str | None) -> None:
    """Raises: SettingsError: the weights are pickles, or a list of safetensors names some."""
    explicit = getattr(config, "transformers_weights", None)
    names = ["model.safetensors.index.json", *([explicit] if explicit else [])]
    if explicit and not str(explicit).endswith((".safetensors", ".safetensors.index.json")):
        raise SettingsError(f"{path}: config.json: transformers_weights {explicit!r} is no safetensors file")
    for name in names:
        index = _find(path, str(name), cache_dir) if str(name).endswith(".json") else None
        for file in () if index is None else _read_shards(index):
            if not file.endswith(".safetensors"):
                raise SettingsError(
                    f"{index}: names {file}, which is no safetensors file; pickles can run code when they are read: "
                    "if you trust them, pass --allow_pickle True"
                )
    safetensors = any(_find(path, name, cache_dir) for name in (*names, "model.safetensors"))
    pickles = [_find(path, f"pytorch_model.bin{end}", cache_dir) for end in ("", ".index.json")]
    if not safetensors and any(pickles):
        raise SettingsError(
            f"{path}: its weights are pickles (.bin), which can run code when they are read: if you trust them, pass "
            "--allow_pickle True"
        )


def copy_without_code(source: Path, copy: Path) -> None:
    """Make a directory with a model's configuration and safetensors, and nothing in it that a library would run.

    Weights are links. Libraries look for code in *.py files and under auto_map, at any depth.
    """
    copy.mkdir()
    for name in _COPIED:
        if (source / name).is_file():
            values = read_json_object(source / name)
            (copy / name).write_text(json.dumps(_without_code(values), ensure_ascii=False), encoding="utf-8")
    for file in [*source.glob("*.safetensors"), *source.glob("*.safetensors.index.json")]:
        (copy / file.name).symlink_to(file.resolve())


def _without_code(values: Any) -> Any:
    if isinstance(values, list):
        return [_without_code(value) for value in values]
    if not isinstance(values, dict):
        return values
    return {key: _without_code(value) for key, value in values.items() if key not in ("auto_map", "custom_pipelines")}


def _find(path: str, name: str, cache_dir: str | None) -> Path | None:
    try:
        found = cached_file(path, name, cache_dir=cache_dir)
    except OSError:
        return None
    return None if found is None else Path(found)


def _read_shards(index: Path) -> list[str]:
    """Raises: SettingsError: not a list of weights files."""
    return sorted(set(read_weight_map(index).values()))


def read_weight_map(index: Path) -> dict[str, str]:
    """File of each tensor, by the index of a checkpoint in several files. Raises: SettingsError: it is no such list."""
    files = read_json_object(index).get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(file, str) for file in files.values()):
        raise SettingsError(f"{index}: is not a list of weights files; copy it again")
    return files
