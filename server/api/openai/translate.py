"""Translates OpenAI bodies into engine requests: the version that answers, and the sampling parameters."""

import asyncio
import json
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from fastapi import Request

from server.api.auth import allow_task
from server.api.deps import Call
from server.api.generation import Prepared, encode_text, find_soft_prompt, locating_errors, location_of
from server.api.openai.errors import no_model
from server.api.openai.schemas import MAX_CHOICES, ChatBody, CompletionBody, SamplingBody
from server.api.outputs import run
from server.api.schemas import grammar_of, schema_text
from server.contracts import Delta, FinishReason, GenerationRequest, Grammar, GrammarKind, TemplatedText
from server.engine.worker import EngineWorker
from server.errors import InvalidRequest, InvalidTaskName, UnknownTask
from server.registry.task_views import Resolved
from server.soft_prompts.manifest import Manifest
from server.soft_prompts.soft_prompt import SoftPrompt
from server.validation import without_nulls

FINISH_REASONS = {FinishReason.LENGTH: "length", FinishReason.EOS_TOKEN: "stop", FinishReason.STOP_SEQUENCE: "stop"}


@dataclass(frozen=True)
class Target:
    """What a request's `model` referred to when the request arrived."""

    id: str
    model: str
    """The model's name as the request gave it."""
    resolved: Resolved | None
    soft_prompt: SoftPrompt | None
    key_id: str | None = None
    """The API key of the request."""

    @property
    def manifest(self) -> Manifest:
        """The soft prompt's manifest; an empty one for the frozen model alone."""
        return Manifest() if self.soft_prompt is None else self.soft_prompt.manifest

    def head(self, kind: str, worker: EngineWorker) -> dict[str, Any]:
        """The first fields of every reply and chunk."""
        # Besides the request, an answer depends on the model's weights and on the version's content.
        digest = "" if self.resolved is None else f"_{self.resolved.content.digest[:12]}"
        return {
            "id": self.id,
            "object": kind,
            "created": int(time.time()),
            "model": self.model,
            "system_fingerprint": f"fp_{worker.model.fingerprint[:12]}{digest}",
        }


def task_of(model: str, worker: EngineWorker) -> str | None:
    """The task, or task@version, that `model` names; None for the frozen model. No task can have the model's name."""
    return None if model == worker.model.name else model


async def find_target(call: Call, body: SamplingBody, kind: str) -> Target:
    """The target that `model` refers to.

    Raises:
        UnknownTask, Forbidden: there is no such model, or the key may not use it.
        VersionUnavailable: the version cannot be read, or not be served by this model.
    """
    task = task_of(body.model, call.worker)
    request_id = f"{kind}-{uuid.uuid4().hex}"
    allow_task(call.request, task)
    if task is None:
        return Target(request_id, body.model, None, None, call.key_id)
    try:
        resolved, soft_prompt = await find_soft_prompt(call.registry, task, body.user or request_id)
    except (InvalidTaskName, UnknownTask) as exc:
        raise no_model(task, exc) from exc
    return Target(request_id, body.model, resolved, soft_prompt, call.key_id)


async def encode_all(
    worker: EngineWorker, texts: Sequence[str | TemplatedText], *, add_special_tokens: bool = True
) -> list[list[int]]:
    """Token ids of several texts; raises InputTooLong if one can never fit the context."""
    ids = []
    for number, text in enumerate(texts):
        with locating_errors(location_of("prompt", number, len(texts))):
            ids.append(await encode_text(worker, text, add_special_tokens=add_special_tokens))
        # A hundred short texts take as long as a long text, which would be encoded on another thread.
        await asyncio.sleep(0)
    return ids


def prepare_all(
    worker: EngineWorker,
    target: Target,
    inputs: Sequence[Sequence[int]],
    body: CompletionBody | ChatBody,
    *,
    choices: int = 1,
    echoed_logprobs: int | None = None,
    continues_text: bool = False,
) -> list[Prepared]:
    """Build the engine's requests, one for each input.

    Args:
        choices: number of texts to generate for each input.
        echoed_logprobs: report the log-probabilities of the input too, with this many likely tokens at each position.
        continues_text: the output continues the input text, even for a task.

    Raises:
        InvalidRequest, InputTooLong: the request is too large, contradicts itself, or names unknown tokens.
    """
    _check_choices(len(inputs), choices, body)
    manifest = target.manifest
    fields = _sampling_fields(worker, body)
    if "temperature" not in fields and _asks_for_sampling(body, choices) and not manifest.generation.temperature:
        fields["temperature"] = 1.0
    if (grammar := _grammar(body)) is not None:
        fields["grammar"] = grammar
    wanted = max((top for top in (echoed_logprobs, body.prompt_logprobs) if top is not None), default=None)
    virtual = 0 if target.soft_prompt is None else target.soft_prompt.num_virtual_tokens
    task = None if target.resolved is None else target.resolved.task
    prepared = []
    for number, ids in enumerate(inputs):
        room = worker.model.max_model_len - virtual - len(ids)
        location = location_of("prompt", number, len(inputs))
        with locating_errors(location):
            params = manifest.generation.sampling_params(
                fields, room=room, seed=secrets.randbits(63), least="min_tokens", most=body.new_tokens_field
            )
        request = GenerationRequest(
            f"{target.id}-{number}",
            tuple(ids),
            params,
            task,
            target.key_id,
            n=1 if params.is_greedy else choices,
            input_logprobs=wanted is not None,
            input_top_logprobs=wanted or 0,
            continues_text=continues_text or target.soft_prompt is None,
        )
        prepared.append(Prepared(request, target.resolved, target.soft_prompt, location))
    return prepared


def _check_choices(inputs: int, choices: int, body: CompletionBody | ChatBody) -> None:
    """Refuse more choices than one request may have, and several texts if all would be the same."""
    if inputs * choices > MAX_CHOICES:
        raise InvalidRequest(
            f"{inputs} inputs with {choices} texts each are more than {MAX_CHOICES} choices.",
            remedy="Send several requests.",
        )
    if body.new_tokens == 0 and choices > 1:
        raise InvalidRequest(
            "With max_tokens 0 all texts are the same.", remedy="Send n 1 with max_tokens 0.", param="n"
        )


def start_all(
    request: Request, worker: EngineWorker, prepared: Sequence[Prepared], choices: int
) -> list[AsyncGenerator[Delta]]:
    """The deltas of each request; a request starts when its first delta is requested."""
    running = [(one, run(request, worker, one)) for one in prepared]
    return [deltas if one.request.n == choices else _repeated(deltas, choices) for one, deltas in running]


async def _repeated(deltas: AsyncGenerator[Delta], choices: int) -> AsyncGenerator[Delta]:
    """Repeat the deltas of a greedy text for several choices: all are the same, so the text is computed once."""
    async with aclosing(deltas):
        async for delta in deltas:
            for index in range(choices):
                is_last = delta.is_last and index == choices - 1
                yield replace(delta, index=index, is_last=is_last, scored=() if index else delta.scored)


def _sampling_fields(worker: EngineWorker, body: CompletionBody | ChatBody) -> dict[str, Any]:
    own = {
        "max_new_tokens": body.new_tokens,
        "min_new_tokens": body.min_tokens,
        "top_k": None if body.top_k is None else max(0, body.top_k),
        "seed": None if body.seed is None else body.seed % 2**64,
        "stop": None if body.stop is None else tuple(body.stop),
        "logit_bias": None if body.logit_bias is None else _biases(worker, body.logit_bias),
        "show_special": body.skip_special_tokens is False,
        "logprobs": body.wants_logprobs,
        "top_logprobs": body.most_likely,
    }
    return {**body.given("ignore_eos"), **without_nulls(own)}


def _asks_for_sampling(body: SamplingBody, choices: int) -> bool:
    """Whether the request asks for sampling but gives no temperature.

    Clients send OpenAI's neutral values (top_p 1, n 1) by default; these do not ask for sampling.
    """
    narrowed = (body.top_p or 1) < 1 or (body.top_k or 0) > 0 or (body.min_p or 0) > 0
    return narrowed or choices > 1


def _biases(worker: EngineWorker, biases: dict[str, float]) -> tuple[tuple[int, float], ...]:
    pairs = {int(key): bias for key, bias in biases.items()}
    unknown = next((token_id for token_id in pairs if token_id >= worker.model.vocab_size), None)
    if unknown is not None:
        raise InvalidRequest(
            f"logit_bias names the token {unknown}; this model has {worker.model.vocab_size:,}.", param="logit_bias"
        )
    return tuple(pairs.items())


def _grammar(body: CompletionBody | ChatBody) -> Grammar | None:
    """The grammar that the text must match, from `structured_outputs` or `response_format`."""
    form = body.structured_outputs
    if form is None:
        schema = body.response_format.schema_of_answer if isinstance(body, ChatBody) and body.response_format else None
        return None if schema is None else grammar_of(GrammarKind.JSON_SCHEMA, schema_text(schema))
    if form.regex is not None:
        return grammar_of(GrammarKind.REGEX, form.regex)
    if form.grammar is not None:
        return grammar_of(GrammarKind.EBNF, form.grammar)
    if form.choice is not None:
        return grammar_of(GrammarKind.CHOICE, json.dumps(form.choice))
    return grammar_of(GrammarKind.JSON_SCHEMA, schema_text(form.json_))
