"""The optimizer and the learning rate schedule, built on a small parameter before any weights load."""

import copy
import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from transformers import Trainer, get_scheduler

from tuning.errors import SettingsError
from tuning.messages import first_line

_STEPS = 100  # of the schedule that is tried
_OF_ADAM = ("adam_beta1", "adam_beta2", "adam_epsilon")
_NOT_FINITE = re.compile("[-+]?(nan|inf|infinity)", re.IGNORECASE)
_TRIED_VALUES = ("0.1234", "0.4321", "true", "")  # of optim_args: numbers, and words that say yes or no


def check_optimizer(run: Any, given: set[str]) -> None:
    """Build what --optim and --lr_scheduler_type name, with their arguments.

    given: names of the options that were given; one that optimizer or schedule do not read is an error.

    Raises: SettingsError.
    """
    optim = f"--optim {run.optim.value}"
    if bad := [
        word for word in re.split("[,= ]", run.optim_args or "") if re.fullmatch("(?i)[-+]?(nan|inf|infinity)", word)
    ]:
        raise SettingsError(f"--optim_args {run.optim_args}: {bad[0]} is not a finite number")
    try:
        chosen, arguments = _choose_optimizer(run)
        optimizer = chosen([torch.nn.Parameter(torch.zeros(2, 2))], **arguments)
    except Exception as error:  # whatever the optimizer's own package raises for these settings
        settings = optim + (f" --optim_args {run.optim_args}" if run.optim_args else "")
        if run.optim_args and any("=" not in each for each in run.optim_args.split(",")):
            raise SettingsError(f"--optim_args {run.optim_args}: say name=value,name=value") from None
        raise SettingsError(f"{settings}: {first_line(error)}") from None
    for name in _OF_ADAM:
        if name in given and not _differs(run, name, (0.1234, 0.4321)):
            raise SettingsError(f"--{name}: has no effect with {optim}")
    for name in (each.partition("=")[0] for each in (run.optim_args or "").replace(" ", "").split(",") if each):
        values = [f"{_drop(run.optim_args or '', name)},{name}={value}".strip(",") for value in _TRIED_VALUES]
        if "optim_args" in given and not _differs(run, "optim_args", values):
            raise SettingsError(f"--optim_args {name}: has no effect with {optim}")
    _check_schedule(run, given, optimizer)


def _choose_optimizer(run: Any) -> tuple[Any, dict[str, Any]]:
    chosen, arguments = Trainer.get_optimizer_cls_and_kwargs(run)
    return chosen, arguments


def _drop(optim_args: str, name: str) -> str:
    return ",".join(each for each in optim_args.replace(" ", "").split(",") if each.partition("=")[0] != name)


def _differs(run: Any, name: str, values: Sequence[Any]) -> bool:
    """Whether the optimizer's arguments follow this setting; a value that it cannot read counts as read."""
    found = set()
    for value in values:
        changed = copy.copy(run)
        setattr(changed, name, value)
        try:
            found.add(repr(_choose_optimizer(changed)))
        except (ValueError, TypeError, AttributeError):
            return True
    return len(found) > 1


def _check_schedule(run: Any, given: set[str], optimizer: Any) -> None:
    kind = f"--lr_scheduler_type {run.lr_scheduler_type.value}"
    kwargs: Any = run.lr_scheduler_kwargs or {}
    try:
        factors = _schedule_factors(run, optimizer, 10, kwargs)
    except Exception as error:  # whatever the schedule makes of these arguments
        how = "" if kwargs else "; it needs --lr_scheduler_kwargs"
        hint = " '{\"min_lr\": 1e-6}'" if how and "min_lr" in str(error) else ""
        said = f" --lr_scheduler_kwargs {kwargs}" if kwargs else ""
        raise SettingsError(f"{kind}{said}: {_plain(first_line(error))}{how}{hint}") from None
    if not all(isinstance(each, (int, float)) and math.isfinite(each) for each in factors):
        raise SettingsError(f"{kind} --lr_scheduler_kwargs {kwargs}: the rates are not finite numbers")
    if kwargs and "lr_scheduler_kwargs" in given and _reads_no_arguments(run, optimizer):
        raise SettingsError(f"--lr_scheduler_kwargs: has no effect with {kind}")
    if run.warmup_steps and "warmup_steps" in given and factors == _schedule_factors(run, optimizer, 0, kwargs):
        way_out = "; use constant_with_warmup" if kind.endswith(" constant") else ""
        raise SettingsError(f"--warmup_steps {run.warmup_steps:g}: has no effect with {kind}{way_out}")


def _schedule_factors(run: Any, optimizer: Any, warmup: int, kwargs: dict[str, Any]) -> list[Any]:
    """The learning rate over the peak rate at every step of a short run."""
    # A schedule keeps its first rate in the optimizer's groups, so each try has groups of its own.
    for group in optimizer.param_groups:
        group.pop("initial_lr", None)
        group["lr"] = run.learning_rate
    schedule: Any = get_scheduler(run.lr_scheduler_type, optimizer, warmup, _STEPS, dict(kwargs))
    return [schedule.lr_lambdas[0](step) for step in range(_STEPS + 1)]


def _reads_no_arguments(run: Any, optimizer: Any) -> bool:
    try:
        _schedule_factors(run, optimizer, 10, {"no_such_argument": 1})
    except TypeError:
        return False
    return True


def _plain(message: str) -> str:
    """Python's words for a missing or unknown argument, without the function's name."""
    return message.partition("() ")[2] or message
