"""A prefix of keys and values is copied in pieces beside the steps: nobody waits, a failure leaves nothing."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable

import pytest
import torch

from server.contracts import Delta, FinishReason, ModelSpec
from server.engine.engine import Engine
from server.engine.memory import arrivals
from server.engine.memory.arrivals import Arrivals, HostCopy
from server.engine.model.frozen import FrozenModel
from server.errors import GenerationFailed, NotFinite
from server.soft_prompts.soft_prompt import SoftPrompt
from tests.support import make_engine, random_kv_prompt, request, run_engine


class FakeCopy(HostCopy):
    """A prefix that arrives once it has been advanced often enough."""

    def __init__(self, soft_prompt: SoftPrompt, model: ModelSpec, after: int) -> None:
        super().__init__(soft_prompt, model, 2**30)
        self._left, self.advanced, self.settled = after, 0, 0

    def advance(self) -> bool:
        self.advanced += 1
        self._left -= 1
        return self._left == 0 and super().advance()

    def settle(self) -> None:
        self.settled += 1


class BrokenCopy(FakeCopy):
    """One that fails instead of arriving."""

    error: tuple[type[Exception], str]

    def advance(self) -> bool:
        self.advanced += 1
        if self.advanced == 3:
            kind, message = self.error
            raise kind(message)
        return True


class Copies:
    """Begins copies, and keeps what it began as long as the engine does."""

    def __init__(self, engine: Engine, begin: Callable[[SoftPrompt], FakeCopy]) -> None:
        self.begun: list[weakref.ref[FakeCopy]] = []
        self.most = 0
        self._begin = begin
        engine.scheduler.arrivals = Arrivals(engine.prefixes, self.start)

    def start(self, soft_prompt: SoftPrompt) -> FakeCopy:
        copy = self._begin(soft_prompt)
        self.begun.append(weakref.ref(copy))
        self.most = max(self.most, len(self.alive))
        return copy

    @property
    def settled(self) -> int:
        return sum(copy.settled for copy in self.alive)

    @property
    def alive(self) -> list[FakeCopy]:
        gc.collect()
        return [copy for one in self.begun if (copy := one()) is not None]


def fake_copies(engine: Engine, after: int) -> Copies:
    return Copies(engine, lambda soft_prompt: FakeCopy(soft_prompt, engine.model.spec, after))


def nothing_is_left(engine: Engine) -> None:
    engine.check_integrity()
    assert not engine.has_work
    assert not engine.kv_cache.allocator.used
    assert engine.scheduler.arrivals._on_its_way is None
    assert not engine.scheduler.arrivals._failed


def run(engine: Engine) -> list[Delta]:
    deltas: list[Delta] = []
    while engine.has_work:
        deltas += engine.step()
    return deltas


def test_everybody_decodes_while_a_prefix_is_on_its_way(tiny: FrozenModel) -> None:
    engine = make_engine(tiny)
    copies = fake_copies(engine, after=6)
    engine.add(request("long", [1, 2], max_new_tokens=20, ignore_eos=True), None)
    engine.step()
    for name in ("first", "second"):
        engine.add(request(name, [1, 2], "task", max_new_tokens=2, ignore_eos=True), random_kv_prompt(tiny.spec))
    alone = 0
    while [delta.request_id for delta in engine.step()] == ["long"]:
        alone += 1
    assert alone == 5, "one piece in each of these steps, and a first one as it begins"
    deltas = run(engine)
    assert {delta.request_id for delta in deltas if delta.finish_reason} == {"long", "first", "second"}
    assert len(copies.begun) == 1
    assert (engine.prefixes.misses, engine.prefixes.hits) == (1, 1)
    nothing_is_left(engine)


def test_answers_are_those_of_a_prefix_that_is_there_at_once(
    tiny: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = [
        (request(f"r{i}", [i, 2], f"task {i}", max_new_tokens=6), random_kv_prompt(tiny.spec, 20, seed=i % 3))
        for i in range(6)
    ]
    expected = run_engine(make_engine(tiny), work)
    monkeypatch.setitem(arrivals.PIECE_BYTES, "cpu", 1)
    engine = make_engine(tiny, prefix_bytes=0)
    outcomes = run_engine(engine, work)
    assert {name: one.token_ids for name, one in outcomes.items()} == {
        name: one.token_ids for name, one in expected.items()
    }
    nothing_is_left(engine)


def test_one_prefix_is_on_its_way_at_a_time(tiny: FrozenModel) -> None:
    engine = make_engine(tiny)
    copies = fake_copies(engine, after=3)
    for seed in range(4):
        prompt = random_kv_prompt(tiny.spec, seed=seed)
        engine.add(request(str(seed), [1], f"task {seed}", max_new_tokens=2), prompt)
    assert {delta.request_id for delta in run(engine) if delta.finish_reason} == {"0", "1", "2", "3"}
    assert (len(copies.begun), copies.most) == (4, 1)
    nothing_is_left(engine)


def test_an_engine_with_nothing_else_to_do_waits_a_bounded_time_and_does_not_spin(tiny: FrozenModel) -> None:
    engine = make_engine(tiny)
    copies = fake_copies(engine, after=-1)
    engine.add(request("r", [1], "task", max_new_tokens=2), random_kv_prompt(tiny.spec))
    began = time.monotonic()
    for _ in range(4):
        assert engine.step() == []
    assert time.monotonic() - began > 2 * arrivals.IDLE_SECONDS
    [copy] = copies.alive
    assert copy.advanced <= 1 + 4 * (1 + arrivals.IDLE_SECONDS / arrivals.PAUSE_SECONDS)
    del copy
    delta = engine.abort("r")
    assert delta is not None
    assert delta.finish_reason is FinishReason.ABORTED
    nothing_is_left(engine)
    assert not copies.alive, "its memory is held"


def test_a_copy_ends_with_the_last_request_that_waits_for_it(tiny: FrozenModel) -> None:
    engine = make_engine(tiny)
    copies = fake_copies(engine, after=100)
    engine.add(request("other", [1], max_new_tokens=30, ignore_eos=True), None)
    for name in ("first", "second"):
        engine.add(request(name, [1], "task", max_new_tokens=2), random_kv_prompt(tiny.spec))
    engine.step()
    engine.abort("first")
    assert not copies.settled
    [copy] = copies.alive
    engine.abort("second")
    assert copy.settled == 1, "the device must not write to memory that others may get"
    del copy
    assert not copies.alive
    run(engine)
    nothing_is_left(engine)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        ((torch.OutOfMemoryError, "CUDA out of memory."), GenerationFailed),
        ((NotFinite, "not finite"), NotFinite),
        ((RuntimeError, "no such stream"), GenerationFailed),
    ],
)
@pytest.mark.parametrize("at_start", [True, False])
def test_a_copy_that_fails_ends_only_those_who_wait_for_it(
    tiny: FrozenModel,
    error: tuple[type[Exception], str],
    expected: type[Exception],
    at_start: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(arrivals.log, "disabled", True)  # its records hold tracebacks
    engine = make_engine(tiny)
    soft_prompt = random_kv_prompt(tiny.spec)
    kept = random_kv_prompt(tiny.spec, seed=1)
    run_engine(engine, [(request("before", [1], "kept", max_new_tokens=1), kept)])
    engine.prefixes.budget_bytes = engine.prefixes.num_bytes  # no room for two

    def begin(soft_prompt: SoftPrompt) -> FakeCopy:
        kind, message = error
        if at_start:
            raise kind(message)
        broken = BrokenCopy(soft_prompt, tiny.spec, 0)
        broken.error = error
        return broken

    copies = Copies(engine, begin)
    engine.add(request("other", [1], max_new_tokens=10, ignore_eos=True), None)
    for name in ("first", "second"):
        engine.add(request(name, [1], "task", max_new_tokens=2, n=2), soft_prompt)
    ends = {delta.request_id: delta for delta in run(engine) if delta.is_last and delta.finish_reason}
    assert ends.keys() == {"other", "first", "second"}
    assert ends["other"].finish_reason is FinishReason.LENGTH
    for name in ("first", "second"):
        assert ends[name].finish_reason is FinishReason.FAILED
        assert isinstance(ends[name].error, expected)
    nothing_is_left(engine)
    assert not copies.alive
    assert list(engine.prefixes) == [kept.prefix_hash], "it evicts nobody"
    fake_copies(engine, after=2)
    assert run_engine(engine, [(request("again", [1], "task", max_new_tokens=2), soft_prompt)])["again"].token_ids


@pytest.mark.parametrize("at_start", [True, False])
def test_an_error_that_may_have_taken_the_device_is_not_hidden_as_one_request_s(
    tiny: FrozenModel, at_start: bool
) -> None:
    """Otherwise an engine that is idle afterwards would be healthy, and fail the next request."""
    engine = make_engine(tiny)

    def begin(soft_prompt: SoftPrompt) -> FakeCopy:
        if at_start:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        broken = BrokenCopy(soft_prompt, tiny.spec, 0)
        broken.error = torch.AcceleratorError, "CUDA error: an illegal memory access was encountered"
        return broken

    copies = Copies(engine, begin)
    engine.add(request("r", [1], "task", max_new_tokens=2), random_kv_prompt(tiny.spec))
    with pytest.raises(torch.AcceleratorError):
        run(engine)
    assert [delta.request_id for delta in engine.fail_all("it broke")] == ["r"]
    nothing_is_left(engine)
    assert not copies.alive


def test_keys_that_are_not_finite_are_not_kept(tiny: FrozenModel) -> None:
    engine = make_engine(tiny)
    tensor = random_kv_prompt(tiny.spec).tensor.clone()
    tensor[-1, -1] = float("nan")
    outcome = run_engine(engine, [(request("r", [1], "task", max_new_tokens=2), SoftPrompt("PREFIX_TUNING", tensor))])[
        "r"
    ]
    assert outcome.finish_reason is FinishReason.FAILED
    assert not len(engine.prefixes)
    nothing_is_left(engine)


def test_a_version_that_is_deleted_meanwhile_answers_and_leaves_nothing_behind(tiny: FrozenModel) -> None:
    engine = make_engine(tiny)
    fake_copies(engine, after=5)
    soft_prompt = random_kv_prompt(tiny.spec)
    engine.add(request("other", [1], max_new_tokens=12, ignore_eos=True), None)
    engine.add(request("r", [1], "task", max_new_tokens=2, ignore_eos=True), soft_prompt)
    engine.step()
    engine.scheduler.is_wanted = lambda prefix_hash: False
    engine.scheduler.drop_unused([soft_prompt.prefix_hash])
    assert [delta.finish_reason for delta in run(engine) if delta.request_id == "r"] == [None, FinishReason.LENGTH]
    assert not len(engine.prefixes)
    nothing_is_left(engine)


def test_a_step_that_fails_leaves_no_copy_behind(tiny: FrozenModel) -> None:
    engine = make_engine(tiny)
    copies = fake_copies(engine, after=50)
    engine.add(request("other", [1], max_new_tokens=12, ignore_eos=True), None)
    engine.add(request("r", [1], "task", max_new_tokens=2), random_kv_prompt(tiny.spec))
    engine.step()
    assert {delta.request_id for delta in engine.fail_all("it broke")} == {"other", "r"}
    nothing_is_left(engine)
    assert not copies.alive
