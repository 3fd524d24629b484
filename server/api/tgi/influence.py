"""The heat map of an answer: how much each virtual token's value made each output token likely."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace

from server.api.generation import Prepared
from server.contracts import FinishReason, GenerationRequest, SamplingParams, Token
from server.engine.worker import EngineWorker
from server.errors import GenerationFailed, InvalidRequest
from server.executors import Executors
from server.interpret.influence import influence, zeroed_prefixes
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


async def influence_of(
    worker: EngineWorker, executors: Executors, prepared: Prepared, tokens: Sequence[Token]
) -> Influence:
    """Score an answer with the soft prompt, and once for each virtual token whose values are zero.

    Raises:
        InvalidRequest: the model keeps a recurrent state.
        Overloaded: too many requests wait.
        GenerationFailed: a scoring has failed.
    """
    assert prepared.soft_prompt is not None, "it has been checked"
    texts = [worker.text.tokens.text_of(token.id) if token.special else token.text for token in tokens]
    prefixes = await executors.interpretation.run(zeroed_prefixes, worker.frozen, prepared.soft_prompt)
    if not tokens:
        return influence([[]] * len(prefixes), texts)
    request = replace(
        prepared.request,
        sampling=SamplingParams(max_new_tokens=1),
        n=1,
        input_logprobs=False,
        labels=(tuple(token.id for token in tokens),),
    )
    turns = asyncio.Semaphore(AT_ONCE)

    async def score(prefix: SoftPrompt) -> list[float]:
        async with turns:
            return await _logprobs(worker, replace(request, request_id=uuid.uuid4().hex), prefix)

    async with running(*map(score, prefixes)) as scoring:
        return influence(await asyncio.gather(*scoring), texts)


async def _logprobs(worker: EngineWorker, request: GenerationRequest, prefix: SoftPrompt) -> list[float]:
    found: list[float] = []
    async with aclosing(worker.generate(request, prefix)) as deltas:
        async for delta in deltas:
            if delta.finish_reason in (FinishReason.FAILED, FinishReason.ABORTED):
                raise GenerationFailed(f"The influence could not be measured: {delta.error or 'it was aborted'}")
            found += [token.logprob or 0.0 for token in delta.scored or ()]
    return found
