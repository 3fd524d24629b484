"""LangChain's ChatOpenAI and OpenAI, with a task for a model."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

import httpx
import openai
import pytest
import pytest_asyncio
from pydantic import BaseModel, Field, SecretStr

from tests.api.clients.support import KEY, SCHEMA, Lazily, chat_answer, rendered
from tests.api.live import LiveServer
from tests.api.openai.support import FROZEN

if TYPE_CHECKING:
    import langchain_openai
    from langchain_core import exceptions, messages, prompts
else:
    langchain_openai = Lazily("langchain_openai")
    exceptions, messages, prompts = (Lazily(f"langchain_core.{part}") for part in ("exceptions", "messages", "prompts"))

Chat = Callable[..., "langchain_openai.ChatOpenAI"]
Text = Callable[..., "langchain_openai.OpenAI"]


class Review(BaseModel):
    """What somebody thought of a film."""

    mood: Literal["good", "bad"]
    stars: Annotated[int, Field(ge=0, le=9)]


@pytest.fixture
def connections() -> Iterator[dict[str, Any]]:
    """One that is closed at the end; LangChain keeps its own for ever."""
    with httpx.Client(timeout=30) as client:
        yield {"http_client": client}


@pytest_asyncio.fixture
async def async_connections() -> AsyncIterator[dict[str, Any]]:
    """The same without blocking."""
    async with httpx.AsyncClient(timeout=30) as client:
        yield {"http_async_client": client}


@pytest.fixture
def chat(chats: LiveServer) -> Chat:
    """Makes a chat model."""

    def make(model: str = FROZEN, **options: Any) -> langchain_openai.ChatOpenAI:
        options = {"max_retries": 0, "max_completion_tokens": 12, **options}
        return langchain_openai.ChatOpenAI(model=model, base_url=f"{chats.url}/v1", api_key=SecretStr(KEY), **options)

    return make


@pytest.fixture
def text(chats: LiveServer) -> Text:
    """Makes a model of plain text; LangChain's own temperature is 0.7."""

    def make(model: str = FROZEN, **options: Any) -> langchain_openai.OpenAI:
        options = {"max_retries": 0, "max_tokens": 12, "temperature": 0, **options}
        return langchain_openai.OpenAI(model=model, base_url=f"{chats.url}/v1", api_key=SecretStr(KEY), **options)

    return make


def test_a_chat_with_the_frozen_model_and_with_a_task(
    chats: LiveServer, chat: Chat, connections: dict[str, Any]
) -> None:
    chats.publish_random("langchain-chat", 1)
    for model, task in ((FROZEN, None), ("langchain-chat", "langchain-chat")):
        message = chat(model, **connections).invoke("hello")
        assert isinstance(message, messages.AIMessage)
        assert message.content == chat_answer(chats, "hello", task, max_new_tokens=12)
        assert message.usage_metadata is not None
        assert message.usage_metadata["output_tokens"] <= 12
        assert message.response_metadata["model_name"] == model
        assert message.response_metadata["finish_reason"] in ("length", "stop")


def test_a_conversation_with_a_system_message_and_what_was_answered(
    chats: LiveServer, chat: Chat, connections: dict[str, Any]
) -> None:
    model = chat(**connections)
    before = model.invoke("hello")
    message = model.invoke(
        [messages.SystemMessage("be brief"), messages.HumanMessage("hello"), before, messages.HumanMessage("and now?")]
    )
    read = f"<system>be brief\n<user>hello\n<assistant>{before.text}\n<user>and now?\n<assistant>"
    assert message.text == chats.text(read, max_new_tokens=12)


def test_a_chain_with_a_prompt_template(chats: LiveServer, chat: Chat, connections: dict[str, Any]) -> None:
    chain = prompts.ChatPromptTemplate.from_messages([("user", "Is {word} good?")]) | chat(**connections)
    assert chain.invoke({"word": "tea"}).text == chat_answer(chats, "Is tea good?", max_new_tokens=12)


def test_a_streamed_chat(chats: LiveServer, chat: Chat, connections: dict[str, Any]) -> None:
    whole: messages.AIMessageChunk | None = None
    for chunk in chat(stream_usage=True, **connections).stream("hello"):
        assert isinstance(chunk, messages.AIMessageChunk)
        whole = chunk if whole is None else whole + chunk
    assert whole is not None
    assert whole.text == chat_answer(chats, "hello", max_new_tokens=12)
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["input_tokens"] == len(rendered("hello"))


def test_a_batch_of_chats(chats: LiveServer, chat: Chat, connections: dict[str, Any]) -> None:
    texts = [f"text {i}" for i in range(6)]
    replies = chat(**connections).batch(list(texts))
    assert [reply.text for reply in replies] == [chat_answer(chats, given, max_new_tokens=12) for given in texts]


async def test_chats_without_blocking(chats: LiveServer, chat: Chat, async_connections: dict[str, Any]) -> None:
    model = chat(**async_connections)
    expected = chat_answer(chats, "hello", max_new_tokens=12)
    assert (await model.ainvoke("hello")).text == expected
    assert "".join([chunk.text async for chunk in model.astream("hello")]) == expected
    assert [message.text for message in await model.abatch(["hello", "hello"])] == [expected, expected]


def test_an_answer_in_a_form(chat: Chat, connections: dict[str, Any]) -> None:
    model = chat(max_completion_tokens=60, **connections)
    review = model.with_structured_output(Review, method="json_schema").invoke("hello")
    assert isinstance(review, Review)
    answer = model.with_structured_output(SCHEMA, method="json_schema").invoke("hello")
    assert isinstance(answer, dict)
    assert Review.model_validate(answer) == review


def test_log_probabilities(chat: Chat, connections: dict[str, Any]) -> None:
    message = chat(max_completion_tokens=3, **connections).bind(logprobs=True, top_logprobs=2).invoke("hello")
    content = message.response_metadata["logprobs"]["content"]
    assert all(len(token["top_logprobs"]) == 2 for token in content)


def test_plain_texts(chats: LiveServer, text: Text, connections: dict[str, Any]) -> None:
    chats.publish_random("langchain-text", 2)
    for model, task in ((FROZEN, None), ("langchain-text", "langchain-text")):
        assert text(model, **connections).invoke("hello") == chats.text("hello", task, max_new_tokens=12)


def test_a_stream_of_plain_text(chats: LiveServer, text: Text, connections: dict[str, Any]) -> None:
    pieces = list(text(**connections).stream("hello"))
    assert len(pieces) > 1
    assert "".join(pieces) == chats.text("hello", max_new_tokens=12)


def test_a_batch_of_plain_texts_is_one_request(chats: LiveServer, text: Text, connections: dict[str, Any]) -> None:
    texts = [f"text {i}" for i in range(6)]
    assert text(**connections).batch(list(texts)) == [chats.text(given, max_new_tokens=12) for given in texts]


def test_stop_strings(chats: LiveServer, text: Text, connections: dict[str, Any]) -> None:
    whole = chats.text("hello", max_new_tokens=12)
    stop = whole[4:6]
    assert text(**connections).invoke("hello", stop=[stop]) == whole[: whole.index(stop)]


async def test_plain_texts_without_blocking(chats: LiveServer, text: Text, async_connections: dict[str, Any]) -> None:
    model = text(**async_connections)
    expected = chats.text("hello", max_new_tokens=12)
    assert await model.ainvoke("hello") == expected
    assert "".join([piece async for piece in model.astream("hello")]) == expected


def test_refusals_are_classes_that_programs_catch(chat: Chat, text: Text, connections: dict[str, Any]) -> None:
    with pytest.raises(openai.NotFoundError, match="The model `langchain-nobody` does not exist"):
        chat("langchain-nobody", **connections).invoke("hello")
    with pytest.raises(openai.NotFoundError, match="The model `langchain-nobody` does not exist"):
        text("langchain-nobody", **connections).invoke("hello")
    with pytest.raises(exceptions.ContextOverflowError):
        chat(**connections).invoke("x" * 500)
    with pytest.raises(openai.BadRequestError, match="tools: not supported"):
        chat(**connections).bind_tools([Review]).invoke("hello")
