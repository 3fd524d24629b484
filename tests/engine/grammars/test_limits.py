"""No grammar takes more time, memory or stack than one may, and what reaches a limit ends alone."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Iterator

import psutil
import pytest

from server.contracts import FinishReason, Grammar, GrammarKind
from server.engine.admission_control import Limits
from server.engine.grammars import walks as grammar_walks
from server.engine.grammars.compile_queue import GrammarQueue, Turns
from server.engine.grammars.compiled import Attempt, Grammars
from server.engine.grammars.wire import GrammarState
from server.engine.model.frozen import FrozenModel
from server.engine.worker import EngineWorker
from server.errors import GenerationFailed, InvalidRequest, Overloaded, RequestAborted, RequestTimedOut
from tests.api.live import wait_until
from tests.engine.hostile import LARGE, ODD, PATTERNS, REQUIRED, SLOW, chain, multiples
from tests.support import EOS, VOCAB_SIZE, byte_tokenizer, make_engine, request, run_engine

GOOD = Grammar(GrammarKind.REGEX, "[ab]{3}")


@pytest.fixture(scope="module")
def grammars() -> Iterator[Grammars]:
    grammars = Grammars(byte_tokenizer().backend_tokenizer, VOCAB_SIZE, [EOS])
    grammars.release(grammars.compile(GOOD))
    yield grammars
    grammars.close()


@pytest.fixture
async def worker(tiny: FrozenModel) -> AsyncIterator[EngineWorker]:
    worker = EngineWorker(make_engine(tiny), Limits(in_flight=3, request_timeout=0.5))
    worker.start()
    yield worker
    await worker.stop()


async def ask(worker: EngineWorker, request_id: str, grammar: Grammar | None, new_tokens: int = 5) -> int:
    asked = request(request_id, [1], grammar=grammar, max_new_tokens=new_tokens)
    return len([delta async for delta in worker.generate(asked, None)])


TIME_OR_MEMORY = "(128 MiB of memory|s to compile)"  # the machine's speed decides which is reached first


def own_processes() -> list[psutil.Process]:
    """Processes of grammars, without those that make them."""
    found: list[psutil.Process] = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended meanwhile
            if "server.engine.grammars.process" in " ".join(child.cmdline()):
                found += child.children()
    return found


@pytest.mark.parametrize(
    ("grammar", "limit"),
    [
        (chain(2500), "6 MiB of stack"),
        (chain(20_000), "6 MiB of stack"),
        (LARGE, TIME_OR_MEMORY),
        (multiples(), TIME_OR_MEMORY),
        (PATTERNS, TIME_OR_MEMORY),
        (REQUIRED, TIME_OR_MEMORY),
    ],
    ids=["chain", "long chain", "large", "multiples", "patterns", "required"],
)
def test_a_grammar_that_takes_too_much_is_refused_with_the_limit(
    grammars: Grammars, grammar: Grammar, limit: str
) -> None:
    with pytest.raises(InvalidRequest, match=f"it takes more than .*{limit}"):
        grammars.compile(grammar)
    grammars.release(grammars.compile(GOOD))


@pytest.mark.parametrize("grammar", ODD.values(), ids=ODD)
def test_whatever_a_grammar_is_compiling_it_ends(grammars: Grammars, grammar: Grammar) -> None:
    with contextlib.suppress(InvalidRequest):
        grammars.release(grammars.compile(grammar))
    grammars.release(grammars.compile(GOOD))


def test_a_grammar_that_reached_a_limit_is_not_tried_again_at_once(grammars: Grammars) -> None:
    for ask in (grammars.compile, grammars.hold):
        with pytest.raises(InvalidRequest, match="stack"):
            ask(chain(3000))


def test_grammars_in_use_hold_only_so_much_memory_together(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    held = [grammars.compile(Grammar(GrammarKind.REGEX, f"in use {i}")) for i in range(3)]
    monkeypatch.setattr("server.engine.grammars.compiled.ALL_MEMORY_MIB", sum(one.process.memory for one in held) - 1)
    with pytest.raises(Overloaded, match="grammars in use hold"):
        grammars.compile(Grammar(GrammarKind.REGEX, "one more"))
    grammars.release(held.pop())
    grammars.release(grammars.compile(Grammar(GrammarKind.REGEX, "one more")))
    for one in held:
        grammars.release(one)


def test_unused_grammars_hold_only_so_much_memory_together(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    held = [grammars.compile(Grammar(GrammarKind.REGEX, f"unused {i}")) for i in range(4)]
    monkeypatch.setattr("server.engine.grammars.compiled.MAX_UNUSED_MIB", sum(one.process.memory for one in held[2:]))
    for one in held:
        grammars.release(one)
    kept = [grammars.hold(Grammar(GrammarKind.REGEX, f"unused {i}")) for i in range(4)]
    assert kept == [None, None, *held[2:]], "those that were used last"
    for one in held[2:]:
        grammars.release(one)


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="the system has no idle processes")
@pytest.mark.parametrize(("each", "together"), [(-1.0, 1e6), (1e6, -1.0)], ids=["each", "together"])
def test_a_grammar_whose_masks_take_long_gets_only_what_others_leave_of_the_cores(
    tiny: FrozenModel, monkeypatch: pytest.MonkeyPatch, each: float, together: float
) -> None:
    others = {process.pid for process in own_processes()}
    monkeypatch.setattr(grammar_walks, "SLOW_SECONDS", each)
    monkeypatch.setattr(grammar_walks, "COSTLY_SECONDS", together)
    monkeypatch.setattr(grammar_walks, "COSTLY_TOKEN_SECONDS", 0.0)
    engine = make_engine(tiny)
    engine.add(request("slow", [1], grammar=GOOD, max_new_tokens=3), None)
    [process] = [process for process in own_processes() if process.pid not in others]
    assert os.sched_getscheduler(process.pid) == os.SCHED_OTHER
    while engine.has_work:
        engine.step()
    wait_until(lambda: os.sched_getscheduler(process.pid) == os.SCHED_IDLE)
    engine.grammars.close()


def test_a_request_is_slow_whose_many_masks_take_long_together(
    tiny: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_walks, "COSTLY_SECONDS", -1.0)
    monkeypatch.setattr(grammar_walks, "COSTLY_TOKEN_SECONDS", 0.0)
    engine = make_engine(tiny)
    monkeypatch.setattr(grammar_walks, "STEP_SECONDS", 60.0)
    nine = Grammar(GrammarKind.REGEX, "[ab]{9}")
    engine.add(request("many", [1], n=8, grammar=nine, temperature=1.0, max_new_tokens=9), None)
    engine.add(request("other", [1], max_new_tokens=28, ignore_eos=True), None)
    ends: list[str] = []
    while engine.has_work:
        ends += [delta.request_id for delta in engine.step() if delta.finish_reason is not None and delta.is_last]
    assert ends == ["other", "many"], "it goes on in the time that others leave, one text in a step"


def test_masks_that_take_long_hold_up_nobody_else_and_end_their_request(
    tiny: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_walks, "REQUEST_SECONDS", 1.5)
    monkeypatch.setattr(grammar_walks, "TOKEN_SECONDS", 0.0)
    engine = make_engine(tiny)
    engine.add(request("slow", [1], n=6, grammar=SLOW, temperature=1.0, max_new_tokens=100), None)
    engine.add(request("other", [1], max_new_tokens=10, ignore_eos=True), None)
    engine.add(request("good", [2], grammar=GOOD, max_new_tokens=60), None)
    ends: list[tuple[str, Exception | None]] = []
    while engine.has_work:
        ends += [(delta.request_id, delta.error) for delta in engine.step() if delta.finish_reason is not None]
    assert [name for name, _ in ends][-1] == "slow"
    assert sorted(name for name, _ in ends) == ["good", "other", "slow"]
    error = dict(ends)["slow"]
    assert isinstance(error, InvalidRequest)
    assert "too slow" in error.message
    assert [error for name, error in ends if name != "slow"] == [None, None]
    engine.check_integrity()


def test_a_request_can_be_aborted_while_its_grammar_takes_a_token(tiny: FrozenModel) -> None:
    engine = make_engine(tiny)
    engine.add(request("slow", [1], n=6, grammar=SLOW, max_new_tokens=100), None)
    for _ in range(5):
        engine.step()
    delta = engine.abort("slow")
    assert delta is not None
    assert delta.finish_reason is FinishReason.ABORTED
    assert not engine.has_work
    engine.check_integrity()
    assert run_engine(engine, [(request("good", [2], grammar=GOOD, max_new_tokens=9), None)])["good"].error is None


def test_a_process_that_ends_fails_its_own_requests_and_the_next_get_another(tiny: FrozenModel) -> None:
    engine = make_engine(tiny)
    before = {process.pid for process in own_processes()}
    engine.add(request("hit", [1], grammar=Grammar(GrammarKind.REGEX, "[ab]{50}"), max_new_tokens=60), None)
    engine.add(request("other", [1], max_new_tokens=20, ignore_eos=True), None)
    engine.step()
    for process in own_processes():
        if process.pid not in before:
            process.kill()
    ends: dict[str, Exception | None] = {}
    while engine.has_work:
        ends |= {delta.request_id: delta.error for delta in engine.step() if delta.finish_reason is not None}
    assert ends["other"] is None
    assert isinstance(ends["hit"], GenerationFailed)
    for again in ("[ab]{50}", "[ab]{3}"):
        asked = request(again, [2], grammar=Grammar(GrammarKind.REGEX, again), max_new_tokens=60)
        assert run_engine(engine, [(asked, None)])[again].error is None


def test_processes_that_end_one_after_the_other_are_all_noticed(grammars: Grammars) -> None:
    before = {process.pid for process in own_processes()}
    held = [grammars.compile(Grammar(GrammarKind.REGEX, f"end {i}")) for i in range(3)]
    for process in own_processes():
        if process.pid not in before:
            process.kill()
            time.sleep(0.2)  # the process that makes them has dealt with this end before the next
    frames = [frame for compiled in held for frame in compiled.process.receive(20)]
    assert [frame.state for frame in frames] == [GrammarState.ENDED] * 3
    for compiled in held:
        grammars.discard(compiled)


def test_grammars_return_after_the_process_that_makes_them_has_ended(tiny: FrozenModel) -> None:
    before = {process.pid for process in psutil.Process().children()}
    engine = make_engine(tiny)
    asked = request("a", [2], grammar=GOOD, max_new_tokens=9)
    assert run_engine(engine, [(asked, None)])["a"].error is None
    for process in psutil.Process().children():
        if process.pid not in before:
            process.kill()
            process.wait(10)
    another = request("b", [2], grammar=Grammar(GrammarKind.REGEX, "[cd]{3}"), max_new_tokens=9)
    assert run_engine(engine, [(another, None)])["b"].error is None


async def test_what_is_over_a_limit_is_refused_before_its_grammar_is_compiled(worker: EngineWorker) -> None:
    running = [asyncio.create_task(ask(worker, str(i), None, 100)) for i in range(3)]
    await asyncio.sleep(0)
    assert worker.num_in_flight == 3
    before = time.monotonic()
    with pytest.raises(Overloaded):
        await ask(worker, "more", multiples())
    assert time.monotonic() - before < 0.5
    await asyncio.gather(*running, return_exceptions=True)


async def test_the_request_timeout_covers_the_grammar(worker: EngineWorker) -> None:
    with pytest.raises(RequestTimedOut):
        await ask(worker, "late", multiples())
    assert worker.num_in_flight == 0


async def test_a_client_that_leaves_takes_its_compilation_along(tiny: FrozenModel) -> None:
    worker = EngineWorker(make_engine(tiny))
    worker.start()
    before = {process.pid for process in own_processes()}
    asked = asyncio.create_task(ask(worker, "leaves", multiples()))
    begun: list[psutil.Process] = []
    for _ in range(1000):
        begun = [process for process in own_processes() if process.pid not in before]
        if begun:
            break
        await asyncio.sleep(0.01)
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    gone, alive = await asyncio.to_thread(psutil.wait_procs, begun, 10)
    assert gone
    assert not alive
    await worker.stop()


async def test_a_drain_ends_what_still_compiles(tiny: FrozenModel) -> None:
    worker = EngineWorker(make_engine(tiny))
    worker.start()
    asked = asyncio.create_task(ask(worker, "compiles", multiples()))
    await asyncio.sleep(0)
    assert worker.num_in_flight == 1
    await worker.drain(0.1)
    with pytest.raises(RequestAborted):
        await asked
    await worker.stop()


async def test_grammars_that_take_long_hold_up_no_other_owner(grammars: Grammars) -> None:
    queue = GrammarQueue(grammars)
    hostile = [asyncio.create_task(queue.compile(multiples(9973, 9949 - i), "hostile")) for i in range(6)]
    await asyncio.sleep(0)
    grammars.release(await queue.compile(Grammar(GrammarKind.REGEX, "of another owner"), "other"))
    assert sum(task.done() for task in hostile) <= 2
    for task in hostile:
        task.cancel()
    await asyncio.gather(*hostile, return_exceptions=True)


async def test_one_compilation_serves_all_who_wait_for_it_and_outlives_any_of_them(grammars: Grammars) -> None:
    queue = GrammarQueue(grammars)
    grammar = Grammar(GrammarKind.REGEX, "asked for by several")
    asked = [asyncio.create_task(queue.compile(grammar, "owner")) for _ in range(4)]
    await asyncio.sleep(0)
    asked[0].cancel()
    compiled = await asyncio.gather(*asked[1:])
    assert len(set(compiled)) == 1
    for one in compiled:
        grammars.release(one)


async def test_a_grammar_whose_process_is_killed_while_it_compiles_is_compiled_again(grammars: Grammars) -> None:
    queue = GrammarQueue(grammars)
    before = {process.pid for process in own_processes()}
    asked = asyncio.create_task(queue.compile(Grammar(GrammarKind.REGEX, "[ab]{90}(x|y|z){5,80}"), "owner"))
    begin = grammars.begin

    def begin_and_kill(grammar: Grammar) -> Attempt:
        grammars.begin = begin  # type: ignore[method-assign]
        attempt = begin(Grammar(GrammarKind.JSON_SCHEMA, multiples().source))  # compiles until it is killed
        while not (new := [process for process in own_processes() if process.pid not in before]):
            time.sleep(0.01)
        new[0].kill()
        return attempt

    grammars.begin = begin_and_kill  # type: ignore[method-assign]
    grammars.release(await asked)


def test_an_unused_grammar_whose_process_was_killed_is_compiled_again(grammars: Grammars) -> None:
    grammar, before = Grammar(GrammarKind.REGEX, "killed while unused"), {*own_processes()}
    first = grammars.compile(grammar)
    grammars.release(first)
    for process in {*own_processes()} - before:
        process.kill()
    wait_until(lambda: first.process.has_ended)
    second = grammars.compile(grammar)
    assert second is not first
    grammars.release(second)


async def test_places_go_round_the_owners_and_back_from_those_who_leave() -> None:
    turns, order = Turns(1), list[str]()

    async def work(name: str) -> None:
        async with turns.turn(name[0]):
            order.append(name)
            await asyncio.sleep(0)

    async with turns.turn("a"):
        tasks = [asyncio.create_task(work(name)) for name in ("a1", "a2", "a3", "b1")]
        await asyncio.sleep(0)
        tasks[1].cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert order == ["a1", "b1", "a3"]
    assert not turns.are_full
