"""Models by name from ModelScope's hub: which hub is meant, what is in its cache, and downloading.

Names of the Hugging Face hub are left to transformers. Standard library only; `modelscope` is imported where it is
needed.
"""

import importlib.util
import inspect
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_utils.model_path import can_reach
from data_utils.sources import DataError

HUBS = ("huggingface", "modelscope")
SWITCH = "USE_MODELSCOPE_HUB"  # as in LLaMA-Factory
_PICKLES = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle"]
_OTHER_WEIGHTS = ["*.gguf", "*.msgpack", "*.h5", "*.onnx", "*.ot", "*.tflite"]


def choose_hub(named: str | None) -> str:
    """The hub that names belong to: --hub, or ModelScope where USE_MODELSCOPE_HUB=1, else Hugging Face's."""
    if named is not None:
        return named
    return "modelscope" if os.environ.get(SWITCH, "").strip().lower() in ("1", "true", "yes", "on") else "huggingface"


def explain_missing_on_modelscope(name: str, cache_dir: str | None = None) -> str | None:
    """Why a model cannot be had from ModelScope, as far as can be told without asking it."""
    return None if Path(name).is_dir() or find_cached_model(name, cache_dir) else _explain_no_way(name)


def _explain_no_way(name: str) -> str | None:
    if (mistake := explain_no_modelscope(name)) is not None:
        return mistake
    if not can_reach(_endpoint()):
        return (
            f"{name}: no such directory, and ModelScope cannot be reached from here; where it can: modelscope download "
            f"{name} --local_dir {name.rpartition('/')[2]}, then name that directory"
        )
    return None


def explain_no_modelscope(name: str) -> str | None:
    """One line where the package `modelscope` is not installed."""
    if importlib.util.find_spec("modelscope") is not None:
        return None
    return f"{name}: ModelScope's hub needs its package: pip install modelscope"


def fetch_model(
    name: str,
    *,
    hub: str | None,
    cache_dir: str | None = None,
    allow_pickle: bool = False,
    tokenizer_only: bool = False,
) -> str:
    """The directory of a model on ModelScope, downloaded if need be; what is no name of that hub as it is.

    hub: of the command line. allow_pickle: download .bin weights, too. tokenizer_only: no weights at all.

    Raises: DataError: no such model there, no way to it, or only pickles.
    """
    if choose_hub(hub) != "modelscope" or Path(name).exists() or name.count("/") != 1:
        return name
    cached = find_cached_model(name, cache_dir, tokenizer_only=tokenizer_only)
    if cached is not None and (explain_no_modelscope(name) or not can_reach(_endpoint())):
        return str(cached)
    if cached is None and (mistake := _explain_no_way(name)) is not None:
        raise DataError(mistake)
    ignored = [*_OTHER_WEIGHTS, *([] if allow_pickle else _PICKLES), *(["*.safetensors"] if tokenizer_only else [])]
    try:
        directory = _download(name, cache_dir, ignored)
    except Exception as error:  # whatever the library and the network may do
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{name}: cannot be downloaded from ModelScope: {line}") from None
    if not tokenizer_only and not allow_pickle and not any(Path(directory).glob("*.safetensors")):
        raise DataError(
            f"{name}: has no safetensors on ModelScope; if its weights are pickles (.bin), which can run code when "
            "they are read, and you trust them, pass --allow_pickle True"
        )
    return directory


def _download(name: str, cache_dir: str | None, ignored: list[str]) -> str:
    """Processes on one machine wait for each other: the first one downloads, the others find it done."""
    from filelock import FileLock
    from modelscope import snapshot_download

    parameters = inspect.signature(snapshot_download).parameters
    options: dict[str, Any] = {"cache_dir": cache_dir} if cache_dir else {}
    if "ignore_patterns" in parameters:
        options["ignore_patterns"] = ignored
    else:  # before modelscope 1.16: regular expressions
        options["ignore_file_pattern"] = [rf"\{pattern[1:]}$" for pattern in ignored]
    root = next(_cache_roots(cache_dir))
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f".{name.replace('/', '--')}.lock"):
        return str(snapshot_download(name, **options))


def find_cached_model(name: str, cache_dir: str | None = None, *, tokenizer_only: bool = False) -> Path | None:
    """Where ModelScope's package keeps a model that it downloaded; None where it has not, or not all of it.

    Its versions have had several layouts; in the older ones a point of a name is written as `___`.
    """
    owner, mark, own = name.partition("/")
    if not mark:
        return None
    safe = own.replace(".", "___")
    for root in _cache_roots(cache_dir):
        snapshots = root / "models" / f"{owner}--{own}" / "snapshots"
        found = [snapshots / "master", snapshots / "main", *sorted(snapshots.glob("*"))]  # since 1.38
        found += [root / folder / owner / each for folder in ("models", ".") for each in (safe, own)]
        for directory in found:
            if _is_whole(directory, tokenizer_only=tokenizer_only):
                return directory
    return None


def _is_whole(directory: Path, *, tokenizer_only: bool) -> bool:
    if not (directory / "config.json").is_file():
        return False
    if tokenizer_only:
        return any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    files = [*directory.glob("*.safetensors"), *directory.glob("*.bin")]
    for index in directory.glob("*.index.json"):
        try:
            files += [
                directory / str(file) for file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            ]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False
    return bool(files) and all(file.is_file() for file in files)


def _cache_roots(cache_dir: str | None) -> Iterator[Path]:
    """Directories that hold models/OWNER/NAME, or OWNER/NAME; the first one is where downloads go."""
    named = cache_dir or os.environ.get("MODELSCOPE_CACHE")
    bases = [named] if named else [os.path.expanduser("~/.cache/modelscope")]
    for base in map(Path, bases):
        yield base.expanduser()
        yield base.expanduser() / "hub"


def _endpoint() -> str:
    domain = os.environ.get("MODELSCOPE_DOMAIN") or "www.modelscope.cn"
    return os.environ.get("MODELSCOPE_ENDPOINT") or f"https://{domain}"
