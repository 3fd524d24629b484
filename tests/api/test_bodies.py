"""Bodies within the bounds are read as they are; those beyond are refused before they cost time or memory."""

from __future__ import annotations

import json
import time
import tracemalloc
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from starlette.exceptions import HTTPException

from server.api import bodies
from server.api.bodies import MAX_DIGITS, MAX_NAME, ORDERS, TEXTS, misfit, nearest, parse_json
from server.api.body_sizes import MAX_JSON_BYTES, json_limit
from server.api.jobs.table import KINDS
from server.contracts import TemplatedText
from server.errors import InvalidRequest, PreludeError
from tests.api.live import LiveServer, assert_error

JSON = {"Content-Type": "application/json"}
SECONDS = 3.0
"""Far more than any of these may take on a busy machine, and far less than they took."""


def names(count: int) -> dict[str, int]:
    """An object of fields that nobody knows."""
    return {f"temperatur{number:05d}": 1 for number in range(count)}


@pytest.mark.parametrize(
    "value",
    [
        {"prompt": list(range(100_000))},
        {"prompt": [[7] * 1000] * 100},
        {"inputs": ['{"a": [1, 2, {"b": "c"}], "d": "\\""}, ' * 300] * 128},
        {"schema": {f"field {number}": {"type": "string", "enum": ["a", "b"]} for number in range(2000)}},
        {"inputs": "1" * 5000 + ":,[{" * 100_000},
        {"metadata": {f"k{number}": "v" for number in range(TEXTS.names - 1)}},
        [[]] * (TEXTS.containers - 1),
        [1] * (TEXTS.values - 1),
        {"a" * MAX_NAME: int("1" * MAX_DIGITS)},
        ["\N{GRINNING FACE}" * 100_000, "é", "\\\\", '"', "\u2028", -0.5, 1e300, True, None],
    ],
    ids=["ids", "lists of ids", "texts of JSON", "schema", "marks", "names", "lists", "values", "longest", "texts"],
)
def test_what_clients_send_is_read_as_it_is(value: Any) -> None:
    for body in (json.dumps(value), json.dumps(value, ensure_ascii=False, separators=(",", ":"))):
        assert parse_json(body.encode()) == value


def test_a_mark_of_byte_order_is_read_over() -> None:
    assert parse_json(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("[" + "1," * TEXTS.values + "1]", "more than 131,072 values"),
        ("[" + "[]," * TEXTS.containers + "1]", "more than 16,384 lists and objects"),
        ("[" + '"",' * TEXTS.values + "1]", "more than 131,072 values"),
        (json.dumps(names(TEXTS.names + 1)), "more than 8,192 named values"),
        ('{"a":1,' * (TEXTS.names + 1), "more than 8,192 named values"),
        (json.dumps({"a" * (MAX_NAME + 1): 1}), "more than 256 characters"),
        (json.dumps([{"b": {"a" * (MAX_NAME + 1): 1}}]), "more than 256 characters"),
        ("[" * 100_000, "nested too deeply"),
        ("[" * 300 + "]" * 300, "nested too deeply"),
        ("1" * (MAX_DIGITS + 1), "more than 1,000 digits"),
        ('["' + "1" * 5000 + '", -' + "7" * 5000 + "]", "more than 1,000 digits"),
        ("1." + "1" * 5000, "more than 1,000 digits"),
        (r'["\ud800"]', "half of a surrogate pair"),
        (r'["\u12"]', "broken escape"),
        ('"\N{GRINNING FACE}' + "a" * TEXTS.wide_bytes + '"', "beyond U+FFFF"),
        (r'"\ud83d\ude00' + "a" * TEXTS.wide_bytes + '"', "beyond U+FFFF"),
        ('"\N{EM DASH}' + "a" * TEXTS.characters + '"', "beyond U+00FF"),
        (r'"\u2014' + "a" * TEXTS.characters + '"', "beyond U+00FF"),
        ("{", "not valid JSON"),
        ("", "not valid JSON"),
        ('{"a": 1} 2', "not valid JSON"),
        ('"' * 2 * TEXTS.values, "not valid JSON"),
    ],
    ids=range(22),
)
def test_what_has_too_much_of_something_is_refused_at_once(body: str, said: str) -> None:
    started = time.monotonic()
    with pytest.raises((PreludeError, HTTPException)) as refused:
        parse_json(body.encode())
    assert said in str(getattr(refused.value, "detail", refused.value))
    assert time.monotonic() - started < SECONDS


@pytest.mark.parametrize("character", ["a", "\N{LATIN SMALL LETTER E WITH ACUTE}", "\N{CJK UNIFIED IDEOGRAPH-6F22}"])
def test_texts_of_any_usual_script_fill_a_body_up_to_its_limit(character: str) -> None:
    text = character * ((MAX_JSON_BYTES - 10) // len(character.encode()))
    assert parse_json(json.dumps(text, ensure_ascii=False).encode()) == text


def test_what_asks_for_a_job_has_narrower_bounds() -> None:
    paths = [kind.router.prefix for kind in KINDS]
    assert json_limit("POST /training/jobs", paths) < json_limit("POST /generate", paths) == MAX_JSON_BYTES
    body = json.dumps(names(ORDERS.names + 1)).encode()
    assert parse_json(body)
    with pytest.raises(InvalidRequest, match="1,024 named values"):
        parse_json(body, ORDERS)


@given(st.lists(st.sampled_from(["\\", '"', "a", ":", ",", "[", "\\\\", '\\"', "{", "1"]), max_size=60).map("".join))
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_what_is_outside_of_texts_does_not_depend_on_where_pieces_end(size: int, text: str) -> None:
    whole = bodies._outside_texts(text.encode(), TEXTS)
    with mock.patch.object(bodies, "PIECE", size):
        assert bodies._outside_texts(text.encode(), TEXTS) == whole


def test_what_is_within_texts_is_not_counted() -> None:
    value = ["a:,[{", '"[[', "\\", '\\"', {"[,": ":"}]
    body = json.dumps(value, separators=(",", ":")).encode()
    assert bodies._outside_texts(body, TEXTS) == b"[,,,,{:}]"


@pytest.mark.parametrize(
    "start",
    [
        "[" + "[]," * (MAX_JSON_BYTES // 3),
        "[" * (MAX_JSON_BYTES - 1),
        '["' + "7\\\\" * (MAX_JSON_BYTES // 3 - 9) + '",1',
    ],
    ids=["lists", "nested", "text"],
)
def test_reading_json_takes_memory_within_a_few_times_of_its_size(start: str) -> None:
    body = start.encode() + b"7" * 2 * MAX_DIGITS
    tracemalloc.start()
    try:
        with pytest.raises((InvalidRequest, HTTPException)):
            parse_json(body)
        assert tracemalloc.get_traced_memory()[1] < 1.5 * len(body)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "path", ["/training/jobs", "/evaluations", "/generate", "/v1/completions", "/prompts/x/activate"]
)
@pytest.mark.parametrize("count", [1000, 8000])
def test_many_unknown_fields_are_refused_briefly_and_quickly(server: LiveServer, path: str, count: int) -> None:
    started = time.monotonic()
    reply = server.client.post(path, json={"task": "mood", **names(count)})
    assert time.monotonic() - started < SECONDS
    assert reply.status_code in (400, 422)
    assert len(reply.content) < 2500


def test_problems_of_a_body_are_told_in_time_that_grows_with_their_number() -> None:
    @dataclass(frozen=True, config={"extra": "forbid"})
    class Order:
        task: str = ""

    def seconds(count: int) -> float:
        with pytest.raises(ValidationError) as refused:
            TypeAdapter(Order).validate_python(names(count))
        started = time.perf_counter()
        assert len(misfit(refused.value).errors()) == count
        return time.perf_counter() - started

    assert seconds(16_000) < SECONDS  # each was compared with each: a minute and a half


@pytest.mark.parametrize("path", ["/generate", "/training/jobs", "/v1/chat/completions"])
def test_a_long_name_is_not_compared_with_the_known_ones(server: LiveServer, path: str) -> None:
    for size in (MAX_NAME, 500_000):
        started = time.monotonic()
        reply = server.client.post(path, json={"inputs": "x", "i" * size: 1})
        assert reply.status_code in (400, 422)
        assert time.monotonic() - started < SECONDS
    started = time.monotonic()
    assert server.client.get("/prompts", params={"l" * 8_000: "1"}).status_code == 422
    assert time.monotonic() - started < SECONDS


def test_the_nearest_name_is_still_found() -> None:
    assert nearest("temprature", ["temperature", "top_k"]) == "temperature"
    assert nearest("temperature" * 3, ["temperature", "top_k"]) is None
    assert nearest("x", []) is None


def test_very_many_token_ids_are_refused_before_they_become_text(server: LiveServer) -> None:
    body = {"model": "tiny-llama", "prompt": [7] * 100_000, "echo": True, "max_tokens": 1}
    reply = server.client.post("/v1/completions", json=body)
    assert_error(reply, 400, "input_too_long", "100,000 tokens")


@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
def test_no_text_is_tokenised_after_one_that_is_too_long(server: LiveServer, path: str) -> None:
    texts = ["short", "ab " * server.worker.model.max_model_len, "never read"]
    encode, read = server.worker.text.encode, []

    def noted(text: TemplatedText, **options: bool) -> list[int]:
        read.append(text.text)
        return encode(text, **options)

    knows_nothing = mock.patch.object(server.worker.text.length_bound, "least_tokens", return_value=0)
    with knows_nothing, mock.patch.object(server.worker.text, "encode", noted):
        asked = {"inputs": texts} if path == "/generate" else {"prompt": texts, "model": server.worker.model.name}
        response = server.client.post(path, json=asked)
    assert_error(response, 400 if path == "/v1/completions" else 422, "input_too_long")
    assert "never read" not in read


def test_a_grammar_has_a_length(server: LiveServer) -> None:
    long = "a" * 300_000
    for grammar in ({"type": "regex", "value": long}, {"type": "json", "value": {"const": long}}):
        reply = server.client.post("/generate", json={"inputs": "x", "parameters": {"grammar": grammar}})
        assert_error(reply, 422, "invalid_request", "at most 262,144 are taken")
    for form in ({"regex": long}, {"choice": [long]}, {"json": {"const": long}}):
        body = {"model": "tiny-llama", "prompt": "x", "structured_outputs": form}
        assert_error(
            server.client.post("/v1/completions", json=body), 400, "invalid_request", "at most 262,144 are taken"
        )
