"""Renders choices as text-generation-inference's replies and events."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Sequence
from typing import Any

from server.api.generation import Prepared
from server.api.outputs import Choice
from server.api.tgi.schemas import (
    ChoiceBody,
    DetailsBody,
    GenerateBody,
    GenerateParameters,
    GenerateReply,
    InputTokenBody,
    SequenceBody,
    TokenBody,
)
from server.contracts import Candidate, Delta, Token
from server.engine.text.choice_scoring import judge
from server.engine.worker import EngineWorker

IN_STREAMS = {"finish_reason", "generated_tokens", "input_length", "prompt_tokens", "virtual_tokens", "seed"}
"""Fields of `details` in a stream's last event."""


def reply_of(
    choices: Sequence[Choice], prepared: Prepared, text: str, parameters: GenerateParameters, worker: EngineWorker
) -> GenerateReply:
    """The reply to one text."""
    front = text if parameters.return_full_text else ""
    if parameters.choices is not None:
        return _chosen(choices, parameters)
    # The sort is stable: of equal choices, the first wins.
    best, *others = sorted(choices, key=lambda choice: -choice.mean_logprob)
    reply = GenerateReply(generated_text=front + best.text)
    if parameters.wants_details:
        prefill = _prefill(choices, worker)
        reply.details = _details(best, prefill, prepared, parameters, worker)
        if others:
            sequences = [_sequence(it, prefill, prepared, front, parameters, worker) for it in others]
            reply.details.best_of_sequences = sequences
    return reply


async def events(
    first: Delta, deltas: AsyncGenerator[Delta], body: GenerateBody, prepared: Prepared, worker: EngineWorker
) -> AsyncGenerator[dict[str, Any]]:
    """Yield one event per token; the last one has the whole text and, if requested, details."""
    parameters, choice = body.parameters, Choice(0)
    delta = first
    try:
        while True:
            assert delta.token is not None, "every delta of a stream that goes on has a token"
            choice.take(delta)
            ended = delta.finish_reason is not None
            event: dict[str, Any] = {
                "index": len(choice.tokens),
                "token": _token(delta.token, worker).model_dump(),
                "generated_text": None,
                "details": None,
            }
            if parameters.top_n_tokens:
                event["top_tokens"] = [token.model_dump() for token in _top(delta.token.top, worker)]
            if ended:
                front = body.inputs if parameters.return_full_text and isinstance(body.inputs, str) else ""
                event["generated_text"] = front + choice.text
                if parameters.details:
                    details = _details(choice, [], prepared, parameters, worker)
                    event["details"] = details.model_dump(include=IN_STREAMS)
            yield event
            if ended:
                return
            delta = await anext(deltas)
    finally:
        await deltas.aclose()


def _chosen(choices: Sequence[Choice], parameters: GenerateParameters) -> GenerateReply:
    labels = parameters.choices or []
    judged = judge(labels, [choice.scored for choice in choices], length_normalized=bool(parameters.length_normalized))
    best = max(judged, key=lambda label: label.probability)  # of equal labels, the first wins
    bodies = [
        ChoiceBody(text=it.text, probability=it.probability, logprob=it.logprob, tokens=it.num_tokens) for it in judged
    ]
    return GenerateReply(generated_text=best.text, choices=bodies)


def _prefill(choices: Sequence[Choice], worker: EngineWorker) -> list[InputTokenBody]:
    """The input's tokens, which all choices share; the engine reports them once, with the first choice."""
    return [
        InputTokenBody(id=scored.id, text=worker.text.tokens.text_of(scored.id), logprob=scored.logprob)
        for scored in choices[0].scored
    ]


def _details(
    choice: Choice,
    prefill: list[InputTokenBody],
    prepared: Prepared,
    parameters: GenerateParameters,
    worker: EngineWorker,
) -> DetailsBody:
    assert choice.usage is not None, "a choice that has ended has its usage"
    details = DetailsBody(
        finish_reason=str(choice.finish_reason),
        generated_tokens=choice.usage.output_tokens,
        input_length=choice.usage.input_tokens,
        prompt_tokens=choice.usage.input_tokens,
        virtual_tokens=choice.usage.virtual_tokens,
        seed=_seed(prepared),
        prefill=prefill,
        tokens=[_token(token, worker) for token in choice.tokens],
    )
    if parameters.top_n_tokens:
        details.top_tokens = _all_top(choice.tokens, worker)
    return details


def _sequence(
    choice: Choice,
    prefill: list[InputTokenBody],
    prepared: Prepared,
    front: str,
    parameters: GenerateParameters,
    worker: EngineWorker,
) -> SequenceBody:
    sequence = SequenceBody(
        generated_text=front + choice.text,
        finish_reason=str(choice.finish_reason),
        generated_tokens=len(choice.tokens),
        seed=_seed(prepared),
        prefill=prefill,
        tokens=[_token(token, worker) for token in choice.tokens],
    )
    if parameters.top_n_tokens:
        sequence.top_tokens = _all_top(choice.tokens, worker)
    return sequence


def _seed(prepared: Prepared) -> int | None:
    sampling = prepared.request.sampling
    return None if sampling.is_greedy else sampling.seed


def _token(token: Token, worker: EngineWorker) -> TokenBody:
    """Render a token. A special token is not part of the text; its `text` is its name."""
    text = worker.text.tokens.text_of(token.id) if token.special else token.text
    return TokenBody(id=token.id, text=text, logprob=token.logprob, special=token.special)


def _all_top(tokens: Iterable[Token], worker: EngineWorker) -> list[list[TokenBody]]:
    return [_top(token.top, worker) for token in tokens]


def _top(candidates: Sequence[Candidate], worker: EngineWorker) -> list[TokenBody]:
    return [
        TokenBody(
            id=candidate.id,
            text=worker.text.tokens.text_of(candidate.id),
            logprob=candidate.logprob,
            special=candidate.id in worker.text.tokens.special_ids,
        )
        for candidate in candidates
    ]
