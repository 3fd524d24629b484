"""The step that memory is measured by is the largest that requests can make, and leaves no trace."""

from __future__ import annotations

import pytest
import torch

from server.contracts import SamplingParams
from server.engine import build_engine
from server.engine.build_engine import take_all
from server.engine.engine import Engine
from server.engine.memory import largest_step
from server.engine.memory.kv_cache import Computed
from server.engine.memory.largest_step import ALL_RULES, decodes, largest_batch, measure_steps
from server.engine.memory.prefix_cache import PrefixCache
from server.engine.memory.slots import Slot
from server.engine.model.frozen import FrozenModel
from server.engine.sampling import sampler
from server.engine.sampling.logit_rows import LogitRows
from server.errors import InsufficientMemory
from server.settings import Settings
from tests.support import make_engine

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def few_rows_at_once(monkeypatch: pytest.MonkeyPatch, tiny: FrozenModel) -> None:
    """So that a test need not draw sixteen thousand rows of a tiny vocabulary."""
    monkeypatch.setattr(sampler, "NUMBERS_AT_ONCE", {"cpu": 20 * tiny.spec.vocab_size})
    monkeypatch.setattr(sampler, "DEVICE_NUMBERS_AT_ONCE", 20 * tiny.spec.vocab_size)


@pytest.mark.parametrize(("running", "tokens"), [(1, 16), (4, 16), (16, 16), (4, 300), (5, 400)])
def test_every_token_of_the_budget_is_computed_scored_and_drawn_from(
    tiny: FrozenModel, running: int, tokens: int
) -> None:
    batch = largest_batch(tiny, Slot(128, 0), running, tokens)
    assert sum(span.count for _, span in batch) == tokens
    assert max(span.end for _, span in batch) == tiny.spec.max_model_len
    rows = LogitRows.of(batch)
    assert len(rows.kept) == tokens
    assert len(rows.drawing) == max(20, len(batch))
    assert all(not sequence.sampling.is_greedy for sequence in rows.drawing)
    assert all(sequence.seen is not None and len(sequence.seen.ids) == 128 for sequence in rows.drawing)
    scored = sum(count for *_, count in rows.scored)
    assert scored == tokens - len(batch)


@pytest.mark.parametrize("tokens", [8, 300])
def test_it_runs_and_leaves_the_engine_as_it_was(tiny: FrozenModel, tokens: int) -> None:
    engine = make_engine(tiny, num_slabs=1, max_batch_tokens=tokens)
    engine.run(largest_batch(tiny, Slot(128, 0), 8, tokens))
    engine.run(decodes(tiny, Slot(128, 0), 8, SamplingParams()))
    assert not engine.has_work
    engine.check_integrity()


def test_rules_of_the_largest_step_include_every_filter() -> None:
    """A new rule that takes memory must be among them."""
    off = SamplingParams()
    without_memory = {
        *("max_new_tokens", "min_new_tokens", "seed", "stop", "stop_token_ids", "include_stop", "show_special"),
        *("ignore_eos", "logit_bias", "grammar"),
    }
    names = set(SamplingParams.__slots__) - without_memory
    assert all(getattr(ALL_RULES, name) != getattr(off, name) for name in names)


def test_nothing_is_measured_on_a_cpu(tiny: FrozenModel) -> None:
    assert measure_steps(tiny, 8, 64, 16) is None


class Device:
    """What torch.cuda says of memory."""

    def __init__(self, peaks: list[int]) -> None:
        self.peaks = peaks
        self.resets = 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Put it where peaks are read."""

        def reset(device: torch.device) -> None:
            self.resets += 1

        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: self.peaks.pop(0) + 70)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 70)


def on_cuda(model: FrozenModel, monkeypatch: pytest.MonkeyPatch) -> FrozenModel:
    """A model that says it is on a GPU, and computes on the CPU."""
    monkeypatch.setattr(FrozenModel, "device", torch.device("cuda:0"))
    monkeypatch.setattr(largest_step, "Engine", lambda model, *rest: _on_cpu(model, monkeypatch, *rest))
    return model


def _on_cpu(model: FrozenModel, monkeypatch: pytest.MonkeyPatch, *rest: object) -> Engine:
    monkeypatch.setattr(FrozenModel, "device", CPU)
    return Engine(model, *rest)  # type: ignore[arg-type]


def test_peaks_are_what_the_largest_step_and_decoding_take_beyond_what_stays(
    tiny: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    Device([1000, 30]).install(monkeypatch)
    steps = measure_steps(on_cuda(tiny, monkeypatch), 4, 64, 16)
    assert steps is not None
    assert steps.largest == 1000
    logits = 5 * tiny.spec.vocab_size * tiny.dtype.itemsize
    assert steps.graphs == 30 + logits + largest_step.WORKSPACES


def test_a_device_without_memory_for_the_largest_step_is_refused_with_the_remedy(
    tiny: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(engine: Engine, batch: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    Device([1000]).install(monkeypatch)
    monkeypatch.setattr(Engine, "run", run)
    with pytest.raises(InsufficientMemory, match="a step of 64 tokens") as caught:
        measure_steps(on_cuda(tiny, monkeypatch), 4, 64, 16)
    assert "PRELUDE_MAX_BATCH_TOKENS" in caught.value.remedy


def test_what_steps_need_later_is_taken_at_the_start_or_the_start_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    def empty(num_bytes: int, *, dtype: torch.dtype, device: torch.device) -> None:
        taken.append(num_bytes * dtype.itemsize)
        if num_bytes > 1000:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch, "empty", empty)
    take_all(torch.device("cuda:0"), 1000)
    assert taken == [1000]
    with pytest.raises(InsufficientMemory, match="another process"):
        take_all(torch.device("cuda:0"), 1001)


@pytest.mark.parametrize("place", ["KVCache", "optimise"])
def test_memory_that_runs_out_while_an_engine_is_built_is_a_sentence(
    place: str, tiny: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_much(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(FrozenModel, "load", lambda _: tiny)
    monkeypatch.setattr(build_engine, place, too_much)
    with pytest.raises(InsufficientMemory) as caught:
        build_engine.load_engine(Settings(optimise="none", max_sequences=2, max_batch_tokens=32))
    assert caught.value.remedy


def test_a_prefix_cache_makes_room_before_a_prefix_is_made() -> None:
    cache = PrefixCache(100)
    cache.put("a", Computed(torch.zeros(60, dtype=torch.uint8)))
    cache.put("b", Computed(torch.zeros(40, dtype=torch.uint8)))
    cache.make_room(50)
    assert list(cache) == ["b"]
    cache.make_room(500)
    assert not len(cache)
    cache.check_integrity()
