"""The log says at start which attention serves, and what would make it faster."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from server.engine.attention.interface import AttentionRules
from server.engine.attention.varlen_rows import log_attention
from server.engine.model.frozen import FrozenModel

PLAIN = [AttentionRules(0.1)]


@pytest.mark.parametrize(
    ("changes", "rules", "remedy"),
    [
        ({"dtype": "float32"}, PLAIN, "PRELUDE_DTYPE=bfloat16"),
        ({"head_dim": 512}, PLAIN, "choose a model without it"),
        ({}, [AttentionRules(0.1, softcap=5.0)], "choose a model without it"),
    ],
)
def test_a_start_warns_that_attention_will_be_slow_and_says_what_helps(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tiny: FrozenModel,
    changes: dict[str, Any],
    rules: list[AttentionRules],
    remedy: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    spec = dataclasses.replace(tiny.spec, **{"device": "cuda:0", "dtype": "bfloat16", "head_dim": 64, **changes})
    log_attention(spec, rules)
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert "slower" in record.message
    assert remedy in record.message
