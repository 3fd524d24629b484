"""A replica for tests of Ray Serve: its steps take time, and it can miss announcements. Ray's processes import it."""

from __future__ import annotations

from benchmarks.replica_app import MeasuredReplica


class TestedReplica(MeasuredReplica):
    """See the module."""

    __test__ = False  # no class of tests
    step_seconds = 0.03
    _is_deaf = False

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
