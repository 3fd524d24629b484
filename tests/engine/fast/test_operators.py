"""A layer's small work is the same by compiled loops as by torch, to the last rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from server.engine.fast.operators import CompiledOperators, Operators
from server.engine.kernels.library import Kernels

NAN, INF = float("nan"), float("inf")
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float32: 1e-6}
"""Half of the distance between two neighbours, relative; in float32 a few of them."""


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = request.param
    return found


@pytest.fixture(scope="module")
def compiled(kernels: Kernels) -> CompiledOperators:
    return CompiledOperators(kernels)


def numbers(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_rounded(got: torch.Tensor, exact: torch.Tensor, roundings: int = 1) -> None:
    """`got` is what is exact, rounded so many times."""
    torch.testing.assert_close(got.double(), exact, rtol=1.01 * roundings * ROUNDING[got.dtype], atol=1e-6)


def views(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same numbers in memory with gaps, and in another order."""
    wide = torch.cat((x, x + 1), dim=-1)
    return {"whole": x, "part": wide[..., : x.shape[-1]], "turned": x.transpose(0, 1).contiguous().transpose(0, 1)}


@pytest.mark.parametrize("view", ["whole", "part", "turned"])
@pytest.mark.parametrize("shape", [(1, 5), (7, 64), (3, 100), (2, 3, 8), (5, 4, 64)])
@pytest.mark.parametrize("epsilon", [1e-6, 0.5])
def test_the_norm_is_torchs_in_any_shape_and_order(
    epsilon: float, shape: tuple[int, ...], view: str, dtype: torch.dtype, compiled: CompiledOperators
) -> None:
    x, weight = views(numbers(*shape, dtype=dtype))[view], numbers(shape[-1], dtype=dtype, seed=1)
    before = x.clone()
    got = compiled.rms_norm(x, weight, epsilon)
    assert got.dtype == dtype
    assert got.shape == x.shape
    assert_rounded(got, Operators().rms_norm(x.double(), weight.double(), epsilon), roundings=2)
    torch.testing.assert_close(got, Operators().rms_norm(x, weight, epsilon), rtol=3 * ROUNDING[dtype], atol=1e-6)
    assert torch.equal(x, before), "a norm reads"


def test_the_norm_rounds_where_transformers_does(compiled: CompiledOperators) -> None:
    """Bit for bit nearly everywhere: their sums are taken in another order."""
    norm = LlamaRMSNorm(64, eps=1e-5).to(torch.bfloat16)
    norm.weight.requires_grad_(False).copy_(numbers(64, dtype=torch.bfloat16, seed=1))
    x = numbers(200, 64, dtype=torch.bfloat16)
    same = compiled.rms_norm(x, norm.weight, 1e-5) == norm(x)
    assert same.double().mean() > 0.999


@pytest.mark.parametrize("size", [1e-25, 1e-4, 1e17, 3e38])
def test_numbers_of_any_size_are_normed_as_by_torch(size: float, compiled: CompiledOperators) -> None:
    x, weight = numbers(3, 16, dtype=torch.float32).clamp(-1, 1) * size, torch.ones(16)
    torch.testing.assert_close(compiled.rms_norm(x, weight, 1e-6), Operators().rms_norm(x, weight, 1e-6))


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_norm_of_what_is_not_finite_is_not_a_number(
    bad: float, dtype: torch.dtype, compiled: CompiledOperators
) -> None:
    x = numbers(3, 37, dtype=dtype)
    x[1, 36] = bad
    got = compiled.rms_norm(x, torch.ones(37, dtype=dtype), 1e-6)
    assert got[1, 36].isnan()
    assert not (got[1].isfinite() & (got[1] != 0)).any(), "infinity leaves its neighbours nothing"
    assert got[[0, 2]].isfinite().all()


@pytest.mark.parametrize("num_rotated", [0, 1, 4, 5])
@pytest.mark.parametrize("dim", [8, 64])
def test_the_first_heads_are_turned_and_no_other(
    dim: int, num_rotated: int, dtype: torch.dtype, compiled: CompiledOperators
) -> None:
    x = numbers(6, 5, dim, dtype=dtype)
    angle = torch.rand(6, dim, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 6
    cos, sin = angle.cos().float(), angle.sin().float()
    exact = Operators().rotate(x.double(), cos.double(), sin.double(), num_rotated)
    before = x.clone()
    got = compiled.rotate(x, cos, sin, num_rotated)
    assert got.dtype == dtype
    assert_rounded(got, exact)
    assert torch.equal(got[:, num_rotated:], before[:, num_rotated:])


def test_what_is_not_finite_stays_so_when_it_is_turned(dtype: torch.dtype, compiled: CompiledOperators) -> None:
    for bad in (NAN, INF, -INF):
        x = numbers(2, 3, 8, dtype=dtype)
        x[0, 1, 2] = bad
        got = compiled.rotate(x, torch.full((2, 8), 0.6), torch.full((2, 8), 0.8), 3)
        wrong = torch.zeros(x.shape, dtype=torch.bool)
        wrong[0, 1, [2, 6]] = True
        assert torch.equal(~got.isfinite(), wrong)


@pytest.mark.parametrize("width", [1, 16, 37, 1536])
def test_the_gate_is_torchs(width: int, dtype: torch.dtype, compiled: CompiledOperators) -> None:
    gate_up = numbers(5, 2 * width, dtype=dtype) * 4
    before = gate_up.clone()
    got = compiled.silu_gate(gate_up)
    assert got.dtype == dtype
    assert got.shape == (5, width)
    assert_rounded(got, Operators().silu_gate(gate_up.double()))
    torch.testing.assert_close(got, Operators().silu_gate(gate_up), rtol=3 * ROUNDING[dtype], atol=1e-6)
    assert torch.equal(gate_up, before), "a gate reads"


@pytest.mark.parametrize("up", [1.0, -3.0, 1e4])
def test_a_gate_far_from_zero_is_open_or_shut(up: float, dtype: torch.dtype, compiled: CompiledOperators) -> None:
    gates = torch.tensor([-1e10, -1000, -300, -127, -100, -88, -87, -60, -20, -0.0, 0, 20, 60, 88, 100, 1e4, 1e30])
    gate_up = torch.cat((gates, torch.full_like(gates, up))).to(dtype)[None]
    got = compiled.silu_gate(gate_up)
    assert got.isfinite().all()
    assert_rounded(got, Operators().silu_gate(gate_up.double()))


def test_a_gate_that_is_not_finite_is_noticed(dtype: torch.dtype, compiled: CompiledOperators) -> None:
    """Among enough others that a vector unit's lanes all see one."""
    for bad in (NAN, INF, -INF):
        for where in range(40):
            gate_up = numbers(1, 80, dtype=dtype)
            gate_up[0, where] = bad
            got = compiled.silu_gate(gate_up)
            wrong = torch.zeros(1, 40, dtype=torch.bool)
            wrong[0, where] = True
            assert torch.equal(~got.isfinite(), wrong)
            if bad != bad:
                assert got[0, where].isnan()


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_what_passes_a_gate_stays_as_it_is_when_it_is_not_finite(
    bad: float, dtype: torch.dtype, compiled: CompiledOperators
) -> None:
    gate_up = torch.tensor([[1.0, -1.0, 0.5, bad, bad, 2.0]], dtype=dtype)
    expected = Operators().silu_gate(gate_up.double()).to(dtype)
    torch.testing.assert_close(compiled.silu_gate(gate_up), expected, rtol=ROUNDING[dtype], atol=0, equal_nan=True)


@pytest.mark.parametrize("tokens", [7, 8, 9, 300])
def test_threads_change_no_bit_of_many_rows(tokens: int, dtype: torch.dtype, compiled: CompiledOperators) -> None:
    """Enough of them for two threads but for the shortest; each row is torch's, and nothing is left out."""
    width, heads, dim = 1024, 16, 64
    x, weight = numbers(tokens, width, dtype=dtype), numbers(width, dtype=dtype, seed=1)
    gate_up = numbers(tokens, 2 * width, dtype=dtype, seed=2)
    angle = torch.rand(tokens, dim, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 6
    tables = angle.cos(), angle.sin()

    def answers(operators: Operators, x: torch.Tensor, *others: torch.Tensor) -> list[torch.Tensor]:
        weight, gate_up, cos, sin = others
        turned = operators.rotate(x.clone().view(tokens, heads, dim), cos, sin, heads - 3)
        return [operators.rms_norm(x, weight, 1e-5), turned, operators.silu_gate(gate_up)]

    before, by_threads = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            by_threads.append(answers(compiled, x, weight, gate_up, *(table.float() for table in tables)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for others in by_threads[1:] for x, y in zip(others, by_threads[0], strict=True))
    exact = answers(Operators(), x.double(), weight.double(), gate_up.double(), *tables)
    for got, expected, roundings in zip(by_threads[0], exact, (2, 1, 1), strict=True):
        assert_rounded(got, expected, roundings)


def float32s() -> torch.Tensor:
    """Ties between two bfloat16s, their neighbours, infinities, the largest numbers, tiny ones and any others."""
    rng = np.random.default_rng(0)
    upper = np.concatenate([rng.integers(0x0080, 0x7F80, 3000), [0x3F80, 0x3F81, 0x7F7F, 0x7F7E, 0x0080, 0x00FF]])
    lower = np.array([0x0000, 0x0001, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xFFFE, 0xFFFF])
    bits = (upper[:, None] << 16 | lower).reshape(-1)
    bits = np.concatenate([bits, rng.integers(0x00800000, 0x7F800000, 5000), [0x7F800000, 0x7FC00000, 0]])
    bits = np.concatenate([bits, bits | 0x80000000]).astype(np.uint32)
    return torch.from_numpy(bits.view(np.float32).copy())


def test_bfloat16_is_rounded_to_the_nearest_and_of_two_to_the_even_one(compiled: CompiledOperators) -> None:
    """One times any float32, which is all that is left of a rotation by these tables."""
    cos = float32s()
    cos = cos[: len(cos) // 8 * 8].view(-1, 8)
    got = compiled.rotate(torch.ones(len(cos), 1, 8, dtype=torch.bfloat16), cos, torch.zeros_like(cos), 1)
    torch.testing.assert_close(got[:, 0], cos.to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_gate_beyond_any_exponent_is_torchs(dtype: torch.dtype, kernels: Kernels) -> None:
    gates = torch.tensor([-3e38, -1e38, -1e37, -1e30, float("-inf")])
    gate_up = torch.cat((gates, torch.ones_like(gates)))[None].to(dtype)
    got = CompiledOperators(kernels).silu_gate(gate_up)
    torch.testing.assert_close(got.double(), Operators().silu_gate(gate_up.double()), atol=1e-6, rtol=0, equal_nan=True)


@pytest.mark.parametrize("width", [1, 15, 16, 17, 100, 49152])
def test_the_best_token_is_torchs_and_of_equals_the_first(
    width: int, dtype: torch.dtype, compiled: CompiledOperators
) -> None:
    logits = numbers(7, width, dtype=dtype)
    logits[1], logits[2, :], logits[3, width // 2 :] = float("-inf"), 3.0, 9.0
    largest, where = compiled.best(logits)
    expected = logits.float().max(dim=-1)
    assert torch.equal(largest, expected.values)
    assert where.tolist() == [row.tolist().index(max(row.tolist())) for row in logits]


@pytest.mark.parametrize("where", [0, 15, 16, 39, 40])
def test_a_row_of_logits_with_one_that_is_not_a_number_has_no_best(
    where: int, dtype: torch.dtype, compiled: CompiledOperators
) -> None:
    logits = numbers(3, 41, dtype=dtype)
    logits[1, where] = NAN
    assert compiled.best(logits)[0].isnan().tolist() == [False, True, False]
    logits[1, where] = INF
    assert compiled.best(logits)[0].isinf().tolist() == [False, True, False]


@pytest.mark.parametrize("width", [1, 15, 512, 513, 49_152])
@pytest.mark.parametrize("scale", [0.01, 3.0, 80.0])
def test_the_logarithm_of_a_sum_of_exponentials_is_exact(
    scale: float, width: int, dtype: torch.dtype, compiled: CompiledOperators
) -> None:
    """Also in a long row, where sums in float32 lose digits."""
    logits = numbers(3, width, dtype=dtype) * scale
    exact = logits.double().logsumexp(dim=-1)
    torch.testing.assert_close(compiled.log_totals(logits).double(), exact, rtol=2e-7, atol=2e-7)


@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_sum_with_a_number_that_is_not_finite_is_noticed(
    bad: float, dtype: torch.dtype, compiled: CompiledOperators
) -> None:
    logits = numbers(3, 37, dtype=dtype)
    logits[1, 36] = bad
    assert compiled.log_totals(logits).isfinite().tolist() == [True, False, True]


def test_tokens_that_are_ruled_out_add_nothing_to_a_sum(dtype: torch.dtype, compiled: CompiledOperators) -> None:
    logits = numbers(2, 40, dtype=dtype)
    ruled_out = torch.cat((logits, torch.full((2, 25), -INF, dtype=dtype)), dim=-1)
    assert torch.equal(compiled.log_totals(ruled_out), compiled.log_totals(logits))


@pytest.mark.parametrize("are_compiled", [False, True])
def test_a_log_probability_has_the_same_bits_alone_and_beside_other_rows(
    are_compiled: bool, compiled: CompiledOperators
) -> None:
    operators = compiled if are_compiled else Operators()
    logits = numbers(100, 49_152, dtype=torch.float32) * 3
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        together = operators.log_totals(logits)
        alone = torch.cat([operators.log_totals(logits[row : row + 1]) for row in range(len(logits))])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(together, alone)


@pytest.mark.parametrize("indices", [[], [3], [4, 0, 4, 1] * 40])
def test_rows_are_copied_from_a_table(indices: list[int], dtype: torch.dtype, compiled: CompiledOperators) -> None:
    table = numbers(5, 600, dtype=dtype)
    assert torch.equal(compiled.rows(table, torch.tensor(indices, dtype=torch.long)), table[indices])


@pytest.mark.parametrize("wrong", [-1, 5, 2**40])
def test_a_row_beyond_a_table_is_never_read(wrong: int, compiled: CompiledOperators) -> None:
    with pytest.raises(IndexError, match="5 rows"):
        compiled.rows(numbers(5, 8, dtype=torch.float32), torch.tensor([0, wrong]))
