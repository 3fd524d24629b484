"""A step is padded to one of a few numbers of rows, at least two, and to the next one only."""

from __future__ import annotations

import time

import pytest
import torch

from server.engine.fast.linear import FrozenLinear, can_pack, prepare_products
from server.engine.fast.row_buckets import TILE, bucket, buckets


def test_a_bucket_holds_its_rows_and_fewer_than_a_tile_more() -> None:
    for rows in range(1, 600):
        assert rows <= bucket(rows) < rows + TILE
        assert bucket(bucket(rows)) == bucket(rows)
        assert bucket(rows) > 1
        assert bucket(rows) in buckets(600)


def test_a_full_step_has_few_numbers_of_rows() -> None:
    assert len(buckets(512)) <= 48


@pytest.mark.skipif(not can_pack(torch.zeros(1, 1)), reason="oneDNN does not multiply float32 here")
def test_in_float32_a_row_has_the_same_bits_in_every_bucket() -> None:
    numbers = torch.Generator().manual_seed(0)
    linear = FrozenLinear(torch.randn(96, 1536, generator=numbers), pack=True)
    x = torch.randn(512, 1536, generator=numbers)
    whole = linear(x)
    for rows in buckets(512):
        assert torch.equal(linear(x[:rows]), whole[:rows]), rows


@pytest.mark.skipif(not can_pack(torch.zeros(1, 1)), reason="oneDNN does not multiply float32 here")
def test_products_of_every_shape_are_prepared_for_every_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, int]] = []
    monkeypatch.setattr(FrozenLinear, "prepare", lambda self, rows: made.append((self.out_features, rows)))
    layers = [FrozenLinear(torch.eye(8), pack=True), FrozenLinear(torch.eye(8), pack=True)]
    logits = FrozenLinear(torch.zeros(32, 8), pack=True)
    prepare_products(torch.nn.ModuleList([*layers, logits]), 64, 17)
    assert [rows for width, rows in made if width == 8] == buckets(64)
    assert [rows for width, rows in made if width == 32] == buckets(TILE)


@pytest.mark.skipif(not can_pack(torch.zeros(1, 1)), reason="oneDNN does not multiply float32 here")
def test_a_log_that_is_no_terminal_shows_no_progress_bar(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(FrozenLinear, "prepare", lambda self, rows: time.sleep(0.09))  # the bar waits for a second
    prepare_products(FrozenLinear(torch.eye(8), pack=True), TILE, TILE)
    assert capfd.readouterr().err == ""


@pytest.mark.skipif(not can_pack(torch.zeros(1, 1)), reason="oneDNN does not multiply float32 here")
@pytest.mark.parametrize("adds", [False, True])
def test_what_is_prepared_is_what_is_multiplied(monkeypatch: pytest.MonkeyPatch, adds: bool) -> None:
    called: list[str] = []
    linear = FrozenLinear(torch.eye(8), pack=True, adds=adds)
    monkeypatch.setattr(linear, "_multiply", lambda *_: called.append("multiply"))
    monkeypatch.setattr(linear, "_multiply_and_add", lambda *_: called.append("add"))
    linear.prepare(3)
    assert called == ["add" if adds else "multiply"]
