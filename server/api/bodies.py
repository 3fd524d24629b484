"""What requests share that take JSON or a form: which of the two it is, and how a field that does not fit is told."""

from __future__ import annotations

from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

FORM, JSON = "multipart/form-data", "application/json"
KINDS = ("bool", "int", "float", "str")
UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")
"""Errors whose last name is one that a client has made up."""


def media_type(request: Request) -> str:
    """The Content-Type without its parameters, in lower case; empty if there is none."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def misfit(exc: ValidationError) -> RequestValidationError:
    """A field's error, told as FastAPI tells those of the bodies that it reads itself.

    Of a field that may be of several kinds pydantic tells what each would have wanted, under names of its own for them.
    """
    told: dict[tuple[int | str, ...], dict[str, Any]] = {}
    for problem in exc.errors(include_url=False):
        place = _place(problem["loc"], is_unknown=problem["type"] in UNKNOWN)
        other = told.get(place)
        message = problem["msg"] if other is None else f"{other['msg']}, or: {problem['msg']}"
        told[place] = {**problem, "loc": ("body", *place), "msg": message}
    deepest = [place for place in told if not any(other != place and other[: len(place)] == place for other in told)]
    return RequestValidationError([told[place] for place in deepest])


def _place(location: tuple[int | str, ...], *, is_unknown: bool) -> tuple[int | str, ...]:
    """Names and numbers of a request's parts, without those of pydantic's kinds."""
    last = len(location) - 1
    return tuple(
        part
        for place, part in enumerate(location)
        if not isinstance(part, str) or (is_unknown and place == last) or (part.isidentifier() and part not in KINDS)
    )
