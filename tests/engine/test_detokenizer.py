"""Text comes out piece by piece: never half a character, never a piece of a stop string, and nothing is lost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from server.engine.detokenizer import Detokenizer
from server.engine.model import FrozenModel
from tests.support import EOS, byte_tokenizer

TOKENIZER = byte_tokenizer()


def encode(text: str) -> list[int]:
    ids: list[int] = TOKENIZER.encode(text)
    return ids


def pieces(text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    """What a detokenizer gives out for a text that comes byte by byte, and whether it stopped."""
    detokenizer = Detokenizer(TOKENIZER, stop)
    out: list[str] = []
    for token_id in encode(text):
        piece, stopped = detokenizer.push(token_id)
        out.append(piece)
        if stopped:
            return out, True
    return [*out, detokenizer.flush()], False


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=30))
def test_pieces_joined_are_the_text_and_none_is_half_a_character(text: str) -> None:
    out, stopped = pieces(text)
    assert "".join(out) == text
    assert not stopped
    assert all("\ufffd" not in piece for piece in out)


@given(st.text("ab ", max_size=30), st.lists(st.text("ab ", min_size=1, max_size=4), min_size=1, max_size=3))
def test_the_text_ends_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    found = [text.find(s) for s in stop if s in text]
    out, stopped = pieces(text, tuple(stop))
    assert stopped == bool(found)
    if stopped:
        # The sequence ends with the token that completes a stop string; of those complete by then, the earliest counts.
        ends = min(text.find(s) + len(s) for s in stop if s in text)
        expected = min(text.find(s) for s in stop if s in text[:ends])
        assert "".join(out) == text[:expected]
    else:
        assert "".join(out) == text


def test_what_may_become_a_stop_string_is_held_back_until_it_does_not() -> None:
    out, _ = pieces("a\n\nb", ("\n\nc",))
    assert out == ["a", "", "", "\n\nb", ""]


def test_half_a_character_at_the_end_is_not_given_out() -> None:
    detokenizer = Detokenizer(TOKENIZER)
    first, second = encode("é")
    assert detokenizer.push(first) == ("", False)
    assert detokenizer.flush() == ""
    assert detokenizer.push(second) == ("é", False)


def test_special_tokens_have_no_text() -> None:
    assert Detokenizer(TOKENIZER).push(EOS) == ("", False)


@pytest.mark.parametrize("text", ["Hello, world!", "naïve café 😀 12345", "  two  spaces\n\n\ttab"])
def test_the_embedded_models_pieces_joined_are_its_decoded_text(smollm2: FrozenModel, text: str) -> None:
    detokenizer = Detokenizer(smollm2.tokenizer)
    joined = "".join(detokenizer.push(token_id)[0] for token_id in smollm2.encode(text)) + detokenizer.flush()
    assert joined == text


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
    detokenizer = Detokenizer(FALLBACK)
    out = "".join(detokenizer.push(token_id)[0] for token_id in token_ids) + detokenizer.flush()
    whole = FALLBACK.backend_tokenizer.decode(token_ids, skip_special_tokens=True)
    if "\ufffd" not in whole:
        assert out == whole
    assert len(out) <= len(whole) + out.count("\ufffd")


def test_the_sequence_that_streaming_cannot_decode_gets_its_text() -> None:
    detokenizer = Detokenizer(FALLBACK)
    pieces = [detokenizer.push(token_id)[0] for token_id in (0x41, 0xE2, 257, 256)]
    assert pieces[0] == "A"
    assert "".join(pieces).endswith("b hello")
