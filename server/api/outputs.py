"""Runs requests in the engine, one or several at the same time, and collects their deltas into choices."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TypeVar

from fastapi import Request

from server.api.generation import Prepared, locating_errors
from server.api.telemetry.observation import Observation
from server.api.telemetry.record import record_of
from server.contracts import Delta, FinishReason, Scored, Token, Usage
from server.engine.worker import EngineWorker
from server.long_work import running

T = TypeVar("T")


@dataclass
class Choice:
    """One choice of a request so far."""

    index: int
    tokens: list[Token] = field(default_factory=list)
    scored: tuple[Scored, ...] = ()
    """Given tokens with their log-probabilities: the input's, or the label's."""
    finish_reason: FinishReason | None = None
    usage: Usage | None = None

    def take(self, delta: Delta) -> None:
        """Add a step's delta."""
        assert self.finish_reason is None, "a choice ends once"
        if delta.token is not None:
            self.tokens.append(delta.token)
        self.scored = delta.scored or self.scored
        self.finish_reason = delta.finish_reason
        self.usage = delta.usage or self.usage

    @property
    def text(self) -> str:
        """Its text."""
        return "".join(token.text for token in self.tokens)

    @property
    def mean_logprob(self) -> float:
        """Mean log-probability of its tokens, by which choices are ranked; those of no tokens come last."""
        known = [token.logprob for token in self.tokens if token.logprob is not None]
        return sum(known) / len(known) if known else float("-inf")


async def run(request: Request, worker: EngineWorker, prepared: Prepared) -> AsyncGenerator[Delta]:
    """Yield the deltas of all choices of an engine request, as they come, and record them for its HTTP request.

    Raises what `EngineWorker.generate` raises; an error about one of several texts names that text.
    """
    observation = Observation(request, prepared)
    with locating_errors(prepared.location):
        try:
            seconds = record_of(request).seconds
            async with aclosing(worker.generate(prepared.request, prepared.soft_prompt, seconds=seconds)) as deltas:
                async for delta in deltas:
                    observation.take(delta)
                    yield delta
        except BaseException as error:
            observation.fail(error)
            raise


async def collect(deltas: AsyncIterator[Delta], num_choices: int = 1) -> list[Choice]:
    """All choices of one request, once it has ended."""
    choices = [Choice(index) for index in range(num_choices)]
    async for delta in deltas:
        choices[delta.index].take(delta)
    return choices


async def collect_all(requests: Sequence[AsyncIterator[Delta]], num_choices: int = 1) -> list[list[Choice]]:
    """All choices of several requests that run at once, in their order.

    If one fails, or the waiting task is cancelled, the others are aborted: nobody would read them.
    """
    if len(requests) == 1:  # the usual case needs no further task
        return [await collect(requests[0], num_choices)]
    async with running(*(collect(deltas, num_choices) for deltas in requests)) as collecting:
        answers: list[list[Choice]] = await asyncio.gather(*collecting)
        return answers


async def merge(requests: Sequence[AsyncGenerator[T]]) -> AsyncGenerator[tuple[int, T]]:
    """What several requests yield, as it comes, with the number of the request.

    If one fails the others are aborted; closing the iterator aborts all.
    """
    if len(requests) == 1:  # a stream of a single request, the usual case, needs no second queue and task
        async with aclosing(requests[0]) as deltas:
            async for delta in deltas:
                yield 0, delta
        return
    # At most one delta of each request waits here; the rest stay in the worker's streams, which limit unread deltas.
    arrived: asyncio.Queue[tuple[int, T | None]] = asyncio.Queue(len(requests))

    async def pump(number: int, deltas: AsyncIterator[T]) -> None:
        try:
            async for delta in deltas:
                await arrived.put((number, delta))
        except Exception:
            await arrived.put((number, None))
            raise
        await arrived.put((number, None))

    async with running(*(pump(number, deltas) for number, deltas in enumerate(requests))) as pumps:
        left = len(pumps)
        while left:
            number, added = await arrived.get()
            if added is not None:
                yield number, added
                continue
            await pumps[number]  # raises what ended it
            left -= 1
