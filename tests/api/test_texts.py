"""The text of an answer is that of its tokens, on every route, streamed or not: in order, with its first space."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import pytest

from server.engine.text.choice_scoring import encode_labels
from tests.api.live import LiveServer, live_server
from tests.api.openai.support import CHAT, COMPLETIONS, TEMPLATE, Body, joined, user
from tests.api.openai.support import ask as ask_openai
from tests.api.openai.support import post as post_openai
from tests.api.openai.support import stream as stream_openai
from tests.scripted import ScriptedModel, sentencepiece_tokenizer
from tests.support import byte_tokenizer

EOS = "<eos>"


@dataclass(frozen=True)
class Speaker:
    """A server whose model says what it is told."""

    server: LiveServer

    @property
    def model(self) -> ScriptedModel:
        return cast(ScriptedModel, self.server.model)

    def say(self, *tokens: str) -> None:
        """What the answers to the next requests consist of."""
        self.model.script = self.model.ids(*tokens)

    def ask(self, path: str = COMPLETIONS, **body: Any) -> Body:
        """The one choice of an answer under /v1, after checking that a stream says the same."""
        body = {"model": "scripted", "max_tokens": len(self.model.script), **body}
        choice: Body = ask_openai(self.server, path, **body)["choices"][0]
        chunks = stream_openai(self.server, path, **body)
        text = choice["text"] if path == COMPLETIONS else choice["message"]["content"]
        assert joined(chunks) == {0: text}
        told = [chunk["choices"][0]["logprobs"] for chunk in chunks if chunk["choices"][0]["logprobs"]]
        if told:
            for name, items in (choice["logprobs"] or {}).items():
                assert items is None or items == [item for part in told for item in part[name]], name
        return choice

    def text(self, path: str = COMPLETIONS, **body: Any) -> str:
        """The text of an answer."""
        choice = self.ask(path, **body)
        text: str = choice["text"] if path == COMPLETIONS else choice["message"]["content"]
        return text

    def generate(self, task: str | None = None, inputs: str = "hello", **parameters: Any) -> Body:
        """An answer of /generate with details, after checking that a stream says the same."""
        parameters = {"max_new_tokens": len(self.model.script), "details": True, **parameters}
        response = self.server.generate(inputs, task, **parameters)
        assert response.status_code == 200, response.text
        reply: Body = response.json()
        events = self.server.events(inputs, task, **parameters)
        assert events[-1]["generated_text"] == reply["generated_text"]
        tokens = [event["token"] for event in events]
        assert tokens == reply["details"]["tokens"]
        said = "".join(token["text"] for token in tokens if not token["special"])
        assert reply["generated_text"] == (inputs if parameters.get("return_full_text") else "") + said
        assert [event["index"] for event in events] == list(range(1, len(events) + 1))
        return reply


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Speaker]:
    """One whose vocabulary is bytes."""
    model = ScriptedModel(byte_tokenizer())
    model.tokenizer.chat_template = TEMPLATE
    with live_server(tmp_path_factory.mktemp("speaker"), model=model) as live:
        yield Speaker(live)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Speaker]:
    """One whose tokenizer puts a space before every text, and takes it away again."""
    model = ScriptedModel(sentencepiece_tokenizer())
    model.tokenizer.chat_template = TEMPLATE
    with live_server(tmp_path_factory.mktemp("reader"), model=model) as live:
        yield Speaker(live)


SHOWN: Body = {"skip_special_tokens": False, "ignore_eos": True}
STOPS: list[tuple[Sequence[str], str, str]] = [
    ((), "a\n<eos>\nb", "a\n\nb"),
    (("\n\nc", "b<eos>"), "a\n<eos>\nb", "a\n\nb"),
    (("<eos>",), "a\n", "a\n\nb"),
    (("n\n<", "\n<eos>\n"), "a", "a\n\nb"),
    (("\n\nb",), "a\n<eos>\nb", "a"),
]


@pytest.mark.parametrize(("stop", "shown", "hidden"), STOPS)
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_stop_string_neither_moves_a_special_token_nor_misses_one_that_is_shown(
    speaker: Speaker, path: str, stop: Sequence[str], shown: str, hidden: str
) -> None:
    speaker.say("a", "Ċ", EOS, "Ċ", "b")
    body: Body = {"messages": user("hello")} if path == CHAT else {}
    assert speaker.text(path, stop=list(stop), **SHOWN, **body) == shown
    assert speaker.text(path, stop=list(stop), ignore_eos=True, **body) == hidden


@pytest.mark.parametrize(("stop", "shown", "hidden"), STOPS)
def test_details_tell_tokens_in_their_order(speaker: Speaker, stop: Sequence[str], shown: str, hidden: str) -> None:
    speaker.say("a", "Ċ", EOS, "Ċ", "b")
    reply = speaker.generate(stop=list(stop), ignore_eos_token=True)
    assert reply["generated_text"] == hidden
    tokens = reply["details"]["tokens"]
    assert [token["id"] for token in tokens] == speaker.model.script
    assert [token["text"] for token in tokens if token["special"]] == [EOS]
    assert speaker.generate(stop=["\n\n"], ignore_eos_token=True)["generated_text"] == "a"


def test_the_end_token_is_itself_although_text_was_held_back(speaker: Speaker) -> None:
    speaker.say("a", "Ċ", EOS)
    reply = speaker.generate(stop=["\n\n"])
    assert (reply["generated_text"], reply["details"]["finish_reason"]) == ("a\n", "eos_token")
    assert [(token["text"], token["special"]) for token in reply["details"]["tokens"]] == [
        ("a", False),
        ("\n", False),
        (EOS, True),
    ]


@pytest.mark.parametrize("stop", [None, ["aX"], ["bb\nb"], ["b"], ["\n<eos>x"]])
@pytest.mark.parametrize("shown", [True, False])
def test_offsets_are_those_that_there_are_without_a_stop_string(
    speaker: Speaker, stop: list[str] | None, shown: bool
) -> None:
    speaker.say("a", "b", "b", "Ċ", EOS, "a", "Ã", "©", "b")
    body: Body = {"logprobs": 0, "ignore_eos": True, "skip_special_tokens": not shown}
    [first, *_] = [speaker.ask(stop=stop, echo=echo, **body) for echo in (False, True)]
    expected = [0, 1, 2, 3, 4, 9, 10, 10, 11] if shown else [0, 1, 2, 3, 4, 4, 5, 5, 6]
    offsets = first["logprobs"]["text_offset"]
    assert offsets == expected[: len(offsets)]
    assert len(offsets) == (2 if stop == ["b"] else 9)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_stop_string_within_the_least_number_of_tokens_ends_nothing(speaker: Speaker, path: str) -> None:
    speaker.say("a", ".", "b", ".", "c")
    body: Body = {"messages": user("hello")} if path == CHAT else {}
    for least, expected in ((0, "a"), (1, "a"), (2, "a.b"), (3, "a.b"), (4, "a.b.c")):
        assert speaker.text(path, stop=["."], min_tokens=least, **body) == expected
        assert speaker.generate(stop=["."], min_new_tokens=least)["generated_text"] == expected


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_stop_string_is_kept_where_the_request_asks_for_it(speaker: Speaker, path: str) -> None:
    speaker.say("a", "b", "c", EOS, "d")
    body: Body = {"messages": user("hello")} if path == CHAT else {}
    kept: Body = {"include_stop_str_in_output": True, "ignore_eos": True, **body}
    assert speaker.text(path, stop=["bc", "c"], **kept) == "abc"
    assert speaker.text(path, stop=["c<e"], skip_special_tokens=False, **kept) == "abc<e"
    assert speaker.text(path, stop=["x"], **kept) == "abcd"
    reply = speaker.generate(stop=["bc"], include_stop_str_in_output=True)
    assert (reply["generated_text"], reply["details"]["finish_reason"]) == ("abc", "stop_sequence")
    assert speaker.generate(stop=["bc"], include_stop_str_in_output=False)["generated_text"] == "a"


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_named_tokens_end_the_text_as_end_tokens_do(speaker: Speaker, path: str) -> None:
    speaker.say("a", "b", "c", EOS, "d")
    b, c, eos = speaker.model.ids("b", "c", EOS)
    body: Body = {"messages": user("hello")} if path == CHAT else {}
    choice = speaker.ask(path, stop_token_ids=[c, 7], **body)
    assert (choice["text"] if path == COMPLETIONS else choice["message"]["content"]) == "ab"
    assert choice["finish_reason"] == "stop"
    kept: Body = {"include_stop_str_in_output": True, **body}
    assert speaker.text(path, stop_token_ids=[c], **kept) == "abc"
    assert speaker.text(path, stop_token_ids=[eos], ignore_eos=True, **kept) == "abc"
    shown: Body = {"ignore_eos": True, "skip_special_tokens": False}
    assert speaker.text(path, stop_token_ids=[eos], **shown, **body) == "abc"
    assert speaker.text(path, stop_token_ids=[eos], **shown, **kept) == "abc<eos>"
    assert speaker.text(path, stop_token_ids=[c], stop=["bc"], **kept) == "abc"
    assert speaker.text(path, stop_token_ids=[c], stop=["bx"], **body) == "ab", "what was held back is text"
    assert b not in speaker.model.ids(*speaker.text(path, stop_token_ids=[b], min_tokens=4, **body)), "as end tokens"
    for include, expected in ((False, "ab"), (True, "abc")):
        reply = speaker.generate(stop_token_ids=[c], include_stop_str_in_output=include)
        assert (reply["generated_text"], reply["details"]["finish_reason"]) == (expected, "stop_sequence")
        assert [token["id"] for token in reply["details"]["tokens"]] == speaker.model.script[:3]


def test_token_ids_to_stop_at_are_bounded_and_the_models(speaker: Speaker) -> None:
    for ids in ([-1], [260], ["2"], list(range(129))):
        refusal = post_openai(speaker.server, COMPLETIONS, model="scripted", stop_token_ids=ids)
        assert (refusal.status_code, "stop_token_ids" in refusal.json()["error"]["message"]) == (400, True)
        assert speaker.server.generate("hello", stop_token_ids=ids).status_code == 422
    speaker.say("a")
    assert speaker.text(stop_token_ids=list(range(200, 256))) == "a"


def test_what_continues_a_text_keeps_the_space_that_it_begins_with(reader: Speaker) -> None:
    reader.say("▁sat", "▁on")
    assert reader.text(prompt="the cat") == " sat on"
    choice = reader.ask(prompt="the cat", echo=True, logprobs=0)
    assert choice["text"] == "the cat sat on"
    assert choice["logprobs"]["text_offset"][-2:] == [7, 11]
    assert reader.text(prompt="the cat", stop=[" sat"]) == ""
    assert reader.text(prompt="the cat", stop=[" on"]) == " sat"
    reply = reader.generate(inputs="the cat", return_full_text=True)
    assert reply["generated_text"] == "the cat sat on"
    assert [token["text"] for token in reply["details"]["tokens"]] == [" sat", " on"]
    assert reader.generate(inputs="the cat", stop=[" sat"])["generated_text"] == ""
    assert reader.text(CHAT, messages=user("hello")) == " sat on"


def test_what_a_task_was_trained_on_had_no_such_space(reader: Speaker) -> None:
    reader.server.publish_random("texts-target", 1)
    reader.say("▁sat", "▁on")
    assert reader.text(model="texts-target", prompt="the cat") == "sat on"
    assert reader.text(model="texts-target", prompt="the cat", stop=["sat"]) == ""
    assert reader.text(CHAT, model="texts-target", messages=user("hello")) == "sat on"
    assert reader.generate("texts-target")["generated_text"] == "sat on"


FORMS: list[Body] = [
    {"choice": ["sat on", "    return x"]},
    {"regex": "sat on"},
    {"json": {"const": "sat on"}},
    {"grammar": 'root ::= "sat on"'},
    {"grammar": 'start: "sat on"'},
]


@pytest.mark.parametrize("form", FORMS, ids=["choice", "regex", "json", "ebnf", "lark"])
def test_what_must_match_is_the_text_with_its_first_space_or_without_it(reader: Speaker, form: Body) -> None:
    reader.server.publish_random("texts-matched", 2)
    reader.say("▁sat", "▁on")
    expected = '"sat on"' if "json" in form else "sat on"
    for model in ("scripted", "texts-matched"):
        choice = reader.ask(model=model, prompt="the cat", structured_outputs=form, max_tokens=40, logprobs=0)
        assert choice["text"] == expected
        wanted = {"scripted": expected[0], "texts-matched": " sat" if "choice" in form or "regex" in form else " "}
        assert choice["logprobs"]["tokens"][0].startswith(wanted[model]), "as targets are tokenised"


@pytest.mark.parametrize("text", [" sat", "sat", "    return x", " ", ""])
def test_a_choice_reads_as_it_was_given(reader: Speaker, text: str) -> None:
    reader.server.publish_random("texts-chosen", 3)
    reader.say()
    form: Body = {"structured_outputs": {"choice": [text]}, "max_tokens": 40}
    assert reader.text(prompt="the cat", **form) == text
    assert reader.text(CHAT, messages=user("hello"), **form) == text
    assert reader.text(model="texts-chosen", prompt="the cat", **form) == text


def test_labels_are_tokens_that_continue_a_text_or_a_tasks_targets(reader: Speaker) -> None:
    text, ids = reader.server.worker.text, reader.model.ids
    assert encode_labels(text, [" sat", "sat"], continue_text=True) == (tuple(ids("▁sat")), tuple(ids("s", "at")))
    assert encode_labels(text, ["sat"]) == (tuple(ids("▁sat")),)
    reader.server.publish_random("texts-labels", 4)
    for task, expected in ((None, {" sat": 1, "sat": 2}), ("texts-labels", {"sat": 1})):
        reply = reader.server.generate("the cat", task, choices=list(expected))
        assert {choice["text"]: choice["tokens"] for choice in reply.json()["choices"]} == expected
