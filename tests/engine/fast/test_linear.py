"""A packed product is the product: packing lays weights out, and changes no answer."""

from __future__ import annotations

import pytest
import torch

from server.engine.fast.linear import FrozenLinear, can_pack

TOLERANCE = {torch.bfloat16: 2.0**-8, torch.float32: 2e-6, torch.float64: 1e-14}
"""Of a rounded result, relative; beside what float32's (float64's) last digit is in a sum of `IN` products."""
ROWS = [0, 1, 2, 3, 7, 15, 16, 17, 63, 64, 65, 128, 130]
DTYPES = [torch.bfloat16, torch.float32]
OUT, IN = 48, 36


def numbers(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = request.param
    if not can_pack(torch.zeros(1, 1, dtype=found)):
        pytest.skip(f"oneDNN does not multiply {found} here")
    return found


def linear(dtype: torch.dtype, *, bias: bool, pack: bool) -> FrozenLinear:
    weight, own_bias = numbers(OUT, IN, dtype=dtype, seed=1), numbers(OUT, dtype=dtype, seed=2)
    return FrozenLinear(weight, own_bias if bias else None, pack=pack)


def product(x: torch.Tensor, *, bias: bool) -> torch.Tensor:
    """In float64, of the same rounded numbers."""
    weight, own_bias = numbers(OUT, IN, dtype=x.dtype, seed=1), numbers(OUT, dtype=x.dtype, seed=2)
    return x.double() @ weight.double().T + (own_bias.double() if bias else 0)


def assert_close(got: torch.Tensor, exact: torch.Tensor) -> None:
    atol = 1e-13 if got.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(got.double(), exact, rtol=1.01 * TOLERANCE[got.dtype], atol=atol)


@pytest.mark.parametrize("bias", [False, True])
def test_packed_weights_give_the_product_for_any_number_of_rows(bias: bool, dtype: torch.dtype) -> None:
    packed = linear(dtype, bias=bias, pack=True)
    assert packed.is_packed
    for rows in ROWS:
        x = numbers(rows, IN, dtype=dtype)
        got = packed(x)
        assert got.dtype == dtype
        assert_close(got, product(x, bias=bias))
        assert_close(packed(x[None]), product(x[None], bias=bias))
    x = numbers(2, 5, IN, dtype=dtype)
    assert_close(packed(x), product(x, bias=bias))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("pack", [False, True])
def test_a_product_is_added_to_a_residual_that_stays_as_it_is(pack: bool, bias: bool, dtype: torch.dtype) -> None:
    own = linear(dtype, bias=bias, pack=pack)
    for rows in ROWS:
        x, residual = numbers(rows, IN, dtype=dtype), numbers(rows, OUT, dtype=dtype, seed=3)
        before, x_before = residual.clone(), x.clone()
        got = own.added_to(residual, x)
        assert got.dtype == dtype
        exact = product(x, bias=bias)
        if pack:
            assert_close(got, residual.double() + exact)
        else:  # the product is rounded before it is added
            error = TOLERANCE[dtype] * 1.01 * (exact.abs() + (residual.double() + exact).abs()) + 1e-5
            assert ((got.double() - residual.double() - exact).abs() <= error).all()
        assert torch.equal(residual, before)
        assert torch.equal(x, x_before)


def test_rows_with_gaps_between_them_are_multiplied_as_they_are(dtype: torch.dtype) -> None:
    packed = linear(dtype, bias=True, pack=True)
    wide = numbers(9, 2 * IN, dtype=dtype)
    for x in (wide[:, :IN], wide[:, IN:], wide[::2, :IN], numbers(IN, 9, dtype=dtype).T):
        assert_close(packed(x), product(x, bias=True))
        residual = numbers(len(x), 2 * OUT, dtype=dtype, seed=3)[:, OUT:]
        assert_close(packed.added_to(residual, x), residual.double() + product(x, bias=True))


def test_packed_weights_are_a_copy(dtype: torch.dtype) -> None:
    weight = numbers(OUT, IN, dtype=dtype, seed=1)
    x = numbers(3, IN, dtype=dtype)
    for own in (weight, weight.T.contiguous().T):
        packed = FrozenLinear(own, pack=True)
        before = packed(x)
        kept = own.clone()
        own.zero_()
        assert torch.equal(packed(x), before)
        own.copy_(kept)


def test_what_is_not_finite_shows_in_its_own_row(dtype: torch.dtype) -> None:
    packed = linear(dtype, bias=True, pack=True)
    for bad in (float("nan"), float("inf")):
        x = numbers(5, IN, dtype=dtype)
        x[2, 7] = bad
        assert (packed(x).isfinite().all(dim=-1) == torch.tensor([True, True, False, True, True])).all()
        residual = numbers(5, OUT, dtype=dtype, seed=3)
        residual[4, 0] = bad
        assert not packed.added_to(residual, x)[4, 0].isfinite()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_weights_that_are_not_packed_are_multiplied_by_torch(bias: bool, dtype: torch.dtype) -> None:
    plain = linear(dtype, bias=bias, pack=False)
    assert not plain.is_packed
    x = numbers(7, IN, dtype=dtype)
    assert_close(plain(x), product(x, bias=bias))


def test_only_what_onednn_multiplies_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not can_pack(torch.zeros(4, 4, dtype=torch.float64))
    assert not can_pack(torch.zeros(4, 4, dtype=torch.float16))
    assert not can_pack(torch.zeros(4, 4, device="meta"))
    assert can_pack(torch.zeros(4, 4)) == torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not can_pack(torch.zeros(4, 4))
    assert not can_pack(torch.zeros(4, 4, dtype=torch.bfloat16))


def test_what_is_not_packed_needs_no_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch without it, on a Mac say, has none of these operators."""
    monkeypatch.setattr("server.engine.fast.linear._mkldnn", lambda name: pytest.fail(f"{name} is asked for"))
    linear = FrozenLinear(torch.eye(3), pack=False)
    assert torch.equal(linear(torch.ones(1, 3)), torch.ones(1, 3))
    assert torch.equal(linear.added_to(torch.ones(1, 3), torch.ones(1, 3)), 2 * torch.ones(1, 3))
