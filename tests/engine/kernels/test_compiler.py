"""Machine code is found again by a later start, and never by other sources."""

from __future__ import annotations

from pathlib import Path

import numba
import numpy as np
import pytest

from server.engine import compiled_attention, kernels, operators
from server.engine.kernels.compiler import Compiler
from server.engine.kernels.small import small_loops

SOURCES = sorted(Path(kernels.__file__).parent.glob("*.py"))
SHARED = [Path(str(module.__file__)) for module in (compiled_attention, operators)]


@pytest.fixture
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    return tmp_path


def directory(cache_dir: Path) -> Path:
    """Where kernels would be kept now."""
    kernels.use_kernels.__wrapped__(cache_dir)
    return Path(numba.config.CACHE_DIR)  # type: ignore[attr-defined]


@pytest.mark.usefixtures("cache_dir")
def test_what_was_compiled_is_found_again() -> None:
    """By functions that are made anew, as they are in another process."""
    for hits in (0, 1):
        small = small_loops.__wrapped__(np.float32, keep=True)
        assert [loop._compiled.cache_hits for loop in vars(small).values()] == [hits] * 4


@pytest.mark.usefixtures("cache_dir")
def test_functions_that_differ_in_shape_are_not_taken_for_one_another() -> None:
    """Whatever number numba has counted up to: it is the same for all that are compiled first thing in a process."""

    def made(shape: int) -> str:
        def nothing(arguments):  # type: ignore[no-untyped-def]
            arguments[0] = shape

        return str(Compiler(shape, keep=True).loop(nothing)._compiled.native_name)

    assert "nothing_1" in made(1)
    assert "nothing_2" in made(2)


@pytest.mark.usefixtures("cache_dir")
def test_kernels_are_kept_in_a_directory_of_the_cache(tmp_path: Path) -> None:
    assert directory(tmp_path).parent == tmp_path
    assert directory(tmp_path) == directory(tmp_path)


@pytest.mark.usefixtures("cache_dir")
@pytest.mark.parametrize("source", [*SOURCES, *SHARED], ids=lambda path: path.name)
def test_other_sources_have_another_directory(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, read = directory(tmp_path), Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + (b"#" if path == source else b""))
    assert directory(tmp_path) != before
