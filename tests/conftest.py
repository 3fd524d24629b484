"""Fixtures that tests of several parts share; models are loaded once per run.

torch, and all that imports it, is imported by fixtures: the process that distributes the tests needs none of it.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import pytest
from hypothesis import settings

from tests import soak as soaking
from tests.soak import Soak

if TYPE_CHECKING:
    from xdist.remote import Producer

    from server.engine.model.frozen import FrozenModel
    from tests.scheduling import SchedulingByNeed


FIRST = tuple(
    f"tests/{name}"
    for name in (
        "test_serve.py",
        "engine/attention/test_compiled_rows.py",
        "api/test_openapi.py",
        "engine/test_isolation.py",
        "test_tutorial.py",
        "engine/test_parity_with_peft.py",
        "api/test_overload.py",
        "test_readme.py",
        "web/",
        "test_examples.py",
        "api/clients/",
        "cli/test_commands.py",
    )
)
"""What takes longest runs first, so that no process of tests works on alone at the end.

On a machine that is new to Prelude, the first test converts the embedded model and compiles the loops for it, which
takes 40 seconds of a core. All others that need them come later and find them; else each process would do the same.
"""

MODULE = pytest.StashKey[Path]()
"""The file of the test that ran last."""


def pytest_addoption(parser: pytest.Parser) -> None:
    soaking.add_options(parser)


def pytest_configure(config: pytest.Config) -> None:
    gc.disable()  # until all is imported and collected, which takes a fifth less time then
    soaking.configure(config)
    settings.register_profile("untimed", deadline=None)  # a busy machine makes no example wrong
    settings.load_profile("untimed")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> SchedulingByNeed | None:
    """Make of --dist=loadfile that of `make test`."""
    if config.option.dist != "loadfile":
        return None
    from tests.scheduling import SchedulingByNeed

    config.option.loadscopereorder = False
    return SchedulingByNeed(config, log)


def pytest_report_header(config: pytest.Config) -> str:
    return f"soak: {'full' if config.option.soak else 'short'}, --soak-seed={config.option.soak_seed}"


def pytest_collection_finish() -> None:
    """Let no collection look through what is imported: each would stop the servers of tests for a second."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Exempt from collection what outlives a module of tests: models, libraries, what numba compiled."""
    if item.path != item.config.stash.get(MODULE, None):
        item.config.stash[MODULE] = item.path
        gc.collect()
        gc.freeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    import torch

    items.sort(key=lambda item: next((i for i, name in enumerate(FIRST) if item.nodeid.startswith(name)), len(FIRST)))
    soaking.lift_timeouts(config, items)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda") is not None:
                item.add_marker(pytest.mark.skip(reason="needs CUDA, and there is none"))


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    """Tiny models are slower on many threads than on one; where tests run in several processes, each gets one."""
    import torch

    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, torch.get_num_threads()))


@pytest.fixture(scope="session", autouse=True)
def nulls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of the nulls of this run, of all its processes, instead of the one in the user's cache."""
    from server.interpret.null_cache import NullCache
    from server.settings import Settings

    run = tmp_path_factory.getbasetemp()
    folder = (run.parent if "PYTEST_XDIST_WORKER" in os.environ else run) / "nulls"
    users = Settings.load().cache_dir / "interpretation"
    true = NullCache.__init__

    def initialise(self: NullCache, directory: Path | None = None) -> None:
        true(self, folder if directory == users else directory)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NullCache, "__init__", initialise)
        yield folder


@pytest.fixture(scope="session")
def _screen(pytestconfig: pytest.Config) -> Iterator[TextIO]:
    """The stderr that pytest was started with: while tests run, descriptor 2 is a file of its own."""
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")
    assert capture is not None
    with capture.global_and_fixture_disabled():
        descriptor = os.dup(2)
    with os.fdopen(descriptor, "w", buffering=1) as screen:
        yield screen


@pytest.fixture
def soak(request: pytest.FixtureRequest, _screen: TextIO) -> Soak:
    """How much a storm does: short, or with --soak in full."""
    options = request.config.option
    request.node.add_report_section("setup", "dice", f"--soak-seed={options.soak_seed}")
    return Soak(options.soak, options.soak_seed, request.node.nodeid, _screen)


@pytest.fixture(scope="session")
def tiny() -> FrozenModel:
    """A tiny llama in float64, in which batching changes nothing that a test could see."""
    from tests.support import tiny_model

    return tiny_model()


@pytest.fixture(scope="session")
def tiny32() -> FrozenModel:
    """A tiny llama in float32."""
    import torch

    from tests.support import tiny_model

    return tiny_model(dtype=torch.float32)


@pytest.fixture(scope="session")
def smollm2() -> FrozenModel:
    """The embedded model in float32, the dtype in which answers are exact, as transformers loads it."""
    from server.engine.model.frozen import FrozenModel
    from server.settings import Settings

    return FrozenModel.load(Settings.load(dtype="float32"))


@pytest.fixture(scope="session")
def served_smollm2() -> FrozenModel:
    """The same as a server runs it, with everything that makes it faster."""
    from tests.support import fast_smollm2

    return fast_smollm2("float32")


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model as other processes load it."""
    from tests.jobs.support import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def served_tiny(model_directory: Path) -> dict[str, str]:
    """Settings with which `prelude serve` runs that model: it starts in a fifth of the embedded model's time."""
    return {"PRELUDE_MODEL": str(model_directory), "PRELUDE_MAX_MODEL_LEN": "128", "OMP_NUM_THREADS": "1"}
