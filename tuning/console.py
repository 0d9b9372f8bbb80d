"""What one process of a run says to the user."""

import os
from typing import Any

try:
    from rich.console import Console
except ImportError:  # on machines that others set up

    class Console:  # type: ignore[no-redef]
        """Prints lines as they are."""

        is_terminal = False

        def print(self, line: str, **_: Any) -> None:
            """Print a line."""
            print(line, flush=True)


CONSOLE = Console()


def is_rank_0() -> bool:
    """Whether this process writes files and talks to the user."""
    return int(os.environ.get("RANK", "0")) == 0


def say(line: str) -> None:
    """Print a line on rank 0."""
    if is_rank_0():
        CONSOLE.print(line, markup=False, highlight=False, soft_wrap=True)
