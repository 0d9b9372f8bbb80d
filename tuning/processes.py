"""What the processes of one run do together."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from tuning.errors import MachineError, SettingsError

T = TypeVar("T")


def on_first(function: Callable[[], T]) -> T:
    """Call a function on the first process; all get its value, or raise its error. All must call this.

    Raises: SettingsError, MachineError: what the function raised, on every process.
    """
    if not dist.is_initialized():
        return function()
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome = [function(), None]
        except (SettingsError, MachineError) as error:
            outcome = [None, (type(error).__name__, str(error))]
        except BaseException as error:
            dist.broadcast_object_list([None, ("MachineError", f"the first process failed: {error!r}")])
            raise
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        kind, message = outcome[1]
        raise SettingsError(message) if kind == "SettingsError" else MachineError(message, agreed=True)
    return outcome[0]


def find_anywhere(value: T | None) -> T | None:
    """The value of the first process that has one, on all processes. All must call this."""
    values: list[T | None] = [value]
    if dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
    return next((each for each in values if each is not None), None)


def raise_together(message: str | None) -> None:
    """Raise MachineError on all processes if one of them has a message. All must call this."""
    if first := find_anywhere(message):
        raise MachineError(first, agreed=True)
