"""transformers' server (transformers.cli.serving) around one model of ours: an API as OpenAI's clients speak it.

Theirs are the app and its routes; those that load other models, or forget this one, are taken away.
"""

import inspect
from typing import Any

from transformers.cli.serving.server import build_server

from inference.chat_handler import ChatHandler
from inference.gate import Gate
from inference.page_routes import FILES, add_page
from inference.requests import RequestError, describe_error, model_not_found

_ROUTES = {"/v1/chat/completions", "/v1/models", "/health"}


def build_app(chat: ChatHandler, *, key: str | None, host: str, page: bool = False) -> Gate:
    """The app that uvicorn runs. key: that requests must bring, or None. host: that it listens at. page: at /, too."""
    manager, state = chat.model_manager, chat.generation_state
    others = [name for name in inspect.signature(build_server).parameters if name.endswith("_handler")]
    handlers = {**dict.fromkeys(others), "chat_handler": chat}
    app = build_server(model_manager=manager, generation_state=state, **handlers)
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) in _ROUTES]

    @app.get("/v1/models/{name:path}")
    def show_model(name: str) -> dict[str, Any]:
        if name != manager.name:
            raise model_not_found(name, manager.name)
        return manager.get_gen_models()[0]

    if page:
        add_page(app, chat)
    _answer_mistakes(app)
    return Gate(app, key, host, open_paths=FILES if page else ())


def _answer_mistakes(app: Any) -> None:
    """Every error in OpenAI's form."""
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException

    async def refuse(_: Any, error: RequestError) -> Any:
        return JSONResponse(error.to_json(), error.status)

    async def refuse_body(_: Any, error: RequestValidationError) -> Any:
        found = error.errors()[0]
        why = (found.get("ctx") or {}).get("error", found["msg"])
        return JSONResponse(describe_error(f"the body must be a JSON object: {why}", 400), 400)

    async def refuse_route(request: Any, error: HTTPException) -> Any:
        message = f"{request.method} {request.url.path}: {error.detail}; served are {', '.join(sorted(_ROUTES))}"
        return JSONResponse(describe_error(message, error.status_code), error.status_code, headers=error.headers)

    async def fail(_: Any, error: Exception) -> Any:
        return JSONResponse(describe_error("the request failed; the server's log says why", 500), 500)

    app.add_exception_handler(RequestError, refuse)
    app.add_exception_handler(RequestValidationError, refuse_body)
    app.add_exception_handler(HTTPException, refuse_route)
    app.add_exception_handler(Exception, fail)
