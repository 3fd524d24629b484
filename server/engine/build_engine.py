"""Builds an engine from the settings, and plans its memory before it is allocated."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from server.contracts import ModelSpec
from server.engine.attention.varlen_rows import log_attention
from server.engine.engine import Engine
from server.engine.fast.decode_graphs import capture
from server.engine.fast.linear import prepare_products
from server.engine.fast.optimise import load_kernels, optimise
from server.engine.memory.kv_cache import KVCache, bytes_per_position
from server.engine.memory.largest_step import measure_steps
from server.engine.memory.plan import MemoryDemand, MemoryPlan, MiB, Steps, plan
from server.engine.memory.prefix_cache import PrefixCache
from server.engine.memory.slots import SlotAllocator
from server.engine.memory.state_pool import bytes_per_state
from server.engine.model.device_defaults import filled_in
from server.engine.model.frozen import FrozenModel
from server.engine.model.preflight import free_memory
from server.engine.out_of_memory import release_unused
from server.engine.scheduling.scheduler import most_running
from server.errors import ConfigurationError, InsufficientMemory
from server.settings import Settings

log = logging.getLogger(__name__)


def load_engine(settings: Settings) -> Engine:
    """Load the frozen model, optimise it, and build its engine.

    Raises ConfigurationError if the model cannot be loaded, or its KV cache allocated, as the settings require.
    """
    model = FrozenModel.load(settings)
    kernels = load_kernels(model, settings.optimisations, settings.cache_dir / "kernels")
    try:
        optimise(model, settings.optimisations, kernels)
    except torch.OutOfMemoryError as exc:
        raise InsufficientMemory(
            f"{model.device} holds the weights of {model.spec.name} and has no memory to join those of a layer.",
            remedy="Free memory on the device, or choose a smaller model or a quantised checkpoint.",
        ) from exc
    return build_engine(settings, model)


def build_engine(settings: Settings, model: FrozenModel) -> Engine:
    """Make an engine for a loaded model.

    Raises:
        ConfigurationError: the settings contradict each other.
        InsufficientMemory: the KV cache does not fit.
    """
    release_unused()  # the original parts of an optimised model
    settings = filled_in(settings, model.spec, free_memory(model.device))
    if settings.max_batch_tokens < settings.max_sequences:
        raise ConfigurationError(
            f"PRELUDE_MAX_BATCH_TOKENS {settings.max_batch_tokens} is less than PRELUDE_MAX_SEQUENCES "
            f"{settings.max_sequences}, but every sequence takes one token of a step.",
            remedy="Raise the first or lower the second.",
        )
    log_attention(model.spec, model.attention_rules)
    sequences, batch_tokens = settings.max_sequences, settings.max_batch_tokens
    steps = measure_steps(model, sequences, batch_tokens, longest_prefix(settings, model.spec))
    planned = plan_memory(settings, model.spec, free_memory(model.device), steps)
    log.info("%s", planned)
    with _still_free("the KV cache", planned.granted, model.device):
        kv_cache = KVCache(model.spec, planned.num_slabs, max_sequences=most_running(sequences, batch_tokens))
    prefixes = PrefixCache(planned.prefix_bytes)
    engine = Engine(model, kv_cache, prefixes, sequences, batch_tokens, planned.shared_bytes)
    prepare_products(model.module, batch_tokens, engine.scheduler.max_running)
    if "graphs" in settings.optimisations and model.spec.state_width and engine.runner.varlen is not None:
        log.info("decoding runs without CUDA graphs, because %s keeps a recurrent state", model.spec.name)
    elif "graphs" in settings.optimisations:
        engine.runner.graphs = capture(model, engine.kv_cache, engine.runner.varlen, engine.scheduler.max_running)
    if steps is not None:
        take_all(model.device, planned.prefix_bytes + planned.shared_bytes + steps.largest + steps.arriving)
    return engine


def take_all(device: torch.device, num_bytes: int) -> None:
    """Allocate what a server will need on a CUDA device, so that no other process, such as a training job, takes it.

    It stays in the allocator's cache. Raises InsufficientMemory if another process has taken the memory.
    """
    release_unused()  # the captures' warm-up leaves memory to a stream that is not used again
    with _still_free("steps, prefixes and copies of inputs", num_bytes, device):
        torch.empty(num_bytes, dtype=torch.uint8, device=device)


@contextmanager
def _still_free(purpose: str, num_bytes: int, device: torch.device) -> Iterator[None]:
    """Context manager around an allocation that was planned when the memory was free."""
    try:
        yield
    except torch.OutOfMemoryError as exc:
        raise InsufficientMemory(
            f"{num_bytes / MiB:,.0f} MiB for {purpose} are no longer free on {device}: another process takes memory "
            "there.",
            remedy="Start the server again once the other process has what it needs, or lower PRELUDE_KV_MEMORY.",
        ) from exc


def longest_prefix(settings: Settings, model: ModelSpec) -> int:
    """Maximum number of prefix positions of a soft prompt."""
    return min(settings.max_virtual_tokens, model.max_model_len)


def plan_memory(settings: Settings, model: ModelSpec, free: int, steps: Steps | None = None) -> MemoryPlan:
    """Plan the KV cache, and the budgets of prefixes and of copies of shared inputs, within `free` bytes.

    Raises InsufficientMemory as `plan`; the error names settings that would fit.
    """
    wanted = MemoryDemand(
        sequences=settings.max_sequences,
        running=most_running(settings.max_sequences, settings.max_batch_tokens),
        max_model_len=model.max_model_len,
        slab_length=SlotAllocator(1, model.max_model_len).slab_length,
        position_bytes=bytes_per_position(model),
        state_bytes=bytes_per_state(model),
        longest_prefix=longest_prefix(settings, model),
        batch_tokens=settings.max_batch_tokens,
        kv=None if settings.kv_memory == "auto" else int(settings.kv_memory),
        prefix=None if settings.prefix_memory == "auto" else int(settings.prefix_memory),
        steps=steps,
    )
    return plan(wanted, free)
