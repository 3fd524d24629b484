"""The inner loops of attention are numpy's products, and touch nothing but what they are given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np
import pytest
import torch

from server.engine.kernels.arithmetic import REORDERED
from server.engine.kernels.vectors import add_products, dot_products, lanes, largest

NAN = float("nan")


class Shape(NamedTuple):
    rows: int
    width: int
    stored: str


SHAPES = [
    Shape(1, 4, "float32"),
    Shape(8, 4, "bfloat16"),
    Shape(2, 8, "bfloat16"),
    Shape(3, 12, "float32"),
    Shape(4, 16, "bfloat16"),
    Shape(3, 64, "bfloat16"),
    Shape(7, 80, "float32"),
    Shape(1, 96, "bfloat16"),
    Shape(2, 128, "float32"),
]


class Loops(NamedTuple):
    shape: Shape
    dot: Callable[..., None]
    add: Callable[..., None]


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: "-".join(map(str, shape)))
def loops(request: pytest.FixtureRequest) -> Loops:
    shape: Shape = request.param
    rows, width, _ = shape

    @numba.njit(fastmath=REORDERED)
    def dot(q: Any, q0: Any, k: Any, k0: Any, k_step: Any, out: Any, out0: Any, out_step: Any) -> None:
        dot_products(rows, width, q, q0, k, k0, k_step, out, out0, out_step, None)

    @numba.njit(fastmath=REORDERED)
    def add(a: Any, a0: Any, a_step: Any, b: Any, b0: Any, b_step: Any, c: Any, c0: Any, n: Any) -> None:
        add_products(rows, width, a, a0, a_step, b, b0, b_step, c, c0, n, None)

    return Loops(shape, dot, add)


class Matrix:
    """Rows somewhere in a flat array in which everything else is NaN."""

    def __init__(self, rows: int, width: int, gap: int, stored: str = "float32", seed: int = 0) -> None:
        self.first, self.step = 5, width + gap
        numbers = np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)
        flat = torch.full((self.first + max(rows, 1) * self.step + 5,), NAN)
        self.inside = torch.zeros(len(flat), dtype=torch.bool)
        for row in range(rows):
            self.inside[self.first + row * self.step :][:width] = True
        flat[self.inside] = torch.from_numpy(numbers).reshape(-1)
        kept = flat.to(getattr(torch, stored))
        self.numbers = kept[self.inside].view(rows, width).double().numpy()
        self.flat = kept.view(torch.uint16).numpy() if stored == "bfloat16" else kept.numpy()

    def read(self) -> np.ndarray:
        """What is in the rows now; between them, nothing has been written to."""
        found = torch.from_numpy(self.flat)
        assert found[~self.inside].isnan().all()
        return found[self.inside].view(self.numbers.shape).double().numpy()


@pytest.mark.parametrize("gap", [0, 3, 64])
def test_dot_products_are_numpys(gap: int, loops: Loops) -> None:
    rows, width, stored = loops.shape
    at_once = lanes(width)
    q, k, out = Matrix(rows, width, 0), Matrix(at_once, width, gap, stored, seed=1), Matrix(rows, at_once, gap, seed=2)
    loops.dot(q.flat, q.first, k.flat, k.first, k.step, out.flat, out.first, out.step)
    np.testing.assert_allclose(out.read(), q.numbers @ k.numbers.T, rtol=1e-5, atol=1e-5)
    assert np.array_equal(q.read(), q.numbers)


@pytest.mark.parametrize("gap", [0, 3, 64])
@pytest.mark.parametrize("n", [0, 1, 2, 17, 64])
def test_matrix_products_are_added_as_by_numpy(n: int, gap: int, loops: Loops) -> None:
    rows, width, stored = loops.shape
    a, b, c = Matrix(rows, n, gap), Matrix(n, width, gap, stored, seed=1), Matrix(rows, width, 0, seed=2)
    loops.add(a.flat, a.first, a.step, b.flat, b.first, b.step, c.flat, c.first, n)
    np.testing.assert_allclose(c.read(), c.numbers + a.numbers @ b.numbers, rtol=1e-5, atol=1e-5)
    assert np.array_equal(a.read(), a.numbers)


def test_a_row_of_a_product_does_not_depend_on_the_others(loops: Loops) -> None:
    rows, width, stored = loops.shape
    b, answers = Matrix(40, width, 0, stored, seed=1), []
    for number in (1.0, NAN):
        a, c = Matrix(rows, 40, 0), Matrix(rows, width, 0, seed=2)
        a.flat[a.first + a.step : a.first + rows * a.step] *= number
        loops.add(a.flat, a.first, a.step, b.flat, b.first, b.step, c.flat, c.first, 40)
        answers.append(c.flat[c.first :][:width].copy())
    assert np.array_equal(answers[0], answers[1])


@pytest.mark.parametrize("at_once", [4, 8, 16, 64])
def test_the_largest_is_found_wherever_it_is(at_once: int) -> None:
    @numba.njit(fastmath=REORDERED)
    def found(x: Any, first: Any, n: Any) -> Any:
        return largest(at_once, x, first, n)

    rng = np.random.default_rng(0)
    for n in (at_once, 3 * at_once):
        for place in range(n):
            flat = np.full(n + 10, np.inf, np.float32)  # what lies around it is larger still
            flat[5:-5] = rng.normal(size=n) - 10
            flat[5 + place] = -3
            assert found(flat, 5, n) == -3
            flat[5 + (place + 1) % n] = NAN
            assert found(flat, 5, n) == -3
    assert found(np.full(at_once, NAN, np.float32), 0, at_once) == -np.inf
    assert found(np.full(at_once, -np.inf, np.float32), 0, at_once) == -np.inf
    assert found(np.full(at_once, 3, np.float32), 0, 0) == -np.inf


def test_a_vector_divides_a_row() -> None:
    widths = [4, 8, 12, 16, 20, 64, 80, 96, 128, 256]
    assert [lanes(width) for width in widths] == [4, 8, 4, 16, 4, 16, 16, 16, 16, 16]
