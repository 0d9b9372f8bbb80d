"""Original Qwen checkpoints in every script: converted once into the user's cache, and loaded from there.

A conversion is named by the original's name and by a hash of what it follows from. It is complete with its manifest,
which is written last; who makes one holds its lock, and who comes later waits for that.
"""

import argparse
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from commands.convert import write_conversion
from data_utils.cache import default_root
from data_utils.qwen_tiktoken import VOCABULARY_FILE
from tuning.checkpoint.manifest import read_manifest, write_manifest
from tuning.checkpoint.original_qwen import is_original_qwen
from tuning.checkpoint.ownership import new_result
from tuning.console import say
from tuning.distributed.processes import on_all_ranks
from tuning.errors import SettingsError, explain_bad_files, read_json_object
from tuning.model.loading import identify_checkpoint, local_directory

if TYPE_CHECKING:  # peft takes a second, which chat.py need not wait for
    from tuning.checkpoint.base import BaseModel
    from tuning.settings.arguments import Arguments

_VERSION = 1  # of what is written; another one converts anew
_NEEDED = ("*.json", "*.safetensors", "*.tiktoken")  # of a hub repository
_DESCRIBING = ("config.json", "generation_config.json", "quantize_config.json", VOCABULARY_FILE)


@dataclass(frozen=True)
class Found:
    """Where a model is loaded from: its conversion's directory. name, revision: of the original, for records."""

    directory: str
    name: str
    revision: str | None
    seq_length: int | None


def find_loadable(
    path: str,
    cache_dir: str | None = None,
    *,
    allow_pickle: bool = False,
    say: Callable[[str], None] = say,
) -> str:
    """PATH as it is, or of an original Qwen checkpoint the directory of its conversion, which is made if need be.

    path: directory or hub name. say: takes the line that tells of a conversion.

    Raises: DataError, SettingsError: a checkpoint that cannot be converted. MachineError: no room for it.
    """
    found = _find(path, cache_dir, allow_pickle=allow_pickle, say=say)
    return path if found is None else found.directory


def find_loadable_base(
    adapter: Path, named: str | None, args: argparse.Namespace, say: Callable[[str], None] = say
) -> str | None:
    """What to name as an adapter's base: `named` as it is, or the conversion of an original Qwen checkpoint.

    named: of --base; None: the base that the adapter names, and None again where that is no original Qwen. args: of the
    script, which may have cache_dir and allow_pickle.

    Raises: as find_loadable.
    """
    from tuning.checkpoint.adapter import read_adapter_config

    config = read_adapter_config(adapter)
    path, revision = (named, None) if named else (config.base_model_name_or_path, config.revision)
    if not path:
        return named
    cache_dir, allow_pickle = getattr(args, "cache_dir", None), getattr(args, "allow_pickle", False)
    found = _find(str(path), cache_dir, revision=revision, allow_pickle=allow_pickle, say=say)
    return named if found is None else found.directory


def find_training_model(arguments: "Arguments") -> "tuple[Arguments, Callable[[BaseModel], BaseModel]]":
    """The arguments with the directory to load from, and what gives a base the original's name, for its records.

    One process of each machine converts, the others find it done. All processes must call this.

    Raises: as find_loadable.
    """
    model = arguments.model

    def find() -> Found | None:
        return _find(model.model_name_or_path, model.cache_dir, allow_pickle=model.allow_pickle)

    is_first = int(os.environ.get("LOCAL_RANK", "0")) == 0
    first = on_all_ranks(lambda: find() if is_first else None)
    found = on_all_ranks(lambda: first if is_first else find())
    if found is None:
        return arguments, lambda base: base
    length = arguments.data.model_max_length
    if found.seq_length is not None and length > found.seq_length:
        say(
            f"warning: --model_max_length {length}: {found.name} was made for {found.seq_length} tokens (seq_length); "
            "what is longer is not computed as the original does it (docs/original-qwen.md)"
        )
    given = replace(arguments, model=replace(model, model_name_or_path=found.directory))
    return given, lambda base: replace(base, name=found.name, revision=found.revision)


def _find(
    path: str,
    cache_dir: str | None,
    *,
    revision: str | None = None,
    allow_pickle: bool = False,
    say: Callable[[str], None] = say,
) -> Found | None:
    """The conversion of an original Qwen checkpoint; None of anything else, which whoever loads it names."""
    try:
        directory = local_directory(path, cache_dir, revision)
    except (OSError, ValueError):
        return None
    if not is_original_qwen(directory):
        return None
    if Path(path).is_dir():
        name, revision = str(directory), None
    else:
        name, revision = path, directory.name  # snapshots/COMMIT
        directory = _download(path, cache_dir, revision)
    converted = _convert_once(directory, path, cache_dir, allow_pickle=allow_pickle, say=say)
    return Found(str(converted), name, revision, read_json_object(directory / "config.json").get("seq_length"))


def _download(name: str, cache_dir: str | None, revision: str) -> Path:
    """The directory of a hub repository with all that is converted."""
    from huggingface_hub import snapshot_download

    with explain_bad_files(f"{name}: cannot be downloaded"):
        return Path(snapshot_download(name, revision=revision, cache_dir=cache_dir, allow_patterns=list(_NEEDED)))


def _convert_once(
    source: Path, path: str, cache_dir: str | None, *, allow_pickle: bool, say: Callable[[str], None]
) -> Path:
    """The directory of a conversion, made if it is not there. path: the original as the user names it."""
    root = default_root(cache_dir, "converted")
    way_out = "use another --cache_dir, or python -m tuning.convert"
    if root is None:
        raise SettingsError(f"{path}: an original Qwen checkpoint, and no home directory to convert it in; {way_out}")
    out = root / f"{Path(path).resolve().name}-{_hash_source(source)}"
    if _is_complete(out):
        say(f"{path}: an original Qwen checkpoint; its conversion is {out}")
        return out
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{out}.lock")
        lock.acquire()
    except OSError as error:
        raise SettingsError(f"{root}: cannot keep converted checkpoints here ({error.strerror}); {way_out}") from None
    try:
        if not _is_complete(out):  # still, now that nobody else makes it
            say(f"{path}: an original Qwen checkpoint; converted once, to {out}")
            with new_result(out) as unfinished:
                write_conversion(source, unfinished, allow_pickle=allow_pickle)
                write_manifest(unfinished, converted_from=str(source))
    finally:
        lock.release()
    return out


def _hash_source(source: Path) -> str:
    """A name for what a conversion follows from."""
    digest = hashlib.sha256(f"{_VERSION} {identify_checkpoint(str(source))['fingerprint']}".encode())
    for name in _DESCRIBING:
        if (source / name).is_file():
            digest.update(name.encode() + hashlib.sha256((source / name).read_bytes()).digest())
    return digest.hexdigest()[:16]


def _is_complete(out: Path) -> bool:
    """Whether a conversion is whole: its manifest is there, and its files have the sizes that this says."""
    try:
        files = read_manifest(out)["files"]
        return all((out / name).stat().st_size == saved["bytes"] for name, saved in files.items())
    except (OSError, ValueError, KeyError):
        return False
