"""Bodies of requests: a field that is null counts as left out, whatever it is called; other unknown ones are errors."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from server.api.evaluations.schemas import EvaluationRequest
from server.api.openai.schemas import ChatBody, CompletionBody
from server.api.schemas import ActivateBody, RequestBody
from server.api.tgi.schemas import GenerateBody, TokenizeBody
from server.api.training.schemas import parse_request, request_body

BODIES: list[tuple[type[RequestBody], dict[str, Any]]] = [
    (ActivateBody, {"version": 1}),
    (EvaluationRequest, {"task": "mood", "data": "rows.jsonl"}),
    (GenerateBody, {"inputs": "hello"}),
    (TokenizeBody, {"inputs": "hello"}),
    (CompletionBody, {"model": "mood", "prompt": "hello"}),
    (ChatBody, {"model": "mood", "messages": [{"role": "user", "content": "hello"}]}),
]


@pytest.mark.parametrize(("kind", "least"), BODIES, ids=lambda value: getattr(value, "__name__", ""))
def test_null_counts_as_left_out(kind: type[RequestBody], least: dict[str, Any]) -> None:
    optional = {name: None for name, field in kind.model_fields.items() if not field.is_required()}
    assert kind.model_validate({**optional, "zzzzz": None, **least}) == kind.model_validate(least)
    with pytest.raises(ValidationError, match="zzzzz"):
        kind.model_validate({"zzzzz": 0, **least})


def test_null_counts_as_left_out_in_a_job_and_in_all_that_it_holds() -> None:
    config: dict[str, Any] = {"labels": ["a", "b"], "learning_rate": 0.1}
    bound: dict[str, Any] = {"metric": "validation_loss", "at_most": 1.5}
    nulls = {"steps": None, "patience": None, "zzzzz": None}
    least = {"task": "mood", "config": config, "activate": bound}
    more = {
        "zzzzz": None,
        "data": None,
        "input_template": None,
        **least,
        "config": {**nulls, **config},
        "activate": {"at_least": None, "zzzzz": None, **bound},
    }
    assert parse_request(more) == parse_request(least)
    for wrong in ({"zzzzz": 0}, {"config": {**nulls, "yyyyy": 0}}, {"task": None}):
        with pytest.raises(ValidationError, match=r"zzzzz|yyyyy|task"):
            parse_request({**more, **wrong})


@pytest.mark.parametrize("kind", [kind for kind, _ in BODIES], ids=lambda kind: kind.__name__)
def test_the_document_says_so(kind: type[RequestBody]) -> None:
    assert kind.model_json_schema()["additionalProperties"] == {"type": "null"}


def test_the_document_says_so_of_jobs() -> None:
    schema = request_body()["requestBody"]["content"]["application/json"]["schema"]
    config = schema["properties"]["config"]["anyOf"][0]
    for held in (schema, config):
        assert held["additionalProperties"] == {"type": "null"}
    assert {"type": "null"} in config["properties"]["steps"]["anyOf"]
    assert schema["properties"]["task"]["type"] == "string", "it cannot be left out"
