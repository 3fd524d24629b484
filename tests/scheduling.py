"""Which process of `make test` runs a file: one that already has the costly things that the file needs."""

from __future__ import annotations

from xdist.scheduler import LoadScopeScheduling
from xdist.workermanage import WorkerController

NEEDS = {
    "servers": (  # a process from which servers are forked: eight seconds of a core; and a browser, beside a server
        "test_serve.py",
        "test_tutorial.py",
        "test_examples.py",
        "web/",
        "jobs/",
        "chaos/",
        "api/training/",
        "api/jobs/",
        "api/test_revoked.py",
        "cli/test_commands.py",
        "cli/test_jobs.py",
        "registry/test_processes.py",
        "registry/test_kill.py",
    ),
    "model": (  # the embedded one: three seconds
        "test_interpretation_example.py",
        "engine/test_isolation.py",
        "engine/test_parity_smollm2.py",
        "engine/model/test_weights.py",
        "engine/text/",
        "train/test_start.py",
        "api/clients/test_lm_eval.py",
    ),
}
"""What files share, beside the files; whichever process begins with one of them runs them all, unless it is late."""


def need_of(file: str) -> str | None:
    """What of NEEDS a file needs."""
    return next((need for need, files in NEEDS.items() if file.removeprefix("tests/").startswith(files)), None)


class SchedulingByNeed(LoadScopeScheduling):  # type: ignore[misc]  # xdist has no types for others
    """Whole files, in the order in which they were collected, except that those of one need stay together."""

    def _split_scope(self, nodeid: str) -> str:
        return nodeid.partition("::")[0]

    def _assign_work_unit(self, node: WorkerController) -> None:
        self.workqueue.move_to_end(self._best_for(node), last=False)
        super()._assign_work_unit(node)

    def _best_for(self, node: WorkerController) -> str:
        """The first file whose need this process has; else one whose need none has, or without; else any."""
        needs_of = {other: set(map(need_of, files)) - {None} for other, files in self.assigned_work.items()}
        taken = set().union(*needs_of.values())

        def rank(file: str) -> int:
            need = need_of(file)
            return 0 if need in needs_of[node] else 2 if need in taken else 1

        best: str = min(self.workqueue, key=rank)
        return best
