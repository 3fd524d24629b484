"""Choosing by likelihood: whole labels, probabilities that add up, and no label that wins only by being short."""

from __future__ import annotations

import math
from typing import Any

import pytest

from server.contracts import Scored
from server.engine.model.frozen import FrozenModel
from server.engine.text.choice_scoring import judge
from tests.api.live import LiveServer, assert_error, engine_answer
from tests.support import EOS


def scores(*logprobs: float) -> tuple[Scored, ...]:
    return tuple(Scored(0, logprob) for logprob in logprobs)


def test_probabilities_are_the_shares_of_the_labels() -> None:
    judged = judge(["a", "b", "c"], [scores(-1.0), scores(-1.0, -1.0), scores(-3.0)], length_normalized=False)
    assert [label.logprob for label in judged] == [-1.0, -2.0, -3.0]
    assert sum(label.probability for label in judged) == pytest.approx(1.0)
    assert judged[0].probability / judged[1].probability == pytest.approx(math.e)


def test_normalised_by_length_a_long_label_loses_nothing_by_its_length() -> None:
    judged = judge(["a", "b"], [scores(-1.0), scores(-1.0, -1.0, -1.0)], length_normalized=True)
    assert [label.probability for label in judged] == [0.5, 0.5]
    assert [label.logprob for label in judged] == [-1.0, -3.0]


def test_labels_that_are_all_impossible_are_equally_likely() -> None:
    judged = judge(["a", "b"], [scores(-math.inf), scores(-math.inf)], length_normalized=False)
    assert [label.probability for label in judged] == [0.5, 0.5]


def choose(server: LiveServer, choices: list[str], task: str | None = None, **parameters: Any) -> dict[str, Any]:
    response = server.generate("hello", task, choices=choices, **parameters)
    assert response.status_code == 200, response.text
    reply: dict[str, Any] = response.json()
    return reply


def test_the_answer_is_the_likeliest_label(server: LiveServer, tiny: FrozenModel) -> None:
    soft_prompt = server.publish_random("labels-whole", 3)
    labels = ["ham", "spam", "eggs", "x"]
    reply = choose(server, labels, "labels-whole")
    assert [choice["text"] for choice in reply["choices"]] == labels
    for choice in reply["choices"]:
        # What the engine says of the same tokens as an input that it scores.
        whole = engine_answer(tiny, soft_prompt, "hello" + choice["text"], max_new_tokens=0, input_logprobs=True)
        logprobs = [token.logprob or 0.0 for token in whole.scored[len("hello") :]]
        assert choice["logprob"] == pytest.approx(sum(logprobs))
        assert choice["tokens"] == len(choice["text"])
    best = max(reply["choices"], key=lambda choice: choice["probability"])
    assert reply["generated_text"] == best["text"]
    assert sum(choice["probability"] for choice in reply["choices"]) == pytest.approx(1.0)


def test_a_label_that_begins_another_is_scored_with_its_end(server: LiveServer) -> None:
    alone = {choice["text"]: choice for choice in choose(server, ["ham", "egg"])["choices"]}
    nested = {choice["text"]: choice for choice in choose(server, ["ham", "hamster", "egg"])["choices"]}
    assert [nested[text]["tokens"] for text in ("ham", "hamster", "egg")] == [4, 8, 4]
    assert nested["ham"]["logprob"] < alone["ham"]["logprob"]
    assert EOS not in (token["id"] for token in server.client.post("/tokenize", json={"inputs": "ham"}).json())


def test_the_tasks_template_is_put_around_the_input_of_choices(server: LiveServer) -> None:
    server.publish_random("labels-plain", 3)
    server.publish_random("labels-template", 3, {"input_template": "Q: {input}\nA:"})
    templated = server.generate("hello", "labels-template", choices=["a", "b"]).json()
    by_hand = server.generate("Q: hello\nA:", "labels-plain", choices=["a", "b"]).json()
    assert templated == by_hand


def test_length_normalisation_changes_the_shares_and_not_the_log_probabilities(server: LiveServer) -> None:
    by_sum, by_mean = (choose(server, ["a", "bcdefgh"], length_normalized=flag)["choices"] for flag in (False, True))
    assert [c["logprob"] for c in by_sum] == pytest.approx([c["logprob"] for c in by_mean])
    assert by_mean[1]["probability"] > by_sum[1]["probability"]


def test_every_text_of_a_list_is_classified(server: LiveServer) -> None:
    body = {"inputs": ["one", "two", "three"], "parameters": {"choices": ["x", "yz"]}}
    replies = server.client.post("/generate", json=body).json()
    singles = [server.generate(text, choices=["x", "yz"]).json() for text in ("one", "two", "three")]
    for reply, single in zip(replies, singles, strict=True):  # on some CPUs a sum's order depends on the batch's shape
        assert reply["generated_text"] == single["generated_text"]
        for one, other in zip(reply["choices"], single["choices"], strict=True):
            assert one == {**other, "probability": one["probability"], "logprob": one["logprob"]}
            assert one["logprob"] == pytest.approx(other["logprob"], rel=1e-12)
            assert one["probability"] == pytest.approx(other["probability"], rel=1e-9)


@pytest.mark.parametrize(
    "parameters", [{"temperature": 1.0}, {"max_new_tokens": 3}, {"details": True}, {"best_of": 2}, {"stop": ["a"]}]
)
def test_what_has_no_effect_on_choices_is_refused(server: LiveServer, parameters: dict[str, Any]) -> None:
    (name,) = parameters
    response = server.generate("hello", choices=["a", "b"], **parameters)
    assert_error(response, 422, "invalid_request", f"{name} has no effect on choices")


def test_length_normalisation_without_choices_is_refused(server: LiveServer) -> None:
    assert_error(server.generate(length_normalized=True), 422, "invalid_request", "needs choices")


def test_choices_do_not_depend_on_neighbours(server: LiveServer) -> None:
    labels = [f"label {i}" for i in range(30)]
    alone = choose(server, labels)
    body = {"inputs": ["hello", "a", "b", "hello"], "parameters": {"choices": labels}}
    first, *_, last = server.client.post("/generate", json=body).json()
    for reply in (first, last):
        for one, other in zip(reply["choices"], alone["choices"], strict=True):
            assert one["logprob"] == pytest.approx(other["logprob"], abs=1e-9)
