"""Whatever bytes come as a soft prompt: they are one or are refused as the client's error, soon and without a trace."""

from __future__ import annotations

import gc
import random
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import psutil
import pytest
import torch
from fastapi import UploadFile
from safetensors.torch import load

from server.api.prompts.uploads import unpacked_upload
from server.api.schemas import error_body
from server.contracts import ModelSpec
from server.errors import PreludeError, StoreError
from server.soft_prompts.formats import load_soft_prompts, save_soft_prompt
from server.soft_prompts.manifest import Manifest
from server.soft_prompts.soft_prompt import DTYPES, SoftPrompt
from tests.mutations import Files, make_zip, mutate_files, mutate_zip, shipped_corpus, tiny_corpus
from tests.soak import Soak

MAX_BYTES = 2**20
MAX_VIRTUAL_TOKENS = 32
SLOW = 2.0
"""CPU-seconds, so that other processes make no upload slow; one that waits for ever meets the limit of each test."""
LONGEST_MESSAGE = 2000
LEAK = 512
"""Bytes that a mutation may leave behind on average; forgetting a tensor, a file or a message costs more."""

Case = tuple[Files, ModelSpec]
Upload = Callable[[Files], list[UploadFile]]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, spec: ModelSpec) -> list[Case]:
    """Soft prompts that are taken, each with the model that takes it."""
    shipped = shipped_corpus()
    manifest = Manifest.parse(shipped[0]["manifest.json"])
    assert manifest.base_model is not None
    large = replace(
        spec,
        hidden_size=manifest.hidden_size or 0,
        num_hidden_layers=30,
        num_key_value_heads=3,
        head_dim=64,
        fingerprint=manifest.base_model.fingerprint or "",
        max_model_len=2048,
    )
    tiny = tiny_corpus(tmp_path_factory.mktemp("corpus"))
    return [(files, spec) for files in tiny] + [(files, large) for files in shipped]


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The temporary folder, in which nothing may stay."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


def as_files(files: Files) -> list[UploadFile]:
    return [UploadFile(BytesIO(content), filename=name) for name, content in files.items()]


def on_disk(files: Files) -> list[UploadFile]:
    """As Starlette hands over what is larger than 1 MB."""
    uploads = []
    for name, content in files.items():
        file = tempfile.TemporaryFile()  # noqa: SIM115
        file.write(content)
        file.seek(0)
        uploads.append(UploadFile(file, filename=name))
    return uploads


def take(files: list[UploadFile], spec: ModelSpec) -> list[SoftPrompt] | PreludeError:
    """What becomes of an upload; anything else that is raised is a bug."""
    started = time.process_time()
    try:
        with unpacked_upload(files, MAX_BYTES) as upload:
            return load_soft_prompts(upload.directory, spec, MAX_VIRTUAL_TOKENS)
    except PreludeError as error:
        return error
    finally:
        assert time.process_time() - started < SLOW
        for file in files:
            file.file.close()


def check(outcome: list[SoftPrompt] | PreludeError, spec: ModelSpec) -> None:
    """A soft prompt is whole and can be kept; an error is the client's, and short."""
    if isinstance(outcome, PreludeError):
        assert not isinstance(outcome, StoreError)
        assert 400 <= outcome.status < 500
        body = error_body(outcome)
        assert 0 < len(body["error"]) < LONGEST_MESSAGE
        assert body["remedy"]
        return
    assert outcome
    for soft_prompt in outcome:
        rows, width = soft_prompt.tensor.shape
        assert 1 <= rows <= MAX_VIRTUAL_TOKENS
        assert width == (spec.kv_width if soft_prompt.is_kv_prefix else spec.hidden_size)
        assert soft_prompt.tensor.dtype in DTYPES.values()
        assert bool(torch.isfinite(soft_prompt.tensor).all())
        text = soft_prompt.manifest.to_json()
        assert Manifest.parse(text).to_json() == text
        soft_prompt.manifest.generation.sampling_params({}, room=10, seed=0)
        assert soft_prompt.manifest.render("x").text.count("x") >= 1


def check_growth(run: Callable[[], None], rounds: int, *, by_rss: bool) -> None:
    """Nothing piles up: Python's objects, and in a long run all memory of the process.

    What leaks, leaks at each run. Other threads and caches of the process may keep something once, so a run may grow if
    a later one does not.
    """
    process = psutil.Process()
    gc.collect()
    rss = process.memory_info().rss
    grown = _kept_by(run)
    for _ in range(3):
        if grown >= LEAK * rounds:
            grown = _kept_by(run)
    assert grown < LEAK * rounds, f"{grown:,} bytes of Python objects stay"
    if by_rss:
        grown = process.memory_info().rss - rss
        assert grown < 2 * LEAK * rounds, f"the process has grown by {grown:,} bytes"


def _kept_by(run: Callable[[], None]) -> int:
    """Bytes of Python objects that a run leaves."""
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    try:
        run()
        gc.collect()
        return tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()


def test_the_corpus_is_taken(corpus: list[Case], temporary: Path) -> None:
    for upload in (as_files, on_disk):
        for files, spec in corpus:
            outcome = take(upload(files), spec)
            assert isinstance(outcome, list), outcome
            check(outcome, spec)


@pytest.mark.soak
@pytest.mark.parametrize("packed", [False, True], ids=["files", "zip"])
def test_mutations_are_soft_prompts_or_the_clients_errors(
    soak: Soak, corpus: list[Case], temporary: Path, tmp_path: Path, packed: bool
) -> None:
    taken = refused = 0

    def mutation(dice: random.Random) -> None:
        nonlocal taken, refused
        files, spec = dice.choice(corpus)
        upload: Upload = dice.choice((as_files, on_disk))
        if packed:
            files = files if dice.random() < 0.7 else mutate_files(dice, files)
            files = {"f.zip": mutate_zip(dice, make_zip(dice, files))}
        else:
            files = mutate_files(dice, files)
        try:
            outcome = take(upload(files), spec)
            check(outcome, spec)
        except BaseException:
            save(tmp_path, files)
            raise
        taken += isinstance(outcome, list)
        refused += isinstance(outcome, PreludeError)

    warm_up = soak.count(60, 1000)
    for _ in range(warm_up):
        mutation(soak.random)
    rounds = soak.count(200, 20_000)

    def mutations() -> None:
        for _ in soak.rounds(200, 20_000, f"mutated {'zips' if packed else 'files'}"):
            mutation(soak.random)

    check_growth(mutations, rounds, by_rss=soak.full)
    # Dice that only ever break, or never do, would test nothing.
    assert taken > (warm_up + rounds) / 50
    assert refused > (warm_up + rounds) / 5


def save(folder: Path, files: Files) -> None:
    """Keep what failed; pytest keeps the folder."""
    for name, content in files.items():
        (folder / f"failed-{name}").write_bytes(content)


@pytest.mark.soak
def test_what_is_taken_is_read_as_safetensors_itself_reads_it(
    soak: Soak, corpus: list[Case], tmp_path: Path, temporary: Path
) -> None:
    compared = 0
    for _ in soak.rounds(100, 5000, "against safetensors"):
        files, spec = soak.random.choice(corpus)
        files = mutate_files(soak.random, files)
        outcome = take(as_files(files), spec)
        if isinstance(outcome, PreludeError) or outcome[0].is_multitask_row:
            continue
        [soft_prompt] = outcome
        theirs = load(files["adapter_model.safetensors"])["prompt_embeddings"]
        assert torch.equal(soft_prompt.tensor, theirs)
        save_soft_prompt(tmp_path / "kept", soft_prompt, spec)
        [kept] = load_soft_prompts(tmp_path / "kept", spec, MAX_VIRTUAL_TOKENS)
        assert kept.digest == soft_prompt.digest
        compared += 1
    assert compared
