"""The page on this machine alone, made anew when the run's files have changed."""

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from commands.report_page.page import build_page
from commands.report_page.runs import read_runs
from tuning.checkpoint.run_record import METRICS_FILE, RUN_FILE
from tuning.errors import MachineError, SettingsError

ADDRESS = "127.0.0.1"
REFRESH_S = 5
_NAMES = {"127.0.0.1", "localhost"}  # what a browser may call this server: a page elsewhere has a name of its own
_CLIENT_TIMEOUT_S = 10
_HEADERS = {
    "Content-Type": "text/html; charset=utf-8",
    "Content-Security-Policy": "frame-ancestors 'none'",  # beside the page's own, which cannot say this
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def make_server(directories: list[str], port: int) -> ThreadingHTTPServer:
    """A server of the runs' page. port: 0 takes a free one. Raises: MachineError: the port is taken."""
    build = _remember(lambda: build_page(read_runs(directories), refresh_s=REFRESH_S), directories)

    class Handler(BaseHTTPRequestHandler):
        timeout = _CLIENT_TIMEOUT_S

        def do_GET(self) -> None:
            host = self.headers.get("Host", "")
            if (host.rpartition(":")[0] or host) not in _NAMES:
                self._send(403, "this server answers to 127.0.0.1 and localhost only")
            elif self.path != "/":
                self._send(404, "the page is at /")
            else:
                try:
                    self._send(200, build())
                except SettingsError as error:  # a run that was deleted, say
                    self._send(500, str(error))

        def _send(self, status: int, text: str) -> None:
            body = text.encode(errors="backslashreplace")
            self.send_response(status)
            for name, value in _HEADERS.items():
                kind = "text/plain; charset=utf-8" if name == "Content-Type" and status != 200 else value
                self.send_header(name, kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Say nothing of every request."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:
            """A client that went away is no news."""

    try:
        return Server((ADDRESS, port), Handler)
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or error
        raise MachineError(f"--port {port}: {why}; leave it out to take a free one") from None


def _remember(build: Callable[[], str], directories: list[str]) -> Callable[[], str]:
    """The same page as long as no file of a run changes. One thread builds it at a time."""
    lock, seen, page = threading.Lock(), None, ""

    def current() -> str:
        nonlocal seen, page
        with lock:
            stamps = [_stamp(path) for name in directories for path in _files_of(Path(name))]
            if stamps != seen:
                page = build()
                seen = stamps
            return page

    return current


def _files_of(directory: Path) -> list[Path]:
    return [directory / RUN_FILE, directory / METRICS_FILE, *sorted(directory.glob("**/rows.parquet"))]


def _stamp(path: Path) -> tuple[str, int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return str(path), stat.st_mtime_ns, stat.st_size
