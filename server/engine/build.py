"""From the settings to an engine: how much memory the KV cache gets, told before it is taken."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from server.core import ModelSpec
from server.engine.decode_graphs import capture
from server.engine.engine import Engine
from server.engine.kv_cache import KVCache, SlotAllocator, bytes_of, bytes_per_position
from server.engine.model import FrozenModel
from server.engine.optimise import load_kernels, optimise
from server.engine.out_of_memory import release_unused
from server.engine.prefix_cache import PrefixCache
from server.engine.preflight import free_memory
from server.engine.recurrent import bytes_per_state
from server.engine.scheduler import SHARED_SHARE, most_running
from server.errors import ConfigurationError, InsufficientMemory
from server.settings import Settings

log = logging.getLogger(__name__)

AUTO_SHARE = 0.5
"""Of the free memory, what 'auto' takes for the KV cache at most: a frozen model's own activations need room too."""
PREFIX_SHARE = 0.25
MiB = 2**20


@dataclass(frozen=True)
class MemoryPlan:
    """What the settings ask for, and what they get, in bytes."""

    asked: int
    granted: int
    num_slabs: int
    prefix_bytes: int
    shared_bytes: int
    positions_per_slab: int
    state_bytes: int = 0
    """Of recurrent states, in models that have one."""

    def __str__(self) -> str:
        positions = self.num_slabs * self.positions_per_slab
        cut = "" if self.granted >= self.asked else f" of the {self.asked / MiB:,.0f} MiB asked for"
        return (
            f"KV cache: {self.granted / MiB:,.0f} MiB{cut} = {positions:,} positions "
            f"({self.num_slabs} sequences of {self.positions_per_slab:,}); prefixes: {self.prefix_bytes / MiB:,.0f} "
            f"MiB; copies of shared inputs: {self.shared_bytes / MiB:,.0f} MiB"
            + (f"; recurrent states: {self.state_bytes / MiB:,.0f} MiB" if self.state_bytes else "")
        )


def load_engine(settings: Settings) -> Engine:
    """The frozen model that the settings name, made fast, in an engine.

    Raises:
        ConfigurationError: the model or its KV cache cannot be had as the settings ask for it.
    """
    model = FrozenModel.load(settings)
    kernels = load_kernels(model, settings.optimisations, settings.cache_dir / "kernels")
    optimise(model, settings.optimisations, kernels)
    return build_engine(settings, model)


def build_engine(settings: Settings, model: FrozenModel) -> Engine:
    """Make an engine for a loaded model.

    Raises:
        ConfigurationError: the settings contradict each other.
        InsufficientMemory: the KV cache does not fit.
    """
    if settings.max_batch_tokens < settings.max_sequences:
        raise ConfigurationError(
            f"PRELUDE_MAX_BATCH_TOKENS {settings.max_batch_tokens} is less than PRELUDE_MAX_SEQUENCES "
            f"{settings.max_sequences}, but every sequence takes one token of a step.",
            remedy="Raise the first or lower the second.",
        )
    release_unused()  # of a model that was made faster, the parts that it was made of
    plan = plan_memory(settings, model.spec, free_memory(model.device))
    log.info("%s", plan)
    most = most_running(settings.max_sequences, settings.max_batch_tokens)
    engine = Engine(
        model,
        KVCache(model.spec, plan.num_slabs, max_sequences=most),
        PrefixCache(plan.prefix_bytes),
        settings.max_sequences,
        settings.max_batch_tokens,
        plan.shared_bytes,
    )
    if "graphs" in settings.optimisations and model.spec.state_width and engine.varlen is not None:
        log.info("decoding goes on without CUDA graphs, because %s keeps a recurrent state", model.spec.name)
    elif "graphs" in settings.optimisations:
        engine.graphs = capture(model, engine.kv_cache, engine.varlen, engine.scheduler.max_running)
    return engine


def plan_memory(settings: Settings, model: ModelSpec, free: int) -> MemoryPlan:
    """Work out the sizes of the KV cache, of what prefixes may take, and of what copies of shared inputs may take.

    A model's recurrent states come first: every sequence that runs has one, whatever its length.

    Raises:
        InsufficientMemory: they do not fit together, or the KV cache holds not even one sequence of the longest
            context; says what would.
    """
    per_position = bytes_per_position(model)
    slab_length = SlotAllocator(1, model.max_model_len).slab_length
    slab = slab_length * per_position
    asked = settings.max_sequences * slab if settings.kv_memory == "auto" else int(settings.kv_memory)
    own_prefix = None if settings.prefix_memory == "auto" else int(settings.prefix_memory)
    states = most_running(settings.max_sequences, settings.max_batch_tokens) * bytes_per_state(model)
    free = max(0, free - states)
    copy = bytes_of(model, slab_length)
    granted = asked
    if settings.kv_memory == "auto":
        room = min(free - copy, free * SHARED_SHARE // (SHARED_SHARE + 1))  # beside the copies
        room = int(room / (1 + PREFIX_SHARE)) if own_prefix is None else room - own_prefix
        granted = min(asked, max(min(int(free * AUTO_SHARE), room), slab))
    need = (
        f"{settings.max_sequences} sequences of {model.max_model_len:,} positions at {per_position:,} bytes each "
        f"ask for {settings.max_sequences * slab / MiB:,.0f} MiB; one of them for {slab / MiB:,.0f} MiB"
    ) + (f"; their recurrent states take {states / MiB:,.0f} MiB more" if states else "")
    shared = max(granted // SHARED_SHARE, copy)  # one copy may always be made, of at most the longest context
    prefix = int(granted * PREFIX_SHARE) if own_prefix is None else own_prefix
    if granted + prefix + shared > free:
        fits = (free - shared) / (1 + PREFIX_SHARE) if own_prefix is None else free - shared - prefix
        raise InsufficientMemory(
            f"The KV cache needs {granted / MiB:,.0f} MiB, prefixes may take {prefix / MiB:,.0f} MiB, copies of shared "
            f"inputs {shared / MiB:,.0f} MiB, and {free / MiB:,.0f} MiB are free ({need}).",
            remedy=f"Let all of it fit {free / MiB:,.0f}MiB: set PRELUDE_KV_MEMORY to at most "
            f"{max(0.0, fits) / MiB:,.1f}MiB, or lower PRELUDE_PREFIX_MEMORY, PRELUDE_MAX_MODEL_LEN or "
            "PRELUDE_MAX_SEQUENCES.",
        )
    if granted < slab:
        raise InsufficientMemory(
            f"PRELUDE_KV_MEMORY of {granted / MiB:,.1f} MiB does not hold one sequence ({need}).",
            remedy=f"Set it to at least {slab / MiB:,.1f}MiB, or lower PRELUDE_MAX_MODEL_LEN.",
        )
    return MemoryPlan(asked, granted // slab * slab, granted // slab, prefix, shared, slab_length, states)
