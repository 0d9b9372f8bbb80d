"""Where a model is (a directory, or a name on the hub), and where a chat template. Standard library only."""

import os
import socket
import urllib.parse
from pathlib import Path

_SECONDS_TO_CONNECT = 3
TEMPLATES = Path(__file__).parent / "templates"


def explain_missing_model(path: str) -> str | None:
    """Why there is no model, if it can be told without asking the hub."""
    directory = Path(path)
    if directory.is_dir():
        return None
    if directory.is_file():
        return f"{path}: is a file; name the checkpoint's directory"
    # `output/run` beside a directory `output` is a path mistyped, not a hub name to look up on the network.
    looks_local = path.count("/") != 1 or path[:1] in "./~" or directory.parent.is_dir()
    return f"{path}: no such checkpoint directory, and not a hub name (owner/name)" if looks_local else None


def explain_unreachable_model(name: str, cache_dir: str | None = None) -> str | None:
    """Why a model cannot be had from the hub, if the hub cannot be reached and the model is not in its cache.

    Where it is in the cache the hub's library is told to ask no more: else it would try for a minute.
    """
    hub = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    if Path(name).is_dir() or os.environ.get("HF_HUB_OFFLINE") or can_reach(hub):
        return None
    if any((root / f"models--{name.replace('/', '--')}").is_dir() for root in _cache_roots(cache_dir)):
        os.environ["HF_HUB_OFFLINE"] = "1"
        return None
    return (
        f"{name}: no such directory, and the hub cannot be reached from here; where it can: hf download {name} "
        f"--local-dir {name.rpartition('/')[2]}, then name that directory; or set HF_ENDPOINT to a mirror "
        "(https://hf-mirror.com)"
    )


def can_reach(address: str) -> bool:
    """Whether a server answers, or a proxy may reach it."""
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True  # the proxy's to say
    server = urllib.parse.urlsplit(address)
    try:
        socket.create_connection((server.hostname or "", server.port or 443), timeout=_SECONDS_TO_CONNECT).close()
    except OSError:
        return False
    return True


def _cache_roots(cache_dir: str | None) -> list[Path]:
    """Where the hub's library keeps downloads, by its own variables."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    home = os.environ.get("HF_HOME") or os.path.join(cache, "huggingface")
    own = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or os.path.join(home, "hub")
    return [Path(root) for root in (cache_dir, own) if root]


def find_template(path: str) -> Path:
    """The file of --chat_template: the one that is named, or one that comes with the program."""
    own = TEMPLATES / f"{path}.jinja"
    return own if not Path(path).exists() and own.is_file() else Path(path)
