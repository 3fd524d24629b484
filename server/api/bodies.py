"""What requests share that take JSON or a form: which of the two it is, and how a field that does not fit is told."""

from __future__ import annotations

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

FORM, JSON = "multipart/form-data", "application/json"


def media_type(request: Request) -> str:
    """The Content-Type without its parameters, in lower case; empty if there is none."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def misfit(exc: ValidationError) -> RequestValidationError:
    """A field's error, told as FastAPI tells those of the bodies that it reads itself."""
    problems = [{**problem, "loc": ("body", *problem["loc"])} for problem in exc.errors(include_url=False)]
    return RequestValidationError(problems)
