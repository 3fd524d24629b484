"""Errors in OpenAI's format: `{"error": {"message", "type", "param", "code"}}`.

Statuses are the ones that OpenAI's client libraries map to exception classes. OpenAI uses 400 for an invalid request
where Prelude's other routes use 422. A few codes are OpenAI's, because programs look for them.
"""

from typing import Any

from pydantic import BaseModel, Field

from server.api.error_format import ErrorFormat
from server.api.openai.schemas import ChatBody, CompletionBody
from server.api.schemas import responses
from server.errors import InputTooLong, InvalidRequest, InvalidTaskName, PreludeError, Unauthorized, UnknownTask

PREFIX = "/v1"

MODELS = "GET /v1/models lists the models."

_CODES: dict[type[PreludeError], str] = {
    InputTooLong: "context_length_exceeded",
    Unauthorized: "invalid_api_key",
    UnknownTask: "model_not_found",
}
_TOO_LONG = "Input tokens exceed the configured limit. "
"""LangChain and litellm recognise this sentence of OpenAI's and raise a class of their own: shorten the input. It is
therefore used only if the input does not fit. If too many new tokens are requested, LangChain still recognises the
code."""

_CALLED = {"max_new_tokens": "max_tokens"}
"""Maps the engine's name of a field to OpenAI's name, where they differ."""

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}

_FIELDS = {f"{PREFIX}/completions": CompletionBody.offered(), f"{PREFIX}/chat/completions": ChatBody.offered()}


class OpenAIError(BaseModel):
    """An error."""

    message: str = Field(description="What was wrong, and what to do about it.")
    type: str = Field(description="Its kind, such as invalid_request_error.")
    param: str | None = Field(description="The field at fault, if it is one field.")
    code: str = Field(description="A code that does not change.")


class OpenAIErrorBody(BaseModel):
    """Every error of the routes under /v1."""

    error: OpenAIError


REFUSALS = responses(
    401,
    403,
    model=OpenAIErrorBody,
    on_400="A field or a parameter does not fit.",
    on_422="Not used: what does not fit is 400 here.",  # otherwise FastAPI documents its own 422 reply
)
"""The error replies that every route can return, for /openapi.json."""

MISSING = responses(404, model=OpenAIErrorBody)


def no_model(name: str, why: InvalidTaskName | UnknownTask) -> UnknownTask:
    """The error for an unknown model, in the wording of OpenAI's API, where tasks are models.

    The message repeats only what the request contains. The remedy suggests similar names; `auth.py` replaces it for
    keys that are restricted to some tasks.
    """
    hint = ""
    if isinstance(why, UnknownTask):
        if why.near is None:  # the task exists, but not this version
            hint = f"{why} "
        elif why.near:
            hint = f"Did you mean {', '.join(why.near)}? "
    return UnknownTask(f"The model `{name[:80]}` does not exist.", remedy=f"{hint}{MODELS}")


def openai_status(error: PreludeError, status: int | None = None) -> int:
    """The HTTP status of an error; `status` overrides the error's own."""
    status = status or error.status
    return 400 if status == 422 and isinstance(error, InvalidRequest) else status


def openai_error(error: PreludeError) -> dict[str, Any]:
    """Render an error as JSON, for replies and streams alike."""
    default = "invalid_request_error" if error.status < 500 else "server_error"
    param = _CALLED.get(error.param or "", error.param)
    opening = ""
    if isinstance(error, InputTooLong):
        opening = _TOO_LONG if param is None else f"{param} is too large. "
    message = f"{opening}{error}"
    body = OpenAIError(
        message=message.encode("utf-8", "backslashreplace").decode(),  # it may quote a lone surrogate
        type=_TYPES.get(error.status, default),
        param=param or ("model" if isinstance(error, UnknownTask) else None),
        code=next((code for cls, code in _CODES.items() if isinstance(error, cls)), error.code),
    )
    return {"error": body.model_dump()}


OPENAI_ERRORS = ErrorFormat(
    PREFIX, body=openai_error, status=openai_status, fields=lambda path: _FIELDS.get(path, ()), union_fields=("prompt",)
)
