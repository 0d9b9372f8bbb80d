"""The chat page: files of inference/page/, and what they show of the model.

The files are the same for everyone and hold no secret, so that a browser gets them without a key; what they ask the
server for takes the key, as every request does. They load nothing from elsewhere and run nothing but themselves: the
policy below says so to the browser.
"""

from pathlib import Path
from typing import Any

from inference.chat_handler import ChatHandler
from inference.requests import DEFAULT_MAX_TOKENS

_FOLDER = Path(__file__).with_name("page")
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
_DECODING = ("temperature", "top_p", "top_k", "repetition_penalty")

# Paths that are served without a key, and their files.
FILES = {
    "/" if path.name == "index.html" else f"/page/{path.name}": path
    for path in sorted(_FOLDER.iterdir())
    if path.suffix in _TYPES
}


def add_page(app: Any, chat: ChatHandler) -> None:
    """Serve the page at /. app: FastAPI's."""
    from fastapi.responses import Response

    def serve_file(path: str) -> None:
        file = FILES[path]
        body, kind = file.read_bytes(), f"{_TYPES[file.suffix]}; charset=utf-8"
        app.add_api_route(path, lambda: Response(body, media_type=kind, headers=_HEADERS), methods=["GET"])

    for path in FILES:
        serve_file(path)
    app.add_api_route("/page/model.json", lambda: describe_model(chat), methods=["GET"])


def describe_model(chat: ChatHandler) -> dict[str, Any]:
    """What the page shows. decoding: what happens where a request says nothing; None: transformers' own default."""
    config = chat.model.generation_config
    eos = config.eos_token_id
    stop_ids = [] if eos is None else eos if isinstance(eos, list) else [eos]
    decoding = {name: getattr(config, name, None) for name in _DECODING}
    if not config.do_sample:
        decoding |= {"temperature": 0, "top_p": None, "top_k": None}
    return {
        "name": chat.name,
        "stop_tokens": chat.tokenizer.convert_ids_to_tokens(stop_ids),
        "system_message": chat.template.system_message,
        "decoding": {**decoding, "max_tokens": min(DEFAULT_MAX_TOKENS, chat.context or DEFAULT_MAX_TOKENS)},
    }
