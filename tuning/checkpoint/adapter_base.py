"""What belongs to an adapter: its base model, what that was quantised with, its tokenizer."""

import shutil
from pathlib import Path

from tuning.checkpoint.adapter import (
    check_adapter_base,
    find_trained_quantization,
    read_adapter,
    read_adapter_config,
)
from tuning.checkpoint.base_tensors import BaseTensors
from tuning.checkpoint.manifest import MANIFEST_FILE
from tuning.checkpoint.older_readers import add_old_names
from tuning.errors import SettingsError, explain_bad_files, read_json_object
from tuning.model.loading import Trust, find_quantization, identify_checkpoint, local_directory
from tuning.model.quantization import Quantization

_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("vocab.txt", "merges.txt", "*.model", "*.tiktoken", "chat_template.jinja", "chat_template.json"),
    *("additional_chat_templates/*.jinja", "preprocessor_config.json", "processor_config.json"),
)


def find_base(adapter: Path, base: str | None, cache_dir: str | None, *, other: bool = False) -> Path:
    """Directory of the base model: the one named, or the one the adapter names.

    other: it may be another one than the adapter was trained on.

    Raises: SettingsError: no adapter there, or no base.
    """
    config = read_adapter_config(adapter)
    named = base or config.base_model_name_or_path
    if not named:
        raise SettingsError(f"{adapter}: does not say which base model it belongs to; name it with --base")
    try:
        directory = local_directory(named, cache_dir, None if base else config.revision)
    except (OSError, ValueError):
        raise SettingsError(f"{named}: no such model (the adapter's base model); name it with --base") from None
    if not (directory / "config.json").is_file():
        raise SettingsError(f"{directory}: no config.json, so no model; name the adapter's base model with --base")
    if not other:
        check_adapter_base(adapter, identify_checkpoint(str(directory))["fingerprint"])
    return directory


def choose_onto(
    adapter: Path, onto: str | None, base: str | None, cache_dir: str | None, *, trust: Trust
) -> Quantization | None:
    """Quantisation of the model that the adapter was trained on, after checking --onto; None if it was not quantised.

    onto: of the command line, "dequantized", "base" or None.

    Raises: SettingsError: onto has no effect, or the unquantised base is not known.
    """
    trained = find_trained_quantization(adapter)
    if trained is None and not (adapter / MANIFEST_FILE).is_file():  # a plain peft adapter: its base says it
        for name in filter(None, (read_adapter_config(adapter).base_model_name_or_path, base)):
            trained = trained or find_quantization(
                str(name), cache_dir=cache_dir, trust_remote_code=trust.trust_remote_code
            )
    if trained is None and onto is not None:
        raise SettingsError(f"--onto {onto}: has no effect; {adapter} was not trained on a quantised model")
    if onto == "base" and trained is not None and trained.dtype is None and base is None:
        raise SettingsError(
            f"--onto base: {adapter} was trained on a checkpoint that is quantised itself; name the unquantised model "
            "with --base"
        )
    return trained


def changes_nothing(adapter: Path) -> bool:
    """Whether an adapter is as fresh ones are: every B is zero, and nothing else was trained."""
    state = read_adapter(adapter).state
    trained = [tensor for name, tensor in state.items() if "lora_A" not in name and "lora_embedding_A" not in name]
    return bool(trained) and all("lora_" in name for name in state) and not any(bool(t.any()) for t in trained)


def tokenizer_source(adapter: Path, base: Path) -> Path:
    """Where the tokenizer comes from: the adapter's directory, or the base's for a plain peft adapter."""
    return adapter if (adapter / "tokenizer_config.json").is_file() else base


def copy_tokenizer(source: Path, out: Path) -> None:
    """Copy the tokenizer's files and its chat templates as they are, and nothing else."""
    for pattern in _TOKENIZER_FILES:
        for file in source.glob(pattern):
            (out / file.relative_to(source)).parent.mkdir(exist_ok=True)
            shutil.copy2(file, out / file.relative_to(source))
    add_old_names(out)


def check_same_template(first: Path, other: Path) -> None:
    """Raises: SettingsError: two adapters to be added up were trained with different chat templates."""
    templates = [path / "chat_template.jinja" for path in (first, other)]
    texts = [path.read_text(encoding="utf-8") if path.is_file() else None for path in templates]
    if None not in texts and texts[0] != texts[1]:
        raise SettingsError(f"{other}: was trained with another chat template than {first}; they cannot be added up")


def check_same_tokens(first: Path, other: Path) -> None:
    """Raises: SettingsError: two adapters to be added up have different tokens at one id."""
    tokens = [_read_added_tokens(path) for path in (first, other)]
    if differing := sorted(i for i in tokens[0].keys() & tokens[1].keys() if tokens[0][i] != tokens[1][i]):
        names = [each[differing[0]] for each in tokens]
        raise SettingsError(
            f"{other}: token {differing[0]} is {names[1]!r}, in {first} {names[0]!r}; they cannot be added up"
        )


def _read_added_tokens(adapter: Path) -> dict[int, str]:
    path = adapter / "tokenizer.json"
    with explain_bad_files(f"{path}: cannot be read; copy it again"):
        added = read_json_object(path).get("added_tokens") or [] if path.is_file() else []
        return {token["id"]: token["content"] for token in added}


def check_same_base(adapter: Path, own: Path, base: Path) -> None:
    """Raises: SettingsError: an adapter to be added up belongs to another base model. own: its base."""
    if own != base and len({identify_checkpoint(str(path))["fingerprint"] for path in (own, base)}) > 1:
        raise SettingsError(
            f"{adapter}: belongs to another base model ({own}) than the first adapter ({base}); they cannot be added up"
        )


def check_same_origin(base: BaseTensors, trained_on: BaseTensors) -> None:
    """Raises: SettingsError: a quantised checkpoint was not made from this unquantised one, by some of its layers."""
    names = [name for name in trained_on.names() if trained_on.is_quantized(name)]
    for name in names[:: max(1, len(names) // 4)]:
        dequantized = trained_on.read(name)
        same = name in base and base.shape(name) == dequantized.shape
        if not same or (base.read(name) - dequantized).norm() > 0.5 * dequantized.norm():
            raise SettingsError(
                f"--base {base.directory}: {trained_on.directory} was not made from it ({name} is another)"
            )
