"""Which sequences run in the next step. `fair_steps.py` decides how much of the step each one takes.

A sequence is admitted when a slot is free that is long enough for all its positions. If no such slot is free, no later
sequence overtakes it. One slot in five is reserved for tasks below their fair share, half of these for keys below
theirs. `fair_queue.py` decides whose turn it is.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable

import numpy as np

from server.contracts import ModelSpec, Queue
from server.engine.attention.cached_rows import Span
from server.engine.memory.arrivals import Arrivals, copies_to
from server.engine.memory.kv_cache import Computed, KVCache, bytes_of
from server.engine.memory.plan import SHARED_SHARE
from server.engine.memory.prefix_cache import PrefixCache
from server.engine.memory.shared_inputs import SharedInputs
from server.engine.memory.slots import Slot
from server.engine.scheduling.fair_queue import FairQueue, Running
from server.engine.scheduling.fair_steps import FairSteps
from server.engine.scheduling.sequence import Sequence
from server.engine.to_device import Download

RESERVED_SHARE = 4
"""For each group of this many in `max_sequences`, one more slot is reserved for tasks below their fair share."""

NO_SLOT = Slot(sys.maxsize, sys.maxsize)
"""Sort key of prefilling sequences: after every real slot."""


class Scheduler:
    """The waiting queue, and the slots and prefixes of running sequences.

    Attributes:
        waiting: accepted, not yet admitted.
        running: admitted, in the order of admission; each owns a slot.
        max_running: maximum number of running sequences, reserved slots included.
        shared: copies of inputs that choices share and wait with.
        arrivals: KV prefixes on their way to the device.
        is_wanted: whether any version still needs a prefix. If none does, it is dropped with its last sequence.
    """

    def __init__(
        self,
        model: ModelSpec,
        kv_cache: KVCache,
        prefixes: PrefixCache,
        max_sequences: int,
        max_batch_tokens: int,
        shared_bytes: int | None = None,
    ) -> None:
        """Start with empty queues; copies of shared inputs may take `shared_bytes`, or a share of the KV cache."""
        assert max_batch_tokens >= max_sequences, "every running sequence must be able to decode in each step"
        self.max_running = most_running(max_sequences, max_batch_tokens)
        self.waiting = FairQueue()
        self.running: list[Sequence] = []
        self._model = model
        self._kv_cache = kv_cache
        self._prefixes = prefixes
        whole = bytes_of(model, kv_cache.allocator.num_positions)
        self.shared = SharedInputs(whole // SHARED_SHARE if shared_bytes is None else shared_bytes)
        self.arrivals = Arrivals(prefixes, copies_to(model))
        self.is_wanted: Callable[[str], bool] = lambda prefix_hash: True
        self._users: Counter[str] = Counter()  # prefix hash -> sequences, waiting or running, that use it
        self._computing: dict[str, Sequence] = {}  # prefix hash -> the sequence that computes it
        self._prefix_checks: dict[Sequence, Callable[[], bool]] = {}  # prefixes that this step completes
        self._max_sequences = max_sequences
        self._max_batch_tokens = max_batch_tokens
        self._steps = FairSteps(max_batch_tokens, self._next_chunk)

    def add(self, sequence: Sequence) -> None:
        """Queue an accepted sequence."""
        self.waiting.add(sequence)
        if sequence.soft_prompt is not None:
            self._users[sequence.soft_prompt.prefix_hash] += 1

    def share_input(self, first: Sequence, others: Iterable[Sequence]) -> None:
        """Give a request's other choices a copy of the input's keys and values, which its first choice has computed."""
        shared = self._kv_cache.copy_out(_slot(first), first.num_input)
        others = list(others)
        for sequence in others:
            sequence.shared, sequence.cached_tokens = shared, first.cached_tokens
        self.shared.made(first.request_id, len(others))

    def add_sharing(self, sequences: list[Sequence]) -> None:
        """Queue choices that start from a copy of their input, ahead of requests that have not started."""
        for sequence in reversed(sequences):
            self.waiting.add_first(sequence)
            if sequence.soft_prompt is not None:
                self._users[sequence.soft_prompt.prefix_hash] += 1

    def schedule(self) -> list[tuple[Sequence, Span]]:
        """Admit sequences that find a slot, and share out the next step's tokens; empty if there is nothing to do.

        Decoding sequences come first, sorted by slot, so that neighbours in the pool are neighbours in the batch.
        """
        self.arrivals.settle()
        self._admit()
        shares = self._steps.share(self.running)
        shares.sort(key=_order)
        return [(sequence, _span(sequence, count)) for sequence, count in shares]

    def finish(self, sequence: Sequence, *, scrub: bool = False) -> None:
        """Take a running sequence out and its slot back; one that ended without ever needing a slot has none.

        The slot is zeroed first if NaN may be in it: its next owner masks what lies behind its own end, but 0 * NaN is
        NaN. Once a token has been drawn from finite logits, all positions that it attended to are known to be finite. A
        sequence that ends during its prefill has no such proof.
        """
        if sequence.slot is None:
            self._release_copy(sequence)
            return
        if sequence.index == 0:
            self.shared.release_unmade(sequence.request_id)
        self.running.remove(sequence)
        self._stop_computing(sequence)
        slot = sequence.slot
        if scrub or sequence.num_finite < sequence.num_computed:
            self._kv_cache.scrub(slot)
        self._kv_cache.release(slot)
        sequence.slot = None
        self._leave(sequence)

    def abort(self, request_id: str) -> list[Sequence]:
        """Remove all choices of a request and return them; empty if the request has ended."""
        waiting = self.waiting.remove(request_id)
        for sequence in waiting:
            self._leave(sequence)
        running = [sequence for sequence in self.running if sequence.request_id == request_id]
        for sequence in running:
            self.finish(sequence)
        self.shared.release(request_id)
        return running + waiting

    def waiting_for(self, prefix_hash: str) -> list[Sequence]:
        """Waiting sequences that will start from this prefix."""
        return [
            sequence
            for sequence in self.waiting
            if sequence.shared is None and sequence.soft_prompt and sequence.soft_prompt.prefix_hash == prefix_hash
        ]

    def drop_unused(self, prefix_hashes: Iterable[str]) -> None:
        """Drop prefixes that no version needs any more; one in use is dropped when its last sequence ends."""
        for prefix_hash in prefix_hashes:
            if prefix_hash not in self._users and not self.is_wanted(prefix_hash):
                self._prefixes.drop(prefix_hash)

    def keep_prefix(self, sequence: Sequence) -> bool:
        """If this sequence has just completed its soft prompt's prefix, keep a copy; False if it is not finite."""
        check = self._prefix_checks.pop(sequence, None)
        if check is None:
            return True
        soft_prompt = sequence.soft_prompt
        assert soft_prompt is not None, "only a soft prompt has a prefix"
        sequence.prefix_seconds = time.monotonic() - sequence.accepted_at - sequence.queued_seconds
        self._stop_computing(sequence)
        prefix = self._kv_cache.view(_slot(sequence), sequence.num_virtual_tokens)
        if is_finite := check():
            self._prefixes.make_room(prefix.num_bytes)
            sequence.prefix = self._prefixes.put(soft_prompt.prefix_hash, prefix.copy())
        return is_finite

    def while_device_works(self, batch: list[tuple[Sequence, Span]], download: Download) -> None:
        """Before the host waits for a step: queue checks of prefixes that it completes, and copy an arriving one."""
        self._prefix_checks.clear()  # of a step that has failed
        for sequence, span in batch:
            soft_prompt = sequence.soft_prompt
            if soft_prompt is None or span.end < sequence.num_virtual_tokens:
                continue
            if self._computing.get(soft_prompt.prefix_hash) is not sequence:
                continue
            prefix = self._kv_cache.view(span.slot, sequence.num_virtual_tokens)
            self._prefix_checks[sequence] = _check_of(prefix, download)
        self.arrivals.advance()

    def check_integrity(self) -> None:
        """Assert that slots belong to exactly those who run; called whenever the engine is idle."""
        self._kv_cache.check_integrity(_slot(sequence) for sequence in self.running)
        self._prefixes.check_integrity()
        self.shared.check_integrity()
        assert all(sequence.request_id in self.shared for sequence in self.waiting if sequence.shared is not None)
        assert all(sequence in self.running for sequence in self._computing.values())
        sequences = [*self.waiting, *self.running]
        used = Counter(sequence.soft_prompt.prefix_hash for sequence in sequences if sequence.soft_prompt is not None)
        assert used == self._users, "a prefix is used by nobody, or its users are not counted"
        self.arrivals.check_integrity(used)

    def _admit(self) -> None:
        if not len(self.waiting):
            return
        work: Counter[str | None] = Counter()
        for one in self.running:
            work[one.request.key_id] += _work(one)
        skipped_queues: set[Queue] = set()
        running = Running(self.running)
        must_skip: Callable[[Sequence], bool] | None = None
        while len(self.running) < self.max_running:
            if len(self.running) >= self._max_sequences:
                skipped_queues |= running.queues_at_share(self._max_sequences)
            sequence = self.waiting.head(running, skipped_queues, self._skipped_keys(running, work), must_skip)
            if sequence is None:
                return
            # The copy of its input that it will make for its siblings.
            copied = bytes_of(self._model, sequence.num_input) if _makes_copy(sequence) else 0
            if copied and not self.shared.has_room(copied):
                # From here on, admit only siblings of started requests, and requests that need no copy of their input.
                must_skip = _makes_copy
                continue
            if self._waits_for_prefix(sequence):
                # It waits for its prefix, not for a slot, so sequences of other queues may still be admitted.
                skipped_queues.add(sequence.request.queue)
                continue
            slot = self._kv_cache.allocate(sequence.max_positions)
            if slot is None:
                return
            self.waiting.take(sequence)
            if copied:
                self.shared.reserve(sequence.request_id, copied)
            self.running.append(sequence)
            running.add(sequence)
            sequence.slot = slot
            sequence.queued_seconds = time.monotonic() - sequence.accepted_at
            self._attach_prefix(sequence)
            work[sequence.request.key_id] += _work(sequence)

    def _skipped_keys(self, running: Running, work: Counter[str | None]) -> set[str | None]:
        """Keys with a full step's tokens to compute and, when only reserved slots are left, keys with their share."""
        skipped = {key for key, tokens in work.items() if tokens >= self._max_batch_tokens}
        reserved_for_keys = (self.max_running - self._max_sequences) // 2
        if len(self.running) >= self.max_running - reserved_for_keys:
            skipped |= running.keys_at_share(self._max_sequences)
        return skipped

    def _next_chunk(self, sequence: Sequence) -> int:
        """The most that a prefill may compute in a step: a recurrent state is kept at the end of a soft prompt."""
        if self._model.state_width and sequence.num_computed < sequence.num_virtual_tokens:
            return sequence.num_virtual_tokens - sequence.num_computed
        return sequence.num_pending

    def _waits_for_prefix(self, sequence: Sequence) -> bool:
        soft_prompt = sequence.soft_prompt
        if soft_prompt is None or sequence.shared is not None:
            return False
        if soft_prompt.is_kv_prefix:
            return not self.arrivals.bring(soft_prompt)
        return soft_prompt.prefix_hash in self._computing

    def _attach_prefix(self, sequence: Sequence) -> None:
        """Copy the shared input or the cached prefix into the slot, or mark the sequence as computing it."""
        soft_prompt = sequence.soft_prompt
        if sequence.shared is not None:
            self._kv_cache.copy_in(_slot(sequence), sequence.shared)
            sequence.num_computed = sequence.num_finite = sequence.num_input
            self._release_copy(sequence)
        elif soft_prompt is not None and (prefix := self._prefixes.get(soft_prompt.prefix_hash)) is not None:
            self._kv_cache.copy_in(_slot(sequence), prefix)
            sequence.prefix = prefix.number
            sequence.num_computed = sequence.cached_tokens = sequence.num_virtual_tokens
        elif soft_prompt is not None:
            self._computing[soft_prompt.prefix_hash] = sequence

    def _release_copy(self, sequence: Sequence) -> None:
        if sequence.shared is not None:
            sequence.shared = None
            self.shared.release_share(sequence.request_id)

    def _leave(self, sequence: Sequence) -> None:
        """A sequence has ended: it no longer uses its prefix."""
        if sequence.soft_prompt is None:
            return
        prefix_hash = sequence.soft_prompt.prefix_hash
        self._users[prefix_hash] -= 1
        if not self._users[prefix_hash]:
            del self._users[prefix_hash]
            self.arrivals.cancel(prefix_hash)
            self.drop_unused([prefix_hash])

    def _stop_computing(self, sequence: Sequence) -> None:
        soft_prompt = sequence.soft_prompt
        if soft_prompt is not None and self._computing.get(soft_prompt.prefix_hash) is sequence:
            del self._computing[soft_prompt.prefix_hash]


def most_running(max_sequences: int, max_batch_tokens: int) -> int:
    """Maximum number of running sequences, reserved slots included."""
    return max_sequences + min(-(-max_sequences // RESERVED_SHARE), max_batch_tokens - max_sequences)


def _span(sequence: Sequence, count: int) -> Span:
    return Span(_slot(sequence), sequence.num_computed, count, sequence.prefix, sequence.num_virtual_tokens)


def _makes_copy(sequence: Sequence) -> bool:
    """Whether other choices of the request will start from a copy of this sequence's computed input."""
    if sequence.shared is not None or sequence.following:
        return False
    return bool(sequence.siblings) or max(map(len, sequence.request.labels), default=0) > 1


def _check_of(prefix: Computed, download: Download) -> Callable[[], bool]:
    if prefix.recurrent is not None:  # it is written once the step has succeeded
        return lambda: prefix.is_finite
    extremes = download.add(prefix.extremes())
    return lambda: bool(np.isfinite(download.array(extremes)).all())


def _work(sequence: Sequence) -> int:
    """The work that a sequence adds to the next steps: tokens to compute, plus one first draw for each sibling."""
    return sequence.num_pending + len(sequence.siblings)


def _order(share: tuple[Sequence, int]) -> Slot:
    sequence = share[0]
    return _slot(sequence) if sequence.num_pending == 1 else NO_SLOT


def _slot(sequence: Sequence) -> Slot:
    assert sequence.slot is not None, "a running sequence owns a slot"
    return sequence.slot
