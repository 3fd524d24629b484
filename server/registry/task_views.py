"""What lists show of the registry's state: immutable snapshots, replaced by the next change."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from server.registry.events import NewVersion, Traffic, VersionContent
from server.registry.state import StoredVersion, TaskState


@dataclass(frozen=True)
class Task:
    """One task as everybody sees it until the next change replaces it.

    Attributes:
        traffic: who answers; () if nobody does, because all versions are staged or what was live is retired.
        etag: number of its last event.
    """

    name: str
    traffic: Traffic
    versions: Mapping[int, StoredVersion]
    etag: int

    @classmethod
    def of(cls, name: str, state: TaskState) -> "Task":
        """A task in this state, which later events do not change: they change copies of it."""
        return cls(name, state.traffic, MappingProxyType(state.versions), state.last_event)

    @property
    def live(self) -> StoredVersion | None:
        """The version that answers; in a canary the one that answers most."""
        if not self.traffic:
            return None
        return self.versions[max(self.traffic, key=lambda pair: pair[1])[0]]

    def pick(self, key: str) -> int | None:
        """The version that answers a request with this key: the same as long as the weights are the same.

        Each version owns a range of hash values, in the order of version numbers. If the weight of one of two versions
        grows, it keeps all keys that it had.
        """
        if len(self.traffic) < 2:
            return self.traffic[0][0] if self.traffic else None
        digest = hashlib.sha256(f"{self.name}\n{key}".encode("utf-8", "surrogatepass")).digest()
        point = int.from_bytes(digest[:8], "big") * 100 >> 64
        for version, weight in self.traffic:
            point -= weight
            if point < 0:
                return version
        raise AssertionError("weights sum to 100")


@dataclass(frozen=True)
class Resolved:
    """The version that a task's name resolved to."""

    task: str
    version: int
    content: VersionContent
    at: str


@dataclass(frozen=True)
class Published:
    """Outcome of a publish.

    Attributes:
        created: False if nothing changed: every content was live already, or it was a dry run.
        live: whether the version answers now; not if it is staged.
        tasks: the versions that the contents now have, or would have.
        etag: number of the task's last event.
    """

    created: bool
    live: bool
    tasks: tuple[NewVersion, ...]
    etag: int
