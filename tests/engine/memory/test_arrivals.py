"""A prefix of keys and values is copied in pieces beside the steps: nobody waits, a failure leaves nothing."""

from __future__ import annotations

import contextlib
import gc
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from server.contracts import Delta, FinishReason, ModelSpec
from server.engine.engine import Engine
from server.engine.memory import arrivals
from server.engine.memory.arrivals import Arrivals, HostCopy, StagedCopy, Staging, copies_to, pieces
from server.engine.memory.kv_cache import Computed
from server.engine.memory.prefix_cache import PrefixCache
from server.engine.model.frozen import FrozenModel
from server.errors import GenerationFailed, NotFinite
from server.soft_prompts.soft_prompt import SoftPrompt
from tests.support import make_engine, random_kv_prompt, request, run_engine


class FakeCopy:
    """A prefix that arrives once it has been advanced often enough."""

    def __init__(self, soft_prompt: SoftPrompt, model: ModelSpec, after: int) -> None:
        self._left, self._copy = after, HostCopy(soft_prompt, model, 2**30)
        self.advanced = self.settled = 0

    @property
    def prefix(self) -> Computed:
        return self._copy.prefix

    @property
    def has_arrived(self) -> bool:
        return self._copy.has_arrived

    def advance(self) -> bool:
        self.advanced += 1
        self._left -= 1
        return self._left == 0 and self._copy.advance()

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


@pytest.mark.parametrize(("planes", "positions", "most"), [(4, 7, 1), (4, 7, 3), (4, 7, 7), (5, 3, 7), (6, 2, 100)])
def test_pieces_are_contiguous_and_small_and_are_all_there_is(planes: int, positions: int, most: int) -> None:
    whole = torch.zeros(planes, positions)
    for piece in pieces(planes, positions, most):
        assert whole[piece].is_contiguous() or whole[piece].shape[0] == 1
        assert 0 < whole[piece].numel() <= most
        whole[piece] += 1
    assert bool((whole == 1).all())


def by_hand(soft_prompt: SoftPrompt, model: ModelSpec) -> torch.Tensor:
    """PEFT's layout, turned."""
    shape = (-1, model.num_kv_layers, 2, model.num_key_value_heads, model.head_dim)
    return soft_prompt.tensor.view(shape).permute(1, 2, 0, 3, 4).to(getattr(torch, model.dtype))


@pytest.mark.parametrize("piece_bytes", [1, 1000, 2**30])
def test_a_prefix_on_the_host_is_the_soft_prompts_keys_and_values(tiny: FrozenModel, piece_bytes: int) -> None:
    soft_prompt = random_kv_prompt(tiny.spec, 17)
    copying = HostCopy(soft_prompt, tiny.spec, piece_bytes)
    while not copying.has_arrived:
        assert copying.advance()
    assert torch.equal(copying.prefix.states, by_hand(soft_prompt, tiny.spec))


class LateDevice:
    """A device that copies when the test lets it, so that what the host overwrites too early is seen to be wrong."""

    def __init__(self) -> None:
        self.queue: list[Callable[[], object]] = []
        self.pinned = 0

    def run(self, count: int) -> None:
        for _ in range(min(count, len(self.queue))):
            self.queue.pop(0)()

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        device = self

        class Event:
            is_pending = False

            def query(self) -> bool:
                return not self.is_pending

            def record(self, stream: Stream) -> None:
                self.is_pending = True
                device.queue.append(lambda: setattr(self, "is_pending", False))

        class Stream:
            def __init__(self, device: object = None) -> None:
                pass

            def wait_stream(self, other: Stream) -> None:
                device.run(len(device.queue))

        class Late(TorchDispatchMode):  # type: ignore[no-untyped-call]
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                if func is not torch.ops.aten.copy_.default:
                    return func(*args, **(kwargs or {}))
                device.queue.append(lambda: func(*args))
                return args[0]

        @contextlib.contextmanager
        def stream(side: Stream) -> Iterator[None]:
            with Late():  # type: ignore[no-untyped-call]
                yield

        def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
            device.pinned += tensor.nbytes
            return tensor.clone()

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "current_stream", Stream)
        monkeypatch.setattr(torch.cuda, "stream", stream)
        monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)


@pytest.mark.parametrize("speed", [0, 1, 2, 5])
def test_no_staged_piece_is_overwritten_before_the_device_has_read_it(
    tiny: FrozenModel, speed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, piece_bytes = LateDevice(), 1000
    device.install(monkeypatch)
    staging = Staging(torch.device("cpu"), piece_bytes)
    for seed in range(3):
        soft_prompt = random_kv_prompt(tiny.spec, 17, seed)
        copying = StagedCopy(soft_prompt, tiny.spec, piece_bytes, staging)
        copied = waited = 0
        while not copying.has_arrived:
            if copying.advance():
                copied += 1
            else:
                waited += 1
                device.run(max(1, speed))
            device.run(speed)
        copying.settle()
        assert copied > 4
        assert waited or speed > 1
        assert torch.equal(copying.prefix.states, by_hand(soft_prompt, tiny.spec))
    assert device.pinned == 2 * piece_bytes, "pinned once, for all prefixes"


def test_a_copy_that_is_cancelled_is_over_before_its_memory_is_free(
    tiny: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = LateDevice()
    device.install(monkeypatch)
    staging = Staging(torch.device("cpu"), 1000)
    one = Arrivals(PrefixCache(2**20), lambda soft_prompt: StagedCopy(soft_prompt, tiny.spec, 1000, staging))
    soft_prompt = random_kv_prompt(tiny.spec, 17)
    assert not one.bring(soft_prompt)
    assert device.queue
    one.cancel(soft_prompt.prefix_hash)
    assert not device.queue
    assert not one.bring(random_kv_prompt(tiny.spec, 17, seed=1)), "another one can begin"


def test_on_cuda_pieces_are_staged_and_on_a_cpu_they_are_not(tiny: FrozenModel) -> None:
    assert isinstance(copies_to(tiny.spec)(random_kv_prompt(tiny.spec)), HostCopy)
