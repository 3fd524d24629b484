"""Divides a device's free memory: a pure function from sizes to a plan, so that it can be tested with any.

A plan counts everything that a server will ever take beside the weights: the KV cache, computed prefixes, copies of
shared inputs, the largest step and the captured graphs. Where the largest step was not measured (on a CPU), `auto`
leaves it half of what is free.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from server.errors import InsufficientMemory

MiB = 2**20

UNMEASURED_SHARE = 0.5
"""The largest share of the free memory that 'auto' gives to the KV cache if the largest step was not measured."""

SLACK = 1 / 32
"""Share of the free memory that is set aside for rounding and fragmentation in the allocator, if the largest step was
measured."""

PREFIX_SHARE = 0.25
"""Default budget of the prefix cache, as a share of the KV cache."""

SHARED_SHARE = 8
"""By default, copies of shared inputs may take the KV cache's bytes divided by this."""


@dataclass(frozen=True)
class Steps:
    """What a device's steps take beside the KV cache, in bytes."""

    largest: int = 0  # the largest step's own tensors
    graphs: int = 0  # the captured graphs
    arriving: int = 0  # a prefix that is on its way to the device beside those in the cache


@dataclass(frozen=True)
class MemoryDemand:
    """What the settings and the model ask for."""

    sequences: int  # that are to run at once
    running: int  # maximum number of running sequences, including reserved slots
    max_model_len: int  # positions of the longest context
    slab_length: int  # positions of a slab, which holds one sequence of the longest context
    position_bytes: int  # keys and values of one position
    longest_prefix: int  # positions
    batch_tokens: int  # of the largest step
    kv: int | None = None  # bytes of the KV cache; None is 'auto'
    prefix: int | None = None  # bytes of computed prefixes; None is 'auto'
    steps: Steps | None = None  # None where they were not measured
    state_bytes: int = 0  # a sequence's recurrent state, whatever its length

    @property
    def slab(self) -> int:
        """Bytes of a slab."""
        return self.slab_length * self.position_bytes

    @property
    def states(self) -> int:
        """Bytes of the recurrent states of all sequences that run."""
        return self.running * self.state_bytes


@dataclass(frozen=True)
class MemoryPlan:
    """What the settings ask for, and what they get, in bytes."""

    requested: int
    granted: int
    num_slabs: int
    prefix_bytes: int
    shared_bytes: int
    positions_per_slab: int
    total: int  # all of it, with what steps take
    state_bytes: int = 0  # recurrent states, in models that have one
    steps: Steps | None = None

    def __str__(self) -> str:
        positions = self.num_slabs * self.positions_per_slab
        cut = "" if self.granted >= self.requested else f" of the {_mib(self.requested)} asked for"
        parts = {"prefixes": self.prefix_bytes, "copies of shared inputs": self.shared_bytes}
        if self.state_bytes:
            parts["recurrent states"] = self.state_bytes
        if self.steps is not None:
            parts |= {"largest step": self.steps.largest, "graphs": self.steps.graphs}
        return (
            f"KV cache: {_mib(self.granted)}{cut} = {positions:,} positions ({self.num_slabs} sequences of "
            f"{self.positions_per_slab:,}); " + "; ".join(f"{name}: {_mib(size)}" for name, size in parts.items())
        )


def plan(wanted: MemoryDemand, free: int) -> MemoryPlan:
    """Share `free` bytes out.

    Raises InsufficientMemory, which says what would fit, if the parts do not fit together, or the KV cache holds not
    even one sequence of the longest context.
    """
    slab = wanted.slab
    requested = wanted.sequences * slab if wanted.kv is None else wanted.kv
    slabs = requested // slab
    if wanted.kv is None:
        share = free if wanted.steps is not None else int(max(0, free - wanted.states) * UNMEASURED_SHARE)
        slabs = min(slabs, max(1, _most(lambda n: n * slab <= share and _fits(wanted, n, free))))
    if not slabs:
        raise InsufficientMemory(
            f"PRELUDE_KV_MEMORY of {requested / MiB:,.1f} MiB does not hold one sequence ({_need(wanted)}).",
            remedy=f"Set it to at least {_exact(slab)}MiB, or lower PRELUDE_MAX_MODEL_LEN.",
        )
    if not _fits(wanted, slabs, free):
        raise _refusal(wanted, slabs, free)
    granted, prefix, shared = _parts(wanted, slabs)
    total = _total(wanted, slabs, free)
    return MemoryPlan(requested, granted, slabs, prefix, shared, wanted.slab_length, total, wanted.states, wanted.steps)


def _parts(wanted: MemoryDemand, slabs: int) -> tuple[int, int, int]:
    """Bytes of the KV cache, of prefixes, and of copies of shared inputs."""
    granted = slabs * wanted.slab
    prefix = int(granted * PREFIX_SHARE) if wanted.prefix is None else wanted.prefix
    # One copy may always be made, of at most the longest context.
    return granted, prefix, max(granted // SHARED_SHARE, wanted.slab + wanted.state_bytes)


def _total(wanted: MemoryDemand, slabs: int, free: int) -> int:
    """Bytes of all parts; grows with the slabs."""
    granted, prefix, shared = _parts(wanted, slabs)
    total = granted + wanted.position_bytes + wanted.states + shared  # one position is scratch
    if wanted.steps is None:
        return total + prefix
    newest = wanted.longest_prefix * wanted.position_bytes + wanted.state_bytes  # stays, whatever the budget
    steps = wanted.steps.largest + wanted.steps.graphs + wanted.steps.arriving
    return total + max(prefix, newest) + steps + int(free * SLACK)


def _fits(wanted: MemoryDemand, slabs: int, free: int) -> bool:
    return _total(wanted, slabs, free) <= free


def _most(holds: Callable[[int], bool]) -> int:
    """The largest number that satisfies a monotonic predicate (binary search); 0 if none does."""
    least, beyond = 0, 1
    while holds(beyond):
        least, beyond = beyond, 2 * beyond
    while beyond - least > 1:
        middle = (least + beyond) // 2
        least, beyond = (middle, beyond) if holds(middle) else (least, middle)
    return least


def _refusal(wanted: MemoryDemand, slabs: int, free: int) -> InsufficientMemory:
    granted, prefix, shared = _parts(wanted, slabs)
    steps, lower = "", "PRELUDE_PREFIX_MEMORY, PRELUDE_MAX_MODEL_LEN or PRELUDE_MAX_SEQUENCES"
    if wanted.steps is not None:
        steps = (
            f", a step of {wanted.batch_tokens:,} tokens takes {_mib(wanted.steps.largest)}, captured graphs "
            f"{_mib(wanted.steps.graphs)}, fragments {_mib(wanted.steps.arriving + int(free * SLACK))}"
        )
        lower = f"PRELUDE_MAX_BATCH_TOKENS, {lower}"
    most = _most(lambda n: _fits(wanted, n, free))
    set_it = f"set PRELUDE_KV_MEMORY to at most {_exact(most * wanted.slab)}MiB, or " if most else ""
    return InsufficientMemory(
        f"The KV cache needs {_mib(granted)}, prefixes may take {_mib(prefix)}, copies of shared inputs "
        f"{_mib(shared)}{steps}, and {_mib(free)} are free ({_need(wanted)}).",
        remedy=f"Let all of it fit {free / MiB:,.0f}MiB: {set_it}lower {lower}.",
    )


def _need(wanted: MemoryDemand) -> str:
    return (
        f"{wanted.sequences} sequences of {wanted.max_model_len:,} positions at {wanted.position_bytes:,} bytes each "
        f"ask for {_mib(wanted.sequences * wanted.slab)}; one of them for {_mib(wanted.slab)}"
    ) + (f"; their recurrent states take {_mib(wanted.states)} more" if wanted.states else "")


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / MiB:,.0f} MiB"


def _exact(num_bytes: int) -> str:
    """The size in MiB, with enough digits that the printed number is no smaller than the size."""
    digits = f"{math.ceil(num_bytes / MiB * 10_000) / 10_000:.4f}"
    return digits.rstrip("0").rstrip(".")
