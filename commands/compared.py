"""Which models are compared, in which order. No torch."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from commands.model_flags import find_named_model
from tuning.errors import SettingsError, read_json_object


@dataclass(frozen=True)
class Column:
    """One model of the table.

    name: as it is shown. args: that loading.load_answering takes. is_base: the base inside the adapter of args.
    """

    name: str
    args: argparse.Namespace
    is_base: bool = False


@dataclass(frozen=True)
class Bound:
    """What the last model must keep: the least value of a metric, or the largest (is_least false)."""

    metric: str
    value: float
    is_least: bool

    def describe(self) -> str:
        """As on the command line."""
        return f"--fail_{'below' if self.is_least else 'above'} {self.metric}={self.value:g}"


def find_columns(args: argparse.Namespace) -> list[Column]:
    """The models of args.models in their order, and before them the bases of adapters that are not named themselves.

    Raises: SettingsError: one that is not there, is named twice, or flags that contradict them. DataError: a download
    that failed.
    """
    words: list[str] = args.models
    if twice := [word for word in words if words.count(word) > 1]:
        raise SettingsError(f"{twice[0]}: named twice")
    adapters = [word for word in words if (Path(word) / "adapter_config.json").is_file()]
    if args.base and not adapters:
        raise SettingsError(f"--base {args.base}: has no effect, as no adapter is named")
    bases: dict[str, Column] = {}
    named: list[Column] = []
    names = _shorten([*words, *filter(None, map(_find_base, adapters)), *filter(None, [args.base])])
    for word in words:
        one = argparse.Namespace(**{**vars(args), "model": word, "base": args.base if word in adapters else None})
        find_named_model(one)
        named.append(Column(names[word], one))
        base = (args.base or _find_base(word)) if word in adapters else None
        if base and not any(_is_same(base, other) for other in words):
            bases.setdefault(base, Column(names[base], one, is_base=True))
    return [*bases.values(), *named]


def _find_base(adapter: str) -> str | None:
    name = read_json_object(Path(adapter) / "adapter_config.json").get("base_model_name_or_path")
    return name if isinstance(name, str) and name else None


def _is_same(first: str, second: str) -> bool:
    return first == second or (Path(first).is_dir() and Path(first).resolve() == Path(second).resolve())


def _shorten(words: Sequence[str]) -> dict[str, str]:
    """The last part of each path where that tells them apart, else all of it."""
    tails = {word: Path(word).name or word for word in words}
    return {word: tail if list(tails.values()).count(tail) == 1 else word for word, tail in tails.items()}
