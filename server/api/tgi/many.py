"""POST /generate_many: one text, answered by several tasks and versions at the same time, as one stream of events."""

import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter, Response

from server.api.auth import Generates, GuardedRoute, allow_task
from server.api.deps import Call, CallDep
from server.api.generation import GenerationOptions, Prepared, prepare
from server.api.outputs import collect, merge, run
from server.api.schemas import error_body
from server.api.sse import EVENTS, EventStream
from server.api.tgi.replies import Writer
from server.api.tgi.routes import ERRORS, options_of, refuse_too_much
from server.api.tgi.schemas import MANY, GenerateManyBody
from server.errors import Overloaded, PreludeError

log = logging.getLogger(__name__)

Event = Mapping[str, Any]

router = APIRouter(tags=["generate"], route_class=GuardedRoute, dependencies=[Generates])


@router.post(MANY, response_class=Response, responses=ERRORS | EVENTS)
async def generate_many(body: GenerateManyBody, call: CallDep) -> Response:
    """Answer one text by several tasks, versions or the frozen model at the same time, as server-sent events.

    Each event names its `target`, by its number in `targets`. A target's failure is an `error` event of that target;
    the others go on.
    """
    refuse_too_much("targets", len(body.targets), body.parameters)
    options = options_of(body.parameters, stream=body.parameters.choices is None)
    options = replace(options, answer_ids=tuple(body.answer_ids or ()))
    targets = [_Target(body, call, options, target.task).events() for target in body.targets]
    return EventStream(_tagged(targets), {})


async def _tagged(targets: list[AsyncGenerator[Event]]) -> AsyncGenerator[Event]:
    async with aclosing(merge(targets)) as merged:
        async for number, event in merged:
            yield {"target": number, **event}


@dataclass(frozen=True)
class _Target:
    """One of the targets of a request; None is the frozen model."""

    body: GenerateManyBody
    call: Call
    options: GenerationOptions
    task: str | None

    async def events(self) -> AsyncGenerator[Event]:
        """Yield its events; an error is the last one."""
        try:
            prepared = await self._prepare()
            yield self._start(prepared)
            async with aclosing(self._answer(prepared)) as answered:
                async for event in answered:
                    yield event
        except PreludeError as error:
            yield _failure(error)
        except Exception:
            log.exception("one of several targets failed")
            yield _failure(PreludeError("The server failed on this target."))

    async def _prepare(self) -> Prepared:
        call, body = self.call, self.body
        allow_task(call.request, self.task)
        return await prepare(
            call.worker,
            call.registry,
            task=self.task,
            text=body.inputs,
            user=body.user,
            key_id=call.key_id,
            wanted=self.options,
        )

    def _start(self, prepared: Prepared) -> Event:
        resolved = prepared.resolved
        named = {} if resolved is None else {"task": resolved.task, "version": resolved.version}
        return {"event": "start", "model": self.call.worker.model.name, **named}

    async def _answer(self, prepared: Prepared) -> AsyncGenerator[Event]:
        writer = Writer(self.call.worker, prepared, self.body.parameters, self.body.inputs)
        async with aclosing(run(self.call.request, self.call.worker, prepared)) as deltas:
            if self.options.labels:
                choices = await collect(deltas, prepared.request.num_choices)
                usage = choices[0].usage
                assert usage is not None, "a choice that has ended has its usage"
                details = {"virtual_tokens": usage.virtual_tokens, "cached_tokens": usage.cached_tokens}
                yield {"event": "choices", **writer.reply(choices).model_dump(exclude_unset=True), "details": details}
                return
            async with aclosing(writer.events(await anext(deltas), deltas)) as events:
                async for event in events:
                    yield {"event": "token", **event}


def _failure(error: PreludeError) -> Event:
    after = {"retry_after": error.retry_after} if isinstance(error, Overloaded) else {}
    return {"event": "error", "status": error.status, **error_body(error), **after}
