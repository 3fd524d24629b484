"""Fakes of torch.cuda's graphs: the real `CudaRecorder` runs on them, and what a device would punish is an error.

A captured graph is a list of operators over fixed memory. It never calls Python again. It keeps alive what it allocated
itself, and nothing else. So the fake holds tensors from outside weakly, repeats the operators on replay, and fills all
temporaries with junk afterwards, because a device's allocator lends their memory to the next graph.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from tests.engine.varlen_reference import reference_varlen_attn

WAITS = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_pin_memory",
    "aten::is_pinned",
    "aten::equal",
    "aten::unique_dim",
    "aten::_unique2",
    "aten::repeat_interleave.Tensor",
}
"""Operators whose result's value or size the host needs, or that cannot be captured."""


class DeadInput(AssertionError):
    """A graph reads memory that nobody holds any more."""


class HostWait(AssertionError):
    """A captured operator makes the host wait for the device."""


class StrayWrite(AssertionError):
    """A captured operator writes to memory outside the graph that it has no business with."""


class _Outside:
    """A tensor that a graph reads and does not own."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._storage = weakref.ref(tensor.untyped_storage())
        self._view = (tensor.storage_offset(), tensor.size(), tensor.stride())
        self._dtype = tensor.dtype

    def tensor(self) -> torch.Tensor:
        storage = self._storage()
        if storage is None:
            raise DeadInput(f"a graph reads a freed {self._dtype} tensor of shape {tuple(self._view[1])}")
        return torch.empty(0, dtype=self._dtype).set_(storage, *self._view)


@dataclass
class _Operator:
    function: Any
    args: Any
    kwargs: Any
    results: list[torch.Tensor]

    def repeat(self) -> None:
        args, kwargs = tree_map_only(_Outside, _Outside.tensor, (self.args, self.kwargs))
        for result, again in zip(self.results, _tensors(self.function(*args, **kwargs)), strict=True):
            if _address(result) != _address(again):  # otherwise a view, or written in place
                result.copy_(again)


@dataclass
class FakeGraph:
    """Stands in for `torch.cuda.CUDAGraph`."""

    operators: list[_Operator] = field(default_factory=list)

    @torch.inference_mode()
    def replay(self) -> None:
        """Repeat the captured operators, then spoil all that is no answer."""
        for operator in self.operators:
            operator.repeat()
        answer = _address(self.operators[-1].results[-1])
        for operator in self.operators:
            for result in operator.results:
                if _address(result) != answer and not _is_outside(operator, result):
                    result.fill_(
                        float("nan") if result.is_floating_point() else -(2**31) if result.dtype != torch.bool else True
                    )


class _Capture(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down the operators of a capture."""

    def __init__(self, graph: FakeGraph, may_write: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._graph, self._may_write = graph, may_write
        self._inside: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._check(func, args, kwargs)
        out = func(*args, **kwargs)
        held_args, held_kwargs = tree_map_only(torch.Tensor, self._taken, (args, kwargs))
        results = _tensors(out)
        outside = {_address(tensor) for tensor in _tensors((args, kwargs))} - self._inside
        self._inside |= {_address(result) for result in results} - outside
        self._graph.operators.append(_Operator(func, held_args, held_kwargs, results))
        return out

    def _taken(self, tensor: torch.Tensor) -> torch.Tensor | _Outside:
        return tensor if _address(tensor) in self._inside else _Outside(tensor)

    def _check(self, func: Any, args: Any, kwargs: Any) -> None:
        name = func.name()
        _refuse_waits(func, args)
        for argument, value in zip(func._schema.arguments, args, strict=False):
            writes = argument.alias_info is not None and argument.alias_info.is_write
            for tensor in _tensors(value) if writes else ():
                if _address(tensor) not in self._inside | self._may_write:
                    raise StrayWrite(f"{name} writes to a tensor of shape {tuple(tensor.shape)} outside the graph")


def _refuse_waits(func: Any, args: Any) -> None:
    name = func.name()
    if name in WAITS or (name.startswith("aten::index") and _has_mask(args)):
        raise HostWait(f"{name} makes the host wait")


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _has_mask(args: Any) -> bool:
    return any(tensor.dtype == torch.bool for tensor in _tensors(args[1:2]))


def _is_outside(operator: _Operator, result: torch.Tensor) -> bool:
    outside = [leaf for leaf in tree_leaves((operator.args, operator.kwargs)) if isinstance(leaf, _Outside)]
    return any(_address(leaf.tensor()) == _address(result) for leaf in outside)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises where the host would wait, as torch does in the sync-debug mode "error"."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        _refuse_waits(func, args)
        return func(*args, **(kwargs or {}))


class FakeStream:
    """Stands in for `torch.cuda.Stream`."""

    def __init__(self, device: torch.device | None = None) -> None:
        pass

    def wait_stream(self, stream: FakeStream) -> None:
        """Do nothing: there is one stream."""


@contextlib.contextmanager
def _nothing(*args: Any, **kwargs: Any) -> Iterator[None]:
    yield


@dataclass
class FakeCuda:
    """What was captured, and which memory outside a graph its operators may write to."""

    graphs: list[FakeGraph] = field(default_factory=list)
    watch: _Watch | None = None
    may_write: set[int] = field(default_factory=set)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Put the fakes where `CudaRecorder` finds them."""

        @contextlib.contextmanager
        def graph(captured: FakeGraph, **options: Any) -> Iterator[None]:
            self.graphs.append(captured)
            with _Capture(captured, self.may_write):
                yield

        def set_sync_debug_mode(mode: int | str) -> None:
            if mode == "error":
                self.watch = _Watch()  # type: ignore[no-untyped-call]
                self.watch.__enter__()  # type: ignore[no-untyped-call]
            elif self.watch is not None:
                self.watch.__exit__(None, None, None)  # type: ignore[no-untyped-call]

        for name, fake in {
            "get_sync_debug_mode": lambda: 0,
            "set_sync_debug_mode": set_sync_debug_mode,
            "graph_pool_handle": lambda: (0, 0),
            "CUDAGraph": FakeGraph,
            "graph": graph,
            "Stream": FakeStream,
            "current_stream": lambda device=None: FakeStream(),
            "stream": _nothing,
            "device": _nothing,
        }.items():
            monkeypatch.setattr(torch.cuda, name, fake)


@torch.library.custom_op("prelude_tests::varlen_attn", mutates_args=())
def _opaque_varlen_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    left: int,
    right: int,
    seqused_k: torch.Tensor,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    return reference_varlen_attn(
        query,
        key,
        value,
        cu_seq_q,
        cu_seq_k,
        max_q,
        max_k,
        scale=scale,
        window_size=(left, right),
        seqused_k=seqused_k,
        sinks=sinks,
    )


def opaque_varlen_attn(
    *args: Any,
    scale: float,
    window_size: tuple[int, int],
    seqused_k: torch.Tensor,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """The reference of `flash_attention` as one operator, as torch's own is: what it reads is no part of a capture."""
    out: torch.Tensor = _opaque_varlen_attn(*args, scale, *window_size, seqused_k, sinks)
    return out
