"""Tasks of EleutherAI's lm-eval, with the chat template and the stop tokens of training."""

import contextlib
import difflib
import importlib
import logging
import math
import os
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from inference.chat_model import ChatModel
from inference.estimates import Estimate, Plain, Value, estimate_mean
from tuning.errors import SettingsError, explain_bad_files

_SEED = 1234  # lm-eval's own: the solved examples of a prompt are the same for all models


class Tasks:
    """Tasks and groups of tasks by their names, with their data sets.

    task_path: directory of local task files. metrics: that those use, when they may not run code. dataset_dir: where
    data sets are looked up by their names before the hub. allow_code: tasks may run code.

    Raises: SettingsError: a name that is not known, a data set that cannot be had, a task that would run code.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        task_path: str | None,
        metrics: set[str] | None,
        dataset_dir: str | None,
        allow_code: bool,
        num_fewshot: int | None,
        limit: int | None,
    ):
        manager = _import_manager(allow_code)
        self._allow_code, self._limit = allow_code, limit
        if metrics:
            _check_metrics(metrics)
        index = _find_index(manager, names, task_path)
        loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
        self._leaves: dict[str, list[str]] = {}  # of each name: the tasks that it stands for
        for name in names:
            if not allow_code and (unsafe := _find_unsafe(index.task_index, name)):
                raise SettingsError(f"--tasks {name}: {unsafe} runs code that the model writes; --allow_code_execution")
            place = contextlib.chdir(dataset_dir) if dataset_dir else contextlib.nullcontext()
            with (
                place,
                explain_bad_files(
                    f"--tasks {name}: cannot be loaded with its data set (of the hub, or in --dataset_dir)"
                ),
            ):
                found = index.load([name])
            for kind in loaded:
                loaded[kind] |= found.get(kind, {})
            names_shown = [name] if name in found["groups"] or name in found["tasks"] else list(found["tasks"])
            for shown in names_shown:
                group = found["groups"].get(shown)
                tasks = group.get_all_tasks() if group else [found["tasks"][shown]]
                self._leaves[shown] = [task.task_name for task in tasks]
        for name, task in loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False) and not allow_code:
                raise SettingsError(f"--tasks {name}: runs code that the model writes; --allow_code_execution lets it")
            own = task.get_config("num_fewshot")
            if num_fewshot and own == 0:
                raise SettingsError(f"--num_fewshot {num_fewshot}: {name} is always asked without solved examples")
            task.set_config(key="num_fewshot", value=(own or 0) if num_fewshot is None else num_fewshot)
        self._loaded = loaded

    @property
    def metrics(self) -> set[str]:
        """TASK/METRIC of all that was named, without what lm-eval's filters make of them."""
        tasks = self._loaded["tasks"]
        return {
            f"{name}/{metric}"
            for name, leaves in self._leaves.items()
            for leaf in leaves
            for metric in tasks[leaf].aggregation()
        }

    def measure(self, chat: ChatModel, *, batch_size: int) -> dict[str, Value]:
        """Every metric of every task that was named, as TASK/METRIC or TASK/METRIC,FILTER."""
        from lm_eval.evaluator import evaluate

        from inference.lm_eval_model import build_lm

        random.seed(0)
        np.random.seed(_SEED)
        torch.manual_seed(_SEED)
        for task in self._loaded["tasks"].values():
            task.set_fewshot_seed(seed=_SEED)
        results: Any = evaluate(
            lm=build_lm(chat, batch_size),
            task_dict=self._loaded,
            limit=self._limit,
            bootstrap_iters=1000,
            apply_chat_template=True,
            fewshot_as_multiturn=True,
            confirm_run_unsafe_code=self._allow_code,
        )
        return dict(self._read(results))

    def _read(self, results: Any) -> Iterator[tuple[str, Value]]:
        for name, leaves in self._leaves.items():
            found = results["results"][name]
            for key, value in found.items():
                metric, comma, filter_name = key.partition(",")
                if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                    continue
                shown = f"{name}/{metric}" if filter_name == "none" else f"{name}/{key}"
                error = found.get(f"{metric}_stderr,{filter_name}")
                samples = [_list_values(results["samples"][leaf], metric, filter_name) for leaf in leaves]
                plain = Plain(float(value), float(error) if isinstance(error, int | float) else math.nan)
                yield shown, _estimate(samples, plain)


def _list_values(samples: Sequence[dict[str, Any]], metric: str, filter_name: str) -> list[float] | None:
    """A metric of each question; None where it is no number, as of metrics that exist for all questions together."""
    values = [each.get(metric) for each in samples if each["filter"] == filter_name]
    return [float(v) for v in values] if all(isinstance(v, int | float) for v in values) else None  # type: ignore[arg-type]


def _estimate(samples: Sequence[list[float] | None], reported: Plain) -> Value:
    """What lm-eval reported, with each question's influence if it is a mean over questions, or over tasks.

    Tasks of a group are not drawn by chance: a question moves the group only as far as it moves its own task.
    """
    known = [each for each in samples if each]
    if len(known) < len(samples):
        return reported
    means = [estimate_mean(each) for each in known]
    total = sum(map(len, known))
    for weights in ([len(each) / total for each in known], [1 / len(known)] * len(known)):
        value = sum(weight * mean.value for weight, mean in zip(weights, means, strict=True))
        if math.isclose(value, reported.value, rel_tol=1e-9, abs_tol=1e-12):
            parts = [weight * mean.influence for weight, mean in zip(weights, means, strict=True)]
            return Estimate(reported.value, np.concatenate(parts))
    return reported


def _import_manager(allow_code: bool) -> Any:
    """lm-eval's TaskManager, of a library that says little and that renders untrusted templates in a sandbox."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with _without_own_evaluate():
        import lm_eval.utils
        from lm_eval.tasks import TaskManager

        if allow_code:
            os.environ["HF_ALLOW_CODE_EVAL"] = "1"
            importlib.import_module("evaluate")
    if not allow_code:
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        # Templates of local task files are others' text; without a sandbox they reach all of Python.
        plain = lm_eval.utils.env
        sandbox = ImmutableSandboxedEnvironment(
            loader=plain.loader, undefined=plain.undefined, keep_trailing_newline=True
        )
        sandbox.filters.update(plain.filters)
        lm_eval.utils.env = sandbox
    return TaskManager


@contextlib.contextmanager
def _without_own_evaluate() -> Iterator[None]:
    """Inside, `import evaluate` finds the library of that name, not the script beside this package."""
    root = Path(__file__).resolve().parent.parent
    before = sys.path
    if (root / "evaluate.py").is_file():
        sys.path = [path for path in sys.path if Path(path).resolve() != root]
    try:
        yield
    finally:
        sys.path = before


def _check_metrics(metrics: set[str]) -> None:
    import lm_eval.api.metrics  # registers them  # noqa: F401
    from lm_eval.api.registry import metric_registry

    if unknown := sorted(metrics - set(metric_registry)):
        raise SettingsError(
            f"--task_path: {unknown[0]}: no metric of lm-eval, which would fetch a script of that name and run it; "
            "--allow_code_execution lets it"
        )


def _find_index(manager: Any, names: Sequence[str], task_path: str | None) -> Any:
    """The tasks among which all names are: local ones alone, if they are enough, since lm-eval's take seconds."""
    if task_path:
        index = manager(include_path=str(Path(task_path).resolve()), include_defaults=False)
        members = {member for entry in index.task_index.values() for member in _list_members(entry)}
        if {*names, *members} <= set(index.all_tasks):
            return index
    index = manager(include_path=str(Path(task_path).resolve()) if task_path else None)
    if unknown := [name for name in names if name not in index.task_index]:
        near = difflib.get_close_matches(unknown[0], index.all_tasks, 3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        where = "lm-eval" + (f", nor in {task_path}" if task_path else "")
        raise SettingsError(f"--tasks {unknown[0]}: no such task in {where}{hint}")
    return index


def _find_unsafe(index: Any, name: str, seen: frozenset[str] = frozenset()) -> str | None:
    """A task in a group, or the task itself, that says of itself that it runs what a model writes."""
    entry = index.get(name)
    if entry is None or name in seen:
        return None
    if (entry.cfg or {}).get("unsafe_code"):
        return name
    found = (_find_unsafe(index, member, seen | {name}) for member in _list_members(entry))
    return next(filter(None, found), None)


def _list_members(entry: Any) -> list[str]:
    """Names of the tasks and groups that a group or a tag of lm-eval's index consists of."""
    listed = (entry.cfg or {}).get("task")
    members = [*(listed if isinstance(listed, list) else ()), *(entry.tags if entry.yaml_path is None else ())]
    return [str(each.get("task", each.get("group")) if isinstance(each, dict) else each) for each in members]
