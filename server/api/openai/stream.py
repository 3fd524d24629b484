"""The chunks of a stream: a common head, a choice's new text, and at the end the token counts if requested."""

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import Request

from server.api.openai.errors import openai_error
from server.api.openai.replies import usage_of
from server.api.outputs import Choice, merge
from server.api.sse import Dialect, EventStream, unless_disconnected
from server.contracts import Delta

OPENAI = Dialect(b"data: ", b"data: [DONE]\n\n", openai_error)

Body = dict[str, Any]


Render = Callable[[int, Sequence[Choice], Delta], list[Body]]
"""Turns a request's number, its choices (which already include the delta) and the delta into chunk choices."""


async def stream(
    request: Request,
    running: Sequence[AsyncGenerator[Delta]],
    num_choices: int,
    headers: Mapping[str, str],
    render: Render,
    head: Mapping[str, Any],
    include_usage: bool,
) -> EventStream:
    """A stream of what requests generate. `head` is in every chunk; `include_usage` ends with the token counts."""
    deltas = merge(running)
    # The first token is awaited before the status is sent, so that a refusal is still a 4xx.
    first = await unless_disconnected(request, anext(deltas))
    choices = [[Choice(index) for index in range(num_choices)] for _ in running]
    return EventStream(_chunks(first, deltas, choices, render, head, include_usage), headers, OPENAI)


async def _chunks(
    first: tuple[int, Delta],
    deltas: AsyncGenerator[tuple[int, Delta]],
    requests: Sequence[Sequence[Choice]],
    render: Render,
    head: Mapping[str, Any],
    include_usage: bool,
) -> AsyncGenerator[Body]:
    more = {"usage": None} if include_usage else {}
    async with aclosing(deltas):
        number, delta = first
        while True:
            choices = requests[number]
            choices[delta.index].take(delta)
            for body in render(number, choices, delta):
                yield {**head, "choices": [body], **more}
            try:
                number, delta = await anext(deltas)
            except StopAsyncIteration:
                break
    if include_usage:
        yield {**head, "choices": [], "usage": usage_of(requests)}
