"""Builds the image and runs it; `make test-image`, or `pytest tests/image`, with docker or podman.

`make test` does not even import these tests: they need an engine, a network and some minutes. The engine is that of
deploy/build_image.sh, which also takes the variables for a build behind a proxy; BUILD_OPTIONS are more options of the
engine's build.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.image.engine import Engine, Running

HERE = Path(__file__).parent


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    """Collect these tests only where they are named."""
    named = [Path(config.invocation_params.dir, argument.partition("::")[0]).resolve() for argument in config.args]
    return None if any(path == HERE or HERE in path.parents for path in named) else True


@pytest.fixture(scope="session")
def engine() -> Engine:
    """The engine, which has built prelude-server:cpu."""
    engine = Engine.find()
    print(engine.build())
    return engine


@pytest.fixture(scope="module")
def server(engine: Engine) -> Iterator[Running]:
    """A server with two keys, restricted as docs/operations.md recommends."""
    with Running.start(engine, "--init") as running:
        yield running
