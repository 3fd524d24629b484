"""Runs the tests that need CUDA, and compares an engine's answers on CUDA with those on a CPU in float32.

In float32 the answers must be equal except for ties. In bfloat16 a model with random weights is often near a tie, so
the comparison is how long the answers agree.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.gpu.devices import device_of
from benchmarks.gpu.stage import Run
from server.engine.engine import Engine
from server.engine.fast.optimise import optimise
from server.engine.model.frozen import FrozenModel

ROOT = Path(__file__).parents[3]
TESTS = ("tests/engine/fast/test_decode_graphs.py", "tests/engine/attention/test_varlen_rows.py")
"""The tests with the marker `cuda`."""
ARCHITECTURES = ("llama", "qwen3", "gemma3_text", "gpt2")
LEAST_AGREEMENT = {torch.float32: 0.95, torch.bfloat16: 0.4}
"""Minimum share of tokens before the first difference; in float32, ties may still differ."""


def measure(run: Run) -> None:
    """Compare answers first, because the tests' packages may not be installed."""
    run.needs("pytest", "hypothesis", "pytest_asyncio", "pytest_timeout")  # also needed to import the tests' builders
    from tests.engine.optimised import rough

    device = device_of(run)
    if run.rehearse:
        run.skip("answers of another device")
    for architecture in ARCHITECTURES[: 1 if run.rehearse else None]:
        expected = _tokens(_engine(rough, architecture, torch.float32, torch.device("cpu")))
        for dtype, least in LEAST_AGREEMENT.items():
            engine = _engine(rough, architecture, dtype, device)
            name = f"{architecture}_{str(dtype).removeprefix('torch.')}"
            share = _agreement(_tokens(engine), expected)
            run.note(**{f"{name}_agrees": share, f"{name}_varlen": engine.runner.varlen is not None})
            run.check(share >= least, f"{name}: answers agree for {share:.2f} of their tokens, not {least}")
    _tests(run)


def _engine(rough: Callable[..., FrozenModel], architecture: str, dtype: torch.dtype, device: torch.device) -> Engine:
    from tests.support import make_engine

    model = rough(architecture, dtype)
    model.module.to(device)  # type: ignore[arg-type]
    on_device = FrozenModel(model.module, model.tokenizer, name=architecture, max_model_len=256)
    optimise(on_device, {"fused"}, None)
    return make_engine(on_device)


def _tokens(engine: Engine) -> dict[str, list[int]]:
    """Generated tokens of chunked prefills, soft prompts of both kinds, and decoding beyond every window."""
    from tests.engine.optimised import answers

    return {name: outcome.token_ids for name, outcome in answers(engine, arrive_every=2).items()}


def _agreement(got: dict[str, list[int]], expected: dict[str, list[int]]) -> float:
    """Share of the expected tokens before the first difference."""
    same = 0
    for name, ids in expected.items():
        pairs = zip(ids, got[name], strict=False)
        same += next((i for i, (one, other) in enumerate(pairs) if one != other), min(len(ids), len(got[name])))
    return same / sum(map(len, expected.values()))


def _tests(run: Run) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider", *TESTS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    last = (done.stdout.strip().splitlines() or ["no output"])[-1]
    run.note(tests=last)
    run.check(done.returncode == 0, f"tests that need CUDA: {last}\n{done.stdout[-1500:]}")
    if run.rehearse:
        run.skip("tests with the marker cuda")
    else:
        run.check("passed" in last and "skipped" not in last, f"tests that need CUDA did not run: {last}")
