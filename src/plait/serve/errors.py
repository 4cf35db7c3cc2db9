"""Errors as clients of OpenAI's interface expect them: a status and `{"error": {...}}`."""

from __future__ import annotations

import re
from itertools import takewhile
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from plait.errors import CancelledError, CapacityError, ConfigError, PlaitError, TemplateError

__all__ = ["HTTPError", "error_body", "error_of", "refusal", "validation_error"]

_TYPES = re.compile(
    r"str|int|float|bool|none|(list|dict|tuple|constrained|literal|function)\b.*|\[key\]|\w+Format|text|json_\w+"
)
_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    502: "server_error",
    503: "server_error",
}


class HTTPError(Exception):
    """An answer other than success.

    Args:
        status: the HTTP status.
        message: what was given, what is allowed, what to do.
        param: the field that is wrong, if it is one.
        code: a word for programs, such as `model_not_found`.
        retry_after: seconds after which the client should try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after = retry_after


def error_body(error: HTTPError) -> dict[str, Any]:
    """The JSON form of an error. Halves of surrogate pairs in it, which are no text, are replaced."""
    return {
        "error": {
            "message": _text(error.message),
            "type": _KINDS.get(error.status, "api_error"),
            "param": None if error.param is None else _text(error.param),
            "code": error.code,
        }
    }


def refusal(error: HTTPError) -> JSONResponse:
    """The response for an error."""
    headers = {} if error.retry_after is None else {"retry-after": str(error.retry_after)}
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error_body(error), error.status, headers)


def error_of(error: Exception) -> HTTPError:
    """What a client is told of an exception; of one that is not ours, only that there was one."""
    if isinstance(error, HTTPError):
        return error
    if isinstance(error, CapacityError):
        return HTTPError(400, str(error), code="context_length_exceeded")
    if isinstance(error, (ConfigError, TemplateError)):
        return HTTPError(400, str(error))
    if isinstance(error, CancelledError):
        return HTTPError(503, "The server is ending, and the request was cancelled.")
    if isinstance(error, PlaitError):
        return HTTPError(500, str(error))
    return HTTPError(500, "Something went wrong in the server; its log has the details.")


def validation_error(error: RequestValidationError) -> HTTPError:
    """The first thing that is wrong with a request, in one sentence that names the field."""
    first = error.errors()[0]
    where = list(
        takewhile(_is_field, (str(part) for part in first["loc"] if part not in ("body", "query", "path")))
    )
    kind, message = str(first["type"]), str(first["msg"])
    param = ".".join(where) or None
    if kind == "json_invalid" or not where:
        message = message.removeprefix("Value error, ")
        return HTTPError(400, f"The body is not what this route takes: {message}.")
    if kind == "extra_forbidden":
        return HTTPError(
            400,
            f"{param} is not supported by this server. Leave it out; the OpenAPI document at /openapi.json lists "
            "what is.",
            param=param,
            code="unsupported_parameter",
        )
    return HTTPError(400, f"{param}: {message.removeprefix('Value error, ')}.", param=param)


def _is_field(part: str) -> bool:
    """Whether a part of a place is what a client wrote, and not the name of a type that was tried."""
    return _TYPES.fullmatch(part) is None


def _text(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")
