"""OpenAI's own library, over a real socket: plain, streaming, async, structured."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import openai
import pytest
from pydantic import BaseModel

from tests.api.live import LiveServer
from tests.api.openai.support import CHAT, FROZEN, ask, texts

ROOT = Path(__file__).parents[3]


class Mood(BaseModel):
    """What a text is to be read as."""

    mood: Literal["good", "bad"]
    sure: bool


@pytest.fixture
def client(chatty: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{chatty.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_models(chatty: LiveServer, client: openai.OpenAI) -> None:
    chatty.publish_random("client-listed", 1)
    listed = {model.id: model for model in client.models.list()}
    assert {FROZEN, "client-listed"} <= set(listed)
    assert client.models.retrieve("client-listed") == listed["client-listed"]
    assert client.models.retrieve("client-listed@1").id == "client-listed@1"


def test_completions(chatty: LiveServer, client: openai.OpenAI) -> None:
    chatty.publish_random("client-task", 1)
    reply = client.completions.create(model="client-task", prompt=["hello", "what"], max_tokens=8, logprobs=2, n=1)
    assert [choice.text for choice in reply.choices] == texts(
        ask(chatty, model="client-task", prompt=["hello", "what"], max_tokens=8)
    )
    assert reply.usage is not None
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert reply.choices[0].logprobs is not None
    assert len(reply.choices[0].logprobs.tokens or []) == 8


def test_completions_as_a_stream(chatty: LiveServer, client: openai.OpenAI) -> None:
    chunks = list(
        client.completions.create(
            model=FROZEN, prompt="hello", max_tokens=12, stream=True, stream_options={"include_usage": True}
        )
    )
    said = "".join(choice.text for chunk in chunks for choice in chunk.choices)
    assert said == texts(ask(chatty, max_tokens=12))[0]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 12


def test_chat(chatty: LiveServer, client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model=FROZEN, messages=[{"role": "user", "content": "hello"}], max_completion_tokens=9, logprobs=True
    )
    assert reply.choices[0].message.content == texts(ask(chatty, CHAT, max_tokens=9))[0]
    assert reply.choices[0].message.role == "assistant"
    assert reply.system_fingerprint
    assert reply.usage is not None
    assert reply.usage.prompt_tokens_details is not None
    again = client.chat.completions.create(
        model=FROZEN,
        messages=[
            {"role": "user", "content": "hello"},
            reply.choices[0].message,  # type: ignore[list-item]  # the library takes its own replies
            {"role": "user", "content": "more"},
        ],
        max_tokens=3,
    )
    assert again.choices


def test_chat_as_a_stream(chatty: LiveServer, client: openai.OpenAI) -> None:
    # The library's helper takes an answer that was cut off for an error, so this one ends by itself.
    stop = texts(ask(chatty, CHAT))[0][20:23]
    with client.chat.completions.stream(
        model=FROZEN, messages=[{"role": "user", "content": "hello"}], stop=[stop]
    ) as events:
        final = events.get_final_completion()
    assert final.choices[0].message.content == texts(ask(chatty, CHAT, stop=stop))[0] != ""


def test_a_structured_answer(client: openai.OpenAI) -> None:
    reply = client.chat.completions.parse(
        model=FROZEN, messages=[{"role": "user", "content": "hello"}], response_format=Mood, max_tokens=120
    )
    assert isinstance(reply.choices[0].message.parsed, Mood)


async def test_the_asynchronous_client(chatty: LiveServer) -> None:
    async with openai.AsyncOpenAI(base_url=f"{chatty.url}/v1", api_key="none", max_retries=0) as client:
        reply = await client.chat.completions.create(
            model=FROZEN, messages=[{"role": "user", "content": "hello"}], max_tokens=9
        )
        stream = await client.chat.completions.create(
            model=FROZEN, messages=[{"role": "user", "content": "hello"}], max_tokens=9, stream=True
        )
        said = [chunk.choices[0].delta.content or "" async for chunk in stream]
        assert "".join(said) == reply.choices[0].message.content
        models = [model.id async for model in client.models.list()]
    assert FROZEN in models


def test_an_error_in_a_stream_is_the_librarys_own_class(own_server: LiveServer) -> None:
    own_server.model.fail_after = 4
    with openai.OpenAI(base_url=f"{own_server.url}/v1", api_key="none", max_retries=0) as client:
        stream = client.completions.create(model=FROZEN, prompt="hello", max_tokens=20, stream=True)
        with pytest.raises(openai.APIError, match="engine failed"):
            list(stream)


def test_the_example_runs(chatty: LiveServer, capsys: pytest.CaptureFixture[str]) -> None:
    chatty.publish_random("client-example", 1)
    path = ROOT / "examples/openai_client.py"
    spec = importlib.util.spec_from_file_location("openai_client", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(["--url", chatty.url, "--text", "hello"])
    out = capsys.readouterr().out
    assert FROZEN in out
    assert "client-example" in out
    assert re.search(r"tokens: \d+ in, \d+ out", out)
