"""The native routes, in text-generation-inference's words, with the task in the query."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import JSONResponse

from server.api.auth import Generates, GuardedRoute, allow_task
from server.api.deps import RegistryDep, WorkerDep, known_query
from server.api.generation import Prepared, prepare
from server.api.schemas import (
    DetailsBody,
    ErrorBody,
    GenerateBody,
    GenerateParameters,
    GenerateReply,
    TokenBody,
)
from server.api.sse import EventStream, unless_disconnected
from server.core import Delta, Token
from server.engine.worker import EngineWorker
from server.errors import InvalidRequest
from server.registry.registry import Registry

ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "The body cannot be read as JSON text."},
    404: {"model": ErrorBody, "description": "No such task or version."},
    413: {"model": ErrorBody, "description": "The body is too large."},
    422: {"model": ErrorBody, "description": "A field does not fit, or the request can never fit the context."},
    500: {"model": ErrorBody, "description": "The engine could not finish the request."},
    503: {"model": ErrorBody, "description": "The server is shutting down."},
}

router = APIRouter(
    tags=["generate"], responses=ERRORS, route_class=GuardedRoute, dependencies=[Generates, Depends(known_query)]
)

TaskQuery = Query(None, description="The task, or task@version; without it the frozen model answers alone.")


@router.post("/generate", response_model=GenerateReply)
async def generate(
    body: GenerateBody, request: Request, worker: WorkerDep, registry: RegistryDep, task: str | None = TaskQuery
) -> Response:
    """Generate text for a task; with `stream: true`, as /generate_stream."""
    return await _answer(body, task, body.stream, request, worker, registry)


@router.post("/", response_model=GenerateReply)
async def compat_generate(
    body: GenerateBody, request: Request, worker: WorkerDep, registry: RegistryDep, task: str | None = TaskQuery
) -> Response:
    """The same as /generate, for clients that know only the server's address (huggingface_hub)."""
    return await _answer(body, task, body.stream, request, worker, registry)


@router.post("/generate_stream")
async def generate_stream(
    body: GenerateBody, request: Request, worker: WorkerDep, registry: RegistryDep, task: str | None = TaskQuery
) -> Response:
    """Generate text for a task as server-sent events, one per token."""
    return await _answer(body, task, True, request, worker, registry)


async def _answer(
    body: GenerateBody, task: str | None, stream: bool, request: Request, worker: EngineWorker, registry: Registry
) -> Response:
    parameters = body.parameters
    named = _one_task(task, parameters.adapter_id)
    allow_task(request, named)
    prepared = await prepare(
        worker,
        registry,
        task=named,
        text=body.inputs,
        user=body.user,
        sampling=_sampling_fields(parameters, stream),
        sample=_wants_sampling(parameters),
        truncate=parameters.truncate,
    )
    deltas = worker.generate(prepared.request, prepared.soft_prompt)
    headers = prepared.headers(worker)
    if stream:
        # The first token is awaited before the status goes out, so that a refusal is still a 4xx.
        first = await unless_disconnected(request, anext(deltas))
        return EventStream(_events(first, deltas, body, prepared), headers)
    reply = await unless_disconnected(request, _collect(deltas, body, prepared))
    return JSONResponse(reply.model_dump(exclude_unset=True), headers=headers)


def _one_task(query: str | None, adapter_id: str | None) -> str | None:
    if query is not None and adapter_id is not None and query != adapter_id:
        raise InvalidRequest(
            f"?task= says {query!r} and parameters.adapter_id says {adapter_id!r}.", remedy="Name the task once."
        )
    return query if query is not None else adapter_id


def _sampling_fields(parameters: GenerateParameters, stream: bool) -> dict[str, Any]:
    """The fields of SamplingParams that the request sets itself."""
    names = ("max_new_tokens", "min_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed")
    fields = {name: getattr(parameters, name) for name in names if getattr(parameters, name) is not None}
    if parameters.stop is not None:
        fields["stop"] = tuple(parameters.stop)
    if parameters.ignore_eos_token is not None:
        fields["ignore_eos"] = parameters.ignore_eos_token
    if parameters.do_sample is False:
        fields["temperature"] = 0.0
    fields["logprobs"] = stream or bool(parameters.details)
    return fields


def _wants_sampling(parameters: GenerateParameters) -> bool:
    """Whether the request asks for sampling without saying at which temperature."""
    asked = parameters.do_sample or parameters.top_k is not None or parameters.top_p is not None
    return bool(asked) and parameters.do_sample is not False and parameters.temperature is None


async def _collect(deltas: AsyncGenerator[Delta], body: GenerateBody, prepared: Prepared) -> GenerateReply:
    received = [delta async for delta in deltas]
    tokens = [delta.token for delta in received if delta.token is not None]
    reply = GenerateReply(generated_text=_full_text(tokens, body))
    if body.parameters.details:
        details = _details(received[-1], prepared)
        reply.details = details.model_copy(update={"prefill": [], "tokens": [_token_body(token) for token in tokens]})
    return reply


async def _events(
    first: Delta, deltas: AsyncGenerator[Delta], body: GenerateBody, prepared: Prepared
) -> AsyncGenerator[dict[str, Any]]:
    """One event per token; the last one carries the whole text and, if asked for, details."""
    tokens: list[Token] = []
    delta = first
    try:
        while True:
            assert delta.token is not None, "every delta of a stream that goes on has a token"
            tokens.append(delta.token)
            ended = delta.finish_reason is not None
            yield {
                "index": len(tokens),
                "token": _token_body(delta.token).model_dump(),
                "generated_text": _full_text(tokens, body) if ended else None,
                "details": _details(delta, prepared).model_dump(exclude={"prefill", "tokens"})
                if ended and body.parameters.details
                else None,
            }
            if ended:
                return
            delta = await anext(deltas)
    finally:
        await deltas.aclose()


def _full_text(tokens: list[Token], body: GenerateBody) -> str:
    text = "".join(token.text for token in tokens if not token.special)
    return body.inputs + text if body.parameters.return_full_text else text


def _details(last: Delta, prepared: Prepared) -> DetailsBody:
    assert last.usage is not None, "the last delta carries the usage"
    sampling = prepared.request.sampling
    return DetailsBody(
        finish_reason=str(last.finish_reason),
        generated_tokens=last.usage.output_tokens,
        input_length=last.usage.input_tokens,
        virtual_tokens=last.usage.virtual_tokens,
        seed=None if sampling.is_greedy else sampling.seed,
    )


def _token_body(token: Token) -> TokenBody:
    return TokenBody(id=token.id, text=token.text, logprob=token.logprob, special=token.special)
