"""The command line and YAML files, read in one pass into settings. Needs neither torch nor transformers."""

import argparse
import dataclasses
import difflib
import functools
import os
import re
import sys
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, NoReturn

from tuning.errors import SettingsError
from tuning.settings.checks import check_number, check_settings
from tuning.settings.help import print_help
from tuning.settings.meaning import Meaning, list_meanings
from tuning.settings.options import GROUPS, Settings
from tuning.settings.other_tools import describe_foreign_file, explain_name
from tuning.settings.transformers_options import LATER, OWN_LOOP, REFUSED, describe_refused
from tuning.settings.yaml_file import as_words, read_settings_file

_MADE_VOID_BY = {
    "warmup_steps": ("lr_scheduler_type",),
    "lr_scheduler_kwargs": ("lr_scheduler_type",),
    "optim_args": ("optim",),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "adam_epsilon"), ("optim",)),
}
MEANINGS: dict[str, Meaning] = {name: meaning for group in GROUPS for name, meaning in list_meanings(group).items()}


Check = Callable[[Settings], Iterable[str]]


def read_settings(argv: Sequence[str] | None = None, *checks: Check) -> Settings:
    """Read and check a command line (sys.argv without the program's name if None): [FILE.yaml] --NAME VALUE ...

    checks: further ones, which give a line for each mistake.

    Raises: SettingsError: all mistakes, a line each. SystemExit: after --help.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    file = words.pop(0) if words and words[0].endswith((".yaml", ".yml")) else None
    if any(word in ("-h", "--help", "--help-all") for word in words):
        print_help(everything="--help-all" in words)
        sys.exit(0)
    in_file = _read_file(file) if file else _Given()
    return _combine(in_file, _read_words(words), checks)


def read_mapping(settings: Mapping[str, Any], *checks: Check) -> Settings:
    """Read and check settings by name, as a YAML file would hold them. Raises: SettingsError, as read_settings."""
    return _combine(_Given(), _read_items([(name, value, "") for name, value in settings.items()]), checks)


@dataclass
class _Given:
    """What a file or a command line gives: values by name, and a line for each mistake.

    bad: names of options whose value, or whose name, is a mistake; what depends on them is not judged.
    """

    values: dict[str, Any] = field(default_factory=dict)
    mistakes: list[str] = field(default_factory=list)
    bad: set[str] = field(default_factory=set)


def _combine(in_file: _Given, flags: _Given, checks: Sequence[Check]) -> Settings:
    given = {**_without_outweighed(in_file.values, flags.values), **flags.values}
    bad = in_file.bad | flags.bad
    mistakes = [*in_file.mistakes, *flags.mistakes]
    judged = {name for name in given if name in flags.values or not _depends_on(name) & flags.values.keys()}
    model, data, lora, run = (_build(group, given) for group in GROUPS)
    settings = Settings(model, data, lora, run, frozenset(judged))
    settings.run.output_dir = _resolve_directory(settings.run.output_dir)
    if settings.lora.q_lora and "use_lora" not in given:
        settings.lora.use_lora = True
    for check in (check_settings, *checks):
        mistakes += [line for line in check(settings) if not _flags_in(line) & bad]
    missing = [name for name, default in _DEFAULTS.items() if default is dataclasses.MISSING and name not in given]
    if missing := [f"--{name}" for name in missing if name not in bad]:
        mistakes.append(f"required: {', '.join(missing)}; see --help")
    if mistakes:
        raise SettingsError("\n".join(dict.fromkeys(mistakes)))
    return settings


_DEFAULTS = {each.name: each.default for group in GROUPS for each in dataclasses.fields(group)}


def _build(group: Any, values: dict[str, Any]) -> Any:
    """A group with its values; a required one that is missing is empty until the mistakes are told."""
    names = [each.name for each in dataclasses.fields(group)]
    empty = {name: "" for name in names if _DEFAULTS[name] is dataclasses.MISSING}
    return group(**{**empty, **{name: values[name] for name in names if name in values}})


# ---- words and files ----


def _read_file(file: str) -> _Given:
    try:
        items = read_settings_file(Path(file))
    except SettingsError as error:
        return _Given(mistakes=[str(error)], bad=set(MEANINGS))
    if foreign := describe_foreign_file(file, {name: value for name, value, _ in items}):
        return _Given(mistakes=[foreign], bad=set(MEANINGS))
    return _read_items([(name, value, f"{file}:{line}: ") for name, value, line in items])


def _read_items(items: Sequence[tuple[str, Any, str]]) -> _Given:
    """Settings of a file. items: name, value, and what a mistake in it begins with."""
    given = _Given()
    for name, value, place in items:
        if value is not None:
            words = as_words(value)
            # One value is joined to its name, since it may begin with dashes.
            _read_option(given, [f"--{name}={words[0]}"] if len(words) == 1 else [f"--{name}", *words], place, value)
    return given


def _read_words(words: Sequence[str]) -> _Given:
    """Settings of a command line, option by option, so that one mistake hides no other."""
    given = _Given()
    starts = [i for i, word in enumerate(words) if re.match(r"--[A-Za-z_]", word)]
    for stray in words[: starts[0] if starts else len(words)]:
        given.mistakes.append(f"{stray}: belongs to no setting; a file of settings ends in .yaml; see --help")
    for start, end in zip(starts, [*starts[1:], len(words)], strict=False):
        _read_option(given, list(words[start:end]))
    return given


def _read_option(given: _Given, words: list[str], place: str = "", value: Any = None) -> None:
    flag, equals, rest = words[0].partition("=")
    name = flag[2:].replace("-", "_")

    def refuse(line: str) -> None:
        # In a file settings have no dashes.
        given.mistakes.append(f"{place}{re.sub(r'--(?=[a-z])', '', line)}" if place else line)

    if name not in _NAMES:
        text = " ".join([*([rest] if equals else []), *words[1:]])
        line, meant = _explain_unknown(name, text, value)
        given.bad |= meant
        if line:
            refuse(line)
        return
    option = _NAMES[name]
    try:
        found, stray = _PARSER.parse_known_args([f"--{name}{equals}{rest}", *words[1:]])
    except SettingsError as error:
        given.bad.add(option)
        refuse(str(error).replace(f"--{option}", f"--{name}", 1))
        return
    for word in stray:
        refuse(f"{word}: belongs to no setting; see --help")
    number = getattr(found, option)
    if mistake := check_number(name, number, MEANINGS[option]):
        given.bad.add(option)
        refuse(mistake)
    elif name == "warmup_ratio" and not 0 <= number < 1:
        given.bad.add(option)
        refuse(f"--warmup_ratio {number}: a share of the steps, at least 0 and below 1")
    else:
        given.values[option] = _NORMALISE[option](number) if option in _NORMALISE else number


def _explain_unknown(name: str, text: str, value: Any) -> tuple[str | None, set[str]]:
    """What to say of a name that is no option, and the options it may have meant."""
    if name in REFUSED:
        return describe_refused(name, text), set()
    if explained := explain_name(name, value):
        return explained
    guesses = [known for known in sorted(_NAMES) if len(name) > 3 and known.startswith(name)]
    guesses = guesses or difflib.get_close_matches(name, _NAMES, n=1, cutoff=0.8)
    hint = f"did you mean --{guesses[0]}?" if guesses else "see --help"
    return f"--{name}: unknown setting; {hint}", {_NAMES[guess] for guess in guesses[:1]}


# ---- one option ----


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # "argument --NAME: VALUE: must be ..." of the readers below, or argparse's own "argument --NAME: invalid ..."
        line = message.removeprefix("argument ")
        raise SettingsError(re.sub(r"^(--\w+): (?!invalid |expected )(.*?): ", r"\1 \2: ", line))


def _build_parser() -> tuple[_Parser, dict[str, str]]:
    """Argparse with every option, and the options by all their names."""
    parser = _Parser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    names = {}
    for group in GROUPS:
        kinds = typing.get_type_hints(group)
        for each in dataclasses.fields(group):
            own = [each.name, *MEANINGS[each.name].aliases, *(["warmup_ratio"] if each.name == "warmup_steps" else [])]
            for name in own:
                names[name] = each.name
                options = _describe_type(kinds[each.name], MEANINGS[each.name].choices)
                parser.add_argument(f"--{name}", dest=each.name, **options)
            if each.default is True:
                names[f"no_{each.name}"] = each.name
                parser.add_argument(f"--no_{each.name}", dest=each.name, action="store_false")
    return parser, names


def _describe_type(kind: Any, choices: tuple[str, ...]) -> dict[str, Any]:
    """Argparse's description of a plain type, a Literal, a list, a bool or word, or one of them or None."""
    kinds = [each for each in typing.get_args(kind) if each is not type(None)] if _is_union(kind) else [kind]
    words = [word for each in kinds if typing.get_origin(each) is typing.Literal for word in typing.get_args(each)]
    if bool in kinds:
        return {"nargs": "?", "const": True, "type": functools.partial(_read_bool, words)}
    if typing.get_origin(kinds[0]) is list:
        return {"nargs": "+"}
    chosen = tuple(words) or choices
    return {"type": functools.partial(_read_choice, chosen)} if chosen else {"type": kinds[0]}


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (UnionType, typing.Union)


def _read_choice(choices: Sequence[str], text: str) -> str:
    if text in choices:
        return text
    if why := next((why for part, why in _LEFT_OUT.items() if part in text), None):
        raise argparse.ArgumentTypeError(f"{text}: {why}")
    guesses = difflib.get_close_matches(text, choices, n=1)
    hint = f"; did you mean {guesses[0]}?" if guesses else ""
    raise argparse.ArgumentTypeError(f"{text}: must be {_join(choices)}{hint}")


def _join(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"


def _read_bool(words: list[str], text: str) -> bool | str:
    if text.lower() in ("true", "yes", "t", "y", "1"):
        return True
    if text.lower() in ("false", "no", "f", "n", "0"):
        return False
    if text.lower() in words:
        return text.lower()
    raise argparse.ArgumentTypeError(f"{text}: must be {_join(['True', 'False', *words])}")


def _read_targets(words: list[str]) -> Any:
    """--lora_target_modules: names, also with commas between; one word that is no name is a regular expression."""
    if words in (["all-linear"], ["all"]):
        return None  # every linear layer but the output
    if len(words) == 1 and not re.fullmatch(r"[\w.,\s-]+", words[0]):
        return words[0]
    return [name for word in words for name in re.split(r"[,\s]+", word) if name]


# What transformers has, but cannot be taken here.
_LEFT_OUT = {
    **dict.fromkeys(("layerwise", "lomo"), f"steps inside the backward pass; {OWN_LOOP}"),
    **dict.fromkeys(("schedule_free", "reduce_lr_on_plateau", "greedy"), LATER),
}
_PARSER, _NAMES = _build_parser()
_NORMALISE: dict[str, Callable[[list[str]], Any]] = {
    "map": lambda words: [pair for word in words for pair in word.split(",") if pair],
    "lora_target_modules": _read_targets,
    "report_to": lambda words: [] if words == ["none"] else words,
}


# ---- a flag and the file ----


def _without_outweighed(in_file: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
    """The file's values but the length of the run where a flag says it otherwise: of the two, steps would win."""
    lengths = {"max_steps", "num_train_epochs"}
    return {name: value for name, value in in_file.items() if name not in lengths or not lengths & flags.keys()}


def _depends_on(name: str) -> set[str]:
    """Options whose value can make this one void. A flag that does so to a value of the file is no mistake."""
    needs = MEANINGS[name].needs or ""
    return {*(_MADE_VOID_BY.get(name, ())), *needs.split()[:1]} | (
        {"lora_weight_path"} if needs == "use_lora" else set()
    )


def _flags_in(line: str) -> set[str]:
    return set(re.findall(r"--(\w+)", line))


def _resolve_directory(path: str) -> str:
    # As the system resolves it: without links, `link/..` is not the directory that holds the link.
    leaves = ".." in Path(path).parts
    return (os.path.realpath if leaves else os.path.normpath)(path) if path else ""
