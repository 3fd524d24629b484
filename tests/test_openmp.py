"""What is set before torch is loaded is a default: a user's own choice stands."""

from __future__ import annotations

import os

import pytest

from server.openmp import ALLOCATOR_VARIABLES, expand_segments


def test_memory_on_cuda_is_cut_from_segments_that_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ALLOCATOR_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")  # so that it is taken back after the test
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    expand_segments()
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"


@pytest.mark.parametrize("name", ALLOCATOR_VARIABLES)
def test_an_allocator_that_the_user_has_set_up_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in ALLOCATOR_VARIABLES:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "max_split_size_mb:64")
    expand_segments()
    assert {other: os.environ.get(other) for other in ALLOCATOR_VARIABLES} == {
        other: "max_split_size_mb:64" if other == name else None for other in ALLOCATOR_VARIABLES
    }
