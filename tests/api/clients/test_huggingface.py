"""huggingface_hub's InferenceClient, for chats and without blocking; `test_clients.py` has what it does beside."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from huggingface_hub import AsyncInferenceClient, InferenceClient, close_session
from huggingface_hub.errors import HfHubHTTPError, ValidationError

from tests.api.clients.support import SCHEMA, chat_answer, rendered
from tests.api.live import LiveServer
from tests.api.openai.support import FROZEN, user


@pytest.fixture
def client(chats: LiveServer) -> Iterator[InferenceClient]:
    yield InferenceClient(chats.url)
    close_session()


def test_a_chat_with_the_frozen_model_and_with_a_task(chats: LiveServer, client: InferenceClient) -> None:
    chats.publish_random("hf-chat", 1)
    for model, task in ((FROZEN, None), ("hf-chat", "hf-chat")):
        output = client.chat_completion(user("hello"), model=model, max_tokens=12)
        [choice] = output.choices
        assert choice.message.content == chat_answer(chats, "hello", task, max_new_tokens=12)
        assert (choice.message.role, output.model) == ("assistant", model)
        assert output.usage.total_tokens == output.usage.prompt_tokens + output.usage.completion_tokens


def test_a_streamed_chat(chats: LiveServer, client: InferenceClient) -> None:
    options: Any = {"include_usage": True}
    stream = client.chat_completion(user("hello"), model=FROZEN, max_tokens=12, stream=True, stream_options=options)
    *chunks, last = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == chat_answer(chats, "hello", max_new_tokens=12)
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] in ("length", "stop")
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.prompt_tokens == len(rendered("hello"))


async def test_without_blocking(chats: LiveServer) -> None:
    expected = chat_answer(chats, "hello", max_new_tokens=12)
    async with AsyncInferenceClient(chats.url) as client:
        output = await client.chat_completion(user("hello"), model=FROZEN, max_tokens=12)
        assert output.choices[0].message.content == expected
        chunks = await client.chat_completion(user("hello"), model=FROZEN, max_tokens=12, stream=True)
        pieces = [chunk.choices[0].delta.content or "" async for chunk in chunks]
        assert "".join(pieces) == expected
        assert await client.text_generation("hello", max_new_tokens=9) == chats.text("hello", max_new_tokens=9)
        tokens = await client.text_generation("hello", max_new_tokens=9, stream=True)
        assert "".join([token async for token in tokens]) == chats.text("hello", max_new_tokens=9)


@pytest.mark.parametrize(
    "form",
    [
        {"type": "json_schema", "json_schema": {"name": "review", "schema": SCHEMA}},
        {"type": "json", "value": SCHEMA},
    ],
    ids=["openai", "tgi"],
)
def test_an_answer_in_a_form(client: InferenceClient, form: Any) -> None:
    """It turns the first kind into text-generation-inference's before it is sent."""
    output = client.chat_completion(user("hello"), model=FROZEN, max_tokens=60, response_format=form)
    review = json.loads(output.choices[0].message.content or "")
    assert set(review) == {"mood", "stars"}
    assert review["mood"] in ("good", "bad")


def test_log_probabilities(client: InferenceClient) -> None:
    output = client.chat_completion(user("hello"), model=FROZEN, max_tokens=4, logprobs=True, top_logprobs=3)
    assert output.choices[0].logprobs is not None
    for token in output.choices[0].logprobs.content:
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].logprob == token.logprob, "greedy"


def test_refusals_are_told_in_the_servers_words(client: InferenceClient) -> None:
    weather: Any = {"type": "function", "function": {"name": "weather", "description": "", "parameters": {}}}
    for status, words, options in (
        (404, "The model `hf-nobody` does not exist", {"model": "hf-nobody"}),
        (400, "tools: not supported", {"model": FROZEN, "tools": [weather]}),
        (400, "tokens", {"model": FROZEN, "max_tokens": 10_000}),
    ):
        with pytest.raises(HfHubHTTPError, match=words) as caught:
            client.chat_completion(user("hello"), **options)
        assert caught.value.response.status_code == status


def test_a_chat_names_its_model(client: InferenceClient) -> None:
    """Where none is named, this client sends the name `dummy`, which is nobody's."""
    with pytest.raises(HfHubHTTPError, match="dummy") as caught:
        client.chat_completion(user("hello"))
    assert caught.value.response.status_code == 404


async def test_an_error_without_blocking_is_the_clients_own_class(chats: LiveServer) -> None:
    async with AsyncInferenceClient(chats.url) as client:
        with pytest.raises(ValidationError, match="no task 'hf-nobody'"):
            await client.text_generation("hello", adapter_id="hf-nobody")
