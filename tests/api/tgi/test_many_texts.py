from __future__ import annotations

import json
import re
from typing import Any

import pytest

from server.contracts import MAX_SCHEMA_DEPTH
from tests.api.live import LiveServer, assert_error

SEQUENCE = {"generated_text", "finish_reason", "generated_tokens", "seed", "prefill", "tokens"}
"""What text-generation-inference's document requires of each of `best_of_sequences`, and its nullable seed."""


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


def test_a_request_that_is_too_much_by_itself_is_refused_before_anything_starts(server: LiveServer) -> None:
    many = {"inputs": ["a"] * 128, "parameters": {"best_of": 2}}
    assert_error(server.client.post("/generate", json=many), 422, "invalid_request", "128 inputs with 2 texts each")
    many = {"inputs": ["a"] * 128, "parameters": {"choices": [f"label {i}" for i in range(20)]}}
    assert_error(server.client.post("/generate", json=many), 422, "invalid_request", "128 inputs with 20 choices each")
    assert server.is_idle
