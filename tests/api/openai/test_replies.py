"""Log-probabilities and token counts as they are written down, where a tiny model would not show the difference."""

from __future__ import annotations

import json
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.api.openai.logprobs import LOWEST, chat_logprobs, completion_logprobs, text_offsets
from server.api.openai.replies import usage_of
from server.api.outputs import Choice
from server.contracts import Candidate, Scored, Token, Usage
from server.engine.text.token_texts import TokenTexts

TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=20)


class Vocabulary:
    """What logprobs ask of a model's texts: single tokens, two of which read alike."""

    pieces = (b"a", b"b", b"\xf0", b"\x9f")

    def bytes_of(self, token_id: int) -> bytes:
        return self.pieces[token_id]

    def text_of(self, token_id: int) -> str:
        return self.pieces[token_id].decode("utf-8", "replace")


WORDS = cast(TokenTexts, Vocabulary())
BROKEN = Token(3, "", 0, -4.0, top=(Candidate(2, -1.0), Candidate(0, -2.0)))


def test_of_two_tokens_that_read_alike_the_likelier_is_told() -> None:
    """Else a harness would take a token for the most likely one that is not."""
    told = completion_logprobs(WORDS, [BROKEN], [0], 2)
    assert told["top_logprobs"] == [{"\ufffd": -1.0, "a": -2.0}]
    assert told["token_logprobs"] == [-4.0]
    assert completion_logprobs(WORDS, [BROKEN], [0], 0)["top_logprobs"] == [{"\ufffd": -4.0}]


def test_a_chat_tells_their_bytes_apart() -> None:
    [entry] = chat_logprobs(WORDS, [BROKEN], 2)["content"]
    assert (entry["token"], entry["bytes"]) == ("\ufffd", [0x9F])
    assert [other["bytes"] for other in entry["top_logprobs"]] == [[0xF0], [ord("a")]]


def test_what_can_never_come_is_told_in_json() -> None:
    never = Token(0, "a", 0, float("-inf"), top=(Candidate(1, float("-inf")),))
    told = [completion_logprobs(WORDS, [never, Scored(0, None)], [0, 1], 1), chat_logprobs(WORDS, [never], 1)]
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    assert told[0]["token_logprobs"] == [LOWEST, None]


@given(TEXT, st.integers(1, 5))
def test_offsets_of_pieces_are_the_characters_that_they_begin_in(text: str, size: int) -> None:
    data = text.encode()
    pieces = [data[i : i + size] for i in range(0, len(data), size)]
    starts = [len(character.encode()) for character in text]
    character_at = [at for at, width in enumerate(starts) for _ in range(width)]
    assert text_offsets(text, pieces) == [character_at[i] for i in range(0, len(data), size)]


@pytest.mark.parametrize(
    ("text", "pieces", "expected"),
    [
        ("hi you", [b"<s>", b" hi", b" you"], [0, 0, 2]),  # a BOS, and the space that a tokenizer adds
        ("a\ufffdb", [b"a", b"\xf0", b"b"], [0, 2, 2]),  # bytes that are no character
        ("a\ufffdb", [b"a", "\ufffd".encode(), b"b"], [0, 1, 2]),  # and one that only looks like it
        ("<|x|>a", [b"<|x|>", b"a"], [0, 5]),
        ("", [b"<s>"], [0]),
    ],
)
def test_what_the_text_does_not_show_has_no_width(text: str, pieces: list[bytes], expected: list[int]) -> None:
    assert text_offsets(text, pieces) == expected


def test_an_input_counts_once_and_is_cached_only_if_no_choice_had_to_compute_it() -> None:
    first = [Choice(0, usage=Usage(5, 3, 7, cached_tokens=0)), Choice(1, usage=Usage(5, 3, 2, cached_tokens=5))]
    second = [Choice(0, usage=Usage(5, 4, 1, cached_tokens=5))]
    assert usage_of([first, second]) == {
        "prompt_tokens": 17,
        "completion_tokens": 10,
        "total_tokens": 27,
        "prompt_tokens_details": {"cached_tokens": 5},
    }
