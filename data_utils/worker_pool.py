"""Map a function over items in forked worker processes, results in order.

The standard pools do not fit: multiprocessing.Pool hangs when a worker is killed, and neither that nor
ProcessPoolExecutor stops a task that is running when the user presses Ctrl-C.
"""

import contextlib
import ctypes
import gc
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar, cast

Item = TypeVar("Item")
Result = TypeVar("Result")
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
_MAX_WORKERS = 16  # one process cannot read and check data fast enough for more


class WorkerDied(Exception):
    """A worker process ended before its result. item: what it worked on. cause: how it ended, for a message."""

    def __init__(self, item: Any, cause: str):
        super().__init__(cause)
        self.item, self.cause = item, cause


def count_workers() -> int:
    """Return how many workers this machine can use: one per usable core, or 1 where processes cannot be forked.

    Forking is safe on Linux alone, and a daemonic process may have no children.
    """
    if sys.platform != "linux" or multiprocessing.current_process().daemon:
        return 1
    return min(_MAX_WORKERS, len(os.sched_getaffinity(0)))


def map_in_order(function: Callable[[Item], Result], items: Iterator[Item], num_workers: int) -> Iterator[Result]:
    """Yield function(item) for every item, in order, computed by num_workers forked processes.

    Items are read as workers become free. At most 2 x num_workers of them are unfinished or wait for an earlier one,
    so memory is bounded. Leaving the iteration for any reason kills the workers.

    Raises: WorkerDied: a worker was killed. What function raises is raised here, with the worker's traceback as a note.
    """
    workers: dict[Connection, BaseProcess] = {}
    try:
        for _ in range(num_workers):
            connection, process = _start_worker(function, inherited=list(workers))
            workers[connection] = process
        idle = list(workers)
        busy: dict[Connection, tuple[int, Item]] = {}
        finished: dict[int, Result] = {}
        numbered = enumerate(items)
        upcoming = next(numbered, None)
        first = 0  # number of the first item whose result has not been yielded
        while upcoming or busy:
            while upcoming and idle and upcoming[0] < first + 2 * num_workers:
                connection = idle.pop()
                busy[connection] = upcoming
                _send(connection, workers[connection], upcoming[1])
                upcoming = next(numbered, None)
            while first in finished:
                yield finished.pop(first)
                first += 1
            for ready in wait(list(busy)) if busy else ():
                connection = cast(Connection, ready)
                number, item = busy.pop(connection)
                finished[number] = _receive(connection, workers[connection], item)
                idle.append(connection)
        for number in sorted(finished):
            yield finished[number]
    finally:
        for process in workers.values():
            process.kill()
        for connection, process in workers.items():
            process.join()
            connection.close()


def _start_worker(function: Callable[[Any], Any], *, inherited: list[Connection]) -> tuple[Connection, BaseProcess]:
    ours, theirs = multiprocessing.Pipe()
    # A copy of our ends in a worker would keep it, or another one, from noticing that this process has ended.
    process = multiprocessing.get_context("fork").Process(
        target=_work, args=(function, theirs, [*inherited, ours], os.getpid()), daemon=True
    )
    process.start()
    theirs.close()
    return ours, process


def _die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent ends, however that ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before
        os._exit(1)


def _work(function: Callable[[Any], Any], connection: Connection, inherited: list[Connection], parent: int) -> None:
    """Answer items until the other process closes the connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which kills the workers
    _die_with_parent(parent)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads do not survive a fork, and every core has a worker
    gc.freeze()  # what was imported before the fork need not be searched for garbage
    for other in inherited:
        other.close()
    with contextlib.suppress(EOFError, OSError):
        while True:
            item = connection.recv()
            answer: tuple[Any, Exception | None]
            try:
                answer = (function(item), None)
            except Exception as error:
                error.add_note(f"in a worker process:\n{traceback.format_exc()}")
                answer = (None, error)
            connection.send(answer)


def _send(connection: Connection, process: BaseProcess, item: Any) -> None:
    try:
        connection.send(item)
    except OSError:
        raise WorkerDied(item, _describe_end(process)) from None


def _receive(connection: Connection, process: BaseProcess, item: Any) -> Any:
    try:
        result, error = connection.recv()
    except (EOFError, OSError):
        raise WorkerDied(item, _describe_end(process)) from None
    if error is not None:
        raise error
    return result


def _describe_end(process: BaseProcess) -> str:
    process.join()
    code = process.exitcode or 0
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
