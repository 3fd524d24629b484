"""POST /generate, /generate_stream and /: who answers, with which text, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from server.api.tgi.schemas import GenerateParameters
from server.engine.model.frozen import FrozenModel
from tests.api.live import MAX_MODEL_LEN, LiveServer, assert_error, engine_answer, parse_events
from tests.api.tgi.support import ROUTES


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
        "cached_tokens",
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


def test_tokens_of_a_text_are_told_with_their_places(server: LiveServer) -> None:
    tokens = server.client.post("/tokenize", json={"inputs": "hé!"}).json()
    assert "".join(dict.fromkeys(token["text"] for token in tokens)) == "hé!"
    assert (tokens[0]["start"], tokens[0]["stop"], tokens[-1]["stop"]) == (0, 1, 3)
    assert_error(server.client.post("/tokenize", json={"inputs": "a" * 10_000_000}), 413, "payload_too_large")
    assert_error(server.client.post("/tokenize", json={"inputs": "a" * 3_000_000}), 422, "input_too_long")
    assert server.client.post("/tokenize", json={"inputs": ""}).json() == []
