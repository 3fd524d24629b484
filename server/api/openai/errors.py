"""The error tree as OpenAI's clients know errors: `{"error": {"message", "type", "param", "code"}}`.

Statuses are those that OpenAI's libraries make classes of. They take 400 for a request that breaks a rule, where we
say 422; a few codes are theirs, because programs look for them.
"""

from __future__ import annotations

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
"""Of these words of OpenAI's LangChain and litellm make a class of their own: the input is to be shortened. So they are
for an input that does not fit; where too many tokens are asked for, LangChain still goes by the code."""

_CALLED = {"max_new_tokens": "max_tokens"}
"""Fields that the engine calls otherwise than OpenAI."""

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}

_FIELDS = {f"{PREFIX}/completions": CompletionBody.offered(), f"{PREFIX}/chat/completions": ChatBody.offered()}


class OpenAIError(BaseModel):
    """What went wrong."""

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
    on_422="Not used: what does not fit is 400 here.",  # without it, FastAPI describes an answer of its own
)
"""What every route may refuse, for /openapi.json."""

MISSING = responses(404, model=OpenAIErrorBody)


def no_model(name: str, why: InvalidTaskName | UnknownTask) -> UnknownTask:
    """The error for a model that there is not, in the words of OpenAI's API, where tasks are models.

    The message repeats only what the request says. What may have been meant is in the remedy, which `auth.py` replaces
    for keys that are not for all tasks.
    """
    hint = ""
    if isinstance(why, UnknownTask):
        if why.near is None:  # the task is there, but not that version of it
            hint = f"{why} "
        elif why.near:
            hint = f"Did you mean {', '.join(why.near)}? "
    return UnknownTask(f"The model `{name[:80]}` does not exist.", remedy=f"{hint}{MODELS}")


def openai_fields(path: str) -> list[str]:
    """Fields that the body of a request to a path may have; none if the path takes no such body."""
    return _FIELDS.get(path, [])


def openai_status(error: PreludeError, status: int | None = None) -> int:
    """The status of an error; `status` where it is not the error's own."""
    status = status or error.status
    return 400 if status == 422 and isinstance(error, InvalidRequest) else status


def openai_error(error: PreludeError) -> dict[str, Any]:
    """An error as JSON, the same in replies and in streams."""
    default = "invalid_request_error" if error.status < 500 else "server_error"
    param = _CALLED.get(error.param or "", error.param)
    opening = ""
    if isinstance(error, InputTooLong):
        opening = _TOO_LONG if param is None else f"{param} is too large. "
    message = f"{opening}{error}"
    body = OpenAIError(
        message=message.encode("utf-8", "backslashreplace").decode(),  # it may quote half a surrogate pair
        type=_TYPES.get(error.status, default),
        param=param or ("model" if isinstance(error, UnknownTask) else None),
        code=next((code for cls, code in _CODES.items() if isinstance(error, cls)), error.code),
    )
    return {"error": body.model_dump()}


OPENAI_ERRORS = ErrorFormat(
    PREFIX, body=openai_error, status=openai_status, fields=openai_fields, union_fields=("prompt",)
)
