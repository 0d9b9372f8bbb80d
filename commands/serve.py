"""Serve a model or an adapter until a signal ends it."""

import argparse
import logging
import signal
import socket
from types import FrameType
from typing import Any

from commands.loading import Answering, load_answering
from data_utils.template import ChatTemplate
from tuning.console import say
from tuning.errors import SettingsError

_MAX_CONNECTIONS = 256  # more are refused without being read


def run(args: argparse.Namespace) -> int:
    """Load and serve. args: of serve.py. Returns: exit code.

    Raises: DataError, SettingsError: the user's mistakes.
    """
    if args.engine == "vllm":
        from commands import vllm_command

        return vllm_command.run(args)
    try:
        import inference.server  # noqa: F401
    except (ImportError, NameError) as error:  # the latter from transformers 5.17 without OpenAI's client
        raise SettingsError(f"{error}: serving takes transformers 5.23, as requirements_finetune.txt has it") from None
    listener = bind(args.host, args.port)  # before minutes of loading
    try:
        loaded = load_answering(args)
        _, server = build_server(args, loaded, listener)
        with _SignalCaught(signal.SIGTERM) as stopped:
            server.run(sockets=[listener])
        return stopped.exit_code
    finally:
        listener.close()


def build_server(args: argparse.Namespace, loaded: Answering, listener: socket.socket) -> tuple[Any, Any]:
    """The handler of chats, and the server, which says where it is when it takes requests. listener: bound."""
    import uvicorn

    from inference.chat_handler import ChatHandler
    from inference.one_model import OneModel
    from inference.server import build_app

    template = ChatTemplate(loaded.tokenizer, system_message=loaded.system_message)
    manager = OneModel(args.name, loaded.model, loaded.tokenizer)
    chat = ChatHandler(manager, template, args.kv_cache)
    app = build_app(chat, key=args.api_key, host=args.host, page=args.page)
    host = f"[{args.host}]" if ":" in args.host else args.host
    access = "with a key" if args.api_key else "without a key, this machine only"

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            address = f"http://{host}:{listener.getsockname()[1]}"
            say(f"serving {args.name} at {address}/v1 ({access})")
            if args.page:
                say(f"chat page: {address}")

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            super().handle_exit(sig, frame)
            if self.force_exit:
                logging.disable(logging.CRITICAL)  # of every answer that is cut off

    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=_MAX_CONNECTIONS,
    )
    return chat, Server(config)


class _SignalCaught:
    """Notes a signal that uvicorn sends again when it has ended, in place of what that does. exit_code: 128 and it."""

    def __init__(self, number: int):
        self._number = number
        self.exit_code = 0

    def __enter__(self) -> "_SignalCaught":
        self._before = signal.signal(self._number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(self._number, self._before)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.exit_code = 128 + number


def bind(host: str, port: int) -> socket.socket:
    """A socket at the address, not yet listening. Raises: SettingsError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise SettingsError(f"--host {host}: {error.strerror or error}") from None
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except (OSError, OverflowError) as error:
        listener.close()
        why = getattr(error, "strerror", None) or error
        raise SettingsError(f"--host {host} --port {port}: {why}; name another one (--port 0: any free one)") from None
    return listener
