"""POST /v1/completions: who answers, with which text, in which order, and what is told of the tokens."""

from __future__ import annotations

from typing import Any

import pytest

from server.engine.model.frozen import FrozenModel
from tests.api.live import MAX_MODEL_LEN, LiveServer, assert_openai_error, engine_answer, wait_until
from tests.api.openai.support import (
    COMPLETIONS,
    FROZEN,
    Body,
    ask,
    engine_ids,
    events,
    joined,
    post,
    reasons,
    stream,
    texts,
)
from tests.support import EOS, VOCAB_SIZE


def test_a_request_is_answered_by_the_soft_prompt_of_its_task(server: LiveServer, tiny: FrozenModel) -> None:
    first, second = server.publish_random("cmpl-first", 1), server.publish_random("cmpl-second", 2)
    answers = set()
    for model, soft_prompt in (("cmpl-first", first), ("cmpl-second", second), (FROZEN, None)):
        reply = ask(server, model=model, max_tokens=20)
        expected = engine_answer(tiny, soft_prompt, "hello", max_new_tokens=20).text
        assert (texts(reply), reply["model"], reply["object"]) == ([expected], model, "text_completion")
        answers.add(expected)
    assert len(answers) == 3


def test_a_version_can_be_asked_for(server: LiveServer, tiny: FrozenModel) -> None:
    old, new = server.publish_random("cmpl-versions", 1), server.publish_random("cmpl-versions", 2)
    for model, version, soft_prompt in (("cmpl-versions@1", "1", old), ("cmpl-versions", "2", new)):
        response = post(server, COMPLETIONS, model=model, max_tokens=12)
        assert response.headers["prelude-version"] == version
        assert texts(response.json()) == [engine_answer(tiny, soft_prompt, "hello", max_new_tokens=12).text]


def test_the_fingerprint_changes_with_what_answers_and_only_with_it(server: LiveServer) -> None:
    for seed in (1, 2):
        server.publish_random("cmpl-print", seed)
    prints = {
        model: {ask(server, model=model, max_tokens=1)["system_fingerprint"] for _ in range(2)}
        for model in (FROZEN, "cmpl-print@1", "cmpl-print@2")
    }
    assert all(len(found) == 1 for found in prints.values())
    assert len(set.union(*prints.values())) == 3
    assert prints["cmpl-print@2"] == {ask(server, model="cmpl-print", max_tokens=1)["system_fingerprint"]}


def test_the_text_is_taken_as_it_is_whatever_template_the_task_has(server: LiveServer, tiny: FrozenModel) -> None:
    soft_prompt = server.publish_random("cmpl-template", 1, {"input_template": "Q: {input}\nA:"})
    reply = ask(server, model="cmpl-template", max_tokens=12)
    assert texts(reply) == [engine_answer(tiny, soft_prompt, "hello", max_new_tokens=12).text]
    assert reply["usage"]["prompt_tokens"] == soft_prompt.num_virtual_tokens + len("hello")


def test_token_ids_are_the_same_as_their_text(server: LiveServer) -> None:
    ids = server.worker.text.encode("hello")
    expected = texts(ask(server, max_tokens=9))
    assert texts(ask(server, prompt=ids, max_tokens=9)) == expected
    assert texts(ask(server, prompt=[ids], max_tokens=9)) == expected
    assert texts(ask(server, prompt=["hello"], max_tokens=9)) == expected


@pytest.mark.parametrize("token_id", [VOCAB_SIZE, 2**31, 2**70])
def test_a_token_that_the_model_does_not_have_is_refused(server: LiveServer, token_id: int) -> None:
    error = assert_openai_error(post(server, COMPLETIONS, prompt=[[1], [2, token_id]]), 400, "invalid_request")
    assert error["param"] == "prompt"
    assert str(VOCAB_SIZE) in error["message"]


def test_several_inputs_with_several_texts_each_come_in_order(server: LiveServer) -> None:
    inputs = ["hello", "what is", "a much longer one of these", "x"]
    alone = [texts(ask(server, prompt=text, max_tokens=8))[0] for text in inputs]
    reply = ask(server, prompt=inputs, max_tokens=8)
    assert texts(reply) == alone
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2, 3]
    twice = ask(server, prompt=inputs, max_tokens=8, n=2, temperature=0)
    assert texts(twice) == [text for text in alone for _ in range(2)]
    assert [choice["index"] for choice in twice["choices"]] == list(range(8))
    assert twice["usage"]["prompt_tokens"] == sum(map(len, inputs))
    assert twice["usage"]["completion_tokens"] == 2 * reply["usage"]["completion_tokens"]
    by_ids = ask(server, prompt=[server.worker.text.encode(text) for text in inputs], max_tokens=8)
    assert texts(by_ids) == alone


def test_inputs_of_one_request_stay_on_one_side_of_a_canary(server: LiveServer) -> None:
    server.publish_random("cmpl-canary", 1)
    server.publish_random("cmpl-canary", 2)
    server.client.put("/prompts/cmpl-canary/traffic", json={"1": 50, "2": 50})
    sides = set()
    for person in map(str, range(12)):
        response = post(server, COMPLETIONS, model="cmpl-canary", prompt=["hello"] * 3, user=person, max_tokens=9)
        side = response.headers["prelude-version"]
        assert len(set(texts(response.json()))) == 1
        again = post(server, COMPLETIONS, model="cmpl-canary", user=person, max_tokens=9)
        assert again.headers["prelude-version"] == side
        sides.add(side)
    assert sides == {"1", "2"}


def test_too_many_choices_are_refused(server: LiveServer) -> None:
    products: list[Body] = [{"prompt": ["x"] * 65, "n": 2}, {"prompt": ["x"] * 2, "best_of": 65}]
    for body in products:
        assert_openai_error(post(server, COMPLETIONS, **body, max_tokens=1), 400, "invalid_request", "128")
    alone: list[Body] = [{"prompt": ["x"] * 129}, {"n": 129}, {"prompt": [[1]] * 129}]
    for body in alone:
        assert post(server, COMPLETIONS, **body, max_tokens=1).status_code == 400
    assert len(ask(server, prompt=["x"] * 128, max_tokens=1)["choices"]) == 128


def test_usage_counts_virtual_tokens_as_part_of_the_input_and_as_cached_once_they_are(own_server: LiveServer) -> None:
    n = own_server.publish_random("counted", 1).num_virtual_tokens
    reply = ask(own_server, model="counted", max_tokens=4, ignore_eos=True)
    usage = reply["usage"]
    assert usage["prompt_tokens"] == n + len("hello")
    assert (usage["completion_tokens"], usage["total_tokens"]) == (4, n + len("hello") + 4)
    assert usage["prompt_tokens_details"] == {"cached_tokens": n}, "a publish computes the prefix"
    alone = ask(own_server, max_tokens=4)
    assert alone["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    several = ask(own_server, model="counted", prompt=["hello", "hi"], n=2, temperature=0, max_tokens=4)
    assert several["usage"]["prompt_tokens_details"] == {"cached_tokens": 2 * n}


def test_the_tasks_defaults_hold_unless_the_request_says_otherwise(server: LiveServer) -> None:
    generation: Body = {"max_new_tokens": 7, "temperature": 0.8, "seed": 11}
    server.publish_random("cmpl-defaults", 6, {"generation": generation})
    server.publish_random("cmpl-plain", 6)
    same: Body = {"max_tokens": 7, "temperature": 0.8, "seed": 11}
    reply = ask(server, model="cmpl-defaults")
    assert texts(reply) == texts(ask(server, model="cmpl-plain", **same))
    assert reply["usage"]["completion_tokens"] <= 7
    for own in ({"max_tokens": 3}, {"temperature": 0}, {"seed": 12}, {"top_k": 2}, {"stop": ["e", "a"]}):
        wanted: Body = same | own
        assert texts(ask(server, model="cmpl-defaults", **own)) == texts(ask(server, model="cmpl-plain", **wanted))


def test_without_a_default_it_is_greedy_and_not_openais_temperature_of_1(server: LiveServer) -> None:
    greedy = engine_answer(server.model, None, "hello", max_new_tokens=128, ignore_eos=True).text
    neutral: Body = {"top_p": 1, "n": 1, "presence_penalty": 0, "frequency_penalty": 0, "top_k": -1, "min_p": 0}
    for own in ({}, neutral, {"temperature": 0}, {"temperature": 0, "top_p": 0.9, "seed": 3}):
        assert texts(ask(server, ignore_eos=True, **own)) == [greedy], own


def test_asking_for_some_of_the_tokens_or_for_several_texts_asks_for_sampling(server: LiveServer) -> None:
    def answer(**own: Any) -> list[str]:
        return texts(ask(server, max_tokens=20, seed=5, **own))

    for own in ({"top_p": 0.9}, {"top_k": 50}, {"min_p": 0.01}, {"n": 3}):
        assert answer(**own) == answer(**own, temperature=1) != answer(**own, temperature=0)
    assert len(set(answer(n=3))) == 3


def test_a_seed_makes_sampling_repeatable_also_a_negative_one(server: LiveServer) -> None:
    def answer(**own: Any) -> list[str]:
        return texts(ask(server, temperature=1, max_tokens=20, **own))

    for seed in (7, -7):
        assert answer(seed=seed) == answer(seed=seed)
    assert answer(seed=7) != answer(seed=-7)
    assert answer() != answer()


def test_the_text_ends_before_a_stop_string(server: LiveServer) -> None:
    [whole] = texts(ask(server, max_tokens=40))
    end = next(i for i in range(5, len(whole) - 3) if whole.find(whole[i : i + 3]) == i)
    stop = whole[end : end + 3]
    for stops in (stop, [stop], ["never there", stop]):
        reply = ask(server, max_tokens=40, stop=stops)
        assert texts(reply) == [whole[:end]]
        assert reply["choices"][0]["finish_reason"] == "stop"
    assert reply["choices"][0]["logprobs"] is None


def test_an_end_token_ends_the_text_and_is_not_part_of_it(server: LiveServer) -> None:
    forced: Body = {"logit_bias": {str(EOS): 100}, "max_tokens": 9}
    reply = ask(server, **forced)
    assert (texts(reply), reply["choices"][0]["finish_reason"]) == ([""], "stop")
    assert reply["usage"]["completion_tokens"] == 1
    assert texts(ask(server, **forced, skip_special_tokens=False)) == [""]
    ignored = ask(server, **forced, ignore_eos=True)
    assert (texts(ignored), ignored["usage"]["completion_tokens"]) == ([""], 9)
    assert texts(ask(server, **forced, ignore_eos=True, skip_special_tokens=False)) == ["<eos>" * 9]
    assert ask(server, **forced, min_tokens=4)["usage"]["completion_tokens"] == 5


def test_a_biased_token_is_chosen_or_never(server: LiveServer) -> None:
    assert texts(ask(server, logit_bias={str(server.worker.text.encode("z")[0]): 100}, max_tokens=5)) == ["zzzzz"]
    [first] = engine_ids(server, FROZEN, 1)
    told: Body = {"max_tokens": 1, "logprobs": 0}
    unbiased, biased = ask(server, **told), ask(server, **told, logit_bias={str(first): -100})
    assert unbiased["choices"][0]["logprobs"] != biased["choices"][0]["logprobs"]
    error = assert_openai_error(post(server, COMPLETIONS, logit_bias={str(VOCAB_SIZE): 1}), 400, "invalid_request")
    assert error["param"] == "logit_bias"


@pytest.mark.parametrize("penalty", ["presence_penalty", "frequency_penalty", "repetition_penalty"])
def test_penalties_change_what_repeats(server: LiveServer, penalty: str) -> None:
    token = str(server.worker.text.encode("z")[0])
    biased: Body = {"logit_bias": {token: 8}, "max_tokens": 30, "ignore_eos": True}
    penalised: Body = {**biased, penalty: 2}
    assert texts(ask(server, **biased)) != texts(ask(server, **penalised))


def test_an_input_that_is_empty_or_too_long_is_refused(server: LiveServer) -> None:
    empty: list[Any] = ["", ["x", ""]]
    for prompt in empty:
        assert_openai_error(post(server, COMPLETIONS, prompt=prompt), 400, "empty_input")
    nothing: list[Any] = [[], [[]], [[1], []]]
    for prompt in nothing:
        assert_openai_error(post(server, COMPLETIONS, prompt=prompt), 400, "invalid_request", "prompt")
    long: list[Body] = [{"prompt": "a" * MAX_MODEL_LEN}, {"max_tokens": MAX_MODEL_LEN}, {"prompt": "a" * 3_000_000}]
    for body in long:
        assert_openai_error(post(server, COMPLETIONS, **body), 400, "input_too_long")


@pytest.mark.parametrize(
    ("bad", "code", "words"),
    [
        ("", "empty_input", "The text is empty."),
        ("a" * 3_000_000, "input_too_long", "The input has 3,000,000 characters"),
        ("a" * MAX_MODEL_LEN, "input_too_long", "The request needs"),
        ("a" * (MAX_MODEL_LEN - 3), "input_too_long", "The request needs"),
        ([1, 9999], "invalid_request", "there is no token 9999"),
        (3, "invalid_request", "Input should be a valid "),
    ],
)
def test_the_bad_text_of_a_list_is_named(server: LiveServer, bad: Any, code: str, words: str) -> None:
    good: list[Any] = [[1], [2]] if isinstance(bad, list) else ["a", "b"]
    for prompt, number in (([good[0], bad, good[1]], 1), ([*good, bad], 2)):
        for streamed in (False, True):
            response = post(server, COMPLETIONS, prompt=prompt, max_tokens=4, stream=streamed)
            if response.status_code == 200:  # of a stream the others may have begun by then
                message = events(response)[-1]["error"]["message"]
            else:
                message = assert_openai_error(response, 400, code)["message"]
            assert f"prompt.{number}: {words}" in message
    if bad != 3:
        error = assert_openai_error(post(server, COMPLETIONS, prompt=bad, max_tokens=4), 400, code, words)
        assert "prompt.0" not in error["message"]
    wait_until(lambda: server.is_idle)


def test_the_text_of_a_list_that_leaves_too_little_room_is_named(server: LiveServer) -> None:
    response = post(server, COMPLETIONS, prompt=["a", "a" * (MAX_MODEL_LEN - 3)], min_tokens=4)
    assert_openai_error(response, 400, "input_too_long", "prompt.1: min_tokens is 4")
    response = post(server, COMPLETIONS, prompt=["a", "b"], min_tokens=4, max_tokens=3)
    assert assert_openai_error(response, 400, "invalid_request")["message"].startswith("min_tokens is 4, ")


def test_one_input_that_does_not_fit_fails_the_request_and_leaves_nothing_behind(own_server: LiveServer) -> None:
    response = post(own_server, COMPLETIONS, prompt=["hello", "a" * MAX_MODEL_LEN, "hello"], max_tokens=50)
    assert_openai_error(response, 400, "input_too_long")
    assert own_server.in_flight == 0


def test_what_has_no_effect_is_let_through_and_nulls_are_as_if_left_out(server: LiveServer) -> None:
    plain = texts(ask(server, max_tokens=5))
    ignored: Body = {"metadata": {"a": "b"}, "store": True, "service_tier": "auto", "prompt_cache_key": "x"}
    assert texts(ask(server, max_tokens=5, **ignored)) == plain
    names = ("n", "best_of", "echo", "logprobs", "stop", "seed", "suffix", "stream", "stream_options", "logit_bias")
    nulls: Body = dict.fromkeys((*names, "temperature", "top_p", "user", "structured_outputs"))
    assert texts(ask(server, max_tokens=5, **nulls)) == plain


def test_a_stream_says_the_same_piece_by_piece(server: LiveServer) -> None:
    server.publish_random("cmpl-stream", 1)
    whole = ask(server, model="cmpl-stream", max_tokens=20)
    chunks = stream(server, model="cmpl-stream", max_tokens=20)
    assert joined(chunks) == {0: texts(whole)[0]}
    assert reasons(chunks) == [(0, whole["choices"][0]["finish_reason"])]
    for chunk in chunks:
        assert (chunk["object"], chunk["model"], chunk["id"]) == ("text_completion", "cmpl-stream", chunks[0]["id"])
        assert chunk["system_fingerprint"] == whole["system_fingerprint"]
        assert "usage" not in chunk


def test_a_stream_of_several_inputs_and_texts_keeps_them_apart(server: LiveServer) -> None:
    body: Body = {"prompt": ["hello", "what"], "n": 3, "seed": 9, "temperature": 1, "max_tokens": 15}
    whole = ask(server, **body)
    chunks = stream(server, **body, stream_options={"include_usage": True})
    assert joined(chunks) == dict(enumerate(texts(whole)))
    assert sorted(reasons(chunks)) == [(c["index"], c["finish_reason"]) for c in whole["choices"]]
    *others, last = chunks
    assert all(chunk["usage"] is None for chunk in others)
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
