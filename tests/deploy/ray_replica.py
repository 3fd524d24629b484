"""A replica for tests of Ray Serve: its steps take time, and it can miss announcements. Ray's processes import it."""

from __future__ import annotations

import os
import time
from types import MethodType

from server.deploy.ray_serve import Replica
from server.engine.engine import Engine
from server.engine.sampling.logit_rows import Batch
from server.engine.sampling.sampler import NextToken
from server.settings import Settings

STEP_SECONDS = 0.03


class TestedReplica(Replica):
    """See the module."""

    __test__ = False  # no class of tests
    _is_deaf = False

    def start_engine(self, settings: Settings) -> Engine:
        """An engine that sleeps in each step, as if a device worked: the cores do not decide."""
        engine = super().start_engine(settings)
        run = engine.run

        def slow(engine: Engine, batch: Batch) -> list[NextToken]:
            time.sleep(STEP_SECONDS)
            return run(batch)

        engine.run = MethodType(slow, engine)  # type: ignore[method-assign]
        return engine

    async def follow(self, event: int) -> None:
        """See Replica."""
        if not self._is_deaf:
            await super().follow(event)

    async def miss_announcements(self, misses: bool) -> None:
        """Whether announcements are lost from now on."""
        self._is_deaf = misses

    async def live_version(self, task: str) -> int | None:
        """The version that this replica would answer with now."""
        found = self._registry.find(task)
        return None if found is None or found.live is None else found.live.number

    async def running(self) -> int:
        """Sequences that have a slot or wait for one."""
        scheduler = self._worker.scheduler
        return len(scheduler.running) + len(scheduler.waiting)

    async def pid(self) -> int:
        """This replica's process."""
        return os.getpid()
