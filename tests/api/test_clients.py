"""Clients that people have: huggingface_hub's InferenceClient."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from huggingface_hub import InferenceClient, close_session
from huggingface_hub.errors import GenerationError, OverloadedError, ValidationError

from tests.api.live import LiveServer


@pytest.fixture
def client(server: LiveServer) -> Iterator[InferenceClient]:
    yield InferenceClient(server.url)
    close_session()


def test_plain_text(server: LiveServer, client: InferenceClient) -> None:
    assert client.text_generation("hello", max_new_tokens=20) == server.text("hello", max_new_tokens=20)


def test_the_task_as_adapter_id(server: LiveServer, client: InferenceClient) -> None:
    server.publish_random("clients-task", 1, {"input_template": "{input}?", "generation": {"max_new_tokens": 9}})
    text = client.text_generation("hello", adapter_id="clients-task")
    assert text == server.text("hello", "clients-task")
    assert text != server.text("hello", max_new_tokens=9)


def test_the_endpoint_tells_its_model_and_limits(server: LiveServer) -> None:
    info = InferenceClient(provider="hf-inference").get_endpoint_info(model=server.url)
    required = {"model_id", "max_concurrent_requests", "max_best_of", "max_stop_sequences", "max_input_tokens"}
    required |= {"max_total_tokens", "validation_workers", "max_client_batch_size", "router", "version"}
    assert required <= info.keys()
    assert info["model_id"] == "tiny-llama"


def test_details(server: LiveServer, client: InferenceClient) -> None:
    output = client.text_generation("hello", max_new_tokens=7, details=True)
    reply = server.generate("hello", max_new_tokens=7, details=True).json()
    assert output.generated_text == reply["generated_text"]
    assert output.details is not None
    assert output.details.finish_reason == "length"
    assert output.details.generated_tokens == 7
    assert output.details.prefill == []
    assert [token.id for token in output.details.tokens] == [token["id"] for token in reply["details"]["tokens"]]


def test_a_stream_of_texts(server: LiveServer, client: InferenceClient) -> None:
    pieces = list(client.text_generation("hello", max_new_tokens=20, stream=True))
    assert len(pieces) == 20
    assert "".join(pieces) == server.text("hello", max_new_tokens=20)


def test_a_stream_with_details(server: LiveServer, client: InferenceClient) -> None:
    *outputs, last = client.text_generation("hello", max_new_tokens=6, stream=True, details=True)
    assert [output.index for output in [*outputs, last]] == [1, 2, 3, 4, 5, 6]
    assert all(output.details is None for output in outputs)
    assert last.details is not None
    assert (last.details.finish_reason, last.details.generated_tokens) == ("length", 6)
    assert last.generated_text == "".join(output.token.text for output in [*outputs, last])


def test_stop_and_seed_and_sampling(server: LiveServer, client: InferenceClient) -> None:
    first = client.text_generation("hello", do_sample=True, temperature=0.9, top_k=40, top_p=0.9, seed=3)
    assert first == server.text("hello", temperature=0.9, top_k=40, top_p=0.9, seed=3)
    assert first == client.text_generation("hello", do_sample=True, temperature=0.9, top_k=40, top_p=0.9, seed=3)
    stop = first[5:8]
    stopped = client.text_generation(
        "hello", do_sample=True, temperature=0.9, top_k=40, top_p=0.9, seed=3, stop=[stop], return_full_text=True
    )
    assert stopped == "hello" + first[: first.index(stop)]


def test_errors_are_the_clients_own_classes(server: LiveServer, client: InferenceClient) -> None:
    with pytest.raises(ValidationError, match="positions"):
        client.text_generation("hello", max_new_tokens=10_000)
    with pytest.raises(ValidationError, match="no task 'clients-nobody'"):
        client.text_generation("hello", adapter_id="clients-nobody")
    with pytest.raises(ValidationError, match="watermark is not supported"):
        client.text_generation("hello", watermark=True)
    with pytest.raises(ValidationError, match="empty"):
        list(client.text_generation("", stream=True))


def test_an_error_in_a_stream_is_the_clients_own_class_too(own_server: LiveServer) -> None:
    try:
        client = InferenceClient(own_server.url)
        own_server.model.fail_after = 3
        stream = iter(client.text_generation("hello", max_new_tokens=10, stream=True))
        assert len([next(stream) for _ in range(3)]) == 3
        with pytest.raises(GenerationError):
            next(stream)
        own_server.worker.draining = True
        with pytest.raises(OverloadedError):
            client.text_generation("hello")
    finally:
        close_session()
