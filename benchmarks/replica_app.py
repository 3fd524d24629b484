"""Replicas for `replicas.py`: a tiny model whose steps take a fixed time, so that cores do not decide."""

from __future__ import annotations

import os
import time
from types import MethodType

from server.deploy.ray_serve import Replica
from server.engine.engine import Engine
from server.engine.sampling.logit_rows import Batch
from server.engine.sampling.sampler import NextToken
from server.settings import Settings


class MeasuredReplica(Replica):
    """Notes when it has taken over an event, and what its prefix cache found."""

    step_seconds = 0.01

    def start_engine(self, settings: Settings) -> Engine:
        """An engine that sleeps in each step, as if a device worked."""
        engine = super().start_engine(settings)
        run = engine.run

        def slow(engine: Engine, batch: Batch) -> list[NextToken]:
            time.sleep(self.step_seconds)
            return run(batch)

        engine.run = MethodType(slow, engine)  # type: ignore[method-assign]
        self._taken: dict[int, float] = {}
        return engine

    async def follow(self, event: int) -> None:
        """See Replica."""
        await super().follow(event)
        now = time.time()
        for number in range(event, 0, -1):
            if number in self._taken:
                break
            self._taken[number] = now

    async def taken(self) -> dict[int, float]:
        """When each event was taken over, by this machine's clock."""
        return self._taken

    async def pid(self) -> int:
        """This replica's process."""
        return os.getpid()

    async def hits_and_misses(self) -> tuple[int, int]:
        """Prefix hits and misses so far."""
        return self._worker.prefixes.hits, self._worker.prefixes.misses
