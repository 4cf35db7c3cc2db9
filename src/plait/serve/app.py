"""The application: routes behind the gate, and the files of the playground."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import Response
from starlette.exceptions import HTTPException as StarletteHTTPException

from plait import __version__
from plait.engine import LanguageModel
from plait.errors import PlaitError
from plait.serve import openai_routes, plait_routes, session_routes, text_routes
from plait.serve.errors import HTTPError, error_of, refusal, validation_error
from plait.serve.gate import Gate
from plait.serve.logs import logger
from plait.serve.service import Service
from plait.serve.settings import Settings

__all__ = ["create_app"]

_KINDS = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
_PAGE_HEADERS = {
    # Nothing but the page's own files runs or loads, whatever a model writes into it.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def create_app(lm: LanguageModel, settings: Settings | None = None, *, replica: int | None = None) -> FastAPI:
    """An ASGI application that serves a model.

    Example:
        >>> app = create_app(plait.load("smollm2"))  # doctest: +SKIP
        >>> uvicorn.run(app)  # doctest: +SKIP

    Args:
        lm: the model; used by nobody else while the application runs.
        settings: of the server; those about host, port and replicas are for `plait serve`.
        replica: the number of this process, where several serve one address.
    """
    settings = settings or Settings()
    service = Service(lm, settings, replica)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.start()
        try:
            yield
        finally:
            await service.close()

    app = FastAPI(
        title="Plait",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        separate_input_output_schemas=False,
    )
    app.state.service = service
    app.include_router(openai_routes.router)
    app.include_router(session_routes.router)
    app.include_router(text_routes.router)
    app.include_router(plait_routes.router)
    if settings.playground:
        _add_playground(app)
    _add_errors(app)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    app.add_middleware(Gate, settings=settings, keys=service.keys)
    return app


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return refusal(validation_error(error))

    @app.exception_handler(StarletteHTTPException)
    async def http(_: Request, error: StarletteHTTPException) -> Response:
        told = refusal(HTTPError(error.status_code, f"{error.detail}."))
        told.headers.update(error.headers or {})
        return told

    @app.exception_handler(HTTPError)
    async def ours(_: Request, error: HTTPError) -> Response:
        return refusal(error)

    @app.exception_handler(PlaitError)
    async def refused(_: Request, error: PlaitError) -> Response:
        told = error_of(error)
        if told.status >= 500:
            logger.exception("error", exc_info=error)
        return refusal(told)


def _add_playground(app: FastAPI) -> None:
    folder = resources.files("plait.serve") / "playground"
    files = {
        file.name: file.read_bytes() for file in folder.iterdir() if file.name.rpartition(".")[2] in _KINDS
    }

    def page(name: str) -> Response:
        kind = _KINDS[name.rpartition(".")[2]]
        return Response(files[name], media_type=kind, headers=_PAGE_HEADERS)

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return page("index.html")

    @app.get("/playground/{name}", include_in_schema=False)
    async def file(name: str) -> Response:
        return page(name) if name in files else refusal(HTTPError(404, "There is no such file."))


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The document, with the key that routes need and without the errors that FastAPI would give itself."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes, description=_ABOUT)
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        needs_key = app.state.service.keys.are_set
        for path, methods in document["paths"].items():
            for operation in methods.values():
                operation["responses"].pop("422", None)
                if needs_key and path != "/health":
                    operation["security"] = [{"key": []}]
        app.openapi_schema = document
    return app.openapi_schema


_ABOUT = (
    "Language models with a memory of strands, behind OpenAI's interface and routes of its own. A field that is not "
    "listed here is refused by name."
)
