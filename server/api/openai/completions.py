"""POST /v1/completions: continues texts or token ids without any template."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from server.api.auth import Generates, GuardedRoute
from server.api.deps import CallDep
from server.api.generation import locating_errors, location_of
from server.api.openai.errors import MISSING, REFUSALS, OpenAIErrorBody
from server.api.openai.logprobs import completion_logprobs, prompt_logprobs, text_offsets
from server.api.openai.replies import CompletionReply, usage_of
from server.api.openai.schemas import CompletionBody
from server.api.openai.stream import Body, stream
from server.api.openai.translate import FINISH_REASONS, encode_all, find_target, prepare_all, start_all
from server.api.outputs import Choice, collect_all
from server.api.schemas import responses
from server.api.sse import OR_STREAM, unless_disconnected
from server.contracts import Delta, Scored, Token
from server.engine.worker import EngineWorker
from server.errors import EmptyInput, InputTooLong, InvalidRequest

ERRORS = (
    REFUSALS
    | MISSING
    | responses(
        413,
        500,
        model=OpenAIErrorBody,
        on_429="Too much is waiting; Retry-After says when to try again.",
        on_503="The server is shutting down, or cannot read the version.",
        on_504="The request took longer than the server lets any take.",
    )
)

router = APIRouter(tags=["openai"], responses=ERRORS, route_class=GuardedRoute, dependencies=[Generates])


@dataclass(frozen=True)
class _Form:
    """Renders the choices of a request as parts of replies and chunks."""

    worker: EngineWorker
    body: CompletionBody
    texts: Sequence[str]
    """The input texts that `echo` puts before the output; empty texts without `echo`."""

    def choice(self, number: int, choices: Sequence[Choice], at: int, index: int) -> Body:
        """Render a choice that has ended: the one `at` this index of the input's choices, as `index` of the reply."""
        choice = choices[at]
        assert choice.finish_reason is not None, "the request has ended"
        return {
            "index": index,
            "text": self.texts[number] + choice.text,
            "logprobs": self._logprobs(number, _given(choices), choice.tokens),
            "finish_reason": FINISH_REASONS[choice.finish_reason],
            **prompt_logprobs(self.worker.text.tokens, _given(choices), self.body.prompt_logprobs),
        }

    def chunk(self, number: int, choices: Sequence[Choice], delta: Delta) -> list[Body]:
        """Render a delta as chunk choices; empty if it adds nothing that the client sees."""
        choice = choices[delta.index]
        tokens = [] if delta.token is None else [delta.token]
        begins = len(choice.tokens) <= 1
        text = (self.texts[number] if begins else "") + "".join(token.text for token in tokens)
        if not text and self.body.logprobs is None and delta.finish_reason is None:
            return []
        given = _given(choices) if begins else ()
        return [
            {
                "index": number * self.body.generated + choice.index,
                "text": text,
                "logprobs": self._logprobs(number, given, tokens),
                "finish_reason": None if delta.finish_reason is None else FINISH_REASONS[delta.finish_reason],
            }
        ]

    def _logprobs(self, number: int, given: Sequence[Scored], tokens: Sequence[Token]) -> Body | None:
        if self.body.logprobs is None:
            return None
        offsets = [len(self.texts[number]) + token.offset for token in tokens]
        if not self.body.echo:
            return completion_logprobs(self.worker.text.tokens, tokens, offsets, self.body.logprobs)
        at = text_offsets(self.texts[number], [self.worker.text.tokens.bytes_of(token.id) for token in given])
        return completion_logprobs(self.worker.text.tokens, [*given, *tokens], [*at, *offsets], self.body.logprobs)


def _given(choices: Sequence[Choice]) -> Sequence[Scored]:
    """The input's tokens, which the engine reports once, with the first choice."""
    return choices[0].scored


@router.post("/v1/completions", response_model=CompletionReply, responses=OR_STREAM)
async def complete(body: CompletionBody, call: CallDep) -> Response:
    """Continue texts; with `stream: true` as server-sent events."""
    request, worker = call.request, call.worker
    target = await find_target(call, body, "cmpl")
    texts, inputs = await _inputs(worker, body)
    echoed = body.logprobs if body.echo else None
    if echoed is None and body.max_tokens == 0:
        echoed = 0  # there is nothing else to compute
    prepared = prepare_all(worker, target, inputs, body, choices=body.generated, echoed_logprobs=echoed)
    headers = prepared[0].headers(worker)
    head = target.head("text_completion", worker)
    form = _Form(worker, body, texts)
    running = start_all(request, worker, prepared, body.generated)
    if body.stream:
        return await stream(request, running, body.generated, headers, form.chunk, head, body.include_usage)
    requests = await unless_disconnected(request, collect_all(running, body.generated))
    return JSONResponse({**head, "choices": _answered(form, requests), "usage": usage_of(requests)}, headers=headers)


def _answered(form: _Form, requests: Sequence[Sequence[Choice]]) -> list[Body]:
    """The choices of the reply; if `best_of` generated more than `n`, only the best `n`, best first."""
    n = form.body.n or 1
    answered = []
    for number, choices in enumerate(requests):
        ranked = [choice.index for choice in choices]
        if len(choices) > n:
            ranked = sorted(ranked, key=lambda at: choices[at].mean_logprob, reverse=True)[:n]
        answered += [form.choice(number, choices, at, number * n + location) for location, at in enumerate(ranked)]
    return answered


async def _inputs(worker: EngineWorker, body: CompletionBody) -> tuple[list[str], list[list[int]]]:
    """The texts to echo, and token ids of all inputs; the error for an invalid input names it."""
    given: list[Any] = body.prompt if isinstance(body.prompt, list) else [body.prompt]
    if isinstance(given[0], str):
        texts: list[str] = given
        if "" in texts:
            with locating_errors(location_of("prompt", texts.index(""), len(texts))):
                raise EmptyInput("The text is empty.", remedy="Send at least one character.", param="prompt")
        return texts if body.echo else [""] * len(texts), await encode_all(worker, texts)
    lists: list[list[int]] = given if isinstance(given[0], list) else [given]
    for number, ids in enumerate(lists):
        if len(ids) > worker.model.max_model_len:
            with locating_errors(location_of("prompt", number, len(lists))):
                raise InputTooLong(
                    f"The input has {len(ids):,} tokens; the context holds {worker.model.max_model_len:,}."
                )
        if max(ids) >= worker.model.vocab_size:
            location = location_of("prompt", number, len(lists)) or "prompt"
            raise InvalidRequest(
                f"{location}: there is no token {max(ids)}; this model has {worker.model.vocab_size:,}, from 0 on.",
                param="prompt",
            )
    if not body.echo:
        return [""] * len(lists), lists
    return [await worker.threads.run(worker.text.tokens.decode, ids) for ids in lists], lists
