"""SIGTERM, SIGINT and SIGHUP: stop at the end of the step, on all processes of the run at the same one."""

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class StopRequest:
    """While it is entered, the first signal is noted; a second one does what it always did, at once.

    Every process of the run enters it and calls agreed() equally often.
    """

    def __init__(self) -> None:
        self._signal = 0
        self._handlers: dict[int, Any] = {}
        self._group: Any = None
        self._sent: tuple[Any, torch.Tensor] | None = None

    def __enter__(self) -> "StopRequest":
        if dist.is_initialized():
            # Its own gloo group on the CPU: asking does not wait for the GPU, nor interleave with other collectives.
            self._group = dist.new_group(backend="gloo")
        if threading.current_thread() is threading.main_thread():
            heard = [number for number in _SIGNALS if not _is_ignored_hangup(number)]
            self._handlers = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._signal = number
        for each in self._handlers:
            signal.signal(each, signal.SIG_DFL)  # in the kernel's hands: it works inside a long operation, too
        if os.environ.get("RANK", "0") == "0":
            show_cursor = "\x1b[?25h" if os.isatty(2) else ""  # nobody could after a second signal
            name = signal.Signals(number).name
            line = f"{show_cursor}{name}: saving at the end of this step; a second signal stops at once\n"
            with contextlib.suppress(OSError):  # the terminal may be what went
                os.write(2, line.encode())

    def agreed(self) -> int:
        """The signal to stop for, the same on all ranks, or 0. With several ranks the answer lags one call behind."""
        if self._group is None:
            return self._signal
        previous, flag = self._sent, torch.tensor([self._signal])
        self._sent = (dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group, async_op=True), flag)
        if previous is None:
            return 0
        previous[0].wait()
        return int(previous[1].item())


def _is_ignored_hangup(number: int) -> bool:
    """Under nohup a run is to outlive its terminal."""
    return number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN
