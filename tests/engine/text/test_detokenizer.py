"""Streamed text is the whole text: no half characters, no piece of a stop string, no token out of order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerFast

from server.contracts import SamplingParams, Token
from server.engine.model.frozen import FrozenModel
from server.engine.text import detokenizer
from server.engine.text.detokenizer import Detokenizer
from server.engine.text.token_texts import TokenTexts
from server.engine.text.tokenizer_parts import byte_level_alphabet
from tests.scripted import sentencepiece_tokenizer
from tests.support import EOS, VOCAB_SIZE, byte_tokenizer

TOKENIZER = byte_tokenizer()
TEXTS = TokenTexts(TOKENIZER.backend_tokenizer, [EOS])
SENTENCEPIECE = [TokenTexts(sentencepiece_tokenizer(legacy=legacy).backend_tokenizer) for legacy in (False, True)]


def encode(text: str) -> list[int]:
    ids: list[int] = TOKENIZER.encode(text)
    return ids


def run(
    token_ids: Sequence[int], texts: TokenTexts = TEXTS, *, continues_text: bool = True, **params: Any
) -> tuple[list[list[Token]], bool]:
    """What a detokenizer releases after each token, until the last one or a stop string, and whether that came."""
    one = Detokenizer(texts, SamplingParams(**params), continues_text=continues_text)
    steps = []
    for number, token_id in enumerate(token_ids, 1):
        released, stopped = one.push(Token(token_id), is_last=number == len(token_ids))
        steps.append(released)
        if stopped:
            return steps, True
    return steps, False


def tokens(token_ids: Sequence[int], texts: TokenTexts = TEXTS, **options: Any) -> list[Token]:
    """All tokens that are released."""
    return [token for released in run(token_ids, texts, **options)[0] for token in released]


def text(token_ids: Sequence[int], texts: TokenTexts = TEXTS, **options: Any) -> str:
    """The whole text."""
    return "".join(token.text for token in tokens(token_ids, texts, **options))


def pieces(whole: str, stop: tuple[str, ...] = ()) -> list[list[str]]:
    """The texts of the tokens that are released after each byte of a text."""
    return [[token.text for token in released] for released in run(encode(whole), stop=stop)[0]]


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=30))
def test_pieces_joined_are_the_text_and_none_is_half_a_character(whole: str) -> None:
    out = tokens(encode(whole))
    assert "".join(token.text for token in out) == whole
    assert all("\ufffd" not in token.text or "\ufffd" in whole for token in out)


@given(st.text("ab ", max_size=30), st.lists(st.text("ab ", min_size=1, max_size=4), min_size=1, max_size=3))
def test_the_text_ends_before_the_first_stop_string(whole: str, stop: list[str]) -> None:
    found = [whole.find(s) for s in stop if s in whole]
    steps, stopped = run(encode(whole), stop=tuple(stop))
    assert stopped == bool(found)
    out = "".join(token.text for released in steps for token in released)
    if stopped:
        # The sequence ends with the token that completes a stop string; of those complete by then, the earliest counts.
        ends = min(whole.find(s) + len(s) for s in stop if s in whole)
        assert len(steps) == ends
        expected = min(whole.find(s) for s in stop if s in whole[:ends])
        assert out == whole[:expected]
    else:
        assert out == whole


ANY_TOKENS = st.lists(st.sampled_from([*encode("ab€ é😀\ufffd"), 0xFF, EOS, EOS + 1]), max_size=16)
ANY_STOPS = st.lists(st.text("ab€ \ufffd<eos>", min_size=1, max_size=6), max_size=3).map(tuple)


def ended(plain: Sequence[Token], stop: Sequence[str], *, include: bool, least: int) -> tuple[int, str] | None:
    """After how many tokens stop strings end a text that is made of these, and that text; None if they do not."""
    whole = "".join(token.text for token in plain)
    reached = [token.offset + len(token.text) for token in plain]
    passed = reached[least - 1] if 0 < least <= len(plain) else len(whole) if least else 0
    places = [
        (begin, begin + len(s))
        for s in stop
        for begin in range(len(whole))
        if whole.startswith(s, begin) and begin + len(s) > passed
    ]
    if not places:
        return None
    last = min(next(i for i, characters in enumerate(reached) if characters >= end) for _, end in places)
    begin, end = min(place for place in places if place[1] <= reached[last])
    return last + 1, whole[: end if include else begin]


def check_stops(
    token_ids: Sequence[int], texts: TokenTexts, stop: tuple[str, ...], include: bool, least: int, **options: Any
) -> None:
    """Stop strings change neither order nor offsets, nor texts before them."""
    plain = tokens(token_ids, texts, **options)
    steps, stopped = run(token_ids, texts, stop=stop, include_stop=include, min_new_tokens=least, **options)
    out = [token for released in steps for token in released]
    assert [token.id for token in out] == list(token_ids[: len(out)])
    assert [token.offset for token in out] == [token.offset for token in plain[: len(out)]]
    assert sorted(token.offset for token in plain) == [token.offset for token in plain]
    expected = ended(plain, stop, include=include, least=least)
    assert stopped == (expected is not None)
    if expected is None:
        assert out == plain
    else:
        assert (len(out), "".join(token.text for token in out)) == expected


@given(ANY_TOKENS, ANY_STOPS, st.booleans(), st.booleans(), st.integers(0, 6))
def test_stop_strings_change_neither_order_nor_offsets_nor_texts_before_them(
    token_ids: list[int], stop: tuple[str, ...], show_special: bool, include_stop: bool, least: int
) -> None:
    check_stops(token_ids, TEXTS, stop, include_stop, least, show_special=show_special)


@given(st.lists(st.integers(0, 320), max_size=12), ANY_STOPS, st.booleans(), st.booleans())
def test_nor_do_they_where_the_decoder_works_on_whole_texts(
    token_ids: list[int], stop: tuple[str, ...], continues_text: bool, legacy: bool
) -> None:
    texts = SENTENCEPIECE[legacy]
    token_ids = [token_id for token_id in token_ids if texts.bytes_of(token_id)]
    check_stops(token_ids, texts, stop, False, 0, continues_text=continues_text)


def test_what_may_become_a_stop_string_is_held_back_until_it_does_not() -> None:
    assert pieces("a\n\nb", ("\n\nc",)) == [["a"], [], [], ["\n", "\n", "b"]]
    assert pieces("a\n\nc", ("\n\nc",)) == [["a"], [], [], ["", "", ""]]
    assert pieces("a\n", ("\n\nc",)) == [["a"], ["\n"]], "nothing comes after it"


def test_of_stop_strings_that_overlap_the_first_that_is_complete_ends_the_text() -> None:
    assert text(encode("xabcd"), stop=("abcd", "bc")) == "xa"
    assert text(encode("xabcd"), stop=("abcd", "bc"), include_stop=True) == "xabc"
    assert text(encode("xabcd"), stop=("abc", "ab"), include_stop=True) == "xab"


def test_a_stop_string_within_the_minimum_is_passed_and_one_that_ends_after_it_is_not() -> None:
    assert text(encode("a.b.c"), stop=(".",), min_new_tokens=2) == "a.b"
    assert text(encode("a..b"), stop=("..",), min_new_tokens=2) == "a"
    assert text(encode("aaab"), stop=("aa",), min_new_tokens=2) == "a"
    assert text(encode("a.b.c"), stop=(".",), min_new_tokens=5) == "a.b.c"


def test_half_a_character_at_the_end_is_not_given_out() -> None:
    first, second = encode("é")
    assert text([first]) == ""
    assert [token.text for token in tokens([first, second])] == ["", "é"]


def test_a_replacement_character_that_was_said_is_text_even_at_the_end() -> None:
    assert text(encode("a\ufffd")) == "a\ufffd"
    assert text(encode("a\ufffd\ufffdb")) == "a\ufffd\ufffdb"
    assert text(encode("a\ufffd"), stop=("\ufffd",)) == "a"


def test_what_a_token_says_before_half_a_character_is_given_out_with_it(smollm2: FrozenModel) -> None:
    sun = smollm2.text.encode(" 日")
    assert [smollm2.text.tokens.bytes_of(token_id) for token_id in sun] == [b" \xe6", b"\x97", b"\xa5"]
    assert text(sun[:1], smollm2.text.tokens) == " "
    assert [token.text for token in tokens(sun, smollm2.text.tokens)] == [" ", "", "日"]


def test_special_tokens_are_text_only_where_they_are_shown() -> None:
    ids = [*encode("a"), EOS, *encode("b")]
    assert text(ids) == "ab"
    assert text(ids, show_special=True) == "a<eos>b"
    assert [token.text for token in tokens(ids, stop=("ac",))] == ["a", "", "b"]
    assert [token.id for token in tokens(ids, stop=("ac",))] == ids
    assert text(ids, stop=("ab",)) == "", "a special token that is not shown comes between no two characters"
    assert text(ids, stop=("ab",), show_special=True) == "a<eos>b"
    assert text(ids, stop=("<eos>",)) == "ab"
    assert text(ids, stop=("<eos>",), show_special=True) == "a"
    assert text(ids, stop=("<eos>",), show_special=True, include_stop=True) == "a<eos>"
    assert text(ids, stop=("a<e", "s>b"), show_special=True) == ""


def test_a_token_that_only_ends_the_text_is_none_of_it() -> None:
    one = Detokenizer(TEXTS, SamplingParams(stop=("xx",)))
    assert one.push(Token(encode("x")[0])) == ([], False)
    certain, stopped = one.push(Token(encode("x")[0]), is_last=True, is_text=False)
    assert ([token.text for token in certain], stopped) == (["x", ""], False)


@pytest.mark.parametrize("whole", ["Hello, world!", "naïve café 😀 12345", "  two  spaces\n\n\ttab"])
def test_the_embedded_models_pieces_joined_are_its_decoded_text(smollm2: FrozenModel, whole: str) -> None:
    for continues_text in (True, False):
        assert text(smollm2.text.encode(whole), smollm2.text.tokens, continues_text=continues_text) == whole


@pytest.mark.parametrize("texts", SENTENCEPIECE, ids=["metaspace", "legacy"])
def test_the_first_space_is_kept_in_what_continues_a_text_and_not_in_a_target(texts: TokenTexts) -> None:
    target = texts.backend.encode("the cat", add_special_tokens=False).ids
    assert texts.puts_space_first
    assert text(target, texts, continues_text=True) == " the cat"
    assert text(target, texts, continues_text=False) == "the cat"
    assert text(texts.encode_after_text(" the cat"), texts) == " the cat"
    assert text(texts.encode_after_text("the cat"), texts) == "the cat"
    indented = texts.encode_after_text("    return x")
    assert text(indented, texts) == "    return x"
    assert text(target, texts, stop=(" the",)) == ""
    assert text(target, texts, continues_text=False, stop=(" cat",)) == "the"


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """A Llama-like tokenizer: words with ▁ for a space, and single bytes for everything else."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁hello": 256, "b": 257, "▁": 258}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend)  # type: ignore[no-untyped-call]


FALLBACK = byte_fallback_tokenizer()


@given(st.lists(st.sampled_from([0x41, 0xE2, 0x82, 0xAC, 0xF0, 256, 257, 258]), max_size=12))
def test_bytes_that_form_no_character_break_no_decoder(token_ids: list[int]) -> None:
    """A byte-fallback decoder changes its mind about earlier text; a sampled sequence can bring that about."""
    texts = TokenTexts(FALLBACK.backend_tokenizer)
    assert not texts.puts_space_first, "this one has no rule that would"
    out = text(token_ids, texts)
    whole = texts.decode([*texts.primer, *token_ids]).removeprefix("a")
    if "\ufffd" not in whole:
        assert out == whole
    assert len(out) <= len(whole) + out.count("\ufffd")


def test_the_sequence_that_streaming_cannot_decode_gets_its_text() -> None:
    out = [token.text for token in tokens((0x41, 0xE2, 257, 256), TokenTexts(FALLBACK.backend_tokenizer))]
    assert out[0] == "A"
    assert "".join(out).endswith("b hello")


@given(st.lists(st.sampled_from([*range(0x40, 0x48), *encode("é€😀\ufffd"), 0xFF, EOS, VOCAB_SIZE - 1]), max_size=40))
def test_a_byte_level_text_is_that_of_all_its_tokens_but_for_half_a_character_at_the_end(token_ids: list[int]) -> None:
    whole: str = TEXTS.backend.decode(token_ids)
    assert whole.removeprefix(text(token_ids)) in ("", "\ufffd")


def test_added_tokens_are_decoded_as_the_tokenizer_does() -> None:
    backend = byte_tokenizer().backend_tokenizer
    backend.add_tokens(["caf\u00e9", "\u0120x", "a b", "\u65e5\u00e9"])
    vocabulary: dict[str, int] = backend.get_vocab()
    ids = [vocabulary[token] for token in ("\u0120x", "a b", "caf\u00e9", "\u65e5\u00e9", "\u0120x")]
    assert text(ids, TokenTexts(backend)) == backend.decode(ids)


class Counting:
    """A tokenizer's Rust part, with a count of the tokens that it decodes, in streams too."""

    def __init__(self, backend: Tokenizer) -> None:
        self._backend, self.decoded = backend, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        """Count, and do the same."""
        self.decoded += len(token_ids)
        text: str = self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    def step(self, stream: DecodeStream, token_id: int) -> str | None:
        """A stream's step."""
        text: str | None = stream.step(self._backend, token_id)
        return text


class CountingStream:
    """A DecodeStream that decodes all that it holds back at each step."""

    def __init__(self, token_ids: list[int], skip_special: bool) -> None:
        self._stream, self._holds = DecodeStream(token_ids, skip_special), len(token_ids)

    def step(self, backend: Counting, token_id: int) -> str | None:
        """Count, and do the same."""
        self._holds += 1
        backend.decoded += self._holds
        text = backend.step(self._stream, token_id)
        if text:
            self._holds = 1
        return text


@pytest.mark.parametrize(
    "pattern",
    [(0x80,), (0xE2,), (0xF0, 0x9F), tuple("\ufffd".encode()), (0x41, 0xE2, 257), (0x41, 0xE2), (300,), (0xE2, 300)],
    ids=["continuation", "first", "half", "said", "mind-changing", "letters", "none", "none-between"],
)
@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback", "target"])
def test_tokens_that_form_no_character_take_no_longer_the_more_there_are(
    pattern: tuple[int, ...], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client can ask for them by a bias; all that a stream holds back is decoded at each step."""
    monkeypatch.setattr(detokenizer, "DecodeStream", CountingStream)
    if kind == "byte-level":
        character_of = {encoded[0]: character for character, encoded in byte_level_alphabet().items()}
        names = [character_of.get(byte, "none") for byte in pattern]
        pattern = tuple(TOKENIZER.get_vocab().get(name, VOCAB_SIZE - 1) for name in names)
    token_ids = pattern * (2000 // len(pattern))
    texts = TokenTexts((TOKENIZER if kind == "byte-level" else FALLBACK).backend_tokenizer, [EOS])
    backend = Counting(texts.backend)
    monkeypatch.setattr(texts, "backend", backend)
    out = text(token_ids, texts, continues_text=kind != "target")
    assert backend.decoded <= 32 * len(token_ids)
    whole = texts.decode(token_ids)
    assert len(whole) - len(out) <= 3, "half a character at the end"
    assert whole.startswith(out) or kind != "byte-level"


def test_characters_among_bytes_that_form_none_are_kept() -> None:
    broken = [0xE2, *"€".encode(), 0xF0, 0x9F, *"é".encode(), 257]
    assert text(broken * 30, TokenTexts(FALLBACK.backend_tokenizer)).count("b") == 30
    byte_ids = [encode(chr(0x41))[0], *encode("é")[:1], *encode("€"), *encode("é")[1:], *encode("😀")]
    assert text(byte_ids * 30) == "A\ufffd€\ufffd😀" * 30
