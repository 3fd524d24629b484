"""Single tokens say what they add to the text, whatever alphabet their vocabulary is written in; chats are rendered."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from server.engine.model.frozen import FrozenModel
from server.engine.text.token_texts import TokenTexts
from server.engine.text.tokenizer_parts import byte_level_alphabet
from tests.engine.text.test_detokenizer import FALLBACK
from tests.support import EOS, VOCAB_SIZE, byte_tokenizer

BYTES = byte_tokenizer()
TEXTS = TokenTexts(BYTES.backend_tokenizer)
TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=30)
HELLO = [{"role": "user", "content": "hello"}]


@given(TEXT)
def test_the_bytes_of_a_texts_tokens_joined_are_the_text(text: str) -> None:
    ids = BYTES.encode(text)
    assert b"".join(map(TEXTS.bytes_of, ids)) == text.encode()
    assert TEXTS.decode(ids) == text


@pytest.mark.parametrize("text", ["Hello, world! 12345", "naïve café 😀\n\n\ttab", "<|im_start|>user\nhi<|im_end|>"])
def test_the_embedded_models_tokens_joined_are_the_text(smollm2: FrozenModel, text: str) -> None:
    ids = smollm2.text.encode(text)
    assert b"".join(map(smollm2.text.tokens.bytes_of, ids)).decode() == smollm2.text.tokens.decode(ids) == text
    assert any(len(smollm2.text.tokens.text_of(token_id)) > 3 for token_id in ids)


def test_texts_share_the_numbers_of_their_tokens(smollm2: FrozenModel) -> None:
    first, second = (smollm2.text.encode("Hello, world! Tell me a story.") for _ in range(2))
    assert max(first) > 256, "Python shares smaller ones anyway"
    assert all(one is other for one, other in zip(first, second, strict=True))


def test_the_byte_level_alphabet_is_the_tokenizers_own() -> None:
    alphabet = byte_level_alphabet()
    assert set(alphabet) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(alphabet.values()) == [bytes([byte]) for byte in range(256)]


def test_a_part_of_a_character_has_its_byte_and_reads_as_a_replacement() -> None:
    first, second = BYTES.encode("é")
    assert (TEXTS.bytes_of(first), TEXTS.bytes_of(second)) == (b"\xc3", b"\xa9")
    assert TEXTS.text_of(first) == TEXTS.text_of(second) == TEXTS.text_of(first) == "\ufffd"


def test_a_vocabulary_of_words_and_single_bytes_is_read_as_such() -> None:
    texts = TokenTexts(FALLBACK.backend_tokenizer)
    assert [texts.bytes_of(token_id) for token_id in (256, 257, 258, 0xE2, 0x41)] == [
        b" hello",
        b"b",
        b" ",
        b"\xe2",
        b"A",
    ]
    assert texts.text_of(256) == " hello"


def test_what_only_looks_like_a_byte_is_text_where_no_decoder_makes_bytes_of_it() -> None:
    backend = Tokenizer(models.BPE(vocab={"<0x41>": 0, "▁a": 1}, merges=[]))
    backend.decoder = decoders.Metaspace()
    texts = TokenTexts(backend)
    assert (texts.bytes_of(0), texts.bytes_of(1)) == (b"<0x41>", b" a")
    backend.decoder = None
    assert TokenTexts(backend).bytes_of(0) == b"<0x41>"


def test_special_tokens_read_by_their_names_and_rows_without_a_token_read_nothing() -> None:
    assert (TEXTS.bytes_of(EOS), TEXTS.text_of(EOS)) == (b"<eos>", "<eos>")
    assert TEXTS.decode([*BYTES.encode("a"), EOS]) == "a<eos>"
    assert (TEXTS.bytes_of(VOCAB_SIZE - 1), TEXTS.text_of(VOCAB_SIZE - 1)) == (b"", "")


def test_an_added_token_is_not_read_in_thebyte_level_alphabet() -> None:
    backend = byte_tokenizer().backend_tokenizer
    backend.add_tokens(["café"])
    token_id = backend.token_to_id("café")
    assert token_id is not None
    assert TokenTexts(backend).bytes_of(token_id) == "café".encode()


def test_special_tokens_are_added_unless_the_text_brings_its_own(smollm2: FrozenModel) -> None:
    text = smollm2.text
    assert text.encode("hello", add_special_tokens=False) == text.encode("hello"), "this model adds none"
