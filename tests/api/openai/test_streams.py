"""Streams under /v1: exactly one end, told, and nothing left behind by clients that vanish."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.api.live import LiveServer, assert_openai_error, send_and_vanish, wait_until
from tests.api.openai.support import CHAT, COMPLETIONS, FROZEN, Body, ask, events, joined, post, stream, texts

ENDLESS: Body = {"max_tokens": 150, "ignore_eos": True}


def test_chunks_come_as_they_are_made(own_server: LiveServer) -> None:
    own_server.model.allow(3)
    body = {"model": FROZEN, "prompt": "hello", "max_tokens": 10, "stream": True, "logprobs": 0}
    with own_server.client.stream("POST", COMPLETIONS, json=body) as response:
        lines = (line for line in response.iter_lines() if line)
        assert json.loads(next(lines).removeprefix("data: "))["choices"]  # although the fourth token cannot be made
        own_server.model.allow(None)
        assert len(list(lines)) == 10  # nine tokens and the end


@pytest.mark.parametrize("body", [{}, {"prompt": ["hello", "what"]}, {"n": 2, "temperature": 0}])
def test_a_failure_after_the_first_token_is_the_last_event_and_not_a_silent_end(
    own_server: LiveServer, body: Body
) -> None:
    expected = joined(stream(own_server, max_tokens=20, **body))
    own_server.model.fail_after = 6
    *chunks, error = events(post(own_server, COMPLETIONS, max_tokens=20, stream=True, **body))
    assert set(error) == {"error"}
    assert (error["error"]["code"], error["error"]["type"]) == ("generation_failed", "server_error")
    assert "[DONE]" not in chunks
    for index, text in joined(chunks).items():
        assert expected[index].startswith(text)
    assert own_server.in_flight == 0
    assert joined(stream(own_server, max_tokens=20, **body)) == expected


def test_texts_that_must_be_the_same_are_computed_once(own_server: LiveServer) -> None:
    body: Body = {"prompt": "hello", "n": 3, "temperature": 0, "max_tokens": 4}
    [alone] = texts(ask(own_server, prompt="hello", max_tokens=4))
    reply = ask(own_server, **body, logprobs=1, echo=True)
    assert texts(reply) == [f"hello{alone}"] * 3
    assert reply["usage"]["completion_tokens"] == 12
    assert len({str(choice["logprobs"]) for choice in reply["choices"]}) == 1
    own_server.model.allow(2)
    with own_server.client.stream("POST", COMPLETIONS, json={"model": FROZEN, "stream": True, **body}) as response:
        lines = (line for line in response.iter_lines() if line)
        assert json.loads(next(lines).removeprefix("data: "))["choices"]
        assert len(own_server.engine.kv_cache.allocator.used) == 1
        own_server.model.allow(None)
        assert list(lines)[-1] == "data: [DONE]"
    assert joined(stream(own_server, **body)) == dict.fromkeys(range(3), alone)


def test_a_failure_before_the_first_token_is_a_500(own_server: LiveServer) -> None:
    for streamed in (True, False):
        own_server.model.fail_after = 0
        assert_openai_error(post(own_server, COMPLETIONS, stream=streamed), 500, "generation_failed")
    own_server.model.fail_after = 3
    assert_openai_error(post(own_server, COMPLETIONS, prompt=["hello", "what"]), 500, "generation_failed")
    assert ask(own_server, max_tokens=1)["choices"]


def test_a_refusal_comes_before_the_stream_with_its_status(server: LiveServer) -> None:
    assert_openai_error(post(server, COMPLETIONS, stream=True, prompt="a" * 500), 400, "input_too_long")
    assert_openai_error(post(server, COMPLETIONS, stream=True, model="nobody"), 404, "unknown_task")
    bodies: Body = {"prompt": ["hello", "a" * 500], "stream": True}
    response = post(server, COMPLETIONS, **bodies, **ENDLESS)
    # The first input may have begun by then; either way the error is told, and nothing goes on.
    if response.status_code == 200:
        assert events(response)[-1]["error"]["code"] == "context_length_exceeded"
    else:
        assert_openai_error(response, 400, "input_too_long")
    wait_until(lambda: server.is_idle, 1)


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("inputs", [["hello"], ["hello"] * 3])
def test_a_client_that_vanishes_frees_all_that_it_asked_for(
    own_server: LiveServer, inputs: list[str], streamed: bool
) -> None:
    own_server.model.delay = 0.02
    body: Body = {"model": FROZEN, "prompt": inputs, "stream": streamed, **ENDLESS}
    connection = send_and_vanish(own_server.port, COMPLETIONS, json.dumps(body).encode())
    wait_until(lambda: own_server.in_flight == len(inputs))
    wait_until(lambda: len(own_server.engine.kv_cache.allocator.used) == len(inputs))
    if streamed:
        assert connection.recv(16) == b"HTTP/1.1 200 OK\r"
    connection.close()
    wait_until(lambda: own_server.is_idle, 1)


def test_a_chat_that_vanishes_frees_its_sequence(own_server: LiveServer) -> None:
    own_server.model.tokenizer.chat_template = "{{ messages[0].content }}"
    own_server.model.delay = 0.02
    for streamed in (True, False):
        body: Body = {"model": FROZEN, "messages": [{"role": "user", "content": "hello"}], "stream": streamed}
        connection = send_and_vanish(own_server.port, CHAT, json.dumps({**body, **ENDLESS}).encode())
        wait_until(lambda: own_server.in_flight == 1)
        connection.close()
        wait_until(lambda: own_server.is_idle, 1)


def test_many_clients_of_many_tasks_get_what_they_would_have_got_alone(server: LiveServer) -> None:
    tasks = [FROZEN]
    for seed in range(3):
        server.publish_random(f"streams-{seed}", seed)
        tasks.append(f"streams-{seed}")
    inputs = ["hello", "what is it about"]
    alone = {task: texts(ask(server, model=task, prompt=inputs, max_tokens=12)) for task in tasks}
    with ThreadPoolExecutor(12) as pool:
        streams = pool.map(lambda task: stream(server, model=task, prompt=inputs, max_tokens=12), tasks * 6)
        for task, chunks in zip(tasks * 6, streams, strict=True):
            assert joined(chunks) == dict(enumerate(alone[task]))
    wait_until(lambda: server.is_idle, 1)
