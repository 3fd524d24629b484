"""No text has fewer tokens than the bound says, so nothing that fits is refused; most of what cannot fit is."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from server.contracts import TemplatedText
from server.engine.model.frozen import FrozenModel
from server.engine.text.length_bound import LengthBound

LETTERS = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60)
RUNS = st.builds(
    lambda run, count: run * count, st.sampled_from([" ", "\n", "=", "-", "#", "a", "é", "\t "]), st.integers(0, 300)
)
TEXT = st.lists(LETTERS | RUNS, max_size=4).map("".join)


def byte_level(*added: AddedToken, normalizer: normalizers.Normalizer | None = None) -> Tokenizer:
    """A byte-level BPE with one long token of white space and no token for the byte `q`."""
    alphabet = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - {"q"})
    merges = [("Ġ", "Ġ"), ("ĠĠ", "ĠĠ"), ("a", "b")]
    vocabulary = {token: i for i, token in enumerate([*alphabet, *(a + b for a, b in merges)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.add_tokens(list(added))
    return tokenizer


TOKENIZERS = {
    "plain": byte_level(),
    "an added token takes white space": byte_level(AddedToken("<x>", lstrip=True, rstrip=True, special=True)),
    "composed": byte_level(normalizer=normalizers.NFC()),
    "in lower case": byte_level(normalizer=normalizers.Lowercase()),
}


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=TEXT | TEXT.map(lambda text: f"  {text}<x>   {text}"))
@example(text="  \x85\u3000\u2028<x>\xa0")
def test_no_text_has_fewer_tokens_than_the_bound(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    bound = LengthBound(tokenizer, 10**6)
    if "q" not in text or name != "in lower case":  # there a dropped byte counts as a character
        assert bound.least_tokens(text) <= len(tokenizer.encode(text, add_special_tokens=False).ids)


@settings(max_examples=200)
@given(text=TEXT)
def test_no_text_of_the_embedded_model_has_fewer_tokens_than_the_bound(smollm2: FrozenModel, text: str) -> None:
    assert smollm2.text.length_bound.least_tokens(text) <= len(smollm2.text.encode(text))


@pytest.mark.parametrize(
    ("text", "share"), [("word " * 40_000, 0.2), ("0" * 20_000, 1.0), ("é" * 90_000, 0.1), (" " * 90_000, 0.7)]
)
def test_what_is_far_too_long_is_known_to_be_so(smollm2: FrozenModel, text: str, share: float) -> None:
    bound = LengthBound(smollm2.text.backend, 10**6)
    tokens = len(smollm2.text.encode(text))
    assert share * tokens <= bound.least_tokens(text) <= tokens


def test_texts_are_counted_together(smollm2: FrozenModel) -> None:
    bound = LengthBound(smollm2.text.backend, 1000)
    assert bound.can_fit("1" * 600)
    assert bound.can_fit("1" * 600, "2" * 400)
    assert not bound.can_fit("1" * 600, "2" * 401)


def test_a_texts_end_has_as_many_tokens_as_the_context_holds(smollm2: FrozenModel) -> None:
    bound = LengthBound(smollm2.text.backend, 1000)
    text = TemplatedText("word " * 100_000 + "the end", ((0, 20), (400_000, 500_007)))
    end = bound.end_of(text)
    assert text.text.endswith(end.text)
    assert len(end.text) < 60_000
    assert len(smollm2.text.encode(end.text)) >= 1000
    assert end.user_spans == ((0, len(end.text)),)
    assert bound.end_of(TemplatedText("short")) == TemplatedText("short")
