"""Turns a front end's request into a request of the engine: soft prompt, text and sampling parameters."""

from __future__ import annotations

import asyncio
import secrets
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import quote

from server.contracts import GenerationRequest, TemplatedText
from server.engine.text.choice_scoring import encode_labels
from server.engine.worker import EngineWorker
from server.errors import EmptyInput, InputTooLong, UnknownToken, VersionUnavailable
from server.registry.registry import Registry
from server.registry.task_views import Resolved
from server.soft_prompts.manifest import Manifest
from server.soft_prompts.soft_prompt import SoftPrompt

LONG_TEXT = 4096
"""Characters beyond which a text is tokenised on another thread than the event loop's."""

FETCH_SECONDS = 60.0
"""How long a request waits for its soft prompt to be read from the store. The read goes on after that, so a later
request may find it in memory."""


@dataclass(frozen=True)
class Prepared:
    """A request that is ready for the engine, and what it was resolved to."""

    request: GenerationRequest
    resolved: Resolved | None
    soft_prompt: SoftPrompt | None
    location: str | None = None
    """Where its text stands in the body, if there are several."""

    def headers(self, worker: EngineWorker) -> dict[str, str]:
        """Headers that say what answered; a model's name that is not ASCII is percent-encoded."""
        headers = {"Prelude-Model": quote(worker.model.name, safe=" !#$&'()*+,/:;=?@[]")}
        if self.resolved is not None:
            headers |= {"Prelude-Task": self.resolved.task, "Prelude-Version": str(self.resolved.version)}
        return headers


def location_of(field: str, number: int, count: int) -> str | None:
    """The position of a text in the body's list, for errors; None if it is the only text."""
    return f"{field}.{number}" if count > 1 else None


@contextmanager
def locating_errors(location: str | None) -> Iterator[None]:
    """Let the refusal of one of several texts say which."""
    try:
        yield
    except (EmptyInput, InputTooLong, UnknownToken) as error:
        if location is None:
            raise
        raise error.at(location) from error


@dataclass(frozen=True)
class GenerationOptions:
    """The options of a request for an answer."""

    sampling: Mapping[str, Any] = field(default_factory=dict)
    """The fields of SamplingParams that the request sets itself."""
    sample: bool = False
    """Sampling without a temperature is requested: the task's applies, or 1 if the task decodes greedily."""
    truncate: int | None = None
    """Keep only this many input tokens, the last ones."""
    n: int = 1
    input_logprobs: bool = False
    labels: Sequence[str] = ()
    """Texts to score; nothing is generated then."""
    answer_ids: tuple[int, ...] = ()
    """Tokens that the answer begins with; the model continues them."""


async def prepare(
    worker: EngineWorker,
    registry: Registry,
    *,
    task: str | None,
    text: str,
    user: str | None = None,
    key_id: str | None = None,
    wanted: GenerationOptions | None = None,
    location: str | None = None,
) -> Prepared:
    """Resolve the task, render its template, tokenise, and merge the sampling parameters.

    Args:
        task: `task` or `task@version`; None is the frozen model alone.
        user: in a canary, all requests with the same value are answered by the same version.
        location: location of the text in the body, if there are several.

    Raises:
        UnknownTask, InvalidTaskName, VersionUnavailable, EmptyInput, InputTooLong.
        InvalidRequest: labels are the same to the model.
    """
    wanted = wanted or GenerationOptions()
    request_id = uuid.uuid4().hex
    resolved = soft_prompt = None
    if task is not None:
        resolved, soft_prompt = await find_soft_prompt(registry, task, user or request_id)
    if not text:
        raise EmptyInput("The text is empty.")
    manifest = Manifest() if soft_prompt is None else soft_prompt.manifest
    if wanted.truncate is None:
        refuse_too_long(worker, text)  # before a template makes a second text of it
    input_ids = [*await encode_text(worker, manifest.render(text), wanted.truncate), *wanted.answer_ids]
    defaults, sampling = manifest.generation, wanted.sampling
    if wanted.sample and not defaults.temperature:
        sampling = {**sampling, "temperature": 1.0}
    virtual = 0 if soft_prompt is None else soft_prompt.num_virtual_tokens
    room = worker.model.max_model_len - virtual - len(input_ids)
    request = GenerationRequest(
        request_id,
        tuple(input_ids),
        defaults.sampling_params(sampling, room=room, seed=secrets.randbits(63)),
        resolved.task if resolved else None,
        key_id,
        n=wanted.n,
        input_logprobs=wanted.input_logprobs,
        continues_text=soft_prompt is None or bool(wanted.answer_ids),
        labels=await _encode_labels(worker, wanted.labels, continue_text=soft_prompt is None),
    )
    return Prepared(request, resolved, soft_prompt, location)


async def _encode_labels(
    worker: EngineWorker, labels: Sequence[str], *, continue_text: bool
) -> tuple[tuple[int, ...], ...]:
    encode = partial(encode_labels, worker.text, labels, continue_text=continue_text)
    return await worker.threads.run(encode) if sum(map(len, labels)) > LONG_TEXT else encode()


async def find_soft_prompt(registry: Registry, reference: str, key: str) -> tuple[Resolved, SoftPrompt]:
    """The version that a reference means, and its soft prompt; from the store if it is not in memory.

    If the version is deleted while it is being read, the reference is resolved again, because another version may be
    live by then.

    Raises:
        UnknownTask, InvalidTaskName.
        VersionUnavailable: the version cannot be read, or not be served by this model.
    """
    while True:
        resolved = registry.resolve(reference, key)
        soft_prompt = registry.cached(resolved)
        if soft_prompt is not None:
            return resolved, soft_prompt
        try:
            # Other requests may wait for the same future, so one client's disconnect must not cancel it.
            fetched = asyncio.shield(asyncio.wrap_future(registry.fetch(resolved)))
            return resolved, await asyncio.wait_for(fetched, FETCH_SECONDS)
        except TimeoutError as exc:
            raise VersionUnavailable(
                f"The store did not give {resolved.task}@{resolved.version} within {FETCH_SECONDS:g} s.",
                remedy="Send the request again; if it happens again, check the store.",
            ) from exc
        except VersionUnavailable:
            if registry.resolve(reference, key) == resolved:
                raise


async def encode_text(
    worker: EngineWorker, text: str | TemplatedText, truncate: int | None = None, *, add_special_tokens: bool = True
) -> list[int]:
    """Token ids of a text that is ready for the model, the last `truncate` of them; raises InputTooLong.

    The tokenizer blocks all other threads while it works, a second for some million characters, so a text that can
    never fit is refused, or cut, before.
    """
    whole = TemplatedText(text) if isinstance(text, str) else text
    if truncate is None:
        refuse_too_long(worker, whole.text)
    else:
        whole = worker.text.length_bound.end_of(whole)
    encode = partial(worker.text.encode, whole, add_special_tokens=add_special_tokens)
    ids = await worker.threads.run(encode) if len(whole.text) > LONG_TEXT else encode()
    if truncate is not None:
        return ids[-truncate:]
    if len(ids) > worker.model.max_model_len:  # the texts after it are not even tokenised
        raise InputTooLong(f"The input has {len(ids):,} tokens; the context holds {worker.model.max_model_len:,}.")
    return ids


def refuse_too_long(worker: EngineWorker, text: str) -> None:
    """Refuse (InputTooLong) a text that can never fit, before it is tokenised."""
    if 4 * len(text) <= worker.model.max_model_len:  # a character has at most four bytes, and each token at least one
        return
    least = worker.text.length_bound.least_tokens(text)
    if least > worker.model.max_model_len:
        raise InputTooLong(
            f"The input has {len(text):,} characters, so more tokens than the context of "
            f"{worker.model.max_model_len:,} holds."
        )
