"""How every entry script shows the user's mistakes and exits."""

import argparse
import contextlib
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TextIO
from unicodedata import category

from tuning.errors import MachineError, SettingsError

MISTAKE, FAILURE, INTERRUPTED = 2, 1, 130  # exit codes

_OBEYED = ("Cc", "Cf", "Cs", "Zl", "Zp")  # Unicode's categories of control characters, directions, half surrogates


class OneLineParser(argparse.ArgumentParser):
    """Shows a mistake in one line, without the usage; a flag is written out; the description keeps its line breaks."""

    def __init__(self, **options: Any):
        super().__init__(**{"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter, **options})

    def error(self, message: str) -> NoReturn:
        """Raise what run_entry prints."""
        raise SettingsError(f"{message}; see --help")


def _escape(line: str) -> str:
    """The line with what a terminal would obey, or could not show, as escapes: names and values are others' text."""
    escaped = (
        c if c == "\t" or category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp") else f"\\u{ord(c):04x}" for c in line
    )
    return "".join(escaped)


def add_trust_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of every tool that reads a model, with finetune.py's names and values."""
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    add_pickle_flag(parser)


def add_pickle_flag(parser: argparse.ArgumentParser) -> None:
    """The flag of tools that read weights and never run a model's code."""
    parser.add_argument(
        "--allow_pickle",
        nargs="?",
        const=True,
        default=False,
        type=_read_bool,
        metavar="True|False",
        help="read .bin weights (they can run code when loaded)",
    )


def add_hub_flag(parser: argparse.ArgumentParser) -> None:
    """Which hub the names of models belong to."""
    parser.add_argument(
        "--hub",
        choices=["huggingface", "modelscope"],
        help="where names of models are looked up (default: huggingface; modelscope with USE_MODELSCOPE_HUB=1)",
    )


def _read_bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError("expected True or False")
    return text.lower() == "true"


def run_entry(main: Callable[[], int | None], *, mistakes: tuple[type[Exception], ...], interrupted: str) -> NoReturn:
    """Run an entry script's main and exit: 2 for the user's mistake, 1 for a failure of the machine, 130 for Ctrl-C.

    mistakes: further exceptions that are the user's mistakes (data_utils' DataError). interrupted: what Ctrl-C left,
    in one line. Of several processes one on each machine prints, since each machine has a log of its own.
    """
    speaks = int(os.environ.get("LOCAL_RANK", "0")) == 0
    was_interrupted = _notice_interrupts()
    try:
        with _outlive_readers():
            code = main() or 0
        sys.exit(code)
    except MachineError as error:
        code, lines, shown = FAILURE, [f"error: {error}"], speaks or not error.agreed
    except KeyboardInterrupt:
        code, lines, shown = INTERRUPTED, [interrupted], speaks
    except Exception as error:
        if was_interrupted():  # a library that was being imported turned Ctrl-C into an error of its own
            code, lines, shown = INTERRUPTED, [interrupted], speaks
        elif isinstance(error, (SettingsError, *mistakes)):
            code, lines, shown = MISTAKE, _as_lines(error), speaks
        else:
            raise
    if shown:
        print("\n".join(map(_escape, lines)), file=sys.stderr)
    sys.exit(code)


def _notice_interrupts() -> Callable[[], bool]:
    """Remember Ctrl-C, which raises KeyboardInterrupt as before. Returns: a function that says whether it came."""
    came = []

    def note(number: int, frame: Any) -> None:
        came.append(number)
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, note)
    return lambda: bool(came)


def _as_lines(error: Exception) -> list[str]:
    return [f"error: {line}" for line in str(error).split("\n")]


def show_mistakes(error: Exception) -> None:
    """Print the user's mistakes, a line each."""
    print("\n".join(map(_escape, _as_lines(error))), file=sys.stderr)


class _LastingStream:
    """Output that may lose its reader: a closed pipe, a terminal that is gone, a full disk. Work goes on without."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return self._try(lambda: self._stream.write(text)) or len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, function: Callable[[], int | None]) -> int | None:
        try:
            return function()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            return None


@contextlib.contextmanager
def _outlive_readers() -> Iterator[None]:
    """Inside, nothing that is printed can end the program, be it unknown to the terminal or read by nobody."""
    streams = sys.stdout, sys.stderr
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = map(_LastingStream, streams)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stdout, sys.stderr = streams
