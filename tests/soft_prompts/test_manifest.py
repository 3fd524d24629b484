"""The manifest: everything in it is optional, unknown facts are kept, unknown options are refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from server.contracts import SamplingParams
from server.errors import InputTooLong, InvalidRequest, InvalidSoftPrompt
from server.soft_prompts.manifest import MAX_DEPTH, GenerationDefaults, Manifest, parse_json_object
from server.validation import MOST_PROBLEMS

FULL: dict[str, Any] = {
    "base_model": {"fingerprint": "f", "name": "llm", "revision": "main"},
    "created_at": "2026-01-01T00:00:00Z",
    "description": "Größe",
    "digest": "d",
    "generation": {"max_new_tokens": 5, "stop": ["\n"], "temperature": 0.5},
    "hidden_size": 32,
    "input_template": "{input}\n",
    "labels": ["ham", "spam"],
    "licence": "CC0-1.0",
    "metrics": {"exact_match": 0.95},
    "num_virtual_tokens": 20,
    "peft_type": "PROMPT_TUNING",
    "prefix_hash": "h",
    "system_message": "refuse",
    "task": "sms_spam",
    "training": {"seed": 1, "hyperparameters": {"lr": 0.02}},
    "a_fact_of_tomorrow": [1, {"deep": None}],
}


def test_a_manifest_keeps_every_field_also_unknown_ones() -> None:
    manifest = Manifest.parse(json.dumps(FULL))
    assert json.loads(manifest.to_json()) == FULL
    assert Manifest.parse(manifest.to_json()) == manifest


def test_its_text_is_sorted_readable_and_without_what_is_not_set() -> None:
    assert Manifest().to_json() == "{}\n"
    assert Manifest(task="a", description="ö").to_json() == '{\n  "description": "ö",\n  "task": "a"\n}\n'


def test_names_of_our_own_methods_are_facts_like_any_other() -> None:
    manifest = Manifest.parse('{"to_json": 1, "render": 2, "model_config": 3, "__class__": 4}')
    assert manifest.render("x").text == "x"
    assert json.loads(manifest.to_json()) == {"to_json": 1, "render": 2, "model_config": 3, "__class__": 4}


@pytest.mark.parametrize(
    ("template", "text", "rendered"),
    [
        (None, "a", "a"),
        ("{input}", "a", "a"),
        ("Text: {input}\nLabel:", "a", "Text: a\nLabel:"),
        ("<{input}>", "{input} {other} \\1 %s", "<{input} {other} \\1 %s>"),
        ("{other} {input}", "a", "{other} a"),
    ],
)
def test_the_text_is_put_into_the_template_as_it_is(template: str | None, text: str, rendered: str) -> None:
    assert Manifest(input_template=template).render(text).text == rendered


def test_a_system_message_fills_the_slot_that_the_manifest_declares_and_no_other() -> None:
    template = "{system}|{input}|"
    slot = Manifest(input_template=template, system_message="template")
    assert slot.render("{system}", "{input}").text == "{input}|{system}|", "neither text is a template"
    assert slot.render("a").text == "|a|"
    for wanted in (None, "ignore", "refuse"):
        assert Manifest(input_template=template, system_message=wanted).render("a", "b").text == "{system}|a|"


@pytest.mark.parametrize(
    ("fields", "outcome"),
    [
        ({}, "template"),
        ({"input_template": "{input}"}, "ignore"),
        ({"input_template": "{input}{system}"}, "ignore"),
        ({"system_message": "ignore"}, "ignore"),
        ({"input_template": "{input}{system}", "system_message": "template"}, "template"),
        ({"input_template": "{input}", "system_message": "refuse"}, "refuse"),
    ],
)
def test_only_a_template_that_has_a_place_for_it_reads_a_system_message(fields: dict[str, Any], outcome: str) -> None:
    assert Manifest.parse(json.dumps(fields)).on_system_message == outcome


@pytest.mark.parametrize("template", ["{input}", "{input}{system}{system}"])
def test_a_slot_that_the_template_lacks_is_refused(template: str) -> None:
    with pytest.raises(InvalidSoftPrompt, match=r"system_message: .*exactly once"):
        Manifest.parse(json.dumps({"input_template": template, "system_message": "template"}))
    with pytest.raises(InvalidSoftPrompt, match=r"system_message: .*ignore"):
        Manifest.parse(json.dumps({"input_template": template, "system_message": "obey"}))


@pytest.mark.parametrize(
    ("generation", "named"),
    [
        ({"max_tokens": 5}, "generation.max_tokens"),
        ({"max_new_tokens": 0}, "generation.max_new_tokens"),
        ({"temperature": -1}, "generation.temperature"),
        ({"temperature": 1e9}, "generation.temperature"),
        ({"top_k": 0}, "generation.top_k"),
        ({"top_p": 1.5}, "generation.top_p"),
        ({"repetition_penalty": 0}, "generation.repetition_penalty"),
        ({"seed": 2**64}, "generation.seed"),
        ({"stop": "x"}, "generation.stop"),
        ({"stop": [""]}, "generation.stop.0"),
    ],
)
def test_generation_defaults_that_a_request_could_not_ask_for_are_refused(
    generation: dict[str, Any], named: str
) -> None:
    with pytest.raises(InvalidSoftPrompt) as caught:
        Manifest.parse(json.dumps({"generation": generation}))
    assert f"{named}: " in caught.value.message


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e400"])
def test_a_temperature_is_finite(number: str) -> None:
    with pytest.raises(InvalidSoftPrompt, match=r"generation\.temperature"):
        Manifest.parse(f'{{"generation": {{"temperature": {number}}}}}')


def test_a_metric_that_is_no_number_can_still_be_kept() -> None:
    assert json.loads(Manifest.parse('{"metrics": {"loss": NaN}}').to_json()) == {"metrics": {"loss": None}}


def test_several_problems_are_named_at_once() -> None:
    with pytest.raises(InvalidSoftPrompt) as caught:
        Manifest.parse('{"labels": 1, "input_template": "x", "num_virtual_tokens": "many"}')
    assert all(field in caught.value.message for field in ("labels", "input_template", "num_virtual_tokens"))


def test_the_request_beats_the_task_and_the_task_beats_the_server() -> None:
    task = GenerationDefaults(temperature=0.5, top_k=3, seed=7)
    sampling = task.sampling_params({"temperature": 0.9}, room=1000, seed=1)
    assert sampling == SamplingParams(temperature=0.9, top_k=3, seed=7)
    assert GenerationDefaults().sampling_params({}, room=1000, seed=1) == SamplingParams(seed=1)


def test_only_a_default_length_shrinks_to_the_room_that_is_left() -> None:
    task = GenerationDefaults(max_new_tokens=50)
    assert task.sampling_params({}, room=1000, seed=0).max_new_tokens == 50
    assert task.sampling_params({}, room=20, seed=0).max_new_tokens == 20
    assert task.sampling_params({}, room=-5, seed=0).max_new_tokens == 1
    assert task.sampling_params({"max_new_tokens": 30}, room=20, seed=0).max_new_tokens == 30


@pytest.mark.parametrize(
    ("own", "room", "message"),
    [
        ({"min_new_tokens": 5, "max_new_tokens": 4}, 1000, "least is 5, but most is 4."),
        ({"min_new_tokens": 1, "max_new_tokens": 0}, 1000, "least is 1, but most is 0."),
        ({"min_new_tokens": 51}, 1000, "least is 51, but most is 50 where it is left out."),
        ({"min_new_tokens": 51}, 20, "least is 51, but most is 50 where it is left out."),
    ],
)
def test_more_tokens_at_least_than_at_most_are_refused_by_the_request_s_own_names(
    own: dict[str, int], room: int, message: str
) -> None:
    task = GenerationDefaults(max_new_tokens=50)
    with pytest.raises(InvalidRequest) as refused:
        task.sampling_params(own, room=room, seed=0, least="least", most="most")
    assert (refused.value.message, refused.value.param) == (message, "least")
    assert not isinstance(refused.value, InputTooLong)


def test_more_tokens_at_least_than_there_is_room_for_are_refused() -> None:
    task = GenerationDefaults(max_new_tokens=50)
    with pytest.raises(InputTooLong, match="is 21, but after the input the context has room for 20 new") as refused:
        task.sampling_params({"min_new_tokens": 21}, room=20, seed=0)
    assert refused.value.param == "min_new_tokens"
    assert task.sampling_params({"min_new_tokens": 20}, room=20, seed=0).min_new_tokens == 20
    task.sampling_params({"min_new_tokens": 21}, room=0, seed=0)  # the engine says that the input is too long


def test_what_only_the_task_asks_for_at_least_gives_way() -> None:
    task = GenerationDefaults(min_new_tokens=30, max_new_tokens=50)
    for own, room, least in (({}, 99, 30), ({"max_new_tokens": 9}, 99, 9), ({"max_new_tokens": 0}, 99, 0), ({}, 7, 7)):
        assert task.sampling_params(own, room=room, seed=0).min_new_tokens == least


@pytest.mark.parametrize(
    "text", ['{"labels": ["a"], "labels": ["b"]}', '{"training": {"lr": 1, "lr": 2}}', '{"x": [{"y": 1, "y": 1}]}']
)
def test_a_field_that_comes_twice_is_refused_at_any_depth(text: str) -> None:
    with pytest.raises(InvalidSoftPrompt, match="twice"):
        Manifest.parse(text)


@pytest.mark.parametrize("text", ['{"a\\ud800": 1}', '{"a": [{"\\uDFFF": 1}]}', '{"a": "\\udc00\\ud800"}'])
def test_half_of_a_surrogate_pair_is_refused_wherever_it_is(text: str) -> None:
    with pytest.raises(InvalidSoftPrompt, match="half of a surrogate pair"):
        parse_json_object(text, "adapter_config.json")
    assert parse_json_object('{"a": "\\ud83d\\ude00 \\\\ud800"}', "x")["a"] == "\N{GRINNING FACE} \\ud800"


def test_the_encoding_is_utf_8_with_or_without_its_mark() -> None:
    text = json.dumps(FULL, ensure_ascii=False)
    assert Manifest.parse(text.encode()) == Manifest.parse(text.encode("utf-8-sig")) == Manifest.parse(text)
    for encoding in ("utf-16", "utf-16-le", "utf-32", "latin-1"):
        with pytest.raises(InvalidSoftPrompt, match="not valid JSON"):
            Manifest.parse(text.encode(encoding))


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_what_is_nested_is_kept_up_to_a_depth_that_can_be_written_anywhere(opening: str, closing: str) -> None:
    def nested(depth: int) -> str:  # the manifest itself is the first level
        return '{"x":' + opening * (depth - 1) + "1" + closing * (depth - 1) + "}"

    manifest = Manifest.parse(nested(MAX_DEPTH))
    assert Manifest.parse(manifest.to_json()) == manifest
    for depth in (MAX_DEPTH + 1, 250, 900, 100_000):
        with pytest.raises(InvalidSoftPrompt, match="manifest"):
            Manifest.parse(nested(depth))


def test_of_many_problems_the_first_are_told() -> None:
    for fields in ({"labels": [1] * 10_000}, {"generation": {"x" * 5000 + str(i): 1 for i in range(100)}}):
        with pytest.raises(InvalidSoftPrompt) as caught:
            Manifest.parse(json.dumps(fields))
        assert "more" in caught.value.message
        assert caught.value.message.count(": ") <= MOST_PROBLEMS + 1
        assert len(caught.value.message) < 1000


@pytest.mark.parametrize("field", ["name", "fingerprint"])
def test_what_an_error_would_quote_of_the_base_model_is_short(field: str) -> None:
    with pytest.raises(InvalidSoftPrompt, match=rf"base_model\.{field}: ") as caught:
        Manifest.parse(json.dumps({"base_model": {field: "x" * 5000}}))
    assert len(caught.value.message) < 300
    assert Manifest.parse(json.dumps({"base_model": {field: "x" * 256}}))


@pytest.mark.parametrize("text", ["[]", "{"])
def test_a_manifest_that_cannot_be_kept_can_be_left_out(text: str) -> None:
    with pytest.raises(InvalidSoftPrompt) as caught:
        Manifest.parse(text)
    assert caught.value.remedy == "Mend or leave out manifest.json."


def test_null_counts_as_left_out_whatever_the_field_is_called() -> None:
    nulls = dict.fromkeys(Manifest.model_fields) | {"zzzzz": None}
    assert Manifest.parse(json.dumps(nulls)) == Manifest()
    defaults = {"generation": {"top_k": None, "zzzzz": None, "seed": 3}}
    assert Manifest.parse(json.dumps(defaults)).generation == GenerationDefaults(seed=3)
