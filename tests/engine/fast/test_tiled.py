"""A tiled product is the product, rounded once, and a row's result depends on no other row."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

from server.engine.fast.tiled import TiledLinear, can_tile, frozen_linear, tile_weight
from server.engine.kernels.library import Kernels
from server.engine.kernels.units import CHUNK, COLUMNS, SHARES

ROWS = [0, 1, 2, 15, 16, 17, 31, 32, 33, 48, 64, 250, 256, 257, 300]
OUT, IN = 96, 160
ROUNDING = 1.01 * 2.0**-8


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


WEIGHT, BIAS = numbers(OUT, IN, seed=1), numbers(OUT, seed=2)


@pytest.fixture
def tiles(kernels: Kernels) -> Kernels:
    if not can_tile(WEIGHT, kernels):
        pytest.skip("this processor has no AMX")
    return kernels


def assert_close(got: torch.Tensor, exact: torch.Tensor) -> None:
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), exact, rtol=ROUNDING, atol=1e-5)


@pytest.mark.parametrize("bias", [None, BIAS], ids=["", "bias"])
def test_it_gives_the_product_for_any_number_of_rows(bias: torch.Tensor | None, tiles: Kernels) -> None:
    linear, gated = (TiledLinear(WEIGHT, bias, tiles, is_gated=is_gated) for is_gated in (False, True))
    for rows in ROWS:
        x, residual = numbers(rows, IN), numbers(rows, OUT, seed=3)
        exact = x.double() @ WEIGHT.double().T + (0 if bias is None else bias.double())
        assert_close(linear(x), exact)
        assert_close(linear(x[None]), exact[None])
        assert_close(linear.added_to(residual, x), residual.double() + exact)
        assert torch.equal(residual, numbers(rows, OUT, seed=3))
        gate, up = exact.chunk(2, dim=-1)
        assert_close(gated.gated(x), F.silu(gate) * up)


def in_tiles(x: torch.Tensor) -> torch.Tensor:
    """Rows in tiles, the last of which is filled up with NaN."""
    rows, columns = x.shape
    whole = torch.full((-(-rows // 16) * 16, columns), float("nan"), dtype=x.dtype)
    whole[:rows] = x
    return whole.view(-1, 16, columns // 32, 32).transpose(1, 2).contiguous().view(-1, columns)


@pytest.mark.parametrize("rows", [1, 2, 15, 16, 32, 48, 256, 272, 304])
def test_rows_in_tiles_give_the_same_bits(rows: int, tiles: Kernels) -> None:
    weight = numbers(192, IN, seed=1)  # a gate of 96 columns, which are three tiles
    x, tiled = numbers(rows, IN), in_tiles(numbers(rows, IN))
    linear, gated = TiledLinear(weight, None, tiles), TiledLinear(weight, None, tiles, is_gated=True)
    expected, expected_gated = linear(x), gated.gated(x)
    got, got_gated = torch.empty_like(expected), torch.full_like(in_tiles(expected_gated), float("nan"))
    for layer, out, out_in_tiles in ((linear, got, False), (gated, got_gated, True)):
        arguments = layer.arguments(
            rows, tiled.data_ptr(), None, out.data_ptr(), x_in_tiles=True, out_in_tiles=out_in_tiles
        )
        layer.loop(adds=False)(192 // COLUMNS * -(-rows // CHUNK), 2, *arguments, *[0] * SHARES)
    assert torch.equal(got, expected)
    torch.testing.assert_close(got_gated, in_tiles(expected_gated), rtol=0, atol=0, equal_nan=True)


def test_a_row_has_the_same_bits_beside_any_others(tiles: Kernels) -> None:
    linear, x = TiledLinear(WEIGHT, BIAS, tiles), numbers(300, IN)
    expected = linear(x)
    for first, rows in [(0, 1), (299, 1), (7, 16), (5, 33), (100, 64), (3, 257)]:
        assert torch.equal(linear(x[first : first + rows]), expected[first : first + rows])


def test_numbers_that_are_not_finite_stay_in_their_row(tiles: Kernels) -> None:
    linear, gated = TiledLinear(WEIGHT, None, tiles), TiledLinear(WEIGHT, None, tiles, is_gated=True)
    x = numbers(40, IN)
    expected, expected_gated = linear(x), gated.gated(x)
    x[7], x[20] = float("nan"), float("inf")
    good = [i for i in range(40) if i not in (7, 20)]
    for got, same in ((linear(x), expected), (gated.gated(x), expected_gated)):
        assert torch.equal(got[good], same[good])
        assert got[7].isnan().all()
        assert not got[20].isfinite().any()


def test_a_gate_far_from_zero_neither_overflows_nor_lets_anything_through(tiles: Kernels) -> None:
    weight = torch.zeros(32, 32, dtype=torch.bfloat16)
    weight[:16, 0] = weight[16:, 1] = 1
    linear = TiledLinear(weight, None, tiles, is_gated=True)
    gates = torch.tensor([-3e38, -1e4, -100.0, -1.0, 0.0, 1.0, 100.0, 1e4, 3e38]).to(torch.bfloat16)
    x = torch.zeros(len(gates), 32, dtype=torch.bfloat16)
    x[:, 0], x[:, 1] = gates, 1
    exact = F.silu(gates.double())[:, None].expand(-1, 16)
    torch.testing.assert_close(linear.gated(x).double(), exact, rtol=ROUNDING, atol=1e-30)


def test_products_of_onednn_and_of_tiles_can_take_turns(tiles: Kernels) -> None:
    """oneDNN remembers how it has configured the tiles, and does not look."""
    own, packed = TiledLinear(WEIGHT, None, tiles), frozen_linear(WEIGHT, None, None)
    few, many = numbers(5, IN), numbers(64, IN)
    expected = [(own(x), packed(x)) for x in (few, many)]
    for _ in range(3):
        for x, (by_own, by_packed) in zip((few, many), expected, strict=True):
            assert torch.equal(packed(x), by_packed)
            assert torch.equal(own(x), by_own)
            assert torch.equal(packed(x), by_packed)


def test_each_weight_is_in_the_tile_of_its_output_and_input() -> None:
    tiled = tile_weight(WEIGHT)
    for out, depth in [(0, 0), (31, 159), (47, 33), (95, 1)]:
        place = (out // 32, depth // 32, out // 16 % 2, depth % 32 // 2, out % 16, depth % 2)
        assert tiled[place] == WEIGHT[out, depth]


def test_only_bfloat16_in_whole_tiles_is_tiled(tiles: Kernels) -> None:
    assert not can_tile(WEIGHT.float(), tiles)
    assert not can_tile(WEIGHT[:48], tiles)
    assert not can_tile(WEIGHT[:, :48], tiles)
    assert isinstance(frozen_linear(WEIGHT, None, tiles), TiledLinear)


def test_any_thread_may_use_tiles(tiles: Kernels) -> None:
    """The kernel's permission is the process's, for threads that begin later too."""
    linear, x = TiledLinear(WEIGHT, BIAS, tiles), numbers(40, IN)
    expected = linear(x)
    with ThreadPoolExecutor(3) as callers:
        assert all(torch.equal(got, expected) for got in callers.map(linear, [x] * 60))
