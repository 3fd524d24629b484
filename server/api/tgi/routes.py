"""The native routes, as text-generation-inference defines them, with the task in the query."""

import asyncio
from collections.abc import Iterable
from typing import Annotated

from fastapi import APIRouter, Query, Response
from fastapi.responses import JSONResponse

from server.api.auth import Generates, GuardedRoute, allow_task
from server.api.deps import Call, CallDep, WorkerDep
from server.api.generation import (
    LONG_TEXT,
    GenerationOptions,
    Prepared,
    locating_errors,
    location_of,
    prepare,
    refuse_too_long,
)
from server.api.outputs import collect_all, run
from server.api.schemas import responses
from server.api.sse import EVENTS, OR_STREAM, EventStream, unless_disconnected
from server.api.tgi.influence import answer_with_influence, check_influence
from server.api.tgi.replies import Writer
from server.api.tgi.schemas import (
    MAX_GENERATED,
    MAX_SCORED,
    GenerateBody,
    GenerateParameters,
    GenerateReply,
    TokenizeBody,
    TokenizedBody,
)
from server.errors import InvalidRequest
from server.validation import without_nulls

ERRORS = responses(
    400,
    404,
    413,
    500,
    503,
    on_422="A field does not fit, or the request can never fit the context.",
    on_429="Too much is waiting already; Retry-After says when to come back.",
    on_504="The request took too long.",
)

router = APIRouter(tags=["generate"], route_class=GuardedRoute, dependencies=[Generates])

TaskQuery = Annotated[
    str | None,
    Query(description="The task, or task@version; without it the frozen model answers alone.", examples=["sms_spam"]),
]
Reply = GenerateReply | list[GenerateReply]


@router.post("/", response_model=list[GenerateReply], responses=ERRORS | OR_STREAM)
async def generate_list(body: GenerateBody, call: CallDep, task: TaskQuery = None) -> Response:
    """The same as /generate, for clients that are given only the server's address; the reply is always a list."""
    if isinstance(body.inputs, str) and not body.stream:
        body = body.model_copy(update={"inputs": [body.inputs]})
    return await _answer(body, task, bool(body.stream), call)


@router.post("/generate", response_model=Reply, responses=ERRORS | OR_STREAM)
async def generate(body: GenerateBody, call: CallDep, task: TaskQuery = None) -> Response:
    """Generate text for a task, or choose one of several texts; with `stream: true`, as /generate_stream."""
    return await _answer(body, task, bool(body.stream), call)


@router.post("/generate_stream", response_class=Response, responses=ERRORS | EVENTS)
async def generate_stream(body: GenerateBody, call: CallDep, task: TaskQuery = None) -> Response:
    """Generate text for a task as server-sent events, one per token."""
    return await _answer(body, task, True, call)


@router.post("/tokenize", responses={status: ERRORS[status] for status in (400, 413, 422, 429)})
async def tokenize(body: TokenizeBody, worker: WorkerDep) -> list[TokenizedBody]:
    """The tokens of a text, as the frozen model reads it."""
    text = body.inputs
    refuse_too_long(worker, text)
    tokenize = worker.text.tokenize
    found = await worker.threads.run(tokenize, text) if len(text) > LONG_TEXT else tokenize(text)
    return [TokenizedBody(id=id_, text=text[start:stop], start=start, stop=stop) for id_, start, stop in found]


async def _answer(body: GenerateBody, task: str | None, stream: bool, call: Call) -> Response:
    parameters, request, worker = body.parameters, call.request, call.worker
    named = _one_task(task, parameters.adapter_id)
    allow_task(request, named)
    texts = body.inputs if isinstance(body.inputs, list) else [body.inputs]
    wanted = options_of(parameters, stream)
    refuse_too_much("inputs", len(texts), parameters)
    _refuse_influence(body)
    if stream:
        _refuse_to_stream(body)
    writers = []
    for number, text in enumerate(texts):
        location = location_of("inputs", number, len(texts))
        with locating_errors(location):
            prepared = await prepare(
                worker,
                call.registry,
                task=named,
                text=text,
                user=body.user,
                key_id=call.key_id,
                wanted=wanted,
                location=location,
            )
        _refuse_equal_texts(prepared, parameters)
        if parameters.influence:
            check_influence(worker, prepared)
        writers.append(Writer(worker, prepared, parameters, text))
        # A hundred short texts take as long as a long text, which would be encoded on another thread.
        await asyncio.sleep(0)
    headers = _common(writer.prepared.headers(worker) for writer in writers)
    running = [run(request, worker, writer.prepared) for writer in writers]
    if stream:
        # The first token is awaited before the status is sent, so that a refusal is still a 4xx.
        first = await unless_disconnected(request, anext(running[0]))
        return EventStream(writers[0].events(first, running[0]), headers)
    measured = None
    if parameters.influence:
        answers, measured = await unless_disconnected(request, answer_with_influence(request, worker, prepared))
    else:
        answers = await unless_disconnected(request, collect_all(running, prepared.request.num_choices))
    replies = [writer.reply(choices) for writer, choices in zip(writers, answers, strict=True)]
    if measured is not None and replies[0].details is not None:
        replies[0].details.influence = measured
    bodies = [reply.model_dump(exclude_unset=True) for reply in replies]
    return JSONResponse(bodies if isinstance(body.inputs, list) else bodies[0], headers=headers)


def _common(headers: Iterable[dict[str, str]]) -> dict[str, str]:
    """The headers that are the same for all texts: in a canary, different versions may answer the texts of a list."""
    first, *others = headers
    return {name: value for name, value in first.items() if all(other[name] == value for other in others)}


def _one_task(query: str | None, adapter_id: str | None) -> str | None:
    if query is not None and adapter_id is not None and query != adapter_id:
        raise InvalidRequest(
            f"?task= says {query!r} and parameters.adapter_id says {adapter_id!r}.", remedy="Name the task once."
        )
    return query if query is not None else adapter_id


def refuse_too_much(what: str, count: int, parameters: GenerateParameters) -> None:
    """Refuse (InvalidRequest) a request for too many answers: `count` inputs or targets, with several answers each."""
    if parameters.choices is not None and count * len(parameters.choices) > MAX_SCORED:
        each, most = f"{len(parameters.choices)} choices", MAX_SCORED
    elif count * (parameters.best_of or 1) > MAX_GENERATED:
        each, most = f"{parameters.best_of} texts", MAX_GENERATED
    else:
        return
    raise InvalidRequest(
        f"{count} {what} with {each} each are more than {most} answers.", remedy="Send several requests."
    )


def _refuse_equal_texts(prepared: Prepared, parameters: GenerateParameters) -> None:
    if (parameters.best_of or 1) > 1 and prepared.request.sampling.is_greedy:
        raise InvalidRequest(
            "parameters.best_of: without sampling all texts are the same, and none is the best.",
            remedy="Set do_sample to true or a temperature above 0, or leave best_of out.",
            param="best_of",
        )


def _refuse_influence(body: GenerateBody) -> None:
    parameters = body.parameters
    if not parameters.influence:
        return
    if not parameters.wants_details:
        raise InvalidRequest("influence is a part of details.", remedy="Set `details` to true.", param="influence")
    if (isinstance(body.inputs, list) and len(body.inputs) > 1) or (parameters.best_of or 1) > 1:
        raise InvalidRequest(
            "influence is measured for one answer at a time.",
            remedy="Send one text in a request, without best_of.",
            param="influence",
        )


def _refuse_to_stream(body: GenerateBody) -> None:
    parameters = body.parameters
    whole = {
        "inputs": isinstance(body.inputs, list),
        "parameters.best_of": (parameters.best_of or 1) > 1,
        "parameters.choices": parameters.choices is not None,
        "parameters.influence": bool(parameters.influence),
        "parameters.decoder_input_details": bool(parameters.decoder_input_details),
    }
    for name, is_whole in whole.items():
        if is_whole:
            what = "a list of texts" if name == "inputs" else name.removeprefix("parameters.")
            raise InvalidRequest(f"{name}: {what} cannot be streamed.", remedy="Send it to /generate without stream.")


def options_of(parameters: GenerateParameters, stream: bool) -> GenerationOptions:
    """Translate a request's parameters into the engine's names."""
    best_of = parameters.best_of or 1
    own = {
        "stop": None if parameters.stop is None else tuple(parameters.stop),
        "ignore_eos": parameters.ignore_eos_token,
        "grammar": None if parameters.grammar is None else parameters.grammar.grammar,
        "logprobs": stream or parameters.wants_details or best_of > 1,
        "top_logprobs": parameters.top_n_tokens or 0,
        **({"temperature": 0.0} if parameters.do_sample is False else {}),
    }
    same = parameters.given("max_new_tokens", "min_new_tokens", "top_k", "typical_p", "seed")
    return GenerationOptions(
        {**same, **without_nulls(own)},
        sample=_wants_sampling(parameters),
        truncate=parameters.truncate,
        n=best_of,
        input_logprobs=bool(parameters.decoder_input_details),
        labels=parameters.choices or (),
    )


def _wants_sampling(parameters: GenerateParameters) -> bool:
    """Whether the request asks for sampling but gives no temperature."""
    # Clients send neutral values of the newer parameters by default, so these count only if they are not neutral; top_k
    # and top_p count whenever they are set.
    newer = (parameters.min_p or 0.0) > 0 or (parameters.typical_p or 1.0) < 1
    asked = parameters.do_sample or parameters.top_k is not None or parameters.top_p is not None or newer
    return bool(asked) and parameters.do_sample is not False and parameters.temperature is None
