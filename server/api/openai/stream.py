"""The chunks of a stream: a common head, a choice's new text, and at the end the token counts if requested."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from server.api.openai.errors import openai_error
from server.api.openai.replies import usage_of
from server.api.outputs import Choice
from server.api.sse import Dialect
from server.contracts import Delta

OPENAI = Dialect(b"data: ", b"data: [DONE]\n\n", openai_error)

Body = dict[str, Any]


async def chunks(
    first: tuple[int, Delta],
    deltas: AsyncGenerator[tuple[int, Delta]],
    requests: Sequence[Sequence[Choice]],
    render: Callable[[int, Sequence[Choice], Delta], list[Body]],
    head: Mapping[str, Any],
    include_usage: bool,
) -> AsyncGenerator[Body]:
    """Yield the chunks of a stream.

    Args:
        first: the first delta, which was awaited before the status was sent.
        deltas: the further deltas, each with its request's number; always closed at the end.
        requests: the choices of each request; initially empty, filled here.
        render: turns a request's number, its choices (which already include the delta) and the delta into chunk
            choices.
        head: fields that every chunk has.
        include_usage: end with a chunk of token counts; `usage` is null in all other chunks.
    """
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
