"""Errors in the shape of OpenAI's API, and the status of each."""

import logging

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from ...planning.reading import one_line
from ..errors import EngineStopped, QueueFull, RequestTooLarge

RETRY_SECONDS = 1  # what a client is told that finds the queue full
_TYPES = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}  # others: invalid_request_error


class ApiError(Exception):
    """An answer that is an error. param: the field that it is about. code: what programs may look at."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, headers: dict | None = None):
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers

    @property
    def body(self) -> dict:
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": one_line(str(self), 2000), "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


def api_error(error: Exception, param: str | None = None) -> ApiError:
    """What a caller is told of an error of the engine, or of a request that failed in it."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestTooLarge):
        return ApiError(400, str(error), param, "context_length_exceeded")
    if isinstance(error, QueueFull):
        return ApiError(429, str(error), None, "queue_full", {"Retry-After": str(RETRY_SECONDS)})
    if isinstance(error, EngineStopped):
        return ApiError(503, str(error), None, "engine_stopped")
    return ApiError(500, f"the request failed: {type(error).__name__}: {error}", None, "request_failed")


def install(app: FastAPI) -> None:
    """Whatever goes wrong in `app` is answered in this shape."""
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unforeseen)


async def _api_error(http: Request, error: ApiError) -> JSONResponse:
    return error.response


async def _invalid(http: Request, error: RequestValidationError) -> JSONResponse:
    first = error.errors()[0]
    names = [str(part) for part in first["loc"][1:]]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first['ctx']['error']} at character {names[0]}").response
    if not names:
        return ApiError(400, "the body must be a JSON object, sent with the header Content-Type: application/json").response
    return ApiError(400, f"{'.'.join(names)}: {first['msg']}", names[0]).response


async def _http_error(http: Request, error: HTTPException) -> JSONResponse:
    """No such path, another method, a body that is too large."""
    return ApiError(error.status_code, f"{http.method} {http.url.path}: {error.detail}", headers=error.headers).response


async def _unforeseen(http: Request, error: Exception) -> JSONResponse:
    logging.getLogger("uvicorn.error").error("%s failed", http.url.path)  # uvicorn adds the traceback
    return ApiError(500, f"the server failed: {type(error).__name__}").response
