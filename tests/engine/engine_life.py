"""A random life of an engine, watched at every step: requests of several tasks arrive, are aborted, and change sides.

Hypothesis draws what happens, and everything is small, so that all of it comes about: prefills in chunks, a pool with
no room, prefixes that are dropped while they are wanted. `test_engine_life.py` says what must hold.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from server.contracts import Delta, FinishReason
from server.engine.engine import Engine
from server.engine.grammars.walks import Walks
from server.engine.memory.kv_cache import KVCache
from server.engine.memory.prefix_cache import PrefixCache
from server.engine.memory.slots import Slot
from server.engine.sampling.logit_rows import Batch
from server.engine.sampling.sampler import NextToken
from server.engine.scheduling.fair_queue import Running
from server.engine.scheduling.sequence import Sequence
from server.soft_prompts.soft_prompt import SoftPrompt
from tests.engine.lives import KINDS, REQUESTS, TASKS, Asked, Life, World
from tests.support import request


class WatchedEngine(Engine):
    """An engine that shows its batches, and that can be told to break."""

    on_batch: Callable[[Batch], None]
    breaks = False

    def run(self, batch: Batch) -> list[NextToken]:
        self.on_batch(batch)
        if self.breaks:
            raise RuntimeError("out of memory, say")
        return super().run(batch)


class EngineLife(RuleBasedStateMachine):
    """What happens to an engine, and what is true of it at every moment."""

    world: World

    def __init__(self) -> None:
        """Begin; `build` makes the engine."""
        super().__init__()
        self.lives: dict[str, Life] = {}  # in the order of their arrival
        self.live_prompts: dict[str | None, str] = {}
        self.broke = False

    @initialize(
        limits=st.sampled_from([(8, 12), (6, 24), (4, 8), (2, 2)]),
        num_slabs=st.sampled_from([2, 1, 4]),
        prefix_positions=st.sampled_from([1000, 30, 0]),
        shared_positions=st.sampled_from([40, 0, 1000]),
        prompts=st.permutations(["short", "long", "another long", "kv", "long kv", "poison"]),
    )
    def build(
        self,
        limits: tuple[int, int],
        num_slabs: int,
        prefix_positions: int,
        shared_positions: int,
        prompts: list[str],
    ) -> None:
        """An engine whose pool and whose budgets are too small; a slab holds one long request or eight short ones."""
        model = self.world.model
        self.max_sequences, self.max_batch_tokens = limits
        per_position = model.spec.kv_width * model.dtype.itemsize
        prefixes = PrefixCache(prefix_positions * per_position)
        kv_cache = KVCache(model.spec, num_slabs, shortest_slot=16)
        self.engine = WatchedEngine(
            model, kv_cache, prefixes, self.max_sequences, self.max_batch_tokens, shared_positions * per_position
        )
        self.engine.grammars = self.world.grammars
        self.engine._walks = Walks(self.world.grammars)
        self.engine.on_batch = self._watch
        self.engine.scheduler.is_wanted = lambda prefix_hash: prefix_hash in self._wanted()
        self.live_prompts = dict(zip(TASKS, [*prompts[:3], "none"], strict=True))

    # What happens

    @precondition(lambda self: sum(1 for _ in self._living()) < 20)
    @rule(requests=st.lists(REQUESTS, min_size=1, max_size=4))
    def arrive(self, requests: list[Asked]) -> None:
        for asked in requests:
            self._accept(*asked)

    def _accept(
        self, task: str | None, input_ids: tuple[int, ...], new_tokens: int, temperature: float, kind: str
    ) -> None:
        """It is answered by what the task stands for at this moment."""
        name = self.live_prompts[task]
        soft_prompt = self.world.soft_prompts[name]
        request_id = str(len(self.lives))
        sampling: dict[str, Any] = {"max_new_tokens": new_tokens, "temperature": temperature, "seed": len(input_ids)}
        asked = request(request_id, input_ids, task, **sampling, **KINDS[kind])
        life = Life(asked, soft_prompt, self.world.alone(input_ids, name, new_tokens, temperature, kind))
        self.lives[request_id] = life
        life.patience = sum(other.positions for other in self._living())
        self.engine.check(asked, soft_prompt)
        self.engine.add(asked, soft_prompt)

    @rule(count=st.integers(1, 4))
    def step(self, count: int) -> None:
        for _ in range(count):
            self._step()

    @precondition(lambda self: self.lives)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        """Waiting, in the middle of its prefill, decoding or ended: whoever it hits."""
        life = data.draw(st.sampled_from(list(self.lives.values())[-8:]), label="whom")
        delta = self.engine.abort(life.asked.request_id)
        assert (delta is None) == (life.end is not None), "a request ends once"
        if delta is not None:
            assert delta.finish_reason is FinishReason.ABORTED
            self._take([delta], cut_short=True)

    @rule(asked=REQUESTS, data=st.data())
    def swap(self, asked: Asked, data: st.DataObject) -> None:
        """The task gets another soft prompt, and is asked at once; who began with the old one keeps it."""
        task, *_ = asked
        old = self.world.soft_prompts[self.live_prompts[task]]
        self.live_prompts[task] = data.draw(st.sampled_from(list(self.world.soft_prompts)), label="by what")
        if old is not None:
            before = set(self.engine.prefixes)
            self.engine.scheduler.drop_unused([old.prefix_hash])
            dropped = before - set(self.engine.prefixes)
            assert not dropped & {life.prefix_hash for life in self._living()}, "a prefix was dropped while in use"
        self._accept(*asked)

    @precondition(lambda self: not self.broke and self.engine.steps > 8)
    @rule()
    def break_down(self) -> None:
        """A step raises, once in a life: the worker then ends everybody."""
        self.broke = self.engine.breaks = bool(self.engine.scheduler.running)
        if not self.broke:
            return
        with pytest.raises(RuntimeError, match="out of memory"):
            self.engine.step()
        self.engine.breaks = False
        self._take(self.engine.fail_all("it broke"), cut_short=True)
        assert all(life.end is not None for life in self.lives.values())

    def teardown(self) -> None:
        """Nobody comes any more: everybody ends."""
        while any(True for _ in self._living()):
            self._step()
        assert not self.engine.has_work
        self.nothing_is_lost_or_held_in_vain()

    # What is true

    @invariant()
    def nothing_is_lost_or_held_in_vain(self) -> None:
        scheduler = self.engine.scheduler
        self.engine.check_integrity()
        living = list(self._living())
        assert {life.asked.request_id for life in living} == _ids(scheduler.waiting) | _ids(scheduler.running)
        for life in living:
            if life.is_single:
                assert (life.asked.request_id in _ids(scheduler.waiting)) == (not life.slots)
        copies = {id(s.shared): s.shared for s in scheduler.waiting if s.shared is not None}
        held = sum(copy.num_bytes for copy in copies.values())
        assert held <= scheduler.shared.num_bytes, "a copy is outside of the budget"
        assert scheduler.shared.num_bytes <= scheduler.shared.budget_bytes or len(scheduler.shared) == 1
        assert set(self.engine.prefixes) <= self._wanted() | {life.prefix_hash for life in living}, "deleted, not gone"
        assert self.engine.prefixes.num_bytes <= self.engine.prefixes.budget_bytes or len(self.engine.prefixes) == 1
        assert self.world.poison.prefix_hash not in self.engine.prefixes, "NaN is kept"
        if not living:
            assert not self.engine.has_work
            assert not self.engine.kv_cache.allocator.used
            assert not scheduler._users
            assert not scheduler._computing
            assert not len(scheduler.shared)

    # Watching

    def _step(self) -> None:
        """One step, after which nobody may have waited for too long."""
        living, steps = list(self._living()), self.engine.steps
        self._take(self.engine.step(), cut_short=False)
        assert self.engine.steps == steps + bool(living), "somebody is there, and nothing was done"
        for life in living:
            life.steps += 1
            assert life.end is not None or life.steps < life.patience, "it starves"

    def _take(self, deltas: Iterable[Delta], *, cut_short: bool) -> None:
        for delta in deltas:
            self.lives[delta.request_id].take(delta, cut_short=cut_short)

    def _watch(self, batch: Batch) -> None:
        """Between a step's scheduling and its work."""
        self._watch_shares(batch)
        running = self.engine.scheduler.running
        assert len(running) <= self.engine.scheduler.max_running
        for place, sequence in enumerate(running):
            life = self.lives[sequence.request_id]
            if sequence not in life.slots:
                self._watch_admission(life, Counter(other.request.task for other in running[:place]))
                life.slots[sequence] = sequence.slot
                assert _is_clean(self.engine.kv_cache, sequence.slot), "NaN was left to the next owner"
            assert sequence.slot == life.slots[sequence], "a sequence keeps its slot to its end"
        self._watch_room()

    def _watch_shares(self, batch: Batch) -> None:
        """All that decode go on, and so does the prefill that began first."""
        running = self.engine.scheduler.running
        served = {sequence for sequence, _ in batch}
        assert 0 < sum(span.count for _, span in batch) <= self.max_batch_tokens
        assert {s for s in running if s.num_pending == 1} <= served, "each that decodes gets its token"
        prefilling = [sequence in served for sequence in running if sequence.num_pending > 1]
        assert all(prefilling[:1]), "there is always a token for a prefill"
        assert prefilling == sorted(prefilling, reverse=True), "whoever came first is prefilled first"

    def _watch_room(self) -> None:
        """Who waits has a reason to."""
        if not all(life.is_single for life in self._living()):
            return  # it may wait for room for a copy
        scheduler, computing = self.engine.scheduler, self._computing()
        held = {(task, None) for task, life in self._heads().items() if life.prefix_hash in computing}
        head = scheduler.waiting.head(Running(scheduler.running), held)
        if head is not None and len(scheduler.running) < self.max_sequences:
            busy = sum(sequence.num_pending for sequence in scheduler.running) >= self.max_batch_tokens
            assert busy or not self.engine.kv_cache.allocator.can_allocate(head.max_positions), "it waits for nothing"

    def _watch_admission(self, admitted: Life, running: Counter[str | None]) -> None:
        """In fair order: the first of its task, and each other task goes once at most before one that waits.

        A task of which fewer run goes before one of which more do, as often as it takes; where all but the kept places
        are taken, only tasks below their share go on. Those that are passed wait for their own task to end.

        Only who waits for another one's prefill may be passed more often: that ends by itself. Since no other task
        goes twice, the number of those who go before a request is bounded; since each step computes one position at
        least of a request or of those who go before it, so is the number of steps that it waits. Of those before it one
        is decoding, and gets its token; or the first of them that prefills gets what those who decode leave, which is
        one token or more, as there are no more of them than sequences less one.
        """
        for life in self._living():
            # Who was there when it came is in its patience already.
            if int(life.asked.request_id) < int(admitted.asked.request_id) and not admitted.slots:
                life.patience += admitted.positions * (not life.slots or not life.is_single)
        if not all(life.is_single for life in self._living()):
            return  # choices go on with what has begun, within a budget of copies
        heads = self._heads()
        task = admitted.asked.task
        assert heads.pop(task) is admitted, "first in, first out within a task"
        computing = self._computing()
        is_kept = running.total() >= self.max_sequences
        share = self.max_sequences // max(1, len(running))
        assert not is_kept or running[task] < share, "a kept place goes to a task of which fewer run than its share"
        for life in heads.values():
            is_held = is_kept and running[life.asked.task] >= share
            if life.prefix_hash not in computing and not is_held and running[task] >= running[life.asked.task]:
                life.passed[task] += 1
                assert life.passed[task] == 1, "overtaken twice by one task"

    def _living(self) -> Iterable[Life]:
        return (life for life in self.lives.values() if life.end is None)

    def _heads(self) -> dict[str | None, Life]:
        """Of each task, the first that waits."""
        return {life.asked.task: life for life in reversed([*self._living()]) if not life.slots}

    def _computing(self) -> set[str]:
        """Hashes of prefixes that a running sequence has not completed."""
        running = self.engine.scheduler.running
        return {s.soft_prompt.prefix_hash for s in running if s.soft_prompt and s.num_computed < s.num_virtual_tokens}

    def _wanted(self) -> set[str | None]:
        """Hashes of what tasks stand for now."""
        prompts: Mapping[str, SoftPrompt | None] = self.world.soft_prompts
        return {soft_prompt.prefix_hash for name in self.live_prompts.values() if (soft_prompt := prompts[name])}


def _ids(sequences: Iterable[Sequence]) -> set[str]:
    return {sequence.request_id for sequence in sequences}


def _is_clean(kv_cache: KVCache, slot: Slot | None) -> bool:
    assert slot is not None
    return kv_cache.copy_out(slot, slot.length).is_finite
