"""Training multiplies in what this machine is fast in, unless somebody says otherwise."""

from __future__ import annotations

import pytest
import torch

from server.settings import Settings
from server.train import dtype
from server.train.dtype import training_settings


@pytest.mark.parametrize(
    ("float32", "bfloat16", "chosen"),
    [(1.0, 2.0, "float32"), (1.0, 0.5, "bfloat16"), (1.0, 1.2, "bfloat16")],
    ids=["clearly faster", "slower", "hardly faster"],
)
def test_float32_is_taken_only_where_it_is_clearly_faster(
    float32: float, bfloat16: float, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dtype, "choose_dtype", lambda name, device: torch.bfloat16)
    times = {torch.float32: float32, torch.bfloat16: bfloat16}
    settings = Settings.load(dtype="auto", device="cpu")
    assert training_settings(settings, times.__getitem__).dtype == chosen


@pytest.mark.parametrize("name", ["bfloat16", "float32", "float64"])
def test_a_dtype_that_somebody_names_is_never_timed(name: str) -> None:
    def never(dtype: torch.dtype) -> float:
        raise AssertionError("timed")

    assert training_settings(Settings.load(dtype=name), never).dtype == name


def test_where_nothing_is_said_a_real_product_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dtype, "choose_dtype", lambda name, device: torch.bfloat16)
    assert training_settings(Settings.load(dtype="auto", device="cpu")).dtype in ("float32", "bfloat16")
