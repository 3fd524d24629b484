"""No step mixes the device's tensors with the host's: on CUDA that raises, or waits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from server.contracts import GenerationRequest
from server.engine.engine import Engine
from server.engine.model.frozen import FrozenModel
from server.engine.to_device import upload
from server.soft_prompts.soft_prompt import SoftPrompt
from tests.engine.fake_cuda import opaque_varlen_attn
from tests.engine.provenance import Meeting, Provenance
from tests.support import make_engine, random_kv_prompt, random_soft_prompt, request, run_engine, tiny_model

PENALTIES: dict[str, Any] = {"repetition_penalty": 1.2, "presence_penalty": 0.5}
FILTERS: dict[str, Any] = {"temperature": 1.0, "top_k": 9, "top_p": 0.9, "min_p": 0.01}


def work(model: FrozenModel) -> list[tuple[GenerationRequest, SoftPrompt | None]]:
    """Requests of all kinds."""
    return [
        (request("greedy", range(20), max_new_tokens=5), None),
        (request("soft", (1, 2), max_new_tokens=5), random_soft_prompt(model.spec, 5)),
        (request("kv", (3,), max_new_tokens=5), random_kv_prompt(model.spec, 4)),
        (request("rules", (1, 2, 1), max_new_tokens=5, logprobs=True, top_logprobs=3, **PENALTIES, **FILTERS), None),
        (request("typical", (1, 2, 1), max_new_tokens=5, temperature=1.0, typical_p=0.5), None),
        (request("bias", (1, 2), max_new_tokens=5, min_new_tokens=3, logit_bias=((3, 2.0),)), None),
        (request("labels", (4, 5), labels=[(7,), (8, 9), (8, 7, 6)]), random_soft_prompt(model.spec, 5)),
        (request("scored", (4, 5, 6), input_logprobs=True, max_new_tokens=3), None),
        (request("several", (4, 5), n=3, temperature=1.0, max_new_tokens=4), None),
    ]


def provenance_of(engine: Engine) -> Provenance:
    module = engine.model.module
    return Provenance([*module.parameters(), *module.buffers(), engine.kv_cache.states])


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt2"])
def test_steps_of_all_kinds_send_what_the_device_reads(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(architecture, dtype=torch.float32)
    asked = work(model)
    expected = run_engine(make_engine(model), asked, arrive_every=1)
    engine = make_engine(model)
    engine.runner.varlen = opaque_varlen_attn
    provenance = provenance_of(engine)
    provenance.install(monkeypatch)
    with provenance:
        got = run_engine(engine, asked, arrive_every=1)
    assert {name: one.token_ids for name, one in got.items()} == {name: one.token_ids for name, one in expected.items()}
    assert provenance.sends > 20


def test_an_index_that_was_not_sent_is_found(tiny: FrozenModel) -> None:
    engine = make_engine(tiny)
    index = torch.from_numpy(np.array([0, 1]))
    with provenance_of(engine), pytest.raises(Meeting, match="aten::index"):
        engine.kv_cache.states[:, :, index]


def test_arrays_that_are_sent_together_arrive_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    Provenance([]).install(monkeypatch)
    arrays = [np.arange(3), np.arange(0), np.arange(5, 7)]
    sent = upload(arrays, torch.device("cpu"))
    assert [tensor.tolist() for tensor in sent] == [array.tolist() for array in arrays]
