"""Where a model is (a directory, or a name on the hub), and where a chat template. Standard library only."""

from pathlib import Path

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


def find_template(path: str) -> Path:
    """The file of --chat_template: the one that is named, or one that comes with the program."""
    own = TEMPLATES / f"{path}.jinja"
    return own if not Path(path).exists() and own.is_file() else Path(path)
