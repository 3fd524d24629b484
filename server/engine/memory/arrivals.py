"""Copies KV prefixes to the device in pieces, beside the steps.

Such a prefix can take a GiB. Copying it at once would stop all decoding for a quarter of a second, so one piece is
copied beside each step, and one prefix at a time. Sequences that need the prefix wait until it is copied, just as they
wait for a prefix that another sequence is computing. On CUDA the pieces go through pinned memory on their own stream.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Container, Iterator

import torch

from server.contracts import ModelSpec
from server.engine.fast.operators import at_least_float32
from server.engine.memory.kv_cache import Computed
from server.engine.memory.prefix_cache import PrefixCache
from server.errors import GenerationFailed, NotFinite, PreludeError
from server.soft_prompts.soft_prompt import SoftPrompt

log = logging.getLogger(__name__)

PIECE_BYTES = {"cpu": 4 * 2**20, "cuda": 16 * 2**20}
"""Maximum number of bytes copied beside a step: a few milliseconds of the host's time."""

IDLE_SECONDS, PAUSE_SECONDS = 0.005, 0.0002
"""How long an engine without other work copies before it handles commands again, and how long it waits before it checks
again whether the device has freed a buffer."""


class HostCopy:
    """A prefix that is copied within the host's memory, or by `StagedCopy` to a device.

    PEFT's layout is `[n, layers * 2 * heads * dim]`, ours `[layers, 2, n, heads, dim]`. A piece is contiguous in ours,
    which is the layout of `prefix`.
    """

    def __init__(self, soft_prompt: SoftPrompt, model: ModelSpec, piece_bytes: int) -> None:
        """Take the memory for it, if the device has any."""
        assert not model.state_width, "a soft prompt of keys and values is refused where they are not all"
        count, heads, head_dim = soft_prompt.num_virtual_tokens, model.num_key_value_heads, model.head_dim
        shape = (model.num_kv_layers, 2, count, heads, head_dim)
        self.prefix = Computed(torch.empty(shape, dtype=getattr(torch, model.dtype), device=model.device))
        planes, width = 2 * model.num_kv_layers, heads * head_dim
        self._to = self.prefix.states.view(planes, count, width)
        self._from = soft_prompt.tensor.view(count, planes, width).transpose(0, 1)
        position_bytes = width * self._to.element_size()
        self._pieces = deque(pieces(planes, count, max(1, piece_bytes // position_bytes)))

    @property
    def has_arrived(self) -> bool:
        """Whether all pieces are copied, or queued so that work submitted after `settle` runs after them."""
        return not self._pieces

    def advance(self) -> bool:
        """Copy a piece; False if the device has to take earlier ones first. Raises NotFinite for NaN or infinity."""
        piece = self._pieces.popleft()
        _check_finite(self._to[piece].copy_(self._from[piece]))
        return True

    def settle(self) -> None:
        """Make the device wait for all copies made so far before it uses the prefix or reuses its memory.

        Called once: after the last piece, or when the copy is cancelled. Here the host has waited.
        """


class Staging:
    """Pinned memory for two pieces, and the stream that copies them to a CUDA device.

    It is kept for all prefixes, because pinning takes the host longer than copying.
    """

    def __init__(self, device: torch.device, piece_bytes: int) -> None:
        """Take the stream; the memory is allocated when it is first needed, a piece at a time."""
        self._device, self._piece_bytes = device, piece_bytes
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._buffers: deque[tuple[torch.Tensor, torch.cuda.Event]] = deque()

    def begin(self) -> None:
        """Make the copies wait for all work queued on the device so far, which may still use their memory."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def take(self) -> torch.Tensor | None:
        """The buffer `[piece_bytes]` that is free; None while the device reads both."""
        if len(self._buffers) < 2:
            buffer = torch.empty(self._piece_bytes, dtype=torch.uint8).pin_memory()
            self._buffers.appendleft((buffer, torch.cuda.Event()))  # type: ignore[no-untyped-call]
        buffer, was_read = self._buffers[0]
        return buffer if was_read.query() else None  # type: ignore[no-untyped-call]

    def send(self, piece: torch.Tensor, to: torch.Tensor) -> None:
        """Copy what lies in the buffer that was taken last; the host does not wait."""
        _, was_read = self._buffers[0]
        with torch.cuda.stream(self._stream):
            to.copy_(piece, non_blocking=True)
            was_read.record(self._stream)
        self._buffers.rotate(-1)

    def end(self) -> None:
        """Make the device wait for all pieces that were sent."""
        torch.cuda.current_stream(self._device).wait_stream(self._stream)


class StagedCopy(HostCopy):
    """A prefix that is copied to a CUDA device."""

    def __init__(self, soft_prompt: SoftPrompt, model: ModelSpec, piece_bytes: int, staging: Staging) -> None:
        super().__init__(soft_prompt, model, piece_bytes)
        self._staging = staging
        staging.begin()

    def advance(self) -> bool:
        """Copy a piece, if there is a free buffer."""
        if (buffer := self._staging.take()) is None:
            return False
        piece = self._pieces.popleft()
        target = self._to[piece]
        staged = buffer[: target.nbytes].view(target.dtype).view(target.shape)
        _check_finite(staged.copy_(self._from[piece]))
        self._staging.send(staged, target)
        return True

    def settle(self) -> None:
        """Let the device wait for the pieces."""
        self._staging.end()


Start = Callable[[SoftPrompt], HostCopy]


def copies_to(model: ModelSpec) -> Start:
    """A function that starts the copy of a KV prefix to the model's device."""
    device = torch.device(model.device)
    if device.type != "cuda":
        return lambda soft_prompt: HostCopy(soft_prompt, model, PIECE_BYTES["cpu"])
    piece_bytes = PIECE_BYTES["cuda"]
    staging: list[Staging] = []

    def start(soft_prompt: SoftPrompt) -> HostCopy:
        if not staging:
            staging.append(Staging(device, piece_bytes))
        return StagedCopy(soft_prompt, model, piece_bytes, staging[0])

    return start


class Arrivals:
    """At most one prefix on its way into the cache, for sequences that wait for it.

    Until it is in the cache, its memory does not count towards the cache's budget.
    """

    def __init__(self, prefixes: PrefixCache, start: Start) -> None:
        self._prefixes, self._start = prefixes, start
        self._on_its_way: tuple[str, HostCopy] | None = None
        self._failed: dict[str, PreludeError] = {}

    def bring(self, soft_prompt: SoftPrompt) -> bool:
        """Return whether the prefix is in the cache; if it is not and no other one is being copied, start its copy."""
        prefix_hash = soft_prompt.prefix_hash
        if prefix_hash not in self._prefixes and self._on_its_way is None and prefix_hash not in self._failed:
            try:
                self._on_its_way = prefix_hash, self._start(soft_prompt)
            except (RuntimeError, PreludeError) as exc:
                self._failed[prefix_hash] = _as_sentence(exc)
            self.advance()
            self.settle()
        return prefix_hash in self._prefixes

    @torch.inference_mode()
    def advance(self, *, is_idle: bool = False) -> None:
        """Copy a piece of the prefix that is on its way; in an idle engine, pieces for `IDLE_SECONDS`."""
        until = time.monotonic() + (IDLE_SECONDS if is_idle else 0.0)
        while self._on_its_way is not None and not self._on_its_way[1].has_arrived:
            prefix_hash, copying = self._on_its_way
            try:
                has_copied = copying.advance()
            except (RuntimeError, PreludeError) as exc:
                error = _as_sentence(exc)
                self.cancel(prefix_hash)
                self._failed[prefix_hash] = error
                return
            if time.monotonic() >= until:
                return
            if not has_copied:
                time.sleep(PAUSE_SECONDS)

    def settle(self) -> None:
        """Put the prefix into the cache, if it has arrived."""
        if self._on_its_way is None or not self._on_its_way[1].has_arrived:
            return
        prefix_hash, copying = self._on_its_way
        self._on_its_way = None
        copying.settle()
        self._prefixes.put(prefix_hash, copying.prefix, is_awaited=True)

    def cancel(self, prefix_hash: str) -> None:
        """Forget a prefix that nobody waits for any more, if it is on its way or has failed."""
        self._failed.pop(prefix_hash, None)
        if self._on_its_way is not None and self._on_its_way[0] == prefix_hash:
            _, copying = self._on_its_way
            self._on_its_way = None
            copying.settle()

    def take_failed(self) -> dict[str, PreludeError]:
        """The errors of prefixes that could not be copied, by prefix hash; clears them."""
        failed, self._failed = self._failed, {}
        return failed

    def check_integrity(self, used: Container[str]) -> None:
        """Assert that somebody uses what is on its way or has failed."""
        assert self._on_its_way is None or self._on_its_way[0] in used, "a prefix is copied for nobody"
        assert all(prefix_hash in used for prefix_hash in self._failed), "a failure that nobody waits for"


def pieces(planes: int, positions: int, most: int) -> Iterator[tuple[slice, slice]]:
    """Cut `[planes, positions]` into contiguous pieces of at most `most` positions, over one plane or several."""
    at_once = max(1, most // positions)
    for first in range(0, planes, at_once):
        for start in range(0, positions, most):
            yield slice(first, min(first + at_once, planes)), slice(start, min(start + most, positions))


def _check_finite(piece: torch.Tensor) -> None:
    extremes = torch.stack(torch.aminmax(piece))
    if not bool(at_least_float32(extremes).isfinite().all()):
        raise NotFinite("The keys and values of this soft prompt are not finite.")


def _as_sentence(exc: Exception) -> PreludeError:
    """The error of the waiting requests, without a traceback, whose frames hold the copy.

    An error that may have destroyed the device's context is raised again: the engine then tries whether it can step.
    """
    if isinstance(exc, torch.AcceleratorError):
        raise exc
    if isinstance(exc, PreludeError):
        return exc.with_traceback(None)
    if isinstance(exc, torch.OutOfMemoryError):
        log.error("the device has no memory for a prefix; the requests that wait for it fail")
        return GenerationFailed("The device has no memory for this soft prompt.", remedy="Retry later.")
    log.error("a prefix cannot be copied; the requests that wait for it fail", exc_info=exc)
    return GenerationFailed("The engine failed on this soft prompt; no other is affected.")
