"""POST /invocations, the route of Amazon SageMaker.

The other half of its contract, GET /ping, is one of the probes in `ops.py`.
"""

from typing import Annotated, Any

from fastapi import APIRouter, Response
from pydantic import Discriminator, Tag

from server.api.auth import Generates, GuardedRoute
from server.api.deps import CallDep
from server.api.error_format import ErrorFormat, Location
from server.api.openai import chat, completions
from server.api.openai.replies import ChatReply, CompletionReply
from server.api.openai.schemas import ChatBody, CompletionBody
from server.api.sse import OR_STREAM
from server.api.tgi import routes as tgi
from server.api.tgi.schemas import GenerateBody, GenerateReply

INVOCATIONS = "/invocations"

_KINDS = {"inputs": GenerateBody, "messages": ChatBody, "prompt": CompletionBody}
"""Maps the field that identifies a kind of body to that body's schema."""


def _kind_of(body: Any) -> str | None:
    if isinstance(body, dict):
        return next((field for field in _KINDS if body.get(field) is not None), None)
    return next((field for field, kind in _KINDS.items() if isinstance(body, kind)), None)


Body = Annotated[
    Annotated[GenerateBody, Tag("inputs")]
    | Annotated[ChatBody, Tag("messages")]
    | Annotated[CompletionBody, Tag("prompt")],
    Discriminator(
        _kind_of,
        custom_error_type="no_invocation",
        custom_error_message="must be an object with inputs, messages or prompt",
    ),
]


def _without_kind(location: Location) -> Location:
    """A problem's location without the word of ours for the kind of body that it is in."""
    return (*location[:1], *location[2:])


INVOCATION_ERRORS = ErrorFormat(INVOCATIONS, union_fields=("inputs", "prompt"), location=_without_kind)

router = APIRouter(tags=["generate"], route_class=GuardedRoute, dependencies=[Generates])


@router.post(
    INVOCATIONS, response_model=list[GenerateReply] | ChatReply | CompletionReply, responses=tgi.ERRORS | OR_STREAM
)
async def invoke(body: Body, call: CallDep) -> Response:
    """Accepts the bodies of `/`, `/v1/chat/completions` and `/v1/completions` and replies as those routes do.

    SageMaker passes no query on, so the task is `parameters.adapter_id`, or `model`.
    """
    if isinstance(body, GenerateBody):
        return await tgi.generate_list(body, call)
    if isinstance(body, ChatBody):
        return await chat.chat(body, call)
    return await completions.complete(body, call)
