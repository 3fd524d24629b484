from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from server.contracts import ModelSpec
from server.engine.memory.arrivals import Arrivals, HostCopy, StagedCopy, Staging, copies_to, pieces
from server.engine.memory.prefix_cache import PrefixCache
from server.engine.model.frozen import FrozenModel
from server.soft_prompts.soft_prompt import SoftPrompt
from tests.support import random_kv_prompt


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
