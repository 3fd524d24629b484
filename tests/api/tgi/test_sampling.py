from __future__ import annotations

from typing import Any

from server.engine.model.frozen import FrozenModel
from tests.api.live import LiveServer, engine_answer


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
