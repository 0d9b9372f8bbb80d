"""What every request passes before the server sees it: the key, the size of its body, and whether its client waits."""

import asyncio
import contextlib
import hmac
import json
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from contextvars import ContextVar
from typing import Any

from inference.requests import describe_error

MAX_BODY_BYTES = 8 * 2**20
_MAX_READ_BYTES = 8 * MAX_BODY_BYTES
_BODY_TIMEOUT_S = 60  # for a client to send its request
_LOOPBACK_NAMES = {"localhost", "127.0.0.1", "[::1]"}
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

# Set when the client of the request in hand has gone away.
CLIENT_GONE: ContextVar[asyncio.Event] = ContextVar("CLIENT_GONE")


class Gate:
    """ASGI middleware. key: that every request must bring, or None: then only requests to loopback names are taken.

    open_paths: what is served without the key.

    A web page can send requests to this machine under a name of its own (DNS rebinding); a browser says that name.
    """

    def __init__(self, app: App, key: str | None, host: str, open_paths: Collection[str] = ()):
        self._app = app
        self._key = None if key is None else key.encode()
        self._open_paths = open_paths
        self._names = {*_LOOPBACK_NAMES, host, f"[{host}]"}

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Refuse a request, or pass it on with its whole body."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        headers = dict(scope["headers"])
        needs_key = self._key is not None and scope["path"] not in self._open_paths
        if needs_key and not self._has_key(headers.get(b"authorization", b"")):
            message = "wrong API key" if b"authorization" in headers else "no API key: send Authorization: Bearer KEY"
            await _refuse(send, 401, message, "invalid_api_key")
            return
        if self._key is None and not self._is_loopback(headers.get(b"host", b"")):
            await _refuse(send, 403, "without an API key this server answers to localhost only")
            return
        try:
            body = await asyncio.wait_for(_read_body(headers, receive), _BODY_TIMEOUT_S)
        except _TooLarge:
            await _refuse(send, 400, f"the request is larger than {MAX_BODY_BYTES:,} bytes", "request_too_large")
            return
        except TimeoutError:
            await _refuse(send, 408, f"the request did not come within {_BODY_TIMEOUT_S} seconds")
            return
        if body is None:
            return
        await self._pass_on(scope, body, receive, send)

    async def _pass_on(self, scope: Message, body: bytes, receive: Receive, send: Send) -> None:
        gone, given = asyncio.Event(), False

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()

        async def receive_again() -> Message:
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": body, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        CLIENT_GONE.set(gone)
        watching = asyncio.create_task(watch())
        try:
            await self._app(scope, receive_again, send)
        finally:
            gone.set()
            watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching

    def _has_key(self, authorization: bytes) -> bool:
        scheme, _, given = authorization.partition(b" ")
        assert self._key is not None
        return hmac.compare_digest(given.strip(), self._key) and scheme.lower() == b"bearer"

    def _is_loopback(self, host: bytes) -> bool:
        name = host.decode("latin-1").lower()
        return (name if name.endswith("]") else name.rpartition(":")[0] or name) in self._names


class _TooLarge(Exception):
    pass


async def _read_body(headers: dict[bytes, bytes], receive: Receive) -> bytes | None:
    """The whole body; None where the client goes away before. Raises: _TooLarge.

    What is not far too large is read to its end: a client that still writes does not read why it is refused.
    """
    said = headers.get(b"content-length", b"0")
    size, parts = 0, []
    while True:
        if size > _MAX_READ_BYTES or (said.isdigit() and int(said) > _MAX_READ_BYTES):
            raise _TooLarge
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        part = message.get("body", b"")
        size += len(part)
        if size <= MAX_BODY_BYTES:
            parts.append(part)
        if not message.get("more_body"):
            break
    if size > MAX_BODY_BYTES:
        raise _TooLarge
    return b"".join(parts)


async def _refuse(send: Send, status: int, message: str, code: str | None = None) -> None:
    text = json.dumps(describe_error(message, status, code=code)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(text)).encode())]
    headers.append((b"connection", b"close"))  # of its body nothing more is read
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text})
