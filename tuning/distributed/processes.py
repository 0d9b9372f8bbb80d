"""What the processes of one run do together: agree, exchange values, and fail with the same error."""

import socket
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from tuning.console import is_rank_0
from tuning.errors import MachineError, SettingsError

T = TypeVar("T")


def leave_processes() -> None:
    """Close the process group: a process that exits with one open may abort. All ranks must call this."""
    if dist.is_initialized():
        dist.destroy_process_group()


def on_rank_0(function: Callable[[], T]) -> T:
    """Call a function on rank 0; all ranks get its value, or raise its error. All must call this.

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
            dist.broadcast_object_list([None, ("MachineError", f"rank 0 failed: {error!r}")])
            raise
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        _raise(*outcome[1])
    return outcome[0]


class RankZeroWork:
    """Work of rank 0 in parts, between which all ranks take part in collectives.

    An error ends the work, not the collectives; finish raises it on all ranks.
    """

    def __init__(self) -> None:
        self._error: Exception | None = None

    def do(self, function: Callable[[], object]) -> None:
        """Do a part, on rank 0."""
        if not is_rank_0() or self._error is not None:
            return
        try:
            function()
        except Exception as error:
            self._error = error

    def finish(self) -> None:
        """Raise what went wrong. All must call this. Raises: as on_rank_0."""

        def check() -> None:
            if self._error is not None:
                raise self._error

        on_rank_0(check)


def on_all_ranks(function: Callable[[], T]) -> T:
    """Call a function on every rank; if it fails on any, all ranks raise. All ranks must call this.

    Raises: on a rank where it failed (and in a run of one process): its own error. On the others: SettingsError if
        that was a ValueError, else MachineError; the message names the rank unless it is rank 0.
    """
    if not dist.is_initialized():
        return function()
    failure: tuple[str, str, str] | None = None
    try:
        value = function()
    except Exception as error:
        known = isinstance(error, ValueError | MachineError)
        name = "SettingsError" if isinstance(error, ValueError) else "MachineError"
        failure = (name, str(error) if known else repr(error), socket.gethostname())
        gather_values(failure)
        raise
    for rank, each in enumerate(gather_values(failure)):
        if each is not None:
            name, message, host = each
            _raise(name, message if rank == 0 else f"process {rank} ({host}): {message}")
    return value


def find_anywhere(value: T | None) -> T | None:
    """The value of the lowest rank that has one, on all ranks. All must call this."""
    return next((each for each in gather_values(value) if each is not None), None)


def raise_on_all_ranks(message: str | None) -> None:
    """Raise MachineError on all processes if one of them has a message. All must call this."""
    if first := find_anywhere(message):
        raise MachineError(first, agreed=True)


def check_agreement(facts: dict[str, Any]) -> None:
    """Compare what every process knows with rank 0's. All must call this.

    Raises: SettingsError: something differs; the first difference is named, with its process.
    """
    everyone = gather_values((facts, socket.gethostname()))
    first = everyone[0][0]
    for rank, (theirs, host) in enumerate(everyone):
        for name in {**first, **theirs}:
            if first.get(name) != theirs.get(name):
                raise SettingsError(
                    f"the processes do not agree: {name} is {theirs.get(name)} in process {rank} ({host}), "
                    f"{first.get(name)} in process 0; start them all with the same command, data and libraries"
                )


def gather_values(value: T) -> list[T]:
    """The values of all processes, by rank. All must call this."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _raise(name: str, message: str) -> None:
    raise MachineError(message, agreed=True) if name == "MachineError" else SettingsError(message)
