"""litellm, which speaks to Prelude as to any server of OpenAI's protocol: `openai/TASK` and an address."""

from __future__ import annotations

import gc
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from server.keys.file import add_key
from server.keys.key import Scope
from tests.api.clients.support import KEY, SCHEMA, Lazily, chat_answer, rendered
from tests.api.live import LiveServer, live_server
from tests.api.openai.support import FROZEN, user

if TYPE_CHECKING:
    import litellm
else:
    litellm = Lazily("litellm")

pytestmark = [
    pytest.mark.filterwarnings("ignore:Accessing the 'model_[a-z_]+' attribute:pydantic.PydanticDeprecatedSince211"),
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]


@pytest.fixture(autouse=True)
def _leaves_no_connections() -> Iterator[None]:
    """litellm closes none that it does not keep; the warning is to come while it is ignored, not in another's test."""
    yield
    litellm.in_memory_llm_clients_cache.flush_cache()
    gc.collect()


@pytest.fixture
def ask(chats: LiveServer) -> dict[str, Any]:
    """What every request says."""
    return {"api_base": f"{chats.url}/v1", "api_key": KEY, "max_retries": 0, "max_tokens": 12}


@pytest_asyncio.fixture
async def _connections() -> AsyncIterator[None]:
    """litellm keeps its connections for the loop that they were made in."""
    yield
    await litellm.close_litellm_async_clients()


def test_a_chat_with_the_frozen_model_and_with_a_task(chats: LiveServer, ask: dict[str, Any]) -> None:
    chats.publish_random("litellm-chat", 1)
    for model, task in ((FROZEN, None), ("litellm-chat", "litellm-chat")):
        reply = litellm.completion(f"openai/{model}", user("hello"), **ask)
        assert reply.choices[0].message.content == chat_answer(chats, "hello", task, max_new_tokens=12)
        assert reply.choices[0].finish_reason in ("length", "stop")
        assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


def test_a_streamed_chat(chats: LiveServer, ask: dict[str, Any]) -> None:
    options = {"include_usage": True}
    chunks = list(litellm.completion(f"openai/{FROZEN}", user("hello"), stream=True, stream_options=options, **ask))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == chat_answer(chats, "hello", max_new_tokens=12)
    assert chunks[-1].usage.prompt_tokens == len(rendered("hello"))


@pytest.mark.usefixtures("_connections")
async def test_without_blocking(chats: LiveServer, ask: dict[str, Any]) -> None:
    expected = chat_answer(chats, "hello", max_new_tokens=12)
    reply = await litellm.acompletion(f"openai/{FROZEN}", user("hello"), **ask)
    assert reply.choices[0].message.content == expected
    stream = await litellm.acompletion(f"openai/{FROZEN}", user("hello"), stream=True, **ask)
    assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == expected


def test_plain_text(chats: LiveServer, ask: dict[str, Any]) -> None:
    model = f"text-completion-openai/{FROZEN}"
    expected = chats.text("hello", max_new_tokens=12)
    assert litellm.text_completion("hello", model=model, **ask).choices[0].text == expected
    chunks = litellm.text_completion("hello", model=model, stream=True, **ask)
    assert "".join(chunk.choices[0].text or "" for chunk in chunks) == expected


def test_a_conversation_goes_on_with_the_message_that_was_answered(chats: LiveServer, ask: dict[str, Any]) -> None:
    history: list[Any] = user("hello")
    for text in ("go on", "and then?"):
        message = litellm.completion(f"openai/{FROZEN}", history, **ask).choices[0].message
        for answer in (message, message.model_dump()):
            reply = litellm.completion(f"openai/{FROZEN}", [*history, answer, *user(text)], **ask)
            assert reply.choices[0].message.content is not None
            assert reply.usage.prompt_tokens > len(f"hello{message.content}{text}")
        history += [message, *user(text)]


def test_an_answer_in_a_form(ask: dict[str, Any]) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "review", "schema": SCHEMA, "strict": True}}
    reply = litellm.completion(f"openai/{FROZEN}", user("hello"), response_format=form, **{**ask, "max_tokens": 60})
    assert set(json.loads(reply.choices[0].message.content)) == {"mood", "stars"}


def test_refusals_are_litellms_own_classes(chats: LiveServer, ask: dict[str, Any]) -> None:
    with pytest.raises(litellm.NotFoundError, match="The model `litellm-nobody` does not exist"):
        litellm.completion("openai/litellm-nobody", user("hello"), **ask)
    with pytest.raises(litellm.ContextWindowExceededError, match="the context of 192 holds"):
        litellm.completion(f"openai/{FROZEN}", user("x" * 500), **ask)
    with pytest.raises(litellm.BadRequestError, match="max_tokens is too large") as refused:
        litellm.completion(f"openai/{FROZEN}", user("hello"), **{**ask, "max_tokens": 500})
    assert not isinstance(refused.value, litellm.ContextWindowExceededError), "a shorter text would not help"
    with pytest.raises(litellm.BadRequestError, match="temperature: "):
        litellm.completion(f"openai/{FROZEN}", user("hello"), temperature=500, **ask)
    chats.worker.draining = True
    try:
        with pytest.raises(litellm.ServiceUnavailableError, match="shutting down"):
            litellm.completion(f"openai/{FROZEN}", user("hello"), **ask)
    finally:
        chats.worker.draining = False


@pytest.mark.usefixtures("_connections")
async def test_refusals_without_blocking_are_the_same_classes(ask: dict[str, Any]) -> None:
    with pytest.raises(litellm.NotFoundError, match="The model `litellm-nobody` does not exist"):
        await litellm.acompletion("openai/litellm-nobody", user("hello"), **ask)


def test_a_wrong_key_and_one_that_may_not(tmp_path: Path, ask: dict[str, Any]) -> None:
    path = tmp_path / "keys.json"
    _, text = add_key(path, "reader", (Scope.PUBLISH,), None)
    with live_server(tmp_path, api_keys_file=path) as guarded:
        there = {**ask, "api_base": f"{guarded.url}/v1"}
        with pytest.raises(litellm.AuthenticationError):
            litellm.completion(f"openai/{FROZEN}", user("hello"), **there)
        with pytest.raises(litellm.APIError, match="lacks the scope") as caught:
            litellm.completion(f"openai/{FROZEN}", user("hello"), **{**there, "api_key": text})
        assert caught.value.status_code == 403
