"""POST /generate, /generate_stream and /: who answers, with which text, and what is refused."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from server.api.tgi.schemas import GenerateParameters
from server.contracts import MAX_SCHEMA_DEPTH
from server.engine.model.frozen import FrozenModel
from tests.api.live import MAX_MODEL_LEN, LiveServer, assert_error, engine_answer, parse_events, wait_until

ROUTES = ("/generate", "/generate_stream", "/")


@pytest.mark.parametrize("route", ["/generate", "/"])
def test_a_request_is_answered_by_the_soft_prompt_of_its_task(
    server: LiveServer, tiny: FrozenModel, route: str
) -> None:
    first, second = server.publish_random("tgi-first", 1), server.publish_random("tgi-second", 2)
    for task, soft_prompt in (("tgi-first", first), ("tgi-second", second), (None, None)):
        expected = engine_answer(tiny, soft_prompt, "hello", max_new_tokens=20).text
        reply = {"generated_text": expected}
        found = server.generate("hello", task, route, max_new_tokens=20).json()
        assert found == ([reply] if route == "/" else reply)
    assert len({server.text("hello", task, max_new_tokens=20) for task in ("tgi-first", "tgi-second", None)}) == 3


@pytest.mark.parametrize("route", ROUTES)
def test_the_task_may_be_named_in_the_query_or_as_adapter_id(server: LiveServer, route: str) -> None:
    server.publish_random("tgi-named", 3)
    by_query = server.generate("hello", "tgi-named", route, max_new_tokens=9)
    by_parameter = server.generate("hello", None, route, max_new_tokens=9, adapter_id="tgi-named")
    by_both = server.generate("hello", "tgi-named", route, max_new_tokens=9, adapter_id="tgi-named")
    assert by_query.status_code == 200
    assert by_query.content == by_parameter.content == by_both.content
    assert by_parameter.headers["prelude-task"] == "tgi-named"


@pytest.mark.parametrize("route", ROUTES)
def test_two_different_tasks_are_refused(server: LiveServer, route: str) -> None:
    server.publish_random("tgi-one", 1)
    response = server.generate("hello", "tgi-one", route, adapter_id="tgi-other")
    assert_error(response, 422, "invalid_request", "'tgi-one'", "'tgi-other'")


def test_headers_say_what_answered(server: LiveServer) -> None:
    server.publish_random("tgi-headers", 1)
    server.publish_random("tgi-headers", 2)
    for route in ROUTES:
        headers = server.generate("hello", "tgi-headers", route, max_new_tokens=1).headers
        assert headers["prelude-task"] == "tgi-headers"
        assert headers["prelude-version"] == "2"
        assert headers["prelude-model"] == "tiny-llama"
        alone = server.generate("hello", None, route, max_new_tokens=1).headers
        assert alone["prelude-model"] == "tiny-llama"
        assert "prelude-task" not in alone
        assert "prelude-version" not in alone


def test_a_version_can_be_asked_for(server: LiveServer, tiny: FrozenModel) -> None:
    old, new = server.publish_random("tgi-versions", 1), server.publish_random("tgi-versions", 2)
    for reference, version, soft_prompt in (
        ("tgi-versions@1", "1", old),
        ("tgi-versions@2", "2", new),
        ("tgi-versions", "2", new),
    ):
        response = server.generate("hello", reference, max_new_tokens=12)
        assert response.headers["prelude-version"] == version
        assert response.headers["prelude-task"] == "tgi-versions"
        expected = engine_answer(tiny, soft_prompt, "hello", max_new_tokens=12).text
        assert response.json()["generated_text"] == expected


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


def test_neutral_values_change_nothing(server: LiveServer) -> None:
    neutral: dict[str, Any] = {
        "best_of": 1,
        "decoder_input_details": False,
        "frequency_penalty": 0.0,
        "grammar": None,
        "top_n_tokens": 0,
        "typical_p": 1.0,
        "watermark": False,
    }
    plain = server.text(max_new_tokens=10)
    assert server.text(max_new_tokens=10, **neutral) == plain
    nulls: dict[str, Any] = dict.fromkeys(neutral)
    assert server.text(max_new_tokens=10, **nulls) == plain


@pytest.mark.parametrize("parameters", [None, {}])
def test_parameters_may_be_left_out_or_null(server: LiveServer, parameters: object) -> None:
    with_field = server.client.post("/generate", json={"inputs": "hello", "parameters": parameters})
    without = server.client.post("/generate", json={"inputs": "hello"})
    assert with_field.status_code == 200
    assert with_field.json() == without.json()


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


def test_the_default_length_shrinks_to_the_room_there_is(server: LiveServer) -> None:
    server.publish_random("tgi-room", 1, {"generation": {"max_new_tokens": 10_000}})
    for task, virtual in ((None, 0), ("tgi-room", 5)):
        inputs = "a" * (MAX_MODEL_LEN - virtual - 7)
        details = server.generate(inputs, task, details=True, ignore_eos_token=True).json()["details"]
        assert (details["generated_tokens"], details["finish_reason"]) == (7, "length")
    details = server.generate("a", details=True, ignore_eos_token=True).json()["details"]
    assert details["generated_tokens"] == 128


def test_truncate_keeps_the_end_of_the_input(server: LiveServer) -> None:
    inputs = "some words that are cut off" + "hello"
    truncated = server.generate(inputs, truncate=5, max_new_tokens=15, details=True).json()
    assert truncated["details"]["input_length"] == 5
    assert truncated["generated_text"] == server.text("hello", max_new_tokens=15)
    assert truncated["generated_text"] != server.text(inputs, max_new_tokens=15)
    assert server.text("hello", truncate=50, max_new_tokens=15) == truncated["generated_text"]
    assert server.generate("a" * 10 * MAX_MODEL_LEN, truncate=8, max_new_tokens=2).status_code == 200


def test_the_text_ends_before_a_stop_string(server: LiveServer) -> None:
    whole = server.text("hello", max_new_tokens=40)
    end = next(i for i in range(5, len(whole) - 3) if whole.find(whole[i : i + 3]) == i)
    stop = whole[end : end + 3]
    for stops in ([stop], ["never there", stop], [stop, whole[end + 4 :]]):
        reply = server.generate("hello", max_new_tokens=40, stop=stops, details=True).json()
        assert reply["generated_text"] == whole[:end]
        assert reply["details"]["finish_reason"] == "stop_sequence"
        assert reply["details"]["generated_tokens"] < 40
    assert server.text("hello", max_new_tokens=40, stop=["never there"]) == whole


def test_the_full_text_begins_with_the_input_as_it_was_sent(server: LiveServer) -> None:
    server.publish_random("tgi-full", 4, {"input_template": "<<{input}>>"})
    generated = server.text("hello", "tgi-full", max_new_tokens=8)
    assert server.text("hello", "tgi-full", max_new_tokens=8, return_full_text=True) == "hello" + generated
    *_, last = server.events("hello", "tgi-full", max_new_tokens=8, return_full_text=True)
    assert last["generated_text"] == "hello" + generated


def test_details_have_the_shape_that_text_generation_inference_gives_them(server: LiveServer) -> None:
    server.publish_random("tgi-details", 2)
    reply = server.generate("hello", "tgi-details", max_new_tokens=6, details=True).json()
    details = reply["details"]
    assert set(details) == {
        "finish_reason",
        "generated_tokens",
        "seed",
        "prefill",
        "tokens",
        "input_length",
        "prompt_tokens",
        "virtual_tokens",
    }
    assert details["finish_reason"] == "length"
    assert details["generated_tokens"] == len(details["tokens"]) == 6
    assert (details["input_length"], details["prompt_tokens"], details["virtual_tokens"]) == (5, 5, 5)
    assert details["prefill"] == []
    assert details["seed"] is None
    for token in details["tokens"]:
        assert set(token) == {"id", "text", "logprob", "special"}
        assert isinstance(token["id"], int)
        assert token["logprob"] <= 0
        assert token["special"] is False
    assert "".join(token["text"] for token in details["tokens"]) == reply["generated_text"]


def test_details_come_only_where_they_are_asked_for(server: LiveServer) -> None:
    assert server.generate(max_new_tokens=2).json().keys() == {"generated_text"}
    assert server.generate(max_new_tokens=2, details=False).json().keys() == {"generated_text"}
    assert all(event["details"] is None for event in server.events(max_new_tokens=2))
    first, last = server.events(max_new_tokens=2, details=True)
    assert first["details"] is None
    assert (last["details"]["finish_reason"], last["details"]["generated_tokens"]) == ("length", 2)


def test_an_end_token_ends_the_text_and_is_not_part_of_it(server: LiveServer, tiny: FrozenModel) -> None:
    found = next(
        (text, seed)
        for seed in range(40)
        for text in ("hello",)
        if server.generate(text, temperature=3.0, seed=seed, details=True, max_new_tokens=100).json()["details"][
            "finish_reason"
        ]
        == "eos_token"
    )
    text, seed = found
    reply = server.generate(text, temperature=3.0, seed=seed, details=True, max_new_tokens=100).json()
    *tokens, last = reply["details"]["tokens"]
    assert last["id"] in tiny.eos_token_ids
    assert "<eos>" not in reply["generated_text"]
    assert not any(token["id"] in tiny.eos_token_ids for token in tokens)
    longer = server.generate(
        text, temperature=3.0, seed=seed, details=True, max_new_tokens=100, ignore_eos_token=True
    ).json()
    assert longer["details"]["generated_tokens"] == 100
    minimum = server.generate(
        text, temperature=3.0, seed=seed, details=True, max_new_tokens=100, min_new_tokens=100
    ).json()
    assert minimum["details"]["generated_tokens"] == 100
    assert not any(token["id"] in tiny.eos_token_ids for token in minimum["details"]["tokens"])


def test_the_tasks_template_is_put_around_the_input(server: LiveServer, tiny: FrozenModel) -> None:
    soft_prompt = server.publish_random("tgi-template", 5, {"input_template": "Q: {input}\nA:"})
    expected = engine_answer(tiny, soft_prompt, "Q: why {input}?\nA:", max_new_tokens=15).text
    reply = server.generate("why {input}?", "tgi-template", max_new_tokens=15, details=True).json()
    assert reply["generated_text"] == expected
    assert reply["details"]["input_length"] == len("Q: why {input}?\nA:")


def test_special_tokens_are_text_in_a_template_and_tokens_in_a_raw_text(server: LiveServer) -> None:
    server.publish_random("tgi-special", 5, {"input_template": "{input}!"})
    server.publish_random("tgi-raw", 5)
    text = "hi<eos><pad>"
    for task, length in (("tgi-special", len(text) + 1), ("tgi-raw", 4), (None, 4)):
        reply = server.generate(text, task, max_new_tokens=1, details=True).json()
        assert reply["details"]["input_length"] == length
    cut = server.generate(text, "tgi-special", max_new_tokens=1, details=True, truncate=3).json()
    assert cut["details"]["input_length"] == 3


def test_the_tasks_generation_defaults_hold_unless_the_request_says_otherwise(server: LiveServer) -> None:
    generation: dict[str, Any] = {"max_new_tokens": 7, "temperature": 0.8, "seed": 11, "top_k": 50}
    server.publish_random("tgi-defaults", 6, {"generation": generation})
    server.publish_random("tgi-plain", 6)
    default = server.generate("hello", "tgi-defaults", details=True).json()
    assert default["details"]["generated_tokens"] == 7
    assert default["details"]["seed"] == 11
    assert default["generated_text"] == server.text("hello", "tgi-plain", **generation)
    for own in ({"max_new_tokens": 3}, {"temperature": 0.0}, {"do_sample": False}, {"seed": 12}, {"top_k": 2}):
        merged: dict[str, Any] = generation | own
        assert server.text("hello", "tgi-defaults", **own) == server.text("hello", "tgi-plain", **merged)
    assert server.text("hello", "tgi-defaults", temperature=0.0) != default["generated_text"]


def test_the_tasks_stop_strings_hold_unless_the_request_brings_its_own(server: LiveServer) -> None:
    server.publish_random("tgi-unstopped", 7)
    whole = server.text("hello", "tgi-unstopped", max_new_tokens=20)
    server.publish_random("tgi-stopped", 7, {"generation": {"stop": [whole[4]]}})
    assert server.text("hello", "tgi-stopped", max_new_tokens=20) == whole[: whole.index(whole[4])]
    assert server.text("hello", "tgi-stopped", max_new_tokens=20, stop=[]) == whole


def test_asking_for_sampling_does_not_override_the_tasks_temperature(server: LiveServer) -> None:
    server.publish_random("tgi-cool", 8, {"generation": {"temperature": 0.3, "max_new_tokens": 30}})
    server.publish_random("tgi-greedy", 8, {"generation": {"max_new_tokens": 30}})
    for own in ({"do_sample": True}, {"top_p": 0.95}, {"top_k": 200}):
        parameters: dict[str, Any] = {**own, "seed": 5}
        cool = server.text("hello", "tgi-cool", **parameters)
        assert cool == server.text("hello", "tgi-greedy", temperature=0.3, **parameters)
        warm = server.text("hello", "tgi-greedy", temperature=1.0, **parameters)
        assert server.text("hello", "tgi-greedy", **parameters) == warm != cool


def test_a_seed_makes_sampling_repeatable(server: LiveServer) -> None:
    first = server.generate("hello", do_sample=True, seed=7, max_new_tokens=30, details=True).json()
    again = server.generate("hello", do_sample=True, seed=7, max_new_tokens=30, details=True).json()
    other = server.generate("hello", do_sample=True, seed=8, max_new_tokens=30, details=True).json()
    assert first == again
    assert first["generated_text"] != other["generated_text"]
    assert first["details"]["seed"] == 7


def test_without_a_seed_samples_differ_and_the_seed_that_was_used_is_told(server: LiveServer) -> None:
    first, second = (server.generate("hello", do_sample=True, max_new_tokens=30, details=True).json() for _ in range(2))
    assert first["generated_text"] != second["generated_text"]
    seed = first["details"]["seed"]
    assert server.text("hello", do_sample=True, max_new_tokens=30, seed=seed) == first["generated_text"]


def test_greedy_is_the_default_and_every_other_way_to_ask_for_it(server: LiveServer, tiny: FrozenModel) -> None:
    greedy = engine_answer(tiny, None, "hello", max_new_tokens=30).text
    ways: tuple[dict[str, Any], ...] = (
        {},
        {"temperature": 0},
        {"temperature": 0.0, "do_sample": True},
        {"do_sample": False},
        {"do_sample": False, "temperature": 2.0, "seed": 3},
        {"do_sample": False, "top_k": 5, "top_p": 0.9},
        {"do_sample": True, "top_k": 1},
        {"temperature": 1e-320},
        {"temperature": 1e-12, "seed": 3},
    )
    for parameters in ways:
        assert server.text("hello", max_new_tokens=30, **parameters) == greedy, parameters


@pytest.mark.parametrize("route", ["/generate", "/"])
def test_stream_true_streams_from_every_route(server: LiveServer, route: str) -> None:
    body = {"inputs": "hello", "stream": True, "parameters": {"max_new_tokens": 5}}
    response = server.client.post(route, json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert parse_events(response.content) == server.events("hello", max_new_tokens=5)


def test_a_reply_is_utf8_json_with_its_length(server: LiveServer) -> None:
    response = server.generate("\N{SNOWMAN}", max_new_tokens=3, return_full_text=True)
    assert response.headers["content-type"] == "application/json"
    assert int(response.headers["content-length"]) == len(response.content)
    assert json.loads(response.content)["generated_text"].startswith("\N{SNOWMAN}")


def test_a_list_of_texts_is_answered_by_a_list_in_its_order(server: LiveServer) -> None:
    server.publish_random("tgi-list", 8)
    texts = [f"text number {i}" for i in range(12)]
    response = server.client.post(
        "/generate", params={"task": "tgi-list"}, json={"inputs": texts, "parameters": {"max_new_tokens": 5}}
    )
    assert [reply["generated_text"] for reply in response.json()] == [
        server.text(text, "tgi-list", max_new_tokens=5) for text in texts
    ]
    assert response.headers["prelude-version"] == "1"
    one = server.client.post("/generate", json={"inputs": ["hello"], "parameters": {"max_new_tokens": 5}}).json()
    assert one == [{"generated_text": server.text("hello", max_new_tokens=5)}]


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


SEQUENCE = {"generated_text", "finish_reason", "generated_tokens", "seed", "prefill", "tokens"}
"""What text-generation-inference's document requires of each of `best_of_sequences`, and its nullable seed."""


@pytest.mark.parametrize("route", ["/generate", "/generate_stream", "/tokenize"])
def test_null_counts_as_left_out_whatever_the_field_is_called(server: LiveServer, route: str) -> None:
    # What text-generation-inference's and LoRAX's clients send unasked, and a name that nobody has.
    names = ["adapter_source", "merged_adapters", "api_token", "return_k_alternatives", "response_format", "zzzzz"]
    nulls = dict.fromkeys([*GenerateParameters.model_fields, *names])
    body: dict[str, Any] = {"inputs": "hello", "zzzzz": None}
    if route != "/tokenize":
        body |= {"parameters": nulls, "stream": None, "user": None}
    response = server.client.post(route, json=body)
    assert response.status_code == 200, response.text
    assert response.content == server.client.post(route, json={"inputs": "hello"}).content
    if route != "/tokenize":
        assert server.client.post(route, json={"inputs": "hello", "parameters": None}).content == response.content
        body["parameters"]["adapter_source"] = "hub"
        assert_error(server.client.post(route, json=body), 422, "invalid_request", "unknown field", "adapter_source")
    assert_error(server.client.post(route, json={"inputs": "hello", "zzzzz": 0}), 422, "invalid_request", "zzzzz")


def test_an_empty_list_of_stops_has_no_effect_on_choices_either(server: LiveServer) -> None:
    assert server.generate(choices=["a", "b"], stop=[], details=False, top_n_tokens=0).status_code == 200


@pytest.mark.parametrize("own", [{}, {"temperature": 0}, {"do_sample": False, "top_k": 5}, {"seed": 1}])
def test_best_of_is_refused_without_sampling(server: LiveServer, own: dict[str, Any]) -> None:
    error = assert_error(server.generate("hello", best_of=2, **own), 422, "invalid_request")
    assert "do_sample" in error["remedy"]
    assert server.generate("hello", best_of=1, **own).status_code == 200
    for sampled in ({"do_sample": True}, {"temperature": 0.5}, {"top_p": 0.5}, {"do_sample": True, "seed": 1}):
        assert server.generate("hello", best_of=2, max_new_tokens=2, **sampled).status_code == 200
    server.publish_random("tgi-warm", 5, {"generation": {"temperature": 0.7}})
    assert server.generate("hello", "tgi-warm", best_of=2, max_new_tokens=2).status_code == 200


def test_best_of_answers_the_text_of_the_highest_mean_log_probability(server: LiveServer) -> None:
    reply = server.generate(
        "hello", best_of=5, temperature=1.5, seed=4, max_new_tokens=6, details=True, ignore_eos_token=True
    ).json()
    details = reply["details"]

    def mean(sequence: dict[str, Any]) -> float:
        return float(sum(token["logprob"] for token in sequence["tokens"]) / len(sequence["tokens"]))

    others = details["best_of_sequences"]
    assert len(others) == 4
    assert mean(details) >= mean(others[0]) >= mean(others[1]) >= mean(others[2]) >= mean(others[3])
    texts = {reply["generated_text"], *(sequence["generated_text"] for sequence in others)}
    assert len(texts) == 5
    assert server.text("hello", temperature=1.5, seed=4, max_new_tokens=6, ignore_eos_token=True) in texts


@pytest.mark.parametrize("wanted", [True, False])
def test_every_text_of_best_of_is_told_with_the_inputs_tokens(server: LiveServer, wanted: bool) -> None:
    """Whichever of them is the best: the engine tells them with the first one."""
    expected = server.generate("hello", decoder_input_details=True, max_new_tokens=1).json()["details"]["prefill"]
    assert len(expected) == len("hello")
    best = set()
    for seed in range(12):
        parameters: dict[str, Any] = {"best_of": 3, "temperature": 1.5, "seed": seed, "max_new_tokens": 3}
        details = server.generate("hello", decoder_input_details=wanted, details=True, **parameters).json()["details"]
        sequences = [details, *details["best_of_sequences"]]
        assert [sequence["prefill"] for sequence in sequences] == [expected if wanted else []] * 3
        first = server.generate("hello", **{**parameters, "best_of": 1}).json()["generated_text"]
        best.add(first == "".join(token["text"] for token in details["tokens"]))
        assert all(sequence.keys() >= SEQUENCE for sequence in sequences[1:])
    assert best == {True, False}, "the first one is not always the best"


def test_the_bare_address_answers_a_list_and_generate_an_object(server: LiveServer) -> None:
    reply = server.generate("hello", max_new_tokens=5, details=True).json()
    assert server.generate("hello", route="/", max_new_tokens=5, details=True).json() == [reply]
    several = server.client.post("/", json={"inputs": ["hello", "what"], "parameters": {"max_new_tokens": 5}}).json()
    assert several == [{"generated_text": server.text(text, max_new_tokens=5)} for text in ("hello", "what")]
    [chosen] = server.generate("hello", route="/", choices=["a", "b"]).json()
    assert chosen == server.generate("hello", choices=["a", "b"]).json()
    body = {"inputs": "hello", "stream": True, "parameters": {"max_new_tokens": 5}}
    assert parse_events(server.client.post("/", json=body).content) == server.events("hello", max_new_tokens=5)
    assert_error(server.generate("hello", "nobody", "/"), 404, "unknown_task", "no task 'nobody'")


def test_the_inputs_tokens_are_told_with_how_likely_they_were(server: LiveServer, tiny: FrozenModel) -> None:
    soft_prompt = server.publish_random("tgi-prefill", 9)
    details = server.generate("hello", "tgi-prefill", decoder_input_details=True, max_new_tokens=1).json()["details"]
    scored = engine_answer(tiny, soft_prompt, "hello", max_new_tokens=1, input_logprobs=True).scored
    assert [(token["id"], token["logprob"]) for token in details["prefill"]] == [
        (token.id, pytest.approx(token.logprob)) if token.logprob else (token.id, None) for token in scored
    ]
    assert [token["text"] for token in details["prefill"]] == list("hello")


def test_the_most_likely_tokens_are_told_in_replies_and_in_streams(server: LiveServer) -> None:
    details = server.generate(top_n_tokens=3, max_new_tokens=4).json()["details"]
    assert [len(top) for top in details["top_tokens"]] == [3] * 4
    for token, top in zip(details["tokens"], details["top_tokens"], strict=True):
        # Greedy: the chosen one is the likeliest. Its text may wait for the rest of a character.
        assert (top[0]["id"], top[0]["logprob"]) == (token["id"], token["logprob"])
        assert top[0]["logprob"] >= top[1]["logprob"] >= top[2]["logprob"]
    streamed = server.events(top_n_tokens=3, max_new_tokens=4)
    assert [event["top_tokens"] for event in streamed] == details["top_tokens"]


@pytest.mark.parametrize("route", ["/generate", "/generate_stream"])
def test_a_grammar_holds(server: LiveServer, route: str) -> None:
    def text(grammar: dict[str, Any]) -> str:
        parameters: dict[str, Any] = {"grammar": grammar, "max_new_tokens": 60, "temperature": 2.0, "seed": 3}
        if route == "/generate":
            return server.text("hello", **parameters)
        return str(server.events("hello", **parameters)[-1]["generated_text"])

    schema: dict[str, Any] = {
        "type": "object",
        "properties": {"n": {"type": "integer", "maximum": 9, "minimum": 0}},
        "required": ["n"],
    }
    schema["additionalProperties"] = False
    assert re.fullmatch("[ab]{3}c", text({"type": "regex", "value": "[ab]{3}c"}))
    assert text({"type": "lark", "value": 'start: WORD "!"\nWORD: "yes" | "no"'}) in ("yes!", "no!")
    assert text({"type": "ebnf", "value": 'root ::= word "?"\nword ::= "yes" | "no"'}) in ("yes?", "no?")
    for grammar in (
        {"type": "json", "value": schema},
        {"type": "json", "value": json.dumps(schema)},
        {"type": "json_schema", "value": {"name": "n", "schema": schema}},
    ):
        assert json.loads(text(grammar))["n"] in range(10)


@pytest.mark.parametrize("form", ['{"type": "json", "value": %s}', '{"type": "json_schema", "value": {"schema": %s}}'])
def test_a_schema_that_is_nested_too_deeply_is_refused_however_deeply(server: LiveServer, form: str) -> None:
    headers = {"Content-Type": "application/json"}
    for depth in range(20, 1000, 20):
        schema = '{"items": ' * (depth - 1) + "{}" + "}" * (depth - 1)
        body = f'{{"inputs": "hello", "parameters": {{"max_new_tokens": 1, "grammar": {form % schema}}}}}'
        response = server.client.post("/generate", content=body, headers=headers)
        if depth <= MAX_SCHEMA_DEPTH:
            assert response.status_code == 200, response.text
        elif response.status_code == 400:  # it could not even be read
            assert_error(response, 400, "invalid_request", "nested too deeply")
        else:
            assert_error(response, 422, "invalid_request", f"nested more than {MAX_SCHEMA_DEPTH} deep")


def test_a_grammar_that_takes_too_much_is_refused_and_the_server_goes_on(server: LiveServer) -> None:
    links = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(2500)}
    schema = {"$defs": links | {"d2500": {"type": "string"}}, "$ref": "#/$defs/d0"}
    for route in ("/generate", "/generate_stream"):
        response = server.generate("hello", None, route, grammar={"type": "json", "value": schema})
        assert_error(response, 422, "invalid_request", "takes more than 6 MiB of stack")
    assert server.text("hello", grammar={"type": "regex", "value": "[a]{3}"}, max_new_tokens=9) == "aaa"


def test_a_grammar_that_cannot_be_used_is_refused_with_the_reason(server: LiveServer) -> None:
    for route in ("/generate", "/generate_stream"):
        response = server.generate("hello", None, route, grammar={"type": "regex", "value": "(a"})
        assert_error(response, 422, "invalid_request", "regular expression cannot be used")
    assert_error(server.generate(grammar={"type": "json", "value": 3}), 422, "invalid_request", "is a JSON schema")
    assert server.generate(max_new_tokens=2).status_code == 200


def test_what_must_be_whole_is_not_streamed(server: LiveServer) -> None:
    for parameters in ({"best_of": 2}, {"choices": ["a", "b"]}, {"decoder_input_details": True}):
        (name,) = parameters
        assert_error(server.generate(route="/generate_stream", **parameters), 422, "invalid_request", name, "streamed")
    response = server.client.post("/generate_stream", json={"inputs": ["a", "b"]})
    assert_error(response, 422, "invalid_request", "a list of texts cannot be streamed")


def test_tokens_of_a_text_are_told_with_their_places(server: LiveServer) -> None:
    tokens = server.client.post("/tokenize", json={"inputs": "hé!"}).json()
    assert "".join(dict.fromkeys(token["text"] for token in tokens)) == "hé!"
    assert (tokens[0]["start"], tokens[0]["stop"], tokens[-1]["stop"]) == (0, 1, 3)
    assert_error(server.client.post("/tokenize", json={"inputs": "a" * 10_000_000}), 413, "payload_too_large")
    assert_error(server.client.post("/tokenize", json={"inputs": "a" * 3_000_000}), 422, "input_too_long")
    assert server.client.post("/tokenize", json={"inputs": ""}).json() == []


def test_a_request_that_is_too_much_by_itself_is_refused_before_anything_starts(server: LiveServer) -> None:
    many = {"inputs": ["a"] * 128, "parameters": {"best_of": 2}}
    assert_error(server.client.post("/generate", json=many), 422, "invalid_request", "128 inputs with 2 texts each")
    many = {"inputs": ["a"] * 128, "parameters": {"choices": [f"label {i}" for i in range(20)]}}
    assert_error(server.client.post("/generate", json=many), 422, "invalid_request", "128 inputs with 20 choices each")
    assert server.is_idle
