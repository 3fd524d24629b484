"""Answers that must match something do, whatever a random model would like to say."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.api.live import LiveServer, assert_openai_error
from tests.api.openai.support import CHAT, COMPLETIONS, FROZEN, Body, ask, joined, post, stream, texts

SCHEMA: Body = {
    "type": "object",
    "properties": {"mood": {"enum": ["good", "bad"]}, "sure": {"type": "boolean"}},
    "required": ["mood", "sure"],
    "additionalProperties": False,
}
HOT: Body = {"temperature": 2, "max_tokens": 120}
DOUBTFUL = [
    {"regex": "("},
    {"json": "{"},
    {"json": {"type": "nonsense"}},
]


def check(text: str) -> None:
    """It is an object of the schema."""
    value = json.loads(text)
    assert set(value) == {"mood", "sure"}
    assert value["mood"] in ("good", "bad")
    assert value["sure"] in (True, False)


@pytest.mark.parametrize("schema", [SCHEMA, json.dumps(SCHEMA)], ids=["object", "text"])
def test_a_json_schema_holds(chatty: LiveServer, schema: Any) -> None:
    for path in (COMPLETIONS, CHAT):
        reply = ask(chatty, path, structured_outputs={"json": schema}, n=4, seed=1, **HOT)
        for choice, text in zip(reply["choices"], texts(reply), strict=True):
            assert choice["finish_reason"] == "stop", text
            check(text)


def test_a_chats_response_format_holds(chatty: LiveServer) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "mood", "schema": SCHEMA, "strict": True}}
    reply = ask(chatty, CHAT, response_format=form, seed=2, **HOT)
    check(texts(reply)[0])
    check(joined(stream(chatty, CHAT, response_format=form, seed=2, **HOT))[0])
    plain = texts(ask(chatty, CHAT, max_tokens=9))
    assert texts(ask(chatty, CHAT, response_format={"type": "text"}, max_tokens=9)) == plain


def test_json_object_is_the_beginning_of_an_object_at_least(chatty: LiveServer) -> None:
    [text] = texts(ask(chatty, CHAT, response_format={"type": "json_object"}, seed=3, temperature=1, max_tokens=60))
    assert text.lstrip().startswith("{")


@pytest.mark.parametrize("kind", ["json_object", "json"])
def test_a_schema_holds_in_text_generation_inferences_form(chatty: LiveServer, kind: str) -> None:
    check(texts(ask(chatty, CHAT, response_format={"type": kind, "value": SCHEMA}, seed=2, **HOT))[0])


@pytest.mark.parametrize("more", [{"name": "mood"}, {}, {"name": None, "strict": True, "zzzzz": None}])
def test_a_named_schema_holds_in_text_generation_inferences_form(chatty: LiveServer, more: Body) -> None:
    form = {"type": "json_schema", "value": {"schema": SCHEMA, **more}}
    check(texts(ask(chatty, CHAT, response_format=form, seed=2, **HOT))[0])


@pytest.mark.parametrize(
    "form",
    [
        {"type": "text", "value": SCHEMA},
        {"type": "json"},
        {"type": "json", "value": "{}"},
        {"type": "json_schema", "value": SCHEMA},
        {"type": "json_schema", "value": {"name": "mood"}},
        {"type": "json_schema", "value": {"schema": SCHEMA, "more": 1}},
        {"type": "json_schema", "value": {"schema": SCHEMA}, "json_schema": {"name": "mood", "schema": SCHEMA}},
    ],
)
def test_a_schema_stands_where_its_type_takes_it(chatty: LiveServer, form: Body) -> None:
    error = assert_openai_error(post(chatty, CHAT, response_format=form), 400, "invalid_request", "value")
    assert error["param"] == "response_format"


def test_a_regex_holds(chatty: LiveServer) -> None:
    for path in (COMPLETIONS, CHAT):
        reply = ask(chatty, path, structured_outputs={"regex": "[a-f]{3}-[0-9]{2}"}, n=3, seed=4, **HOT)
        assert all(re.fullmatch("[a-f]{3}-[0-9]{2}", text) for text in texts(reply))
        assert {choice["finish_reason"] for choice in reply["choices"]} == {"stop"}


@pytest.mark.parametrize("grammar", ['root ::= [a-f] "-" digit+\ndigit ::= [7]', 'start: /[a-f]/ "-" "7"+'])
def test_a_grammar_in_gbnf_or_lark_holds(chatty: LiveServer, grammar: str) -> None:
    for path in (COMPLETIONS, CHAT):
        reply = ask(chatty, path, structured_outputs={"grammar": grammar}, n=3, seed=4, **HOT)
        assert all(re.fullmatch("[a-f]-7*", text) for text in texts(reply))
    error = assert_openai_error(post(chatty, CHAT, structured_outputs={"grammar": "answer: 7"}), 400, "invalid_request")
    assert "EBNF grammar cannot be used" in error["message"]


def test_one_of_the_choices_is_said(chatty: LiveServer) -> None:
    offered = ["positive", "negative", "neither of them"]
    reply = ask(chatty, structured_outputs={"choice": offered}, n=8, seed=5, **HOT)
    assert set(texts(reply)) <= set(offered)
    assert len(set(texts(reply))) > 1


@pytest.mark.parametrize("form", DOUBTFUL, ids=str)
def test_a_form_that_nothing_can_have_is_refused(chatty: LiveServer, form: Body) -> None:
    assert_openai_error(post(chatty, COMPLETIONS, structured_outputs=form), 400, "invalid_request")


@pytest.mark.parametrize(
    "form",
    [
        '"structured_outputs": {"json": %s}',
        '"response_format": {"type": "json", "value": %s}',
        '"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": %s}}',
    ],
)
def test_a_schema_that_is_nested_too_deeply_is_refused_however_deeply(chatty: LiveServer, form: str) -> None:
    headers = {"Content-Type": "application/json"}
    for depth in range(140, 1000, 20):
        schema = '{"items": ' * (depth - 1) + "{}" + "}" * (depth - 1)
        body = f'{{"model": "{FROZEN}", "messages": [{{"role": "user", "content": "hello"}}], {form % schema}}}'
        response = chatty.client.post(CHAT, content=body, headers=headers)
        assert_openai_error(response, 400, "invalid_request", "nested ", " deep")


def test_two_forms_at_once_are_refused(chatty: LiveServer) -> None:
    both: Body = {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}
    error = assert_openai_error(post(chatty, CHAT, **both), 400, "invalid_request")
    assert error["param"] == "response_format"
