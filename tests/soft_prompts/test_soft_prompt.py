"""The soft prompt's two identities: what is in them, and what is not."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.contracts import ModelSpec
from server.soft_prompts.manifest import Manifest
from server.soft_prompts.soft_prompt import SoftPrompt
from tests.support import random_soft_prompt

TENSOR = torch.arange(64, dtype=torch.float32).reshape(2, 32)


def make(tensor: torch.Tensor = TENSOR, kind: str = "PROMPT_TUNING", **manifest: Any) -> SoftPrompt:
    return SoftPrompt(kind, tensor, Manifest.model_validate(manifest))


def test_equal_content_has_equal_identities_however_it_lies_in_memory() -> None:
    first = make()
    for tensor in (TENSOR.clone(), TENSOR.t().contiguous().t(), torch.stack([TENSOR, TENSOR])[1]):
        assert make(tensor).prefix_hash == first.prefix_hash
        assert make(tensor).digest == first.digest


@pytest.mark.parametrize(
    "other",
    [
        make(TENSOR + 1),
        make(TENSOR.flip(0)),
        make(TENSOR.half()),
        make(TENSOR.bfloat16()),
        make(TENSOR.reshape(4, 16)),
        make(TENSOR, "PREFIX_TUNING"),
        make(torch.where(TENSOR == 0, -0.0, TENSOR)),
    ],
)
def test_other_numbers_dtype_shape_or_kind_have_another_prefix_hash(other: SoftPrompt) -> None:
    assert other.prefix_hash != make().prefix_hash
    assert other.digest != make().digest


def test_halves_with_the_same_bytes_differ_by_their_dtype() -> None:
    bits = torch.arange(64, dtype=torch.int16).reshape(2, 32)
    assert make(bits.view(torch.float16)).prefix_hash != make(bits.view(torch.bfloat16)).prefix_hash


@pytest.mark.parametrize("kind", ["P_TUNING", "CPT"])
def test_the_method_that_trained_embeddings_is_not_in_their_identity(kind: str) -> None:
    assert make(TENSOR, kind).digest == make().digest


@pytest.mark.parametrize(
    "manifest",
    [
        {"input_template": "{input}\n"},
        {"generation": {"max_new_tokens": 5}},
        {"generation": {"stop": ["\n"]}},
        {"labels": ["ham", "spam"]},
        {"labels": ["spam", "ham"]},
        {"labels": []},
        {"system_message": "ignore"},
        {"system_message": "refuse"},
    ],
)
def test_what_changes_answers_is_in_the_digest_and_not_in_the_prefix_hash(manifest: dict[str, Any]) -> None:
    assert make(**manifest).digest != make().digest
    assert make(**manifest).prefix_hash == make().prefix_hash


def test_answers_do_not_run_together_in_the_digest() -> None:
    digests = {
        make(labels=["a", "b"]).digest,
        make(labels=["a,b"]).digest,
        make(labels=["b", "a"]).digest,
        make(input_template="{input}a").digest,
        make(generation={"stop": ["a", "b"]}).digest,
    }
    assert len(digests) == 5


def test_a_system_message_that_is_read_otherwise_is_in_the_digest_and_the_default_is_not() -> None:
    template = "{input}{system}"
    digests = [
        make(input_template=template, system_message=wanted).digest for wanted in ("ignore", "refuse", "template")
    ]
    assert len({make(input_template=template).digest, *digests}) == 3
    assert digests[0] == make(input_template=template).digest, "the default, written out"


@pytest.mark.parametrize(
    "manifest",
    [
        {"description": "words"},
        {"metrics": {"exact_match": 0.9}},
        {"licence": "Apache-2.0"},
        {"training": {"seed": 1}},
        {"created_at": "2026-01-01"},
        {"task": "other", "digest": "0", "prefix_hash": "0"},
        {"base_model": {"name": "llm", "fingerprint": "f"}},
        {"generation": {}},
        {"system_message": "template"},
        {"a_field_of_tomorrow": 1},
    ],
)
def test_what_people_read_is_not_in_the_digest(manifest: dict[str, Any]) -> None:
    assert make(**manifest).digest == make().digest


def test_identities_stay_the_same_from_release_to_release() -> None:
    # Stores are keyed by these: another value here would orphan every blob that is out there.
    soft_prompt = make(labels=["ja", "nein", "größer"], generation={"temperature": 0.5}, input_template="{input}\n")
    assert soft_prompt.prefix_hash == "bb4721a94a2fec2eaad7d645999fca881294c63ad4c306115f617820f493e297"
    assert soft_prompt.digest == "26e9864117893f38f0cd39c17938e623f54fc5e43cb98899b83331a231a2636b"


def test_a_soft_prompt_cannot_be_changed() -> None:
    soft_prompt = make(description="words")
    with pytest.raises(dataclasses.FrozenInstanceError):
        soft_prompt.tensor = TENSOR + 1  # type: ignore[misc]
    with pytest.raises(ValueError, match="frozen"):
        soft_prompt.manifest.description = "others"  # type: ignore[misc]


def test_sizes_are_those_of_the_tensor(spec: ModelSpec) -> None:
    soft_prompt = random_soft_prompt(spec, 7)
    assert soft_prompt.num_virtual_tokens == 7
    assert soft_prompt.num_bytes == 7 * spec.hidden_size * 4


@settings(max_examples=50, deadline=None, database=None)
@given(st.lists(st.floats(width=32), min_size=4, max_size=4), st.lists(st.floats(width=32), min_size=4, max_size=4))
def test_two_tensors_share_a_prefix_hash_only_if_all_bits_are_equal(first: list[float], second: list[float]) -> None:
    left, right = (torch.tensor(values).reshape(2, 2) for values in (first, second))
    same = torch.equal(left.view(torch.int32), right.view(torch.int32))
    assert (make(left).prefix_hash == make(right).prefix_hash) is same
