"""Tools that run here: the public functions of a Python file, described to the model by their docstrings."""

import importlib.util
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers.utils import get_json_schema

from tuning.errors import SettingsError


def load_functions(path: str) -> dict[str, Callable[..., Any]]:
    """Run a Python file. Returns: the functions that it defines, but for those with _ before their names.

    Raises: SettingsError: no such file, none in it, or it fails.
    """
    spec = importlib.util.spec_from_file_location("tool_module", path)
    if spec is None or spec.loader is None or not Path(path).is_file():
        raise SettingsError(f"{path}: expected a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever its author wrote; sys.exit() would end this program, silently
        raise SettingsError(f"{path}: {type(error).__name__}: {' '.join(str(error).split())}") from None
    found: dict[str, Callable[..., Any]] = {
        name: function
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == "tool_module" and not name.startswith("_")
    }
    if not found:
        raise SettingsError(f"{path}: no functions in it")
    return found


def describe_functions(path: str, functions: dict[str, Callable[..., Any]]) -> list[dict[str, Any]]:
    """Their descriptions as a model gets them, in OpenAI's form.

    Raises: SettingsError: a function without docstring or types.
    """
    tools = []
    for name, function in functions.items():
        try:
            tools.append(get_json_schema(function))
        except Exception as error:  # its own exceptions, and jinja's and re's
            line = " ".join(str(error).split())
            raise SettingsError(f"{path}: {name}: {line}; it needs types, and a docstring with Args") from None
    return tools


def call_function(function: Callable[..., Any], arguments: dict[str, Any]) -> str:
    """What a function returns, as text for the model; of one that fails, its error."""
    try:
        result = function(**arguments)
        return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)
    except (Exception, SystemExit) as error:
        return f"error: {type(error).__name__}: {error}"
