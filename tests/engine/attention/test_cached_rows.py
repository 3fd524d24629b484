"""The serving layout reads neighbouring slots as one batch, and what it reads is what was written."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from server.engine.attention.cached_rows import CachedRows, Span
from server.engine.attention.interface import AttentionRules, PackedRows
from server.engine.memory.kv_cache import KVCache
from server.engine.memory.slots import Slot
from server.engine.model.frozen import FrozenModel


def groups(layout: CachedRows) -> list[int]:
    return [len(group.spans) for group in layout._groups]


def test_neighbouring_decodes_are_one_run_and_everything_else_is_not(tiny: FrozenModel) -> None:
    cache = KVCache(tiny.spec, num_slabs=4, shortest_slot=32)
    spans = [
        Span(Slot(32, 0), 5, 1),
        Span(Slot(32, 32), 9, 1),
        Span(Slot(32, 96), 2, 1),  # a hole before it
        Span(Slot(64, 128), 2, 1),  # another length
        Span(Slot(64, 192), 0, 4),  # a chunk
        Span(Slot(64, 256), 0, 1),
    ]
    assert groups(CachedRows(cache, spans)) == [2, 1, 1, 1, 1]


def test_positions_count_from_the_start_of_each_sequence(tiny: FrozenModel) -> None:
    cache = KVCache(tiny.spec, num_slabs=4, shortest_slot=32)
    layout = CachedRows(cache, [Span(Slot(32, 0), 5, 1), Span(Slot(32, 64), 2, 3)])
    assert layout.position_ids.tolist() == [5, 2, 3, 4]


def test_chunks_and_decodes_over_the_cache_equal_whole_rows_without_one(tiny: FrozenModel) -> None:
    """Two sequences, computed in pieces of any size, attend as if each were computed at once."""
    cache = KVCache(tiny.spec, num_slabs=4, shortest_slot=32)
    heads, kv_heads, dim = 4, tiny.spec.num_key_value_heads, tiny.spec.head_dim
    lengths, slots = [9, 6], [Slot(32, 32), Slot(32, 64)]
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(heads, 15, dim, dtype=torch.float64, generator=generator)
    key, value = torch.randn(2, kv_heads, 15, dim, dtype=torch.float64, generator=generator)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
    for rules in (
        AttentionRules(0.3),
        AttentionRules(0.3, sliding_window=3),
        AttentionRules(0.3, softcap=1.5),
        AttentionRules(0.3, sinks=sinks),
    ):
        expected = PackedRows(lengths).attend(0, query, key, value, rules)
        cut = [(0, [4, 1, 1, 2, 1]), (1, [1, 3, 1, 1])]
        filled = [0, 0]
        for step in range(5):
            spans: list[Span] = []
            rows: list[int] = []
            for sequence, pieces in cut:
                if step < len(pieces):
                    first = filled[sequence]
                    spans.append(Span(slots[sequence], first, pieces[step]))
                    offset = sum(lengths[:sequence])
                    rows += range(offset + first, offset + first + pieces[step])
                    filled[sequence] += pieces[step]
            got = CachedRows(cache, spans).attend(0, query[:, rows], key[:, rows], value[:, rows], rules)
            torch.testing.assert_close(got, expected[rows])


class Copies(TorchDispatchMode):
    """Counts tensors that go from one device to another."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.count += (
            isinstance(out, torch.Tensor) and bool(args) and getattr(args[0], "device", out.device) != out.device
        )
        return out


def test_the_layers_of_a_training_step_share_one_upload_of_where_its_tokens_are() -> None:
    """Every further one would make the host wait for the device."""
    layout = PackedRows([4, 2, 3])
    query, key, value = torch.empty(4, 9, 8, device="meta"), *torch.empty(2, 2, 9, 8, device="meta")
    counts = []
    for layer in range(3):
        with Copies() as copies:
            assert layout.attend(layer, query, key, value, AttentionRules(0.3)).shape == (9, 4, 8)
        counts.append(copies.count)
    assert counts == [2, 0, 0]
