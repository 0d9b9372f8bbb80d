"""YAML files of settings: names, values, lines."""

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


def read_settings_file(path: Path) -> list[tuple[str, Any, int]]:
    """Name, value and line of every setting. Paths are relative to the working directory, as on the command line.

    Raises: SettingsError: no such file, invalid YAML (line), no mapping.
    """
    try:
        loader = _UniqueKeys(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        settings = None if node is None else loader.construct_document(node)
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SettingsError(f"{path}: not UTF-8") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise SettingsError(f"{path}:{line}: invalid YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: dates and numbers that are none
        raise SettingsError(f"{path}: invalid YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(node, yaml.MappingNode) or not isinstance(settings, dict):
        raise SettingsError(f"{path}: expected settings, one `name: value` a line")
    lines = {str(loader.construct_object(key, deep=True)): key.start_mark.line + 1 for key, _ in node.value}
    return [(str(name), value, lines.get(str(name), 1)) for name, value in settings.items()]


def as_words(value: Any) -> list[str]:
    """The words of a command line that say the same: of a list each item, of a mapping JSON."""
    if isinstance(value, list | tuple):
        return [word for item in value for word in as_words(item)]
    return [json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, dict) else str(value)]
