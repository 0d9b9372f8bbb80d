"""Local task files of lm-eval, looked at before anything of them is used: which could run code is refused.

lm-eval's YAML may name Python functions (`!function file.name`), classes and metrics that are fetched as scripts.
Whoever writes such a file runs code here, and so it takes the user's word (--allow_code_execution). What is known to
hold data alone is listed; all else is refused.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tuning.errors import SettingsError

_WAY_OUT = "; it may run code: pass --allow_code_execution if you trust whoever wrote it"
_KEYS = {
    *("task", "task_alias", "tag", "group", "group_alias", "include", "aggregate_metric_list", "metadata"),
    *("dataset_path", "dataset_name", "dataset_kwargs", "training_split", "validation_split", "test_split"),
    *("fewshot_split", "fewshot_config", "num_fewshot", "description", "doc_to_text", "doc_to_target"),
    *("doc_to_choice", "target_delimiter", "fewshot_delimiter", "gen_prefix", "output_type", "metric_list"),
    *("generation_kwargs", "repeats", "filter_list"),
}


def check_task_files(directory: str) -> set[str]:
    """Look at every task file below a directory, and at what they include.

    Returns: the names of the metrics that they use: each must be one of lm-eval's own, as others are fetched and run.

    Raises: SettingsError: no such directory, no task file in it, a file that is no YAML, or that may run code.
    """
    root = Path(directory)
    if not root.is_dir():
        raise SettingsError(f"--task_path {directory}: no such directory")
    waiting = sorted(root.glob("**/*.yaml"))
    if not waiting:
        raise SettingsError(f"--task_path {directory}: no .yaml file in it")
    seen: set[Path] = set()
    metrics: set[str] = set()
    while waiting:
        path = waiting.pop()
        if path.resolve() in seen:
            continue
        seen.add(path.resolve())
        for config in _walk(_read_plain(path), path):
            waiting += _find_included(config, path, root)
            metrics |= set(_list_metrics(config, path))
    return metrics


def _read_plain(path: Path) -> dict[str, Any]:
    """A YAML file of plain values. Raises: SettingsError: it is none, or has tags, which stand for Python objects."""
    try:
        text = path.read_text(encoding="utf-8")
        tags = [event.tag for event in yaml.parse(text, yaml.SafeLoader) if getattr(event, "tag", None)]
        odd = [tag for tag in tags if not tag.startswith("tag:yaml.org,2002:") or "python" in tag]
        if odd:
            raise SettingsError(f"{path}: {odd[0]}: not a plain value{_WAY_OUT}")
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise SettingsError(f"{path}{line}: invalid YAML: {getattr(error, 'problem', None) or error}") from None
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise SettingsError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(value, dict):
        raise SettingsError(f"{path}: expected keys and values, as a task of lm-eval has")
    return value


def _walk(config: dict[str, Any], path: Path) -> Iterator[dict[str, Any]]:
    """A configuration and those inside it, as groups have them. Raises: SettingsError: an unknown key."""
    if unknown := sorted(str(key) for key in config if key not in _KEYS):
        raise SettingsError(f"{path}: {unknown[0]}: not a key of plain tasks{_WAY_OUT}")
    yield config
    members = config.get("task")
    for member in members if isinstance(members, list) else ():
        if isinstance(member, dict):
            yield from _walk(member, path)


def _find_included(config: dict[str, Any], path: Path, root: Path) -> list[Path]:
    named = config.get("include") or []
    files = [(path.parent / str(name)) for name in (named if isinstance(named, list) else [named])]
    for file in files:
        if not file.resolve().is_relative_to(root.resolve()):
            raise SettingsError(f"{path}: include: {file} is outside of {root}{_WAY_OUT}")
    return files


def _list_metrics(config: dict[str, Any], path: Path) -> Iterator[str]:
    listed = config.get("metric_list") or []
    for entry in listed if isinstance(listed, list) else [listed]:
        if not isinstance(entry, dict) or not isinstance(entry.get("metric"), str):
            raise SettingsError(f"{path}: metric_list: expected entries with the name of a metric")
        if entry.get("hf_evaluate"):
            raise SettingsError(f"{path}: metric_list: hf_evaluate: fetches a script{_WAY_OUT}")
        yield entry["metric"]
