"""Turns errors into replies: our own tree, FastAPI's validation, and unexpected errors.

The request's path decides which front end's error format applies (`error_format.py`).
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match

from server.api.bodies import UNKNOWN, nearest
from server.api.error_format import ErrorFormats, Location
from server.api.files import upload_not_stored
from server.errors import InvalidRequest, Overloaded, PreludeError, StoreError, Unauthorized, VersionUnavailable
from server.validation import MOST_PROBLEMS, listed

log = logging.getLogger(__name__)

WANTS_A_KEY = {"WWW-Authenticate": "Bearer"}

BROKEN_BODY = "Send the whole body again, as JSON or as a multipart form; /docs says which."

ROUTES = "See /docs for the routes, and check the address before them."

METHODS = ("GET", "POST", "PUT", "DELETE")
"""HTTP methods that at least one route accepts."""


def install_error_handlers(app: FastAPI, formats: ErrorFormats) -> None:
    """Let every error of the app leave in the format of its front end."""

    def _reply(
        request: Request, error: PreludeError, status: int | None = None, headers: Mapping[str, str] | None = None
    ) -> JSONResponse:
        body, status = formats.render(request.url.path, error, status)
        return JSONResponse(body, status, headers=headers)

    @app.exception_handler(PreludeError)
    async def _ours(request: Request, error: PreludeError) -> JSONResponse:
        if isinstance(error, StoreError | VersionUnavailable):  # the operator must fix this, so it is logged as well
            log.error("%s %s: %s", request.method, request.url.path, error)
        return _reply(request, error, headers=_headers(error))

    @app.exception_handler(RequestValidationError)
    async def _validation(request: Request, error: RequestValidationError) -> JSONResponse:
        path, items = request.url.path, error.errors()
        found, known = formats.of(path), formats.fields(path)
        locations = [found.location(tuple(item["loc"])) for item in items[:MOST_PROBLEMS]]
        problems = listed(
            [
                _problem(item, _without_kind(location, found.union_fields), known)
                for item, location in zip(items, locations, strict=False)
            ],
            len(items),
        )
        param = str(locations[0][1])[:80] if len(locations[0]) > 1 else None  # none if it is about the body itself
        return _reply(request, InvalidRequest(f"{problems}.", param=param))

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        cause = error.__cause__
        if isinstance(cause, OSError):  # no room for an upload's files, which are spooled to disk as they arrive
            cause = upload_not_stored(cause)
        if isinstance(cause, PreludeError):  # raised while FastAPI read the body
            return _reply(request, cause, headers=_headers(cause))
        if error.status_code in (404, 405):
            missing = InvalidRequest(f"There is no {request.method} {request.url.path[:200]}.", remedy=ROUTES)
            allowed = {"Allow": ", ".join(_methods(request))} if error.status_code == 405 else None
            return _reply(request, missing, error.status_code, allowed)
        remedy = BROKEN_BODY if error.status_code == 400 else None
        return _reply(request, InvalidRequest(f"{error.detail}.", remedy=remedy), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def _unexpected(request: Request, error: Exception) -> JSONResponse:
        return _reply(request, PreludeError("The server failed on this request."))


def _headers(error: PreludeError) -> Mapping[str, str] | None:
    if isinstance(error, Unauthorized):
        return WANTS_A_KEY
    return {"Retry-After": str(error.retry_after)} if isinstance(error, Overloaded) else None


def _methods(request: Request) -> list[str]:
    """All methods of a path; several routes may share the path, and each knows only its own methods."""
    scope = {"type": "http", "path": request.scope["path"], "root_path": request.scope.get("root_path", "")}
    routes = request.app.routes
    methods = [
        method
        for method in METHODS
        if any(route.matches({**scope, "method": method})[0] is Match.FULL for route in routes)
    ]
    return [*methods, "HEAD"] if "GET" in methods else methods


def _without_kind(location: Location, union_fields: Sequence[str]) -> Location:
    """The location of a problem, without pydantic's name for the kind as which it read a field of several."""
    return (*location[:2], *location[3:]) if len(location) > 2 and location[1] in union_fields else location


def _problem(item: Mapping[str, Any], location: Location, known: Sequence[str]) -> str:
    """One validation problem as a sentence, with the nearest name for an unknown field."""
    field = ".".join(str(part)[:80] for part in location if part != "body") or "body"
    if item["type"] in UNKNOWN:
        near = _nearest_field(field, str(location[-1]), known)
        return f"unknown field {field}" + (f" (did you mean {near}?)" if near else "")
    if field.partition(".")[0] == "files":  # FastAPI's message contains the name of one of our classes
        return f"{field}: must be a file of a multipart form, sent with a file name"
    if item["type"] in ("model_type", "model_attributes_type", "dict_type"):  # pydantic names classes of ours
        if field == "body":
            return "the body must be a JSON object, sent with Content-Type: application/json"
        return f"{field}: must be a JSON object"
    return f"{field}: {item['msg'].removeprefix('Value error, ')}"


def _nearest_field(field: str, name: str, known: Sequence[str]) -> str | None:
    """The known field that an unknown one is most like: its name, or its path if it belongs elsewhere in the body."""
    paths = {path.rpartition(".")[2]: path for path in reversed(known)}
    near = nearest(name, list(paths))
    if near is None or paths[near].rpartition(".")[0] == field.rpartition(".")[0]:
        return near
    return paths[near]
