"""What a step may launch, upload and wait for; figures that hold on every machine, unlike times."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from server.contracts import GenerationRequest
from server.engine.fast.decode_graphs import DecodeGraphs
from server.engine.fast.optimise import optimise
from server.engine.model.frozen import FrozenModel
from server.engine.runner import Runner
from server.engine.sampling import sampler
from server.engine.scheduling.sequence import Sequence
from server.engine.to_device import Download
from tests.engine.counting import Largest, Operators, Reads, count_uploads
from tests.engine.fake_cuda import opaque_varlen_attn
from tests.engine.sampling.choosing import choose_next
from tests.engine.sampling.test_sampler import sequence
from tests.support import TINY, make_engine, random_soft_prompt, request, tiny_model

ROWS, VOCABULARY = 256, 2000

PENALTIES: dict[str, Any] = {"repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.25}
FILTERS: dict[str, Any] = {"temperature": 0.7, "top_k": 50, "top_p": 0.9, "min_p": 0.01}
BIAS: dict[str, Any] = {"logit_bias": ((3, 1.5), (9, -2.0)), "min_new_tokens": 40}
LOGPROBS: dict[str, Any] = {"logprobs": True, "top_logprobs": 5}


class Mask:
    """A grammar's walk, as far as sampling sees it."""

    def allowed_bits(self) -> np.ndarray:
        """Every second token, but none of the last hundred."""
        return np.full((VOCABULARY - 100) // 8, 0b10101010, dtype=np.uint8)


def rows(*rules: dict[str, Any], mask: bool = False) -> list[Sequence]:
    """Sequences with 55 tokens of input and 20 of output each, under these rules in turn."""
    sequences = []
    for i in range(ROWS):
        one = sequence(i, tuple(range(5, 60)), max_new_tokens=50, **rules[i % len(rules)])
        for token_id in range(20):
            one.append(token_id + i)
        if mask and i % len(rules) == 0:
            one.walk = Mask()  # type: ignore[assignment]
        sequences.append(one)
    return sequences


@pytest.mark.parametrize(
    ("sequences", "most"),
    [
        (rows({}), 8),
        (rows({"temperature": 1.0}), 14),
        (rows({"temperature": 0.7, "top_p": 0.9}), 21),
        (rows(PENALTIES), 16),
        (rows(PENALTIES | {"temperature": 0.7, "top_p": 0.9}), 30),
        (rows({}, mask=True), 10),
        (rows(LOGPROBS), 12),
        (rows(PENALTIES | FILTERS | BIAS | LOGPROBS), 40),
        (rows(FILTERS | PENALTIES | LOGPROBS, mask=True), 40),
    ],
    ids=["greedy", "drawn", "top-p", "penalties", "penalties-top-p", "grammar", "logprobs", "all", "all-grammar"],
)
def test_rules_of_256_rows_take_a_few_operators(
    sequences: list[Sequence], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads = count_uploads(monkeypatch)
    logits = torch.randn(ROWS, VOCABULARY, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), Reads() as reads, Operators() as operators:
        choices = choose_next(logits, sequences, frozenset({2}))
    assert sum(operators.names.values()) <= most, operators.names
    assert len(uploads) <= 8
    assert reads.names == ["cpu"]
    assert all(choice.token_id is not None for choice in choices)


def test_rows_of_all_kinds_together_take_a_few_operators_more(monkeypatch: pytest.MonkeyPatch) -> None:
    uploads = count_uploads(monkeypatch)
    sequences = rows(FILTERS, {}, PENALTIES | BIAS, LOGPROBS | FILTERS | PENALTIES, {"top_k": 3} | FILTERS, mask=True)
    with torch.inference_mode(), Reads() as reads, Operators() as operators:
        choose_next(torch.randn(ROWS, VOCABULARY), sequences, frozenset({2}))
    assert sum(operators.names.values()) <= 50, operators.names
    assert len(uploads) <= 10
    assert reads.names == ["cpu"]


@pytest.mark.parametrize("every", [1, 3], ids=["neighbours", "scattered"])
def test_only_the_rows_with_rules_are_copied_for_them(every: int) -> None:
    """A few clients' rules cost nothing for the rows of all others."""
    places = range(0, 16 * every, every)
    sequences = [sequence(i, max_new_tokens=50, **(FILTERS | PENALTIES if i in places else {})) for i in range(ROWS)]
    logits = torch.randn(ROWS, VOCABULARY, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), Sorted() as sorted_rows:
        choices = choose_next(logits, sequences, frozenset({2}))
    assert sorted_rows.numbers == 16 * VOCABULARY
    alone = [choose_next(logits[i : i + 1], sequences[i : i + 1], frozenset({2}))[0] for i in range(ROWS)]
    assert choices == alone


class Sorted(Largest):  # type: ignore[no-untyped-call]
    """The same of operators that rules take, and that the best token does not."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        numbers = self.numbers
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if func.__name__.split(".")[0] not in ("clone", "div", "_softmax", "sort", "topk", "masked_fill"):
            self.numbers = numbers
        return out


@pytest.mark.parametrize("rules", [{}, {"temperature": 1.0}], ids=["greedy", "drawn"])
def test_choices_that_share_a_row_take_no_copy_of_it_each(
    rules: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many requests of 128 choices each may begin in one step; their draws are made in parts that memory holds."""
    monkeypatch.setattr(sampler, "NUMBERS_AT_ONCE", {"cpu": 16 * VOCABULARY})
    sequences = [sequence(i, max_new_tokens=50, **rules) for i in range(ROWS)]
    shared = torch.randn(2, VOCABULARY, generator=torch.Generator().manual_seed(0))
    drawn_from = [i % 2 for i in range(ROWS)]
    download = Download()
    with torch.inference_mode(), Largest() as largest:
        choices = sampler.begin_choosing(shared, sequences, frozenset(), download, drawn_from=drawn_from)
    assert largest.numbers <= 16 * VOCABULARY
    expected = choose_next(shared[drawn_from], sequences, frozenset())
    assert [choice.token_id for choice in choices()] == [choice.token_id for choice in expected]


def step_of(requests: list[GenerationRequest], tiny: FrozenModel, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """How the host reads tensors in a step that prefills all of these requests; the model takes no part."""
    engine = make_engine(tiny, max_sequences=300, max_batch_tokens=4096, num_slabs=300)
    for one in requests:
        engine.add(one, None)
    batch = engine.scheduler.schedule()
    assert len(batch) == len(requests)

    def forward(runner: Runner, batch: Any, kept: np.ndarray) -> torch.Tensor:
        return torch.randn(len(kept), tiny.spec.vocab_size)

    monkeypatch.setattr(Runner, "forward", forward)
    with Reads() as reads:
        engine.run(batch)
    names: list[str] = reads.names
    return names


def test_a_step_waits_for_the_device_once_however_many_requests_have_labels(
    tiny: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    labelled = [request(f"r{i}", (1, 2, 3), labels=[(i % 100,), (101, 7)]) for i in range(ROWS)]
    assert step_of(labelled, tiny, monkeypatch) == ["cpu"]


def test_a_step_waits_for_the_device_once_whatever_its_requests_ask_for(
    tiny: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [
        request("greedy", (1, 2, 3), max_new_tokens=9),
        request("labels", (1, 2, 3), labels=[(5,), (6,)]),
        request("drawn", (1, 2, 3), temperature=1.0, top_p=0.9, max_new_tokens=9, **LOGPROBS),
        request("scored", (1, 2, 3, 4), input_logprobs=True, max_new_tokens=9, **LOGPROBS),
        request("penalised", (1, 2, 3), repetition_penalty=1.3, max_new_tokens=9),
    ]
    assert step_of(asked, tiny, monkeypatch) == ["cpu"]


def test_a_step_that_completes_prefixes_waits_for_the_device_once(tiny: FrozenModel) -> None:
    """Whether they are finite comes with the step's other answers."""
    engine = make_engine(tiny, max_batch_tokens=64)
    for i in range(4):
        engine.add(request(f"r{i}", (1, 2, 3), max_new_tokens=9), random_soft_prompt(tiny.spec, 5, seed=i))
    with Reads() as reads:
        engine.step()
    assert len(engine.prefixes) == 4
    assert reads.names == ["cpu"]


@pytest.mark.parametrize(
    ("architecture", "fused", "in_a_layer", "beside"),
    [
        ("llama", True, 21, 34),
        ("qwen3", True, 24, 34),
        ("llama", False, 42, 34),
        ("phi3", False, 44, 36),
        ("gemma3_text", False, 86, 50),
    ],
)
def test_a_decoding_step_launches_a_bounded_number_of_operators_per_layer(
    architecture: str, fused: bool, in_a_layer: int, beside: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CUDA graph replays them, an eager step launches them: either way each costs microseconds."""
    counts = []
    for layers in (2, 4):
        config = TINY[architecture] | {"num_hidden_layers": layers}
        if "layer_types" in config:
            config["layer_types"] = config["layer_types"] * (layers // 2)
        monkeypatch.setitem(TINY, architecture, config)
        model = tiny_model(architecture, dtype=torch.float32)
        optimise(model, {"fused"} if fused else set(), None)
        graphs = DecodeGraphs(model, make_engine(model).kv_cache, opaque_varlen_attn, 4, lambda forward: forward)
        with torch.inference_mode(), Operators() as operators:
            graphs.run([1, 2, 3, 4], [1, 2, 3, 4], [0, 32, 64, 96])
        counts.append(sum(operators.names.values()))
    per_layer = (counts[1] - counts[0]) / 2
    assert per_layer <= in_a_layer, counts
    assert counts[0] - 2 * per_layer <= beside, counts
