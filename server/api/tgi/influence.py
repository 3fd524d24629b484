"""The heat map of an answer: how much each virtual token's value made each output token likely."""

import asyncio
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import replace

from fastapi import Request

from server.api.generation import Prepared
from server.api.outputs import Choice, collect_all, run
from server.api.telemetry.observation import Observation
from server.api.telemetry.record import record_of
from server.contracts import Delta, FinishReason, SamplingParams, Token
from server.engine.worker import EngineWorker
from server.errors import GenerationFailed, InvalidRequest, PreludeError
from server.executors import Executors
from server.interpret.influence import check_model, influence, zeroed_prefixes
from server.interpret.results import Influence
from server.long_work import running
from server.soft_prompts.soft_prompt import SoftPrompt

MOST_CELLS = 16_384
"""Maximum of virtual tokens times new tokens."""
MOST_BYTES = 256 * 2**20
"""Memory of the soft prompts with one value zeroed, as keys and values."""
BYTES_OF_A_NUMBER = 4
AT_ONCE = 64
"""Maximum number of scorings in flight for one request."""


def check_influence(worker: EngineWorker, prepared: Prepared) -> None:
    """Refuse (InvalidRequest) a heat map that has no rows, or is too large, before anything is generated."""
    if prepared.soft_prompt is None:
        raise InvalidRequest(
            "The frozen model alone has no virtual tokens whose influence could be measured.",
            remedy="Name a task, or leave out `influence`.",
            param="influence",
        )
    check_model(worker.model)
    virtual, new = prepared.soft_prompt.num_virtual_tokens, prepared.request.sampling.max_new_tokens
    if virtual * new > MOST_CELLS:
        raise InvalidRequest(
            f"The influence of {virtual} virtual tokens on up to {new} new tokens is {virtual * new:,} numbers; "
            f"at most {MOST_CELLS:,} are computed.",
            remedy=f"Set max_new_tokens to at most {MOST_CELLS // virtual}, or leave out `influence`.",
            param="influence",
        )
    spec = worker.model
    row = 2 * spec.num_kv_layers * spec.num_key_value_heads * spec.head_dim * BYTES_OF_A_NUMBER
    needed = (virtual + 1) * virtual * row
    if needed > MOST_BYTES:
        raise InvalidRequest(
            f"The influence of {virtual} virtual tokens takes {needed:,} bytes; at most {MOST_BYTES:,} are used.",
            remedy="Ask for the answer without `influence`.",
            param="influence",
        )


async def answer_with_influence(
    request: Request, worker: EngineWorker, prepared: Prepared
) -> tuple[list[list[Choice]], Influence]:
    """An answer and its heat map. The scorings count towards no limit: they belong to this one accepted request.

    Raises:
        What `EngineWorker.generate` raises.
        Overloaded: too many interpretations wait.
        GenerationFailed: a scoring has failed.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(worker.holding(prepared.request))
        except PreludeError as error:
            Observation(request, prepared).fail(error)
            raise
        prepared = replace(prepared, request=replace(prepared.request, is_part=True))
        answers = await collect_all([run(request, worker, prepared)])
        return answers, await _influence_of(request, worker, prepared, answers[0][0].tokens)


async def _influence_of(
    request: Request, worker: EngineWorker, prepared: Prepared, tokens: Sequence[Token]
) -> Influence:
    """Score an answer with the soft prompt, and once for each virtual token whose values are zero."""
    assert prepared.soft_prompt is not None, "it has been checked"
    texts = [worker.text.tokens.text_of(token.id) if token.special else token.text for token in tokens]
    executors: Executors = request.app.state.executors
    prefixes = await executors.interpretation.run(zeroed_prefixes, worker.frozen, prepared.soft_prompt)
    if not tokens:
        return influence([[]] * len(prefixes), texts)
    scoring_request = replace(
        prepared.request,
        sampling=SamplingParams(max_new_tokens=1),
        n=1,
        input_logprobs=False,
        labels=(tuple(token.id for token in tokens),),
    )
    turns = asyncio.Semaphore(AT_ONCE)

    async def score(prefix: SoftPrompt) -> list[float]:
        async with turns:
            part, seconds = replace(scoring_request, request_id=uuid.uuid4().hex), record_of(request).seconds
            return await _logprobs(worker.generate(part, prefix, seconds=seconds))

    async with running(*map(score, prefixes)) as scoring:
        return influence(await asyncio.gather(*scoring), texts)


async def _logprobs(generated: AsyncGenerator[Delta]) -> list[float]:
    found: list[float] = []
    async with aclosing(generated) as deltas:
        async for delta in deltas:
            if delta.finish_reason in (FinishReason.FAILED, FinishReason.ABORTED):
                raise GenerationFailed(f"The influence could not be measured: {delta.error or 'it was aborted'}")
            found += [token.logprob or 0.0 for token in delta.scored or ()]
    return found
