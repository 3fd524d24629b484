from __future__ import annotations

from typing import Any

import pytest

from tests.api.live import MAX_MODEL_LEN, LiveServer, assert_error, wait_until
from tests.api.tgi.support import ROUTES


def test_an_unknown_version_is_404_and_names_those_there_are(server: LiveServer) -> None:
    server.publish_random("tgi-one-version", 1)
    body = assert_error(server.generate("hello", "tgi-one-version@7"), 404, "unknown_task", "no version 7")
    assert body["remedy"] == "Its versions are 1."


@pytest.mark.parametrize("route", ROUTES)
def test_an_unknown_task_is_404_and_names_the_nearest(server: LiveServer, route: str) -> None:
    server.publish_random("tgi-sentiment", 1)
    response = server.generate("hello", "tgi-sentimant", route)
    assert_error(response, 404, "unknown_task", "'tgi-sentimant'", "Did you mean tgi-sentiment")


@pytest.mark.parametrize("name", ["", "UPPER", "a b", "../x", "x" * 65, "x@", "x@0", "x@latest", "\N{SNOWMAN}"])
def test_a_name_that_no_task_can_have_is_refused(server: LiveServer, name: str) -> None:
    assert_error(server.generate("hello", name), 422, "invalid_task_name")
    assert_error(server.generate("hello", adapter_id=name), 422, "invalid_task_name")


def test_an_unknown_field_is_refused_and_the_nearest_named(server: LiveServer) -> None:
    assert_error(
        server.generate(max_new_token=3), 422, "invalid_request", "parameters.max_new_token", "max_new_tokens?"
    )
    response = server.client.post("/generate", json={"input": "hello"})
    assert_error(
        response, 422, "invalid_request", "unknown field input (did you mean inputs?)", "inputs: Field required"
    )
    elsewhere = server.client.post("/generate", json={"inputs": "hello", "max_new_tokens": 3})
    assert_error(elsewhere, 422, "invalid_request", "max_new_tokens (did you mean parameters.max_new_tokens?)")
    elsewhere = server.client.post("/generate", json={"inputs": "hello", "parameters": {"inputs": "hello"}})
    assert_error(elsewhere, 422, "invalid_request", "parameters.inputs (did you mean inputs?)")
    assert_error(server.generate(zzzzzz=1), 422, "invalid_request", "unknown field parameters.zzzzzz")


@pytest.mark.parametrize("route", ROUTES)
def test_a_misspelt_query_is_refused_and_not_answered_without_the_task(server: LiveServer, route: str) -> None:
    response = server.client.post(route, params={"taks": "tgi-first"}, json={"inputs": "hello"})
    assert_error(response, 422, "invalid_request", "'taks'", "task?")
    response = server.client.post(route, params=[("task", "a"), ("task", "b")], json={"inputs": "hello"})
    assert_error(response, 422, "invalid_request", "task comes twice")


@pytest.mark.parametrize(
    "parameters",
    [
        {"max_new_tokens": "3"},
        {"max_new_tokens": True},
        {"max_new_tokens": 1.5},
        {"max_new_tokens": 0},
        {"max_new_tokens": -1},
        {"min_new_tokens": -1},
        {"temperature": "1"},
        {"temperature": True},
        {"temperature": -0.1},
        {"temperature": 101},
        {"top_k": 0},
        {"top_k": 1.5},
        {"top_p": 0},
        {"top_p": 1.01},
        {"min_p": 1.1},
        {"typical_p": 0},
        {"presence_penalty": 3},
        {"frequency_penalty": "1"},
        {"best_of": 0},
        {"best_of": 65},
        {"top_n_tokens": 21},
        {"choices": []},
        {"choices": [""]},
        {"choices": ["a", "a"]},
        {"grammar": {"type": "yacc", "value": "a"}},
        {"grammar": {"type": "lark", "value": {}}},
        {"repetition_penalty": 0},
        {"repetition_penalty": 1e-300},
        {"seed": -1},
        {"seed": 2**64},
        {"seed": "1"},
        {"do_sample": 1},
        {"do_sample": "false"},
        {"details": "yes"},
        {"stop": "x"},
        {"stop": [""]},
        {"stop": [1]},
        {"stop": ["x"] * 17},
        {"stop": ["x" * 257]},
        {"truncate": 0},
        {"adapter_id": 3},
        {"ignore_eos_token": 0},
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_and_its_field_named(
    server: LiveServer, parameters: dict[str, Any]
) -> None:
    (name,) = parameters
    assert_error(server.generate(**parameters), 422, "invalid_request", f"parameters.{name}")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("name", ["temperature", "top_p", "repetition_penalty"])
def test_a_number_that_is_not_finite_is_refused(server: LiveServer, name: str, number: str) -> None:
    body = f'{{"inputs": "hello", "parameters": {{"{name}": {number}}}}}'
    response = server.client.post("/generate", content=body, headers={"Content-Type": "application/json"})
    assert_error(response, 422, "invalid_request", f"parameters.{name}")


def test_what_is_not_offered_is_refused_by_name(server: LiveServer) -> None:
    assert_error(server.generate(watermark=True), 422, "invalid_request", "watermark is not supported")


@pytest.mark.parametrize("route", ROUTES)
def test_an_empty_input_is_refused(server: LiveServer, route: str) -> None:
    assert_error(server.generate("", route=route), 422, "empty_input")


def test_half_a_surrogate_pair_is_refused_wherever_it_stands(server: LiveServer) -> None:
    bodies = {
        "inputs": r'{"inputs": "\ud800"}',
        "in the middle": r'{"inputs": "a\udfffb"}',
        "adapter_id": r'{"inputs": "a", "parameters": {"adapter_id": "\ud800"}}',
        "field": r'{"inputs": "a", "\ud800": 1}',
        "parameter": r'{"inputs": "a", "parameters": {"\ud800": 1}}',
    }
    for name, body in bodies.items():
        response = server.client.post("/generate", content=body, headers={"Content-Type": "application/json"})
        assert response.status_code == 422, name
    whole = server.client.post(
        "/generate",
        content=r'{"inputs": "\ud83d\ude00", "parameters": {"max_new_tokens": 4}}',
        headers={"Content-Type": "application/json"},
    )
    assert whole.json()["generated_text"] == server.text("\N{GRINNING FACE}", max_new_tokens=4)


def test_a_stop_string_that_is_not_text_does_no_harm(server: LiveServer) -> None:
    body = r'{"inputs": "hello", "parameters": {"max_new_tokens": 5, "stop": ["\ud800"]}}'
    response = server.client.post("/generate", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code in (200, 422)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b'{"inputs": "x"',
        b"{\"inputs\": 'x'}",
        b"[]",
        b'"hello"',
        b"null",
        b'{"inputs": null}',
        b'{"inputs": 3}',
        b'{"inputs": []}',
        b'{"inputs": [3]}',
        b'{"inputs": {"a": "b"}}',
        b'{"inputs": "x", "stream": "true"}',
        b'{"inputs": "x", "parameters": []}',
    ],
)
def test_a_body_that_is_not_a_request_is_refused(server: LiveServer, content: bytes) -> None:
    response = server.client.post("/generate", content=content, headers={"Content-Type": "application/json"})
    assert_error(response, 422, "invalid_request")


@pytest.mark.parametrize("content", [b'{"inputs": "\xff\xfe"}', b"[" * 100_000, b'{"inputs": ' + b"9" * 5000 + b"}"])
def test_a_body_that_no_parser_takes_is_the_clients_error(server: LiveServer, content: bytes) -> None:
    response = server.client.post("/generate", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code in (400, 422)
    assert_error(response, response.status_code, "invalid_request")


def test_a_body_without_its_content_type_is_refused_with_the_reason(server: LiveServer) -> None:
    for headers in ({}, {"Content-Type": "application/x-www-form-urlencoded"}):
        response = server.client.post("/generate", content=b'{"inputs": "hello"}', headers=headers)
        assert_error(response, 422, "invalid_request", "Content-Type: application/json")


def test_a_request_that_can_never_fit_is_refused_with_both_lengths(server: LiveServer) -> None:
    soft_prompt = server.publish_random("tgi-long", 1)
    n = soft_prompt.num_virtual_tokens
    for inputs, new in (("a" * MAX_MODEL_LEN, 1), ("a" * 10, MAX_MODEL_LEN), ("a" * 100, MAX_MODEL_LEN - 100 - n + 1)):
        response = server.generate(inputs, "tgi-long", max_new_tokens=new)
        assert_error(
            response,
            422,
            "input_too_long",
            f"needs {n + len(inputs) + new} positions",
            f"{n} virtual tokens, {len(inputs)} input tokens, {new} new tokens",
            f"holds {MAX_MODEL_LEN}",
        )
    fits = server.generate(
        "a" * 100, "tgi-long", max_new_tokens=MAX_MODEL_LEN - 100 - n, ignore_eos_token=True, details=True
    )
    assert fits.json()["details"]["generated_tokens"] == MAX_MODEL_LEN - 100 - n


@pytest.mark.parametrize("route", ROUTES)
def test_more_tokens_at_least_than_at_most_are_refused(server: LiveServer, route: str) -> None:
    server.publish_random("tgi-brief", 1, {"generation": {"max_new_tokens": 6}})
    for task, parameters, message in (
        (None, {"min_new_tokens": 5, "max_new_tokens": 4}, "min_new_tokens is 5, but max_new_tokens is 4."),
        (None, {"min_new_tokens": 129}, "min_new_tokens is 129, but max_new_tokens is 128 where it is left out."),
        ("tgi-brief", {"min_new_tokens": 7}, "min_new_tokens is 7, but max_new_tokens is 6 where it is left out."),
    ):
        body = assert_error(server.generate("a", task, route, **parameters), 422, "invalid_request", message)
        assert "Lower min_new_tokens" in body["remedy"]
    response = server.generate("a" * (MAX_MODEL_LEN - 10), None, route, min_new_tokens=11)
    assert_error(response, 422, "input_too_long", "min_new_tokens is 11", "room for 10 new tokens")


def test_an_input_that_leaves_no_room_is_refused_by_default_too(server: LiveServer) -> None:
    assert_error(server.generate("a" * MAX_MODEL_LEN), 422, "input_too_long", f"{MAX_MODEL_LEN} input tokens")


def test_one_bad_text_of_a_list_refuses_the_whole_list(server: LiveServer) -> None:
    response = server.client.post("/generate", json={"inputs": ["hello", "a" * 10 * MAX_MODEL_LEN]})
    assert_error(response, 422, "input_too_long")
    assert_error(server.client.post("/generate", json={"inputs": ["hello", ""]}), 422, "empty_input")
    wait_until(lambda: server.is_idle)


@pytest.mark.parametrize(
    ("bad", "code", "words"),
    [
        ("", "empty_input", "The text is empty."),
        ("a" * 10 * MAX_MODEL_LEN, "input_too_long", "The input has 1,920 characters"),
        ("a" * MAX_MODEL_LEN, "input_too_long", "The request needs"),
        ("a" * (MAX_MODEL_LEN - 3), "input_too_long", "The request needs"),
        (3, "invalid_request", "Input should be a valid string."),
    ],
)
def test_the_bad_text_of_a_list_is_named(server: LiveServer, bad: Any, code: str, words: str) -> None:
    parameters = {"max_new_tokens": 4}
    for inputs, place in ((["a", bad, "b"], "inputs.1: "), (["a", "b", bad], "inputs.2: ")):
        response = server.client.post("/generate", json={"inputs": inputs, "parameters": parameters})
        assert assert_error(response, 422, code, words)["error"].startswith(place)
    if isinstance(bad, str):
        response = server.client.post("/generate", json={"inputs": bad, "parameters": parameters})
        assert assert_error(response, 422, code)["error"].startswith(words)
    wait_until(lambda: server.is_idle)


def test_what_is_wrong_with_all_texts_of_a_list_is_not_said_of_the_first(server: LiveServer) -> None:
    for query, parameters in (("", {"min_new_tokens": 2, "max_new_tokens": 1}), ("?task=A", {})):
        response = server.client.post(f"/generate{query}", json={"inputs": ["a", "b"], "parameters": parameters})
        assert response.status_code == 422
        assert "inputs" not in response.json()["error"]
