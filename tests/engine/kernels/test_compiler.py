"""Machine code is found again by a later start, and never by other sources."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path
from types import FunctionType

import numba
import numpy as np
import pytest

from server.engine.kernels import library
from server.engine.kernels.compiler import Compiler
from server.engine.kernels.small import small_loops
from tests.soak import Soak

SOURCES = sorted(Path(library.__file__).parent.glob("*.py"))


@pytest.fixture
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    return tmp_path


def directory(cache_dir: Path) -> Path:
    """Where kernels would be kept now."""
    library.use_kernels.__wrapped__(cache_dir)
    return Path(numba.config.CACHE_DIR)  # type: ignore[attr-defined]


@pytest.mark.usefixtures("cache_dir")
def test_what_was_compiled_is_found_again() -> None:
    """By functions that are made anew, as they are in another process."""
    for hits in (0, 1):
        small = small_loops.__wrapped__(np.float32, keep=True)
        assert {loop._compiled.cache_hits for loop in vars(small).values()} == {hits}


@pytest.mark.usefixtures("cache_dir")
def test_what_one_clone_compiled_another_clone_of_the_same_sources_finds(tmp_path: Path) -> None:
    def nothing(arguments: object) -> None:
        pass

    clone = tmp_path / "clone" / Path(__file__).name
    clone.parent.mkdir()
    clone.write_bytes(b"# of another time\n")
    hits = []
    for path in (Path(__file__), clone):
        code = nothing.__code__.replace(co_filename=str(path))
        loop = Compiler("cloned", keep=True).loop(FunctionType(code, globals(), "nothing"))
        hits.append(loop._compiled.cache_hits)
    assert hits == [0, 1]


def test_no_garbage_is_collected_while_a_loop_is_compiled() -> None:
    """Collections look through all that the compiler builds, time after time."""
    seen: list[str] = []

    def watch(phase: str, info: dict[str, int]) -> None:
        seen.append(phase)

    def nothing(arguments: object) -> None:
        pass

    before = gc.get_threshold()
    gc.set_threshold(10)
    gc.callbacks.append(watch)
    try:
        compiler = Compiler("uncollected", keep=False)
        seen.clear()
        compiler.loop(nothing)
        during = len(seen)
    finally:
        gc.callbacks.remove(watch)
        gc.set_threshold(*before)
    assert during < 10, "a few before and after it"
    assert gc.isenabled()


ATTEND = """
import sys, torch
from pathlib import Path
from types import FunctionType
from server.engine.memory.kv_cache import KVCache
from server.engine.memory.slots import Slot
from server.engine.attention.compiled_rows import CompiledAttention, CompiledRows
from server.engine.kernels.library import use_kernels

from server.engine.attention.cached_rows import Span
from server.engine.model.frozen import FrozenModel
from tests.support import TINY, byte_tokenizer, tiny_module

TINY["llama"] |= {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "num_hidden_layers": 1}
module = tiny_module(dtype=torch.float32, attention="prelude")
with torch.no_grad():
    [weight.mul_(0.1) for weight in module.parameters() if weight.dim() > 1]  # so that a token attends to many
model = FrozenModel(module, byte_tokenizer(), name="tiny", max_model_len=128)
kv_cache = KVCache(model.spec, num_slabs=2)
kernels = use_kernels(Path(sys.argv[1]))
kernels.small(torch.float32)
attention = CompiledAttention.over(kv_cache, model.attention_rules, kernels)
with torch.inference_mode():
    for start, tokens in ((0, 100), (100, 1)):
        rows = CompiledRows(attention, [Span(Slot(128, 0), start, tokens)])
        hidden = model.embed(torch.arange(tokens) % 7)
        last = torch.tensor([tokens - 1])
        print(model.forward(hidden, rows.position_ids, rows, last).float().numpy().tobytes().hex())
"""


@pytest.mark.soak
def test_what_was_just_compiled_computes_the_bits_of_what_is_read_later(soak: Soak, tmp_path: Path) -> None:
    """A function that is called, and not made a part of the loop, is another one in the process that compiled it."""
    soak.only_in_full()

    def attend() -> str:
        command = [sys.executable, "-c", ATTEND, str(tmp_path)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        return run.stdout

    assert attend() == attend()


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
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_other_sources_have_another_directory(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, read = directory(tmp_path), Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + (b"#" if path == source else b""))
    assert directory(tmp_path) != before
