"""YAML files of settings, turned into the words of a command line."""

import json
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from tuning.errors import SettingsError


class _UniqueKeys(yaml.SafeLoader):
    """YAML itself lets the last of two equal keys win in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"the key '{key}' stands twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1 reads 1e-5, without a point, as text; inside a mapping it would reach a schedule as such.
_UniqueKeys.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d[\d_]*(\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_settings_file(path: Path) -> list[str]:
    """Words of a command line: `learning_rate: 1e-4` becomes --learning_rate 1e-4.

    Lists become several words, true and false True and False, mappings JSON; null leaves a setting at its default.
    Paths are relative to the working directory, as on the command line.

    Raises: SettingsError: no such file, invalid YAML (line), no mapping.
    """
    try:
        settings = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SettingsError(f"{path}: not UTF-8") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise SettingsError(f"{path}:{line}: invalid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise SettingsError(f"{path}: invalid YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(settings, dict):
        raise SettingsError(f"{path}: expected settings, one `name: value` a line")
    words = []
    for name, value in settings.items():
        if value is not None:
            words += [f"--{name}", *_as_words(value)]
    return words


def _as_words(value: Any) -> list[str]:
    if isinstance(value, list):
        return [word for item in value for word in _as_words(item)]
    return [json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value)]
