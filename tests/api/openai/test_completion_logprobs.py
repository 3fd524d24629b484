from __future__ import annotations

import math
from typing import Any

import pytest

from tests.api.live import LiveServer, assert_openai_error
from tests.api.openai.support import (
    COMPLETIONS,
    FROZEN,
    Body,
    ask,
    engine_ids,
    joined,
    post,
    stream,
    texts,
)
from tests.support import EOS


def test_logprobs_are_told_for_every_token(server: LiveServer) -> None:
    reply = ask(server, max_tokens=6, logprobs=3, ignore_eos=True)
    [choice] = reply["choices"]
    logprobs = choice["logprobs"]
    assert set(logprobs) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    assert len(logprobs["tokens"]) == reply["usage"]["completion_tokens"] == 6
    assert logprobs["text_offset"][0] == 0
    assert logprobs["text_offset"] == sorted(logprobs["text_offset"])
    for token, logprob, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert top[token] == logprob == max(top.values()) <= 0, "greedy tokens are the most likely ones"
        assert 1 <= len(top) <= 3
    [plain] = ask(server, max_tokens=6, logprobs=0, ignore_eos=True)["choices"]
    assert all(len(top) == 1 for top in plain["logprobs"]["top_logprobs"])
    assert plain["logprobs"]["token_logprobs"] == logprobs["token_logprobs"]


def test_a_token_that_is_not_among_the_most_likely_is_told_beside_them(server: LiveServer) -> None:
    [choice] = ask(server, max_tokens=12, logprobs=1, temperature=5, seed=1, ignore_eos=True)["choices"]
    tops = choice["logprobs"]["top_logprobs"]
    assert any(len(top) == 2 for top in tops)
    for logprob, top in zip(choice["logprobs"]["token_logprobs"], tops, strict=True):
        assert logprob <= max(top.values())


def scored(server: LiveServer, prompt: str | list[int], **own: Any) -> Body:
    """What an evaluation harness asks for: the log-probabilities of a text that it has."""
    reply = ask(server, prompt=prompt, echo=True, logprobs=1, **own)
    found: Body = reply["choices"][0]
    return found


@pytest.mark.parametrize("model", [FROZEN, "cmpl-echo"])
def test_a_text_that_is_echoed_is_as_likely_as_when_it_was_generated(server: LiveServer, model: str) -> None:
    server.publish_random("cmpl-echo", 3)
    generated = ask(server, model=model, max_tokens=8, logprobs=1, ignore_eos=True)["choices"][0]
    given = server.worker.text.encode("hello")
    # Ids, because bytes that are no character cannot be sent as text.
    ids = [*given, *engine_ids(server, model, 8)]
    echoed = scored(server, ids, model=model, max_tokens=0)
    assert len(echoed["logprobs"]["tokens"]) == len(ids)
    assert echoed["logprobs"]["token_logprobs"][0] is None
    assert echoed["logprobs"]["top_logprobs"][0] is None
    for one, other in zip(
        echoed["logprobs"]["token_logprobs"][len(given) :], generated["logprobs"]["token_logprobs"], strict=True
    ):
        assert math.isclose(one, other, rel_tol=1e-4, abs_tol=1e-5)
    assert echoed["finish_reason"] == "length"


def test_lm_evals_arithmetic_holds(server: LiveServer) -> None:
    """It asks for one token more, leaves that out, and calls a continuation greedy if no other token is likelier."""
    context = server.worker.text.encode("hello")
    greedy = engine_ids(server, FROZEN, 4)
    other = [*greedy[:3], (greedy[3] + 1) % 256]
    for continuation, is_greedy in ((greedy, True), (other, False)):
        choice = scored(server, [*context, *continuation], max_tokens=1, temperature=0, seed=1234)
        told = choice["logprobs"]
        logprobs = told["token_logprobs"][len(context) : -1]
        assert len(logprobs) == 4
        tops = told["top_logprobs"][len(context) : -1]
        assert all(logprob == max(top.values()) for logprob, top in zip(logprobs, tops, strict=True)) == is_greedy
        alone = scored(server, [*context, *continuation], max_tokens=0)["logprobs"]["token_logprobs"][len(context) :]
        assert logprobs == pytest.approx(alone)
    ended = scored(server, context, max_tokens=1, logit_bias={str(EOS): 100})
    assert len(ended["logprobs"]["tokens"]) == len(context) + 1, "an end token is a token too"


def test_an_echoed_text_stands_before_what_was_generated(server: LiveServer) -> None:
    text = "h\N{SNOWMAN}llo"
    [generated] = texts(ask(server, prompt=text, max_tokens=5))
    assert texts(ask(server, prompt=text, max_tokens=5, echo=True)) == [text + generated]
    assert texts(ask(server, prompt=server.worker.text.encode(text), max_tokens=5, echo=True)) == [text + generated]
    assert texts(ask(server, prompt=text, max_tokens=0, echo=True)) == [text]
    twice = ask(server, prompt=[text, "x"], n=2, temperature=0, max_tokens=5, echo=True, logprobs=0)
    assert [found.startswith(given) for found, given in zip(texts(twice), [text, text, "x", "x"], strict=True)]
    for choice in twice["choices"]:
        assert choice["logprobs"]["token_logprobs"][0] is None
        assert len(choice["logprobs"]["tokens"]) == len(choice["logprobs"]["text_offset"])


def test_offsets_say_where_in_the_text_a_token_begins(server: LiveServer) -> None:
    text = "h\N{SNOWMAN}llo"
    choice = scored(server, text, max_tokens=0)
    assert choice["logprobs"]["text_offset"] == [0, 1, 1, 1, 2, 3, 4]
    assert [choice["text"][offset] for offset in choice["logprobs"]["text_offset"]] == list("h\u2603\u2603\u2603llo")


def test_an_input_can_be_looked_at_without_an_answer(server: LiveServer) -> None:
    reply = ask(server, max_tokens=0, n=1)
    assert (texts(reply), reply["choices"][0]["finish_reason"]) == ([""], "length")
    assert reply["usage"]["completion_tokens"] == 0
    several: list[Body] = [{"n": 3}, {"best_of": 2}, {"n": 2, "stream": True}]
    for body in several:
        response = post(server, COMPLETIONS, max_tokens=0, **body)
        assert assert_openai_error(response, 400, "invalid_request")["param"] == "n"
    assert ask(server, max_tokens=1)["choices"], "the engine goes on"


def test_the_best_of_several_are_the_likeliest(server: LiveServer) -> None:
    drawn: Body = {"temperature": 2, "seed": 3, "max_tokens": 6, "ignore_eos": True}
    every = ask(server, **drawn, n=6, logprobs=0)
    ranked = sorted(every["choices"], key=lambda c: -sum(c["logprobs"]["token_logprobs"]) / 6)
    best = ask(server, **drawn, n=2, best_of=6)
    assert texts(best) == [choice["text"] for choice in ranked[:2]]
    assert [choice["index"] for choice in best["choices"]] == [0, 1]
    assert all(choice["logprobs"] is None for choice in best["choices"])
    assert best["usage"] == every["usage"], "what was generated counts"
    assert_openai_error(post(server, COMPLETIONS, n=3, best_of=2), 400, "invalid_request", "best_of")
    assert_openai_error(post(server, COMPLETIONS, best_of=2, stream=True), 400, "invalid_request", "best_of")


@pytest.mark.parametrize("n", [1, 2])
def test_a_stream_tells_the_same_logprobs(server: LiveServer, n: int) -> None:
    body: Body = {"prompt": ["hello", "hi"], "n": n, "temperature": 0, "max_tokens": 7, "logprobs": 2, "echo": True}
    whole = ask(server, **body)
    found: dict[int, dict[str, list[Any]]] = {}
    for chunk in stream(server, **body):
        for choice in chunk["choices"]:
            for name, values in choice["logprobs"].items():
                found.setdefault(choice["index"], {}).setdefault(name, []).extend(values)
    assert found == {choice["index"]: choice["logprobs"] for choice in whole["choices"]}
    assert joined(stream(server, **body)) == dict(enumerate(texts(whole)))


def test_a_streamed_look_at_an_input_is_one_chunk(server: LiveServer) -> None:
    [chunk] = stream(server, max_tokens=0, echo=True, logprobs=1)
    assert chunk["choices"][0]["text"] == "hello"
    assert chunk["choices"][0]["finish_reason"] == "length"
    assert len(chunk["choices"][0]["logprobs"]["tokens"]) == 5
