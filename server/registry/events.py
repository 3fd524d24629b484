"""One event per change, and the fold that makes the registry's state of them.

The fold is the only place that says what an event means. What answers a task's requests now is the top of its history,
so rolling back is taking the top off. Version numbers come from the fold and are never used twice, also not after a
delete; a deleted task leaves behind what must not be forgotten: its last number, and which content of the inbox was
already published.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from server.errors import StoreError
from server.soft_prompts.manifest import Manifest
from server.soft_prompts.soft_prompt import SoftPrompt

Source = Literal["api", "inbox"]

Traffic = tuple[tuple[int, int], ...]
"""Who answers: (version, weight) by version, weights summing to 100. One pair usually, more in a canary; () nobody."""


def _as_text(value: Any) -> str:
    if not isinstance(value, dict):
        raise ValueError("must be an object")
    return compact_json(value)


JsonText = Annotated[str, BeforeValidator(_as_text)]
"""A JSON object in an event's file, its text in memory: ten thousand parsed manifests would take ten times the room."""

FILLED_IN = (
    "task",
    "digest",
    "prefix_hash",
    "created_at",
    "peft_type",
    "num_virtual_tokens",
    "hidden_size",
    "base_model",
)
"""Fields of a manifest that a download fills in: uploading it again changes nothing."""


def alone(version: int) -> Traffic:
    """One version that answers everything."""
    return ((version, 100),)


class _Strict:
    __slots__ = ()
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")


@dataclass(frozen=True, slots=True)
class Content(_Strict):
    """All that may be known of a version's content without reading its tensor.

    Attributes:
        digest: identity of what changes answers; checked whenever the blob is read.
        prefix_hash: identity of the numbers alone, the key of what the engine caches.
        peft_type: how the tensor is read.
        shape: the tensor's, `[num_virtual_tokens, width]`.
        num_bytes: size of the tensor.
        blob: name of the blob; every version has one of its own, so deleting a version never takes another's.
        manifest: what the soft prompt says about itself, as JSON.
    """

    digest: str
    prefix_hash: str
    peft_type: str
    shape: tuple[int, int]
    num_bytes: int
    blob: str
    manifest: JsonText

    @property
    def num_virtual_tokens(self) -> int:
        """Positions that it takes at the start of every sequence."""
        return self.shape[0]

    @property
    def identity(self) -> str:
        """Digest and what people wrote into the manifest: what differs here is worth a new version."""
        about = {name: value for name, value in json.loads(self.manifest).items() if name not in FILLED_IN}
        return f"{self.digest} {hashlib.sha256(compact_json(about).encode()).hexdigest()[:16]}"

    def parse_manifest(self) -> Manifest:
        """The manifest as an object."""
        return Manifest.parse(self.manifest)


def content_of(soft_prompt: SoftPrompt, blob: str) -> Content:
    """What an event says of a soft prompt."""
    n, width = soft_prompt.tensor.shape
    return Content(
        digest=soft_prompt.digest,
        prefix_hash=soft_prompt.prefix_hash,
        peft_type=soft_prompt.peft_type,
        shape=(n, width),
        num_bytes=soft_prompt.num_bytes,
        blob=blob,
        manifest=compact_json(json.loads(soft_prompt.manifest.to_json())),
    )


@dataclass(frozen=True, slots=True)
class NewVersion(_Strict):
    """A content under a number of a task."""

    task: str
    version: int
    content: Content


@dataclass(frozen=True, slots=True)
class Publish(_Strict):
    """New versions, one or all rows of a multitask soft prompt; `activate` also lets them answer.

    A version that exists already is only marked as what the inbox holds.
    """

    published: tuple[NewVersion, ...]
    activate: bool = True
    kind: Literal["publish"] = "publish"


@dataclass(frozen=True, slots=True)
class Activate(_Strict):
    """A version answers from now on, alone."""

    task: str
    version: int
    kind: Literal["activate"] = "activate"


@dataclass(frozen=True, slots=True)
class SetTraffic(_Strict):
    """Versions share the requests by weight: a canary."""

    task: str
    traffic: Traffic
    kind: Literal["traffic"] = "traffic"


@dataclass(frozen=True, slots=True)
class RollBack(_Strict):
    """What answered before answers again."""

    task: str
    kind: Literal["rollback"] = "rollback"


@dataclass(frozen=True, slots=True)
class DeleteVersion(_Strict):
    """A version that does not answer is gone."""

    task: str
    version: int
    kind: Literal["delete_version"] = "delete_version"


@dataclass(frozen=True, slots=True)
class Delete(_Strict):
    """A task and all its versions are gone."""

    task: str
    kind: Literal["delete"] = "delete"


@dataclass(frozen=True, slots=True)
class Retire(_Strict):
    """The inbox no longer holds these tasks: what came from it stops answering; its versions stay."""

    tasks: tuple[str, ...]
    kind: Literal["retire"] = "retire"


Change = Annotated[
    Publish | Activate | SetTraffic | RollBack | DeleteVersion | Delete | Retire, Field(discriminator="kind")
]


@dataclass(frozen=True, slots=True)
class Event(_Strict):
    """One atomic change: which, when, from where, and by whom (a key's id, or an inbox's place)."""

    number: int
    at: str
    source: Source
    by: str | None
    change: Change

    def to_json(self) -> bytes:
        """The event's file."""
        fields = asdict(self)
        for item in fields["change"].get("published", ()):
            item["content"]["manifest"] = json.loads(item["content"]["manifest"])
        return json.dumps(fields, sort_keys=True, ensure_ascii=False).encode()

    @classmethod
    def parse(cls, data: bytes, name: str) -> Event:
        """Read an event's file.

        Raises:
            StoreError: it is not one, or it is of a kind that only a newer Prelude knows.
        """
        try:
            return _EVENT.validate_json(data)
        except ValidationError as exc:
            problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in exc.errors()[:3])
            raise StoreError(
                f"The store's event {name} cannot be read: {problems}.",
                remedy="Restore it from a backup of the store, or run the version of Prelude that wrote it.",
            ) from exc


_EVENT = TypeAdapter(Event)


@dataclass(frozen=True, slots=True)
class Version:
    """A version of a task as the events tell it."""

    task: str
    number: int
    content: Content
    at: str
    source: Source
    by: str | None


@dataclass
class TaskState:
    """What the events say about one task.

    Attributes:
        versions: by number, those that are not deleted.
        history: who answered, oldest first; the last entry answers now.
        last_version: highest number ever given.
        last_event: number of the last event that changed the task: its ETag.
        inbox_identity: what the inbox last published under this name, so that a restart does not publish it again.
    """

    versions: dict[int, Version] = field(default_factory=dict)
    history: list[Traffic] = field(default_factory=list)
    last_version: int = 0
    last_event: int = 0
    inbox_identity: str | None = None

    @property
    def traffic(self) -> Traffic:
        """Who answers now; () if nobody does."""
        return self.history[-1] if self.history else ()

    @property
    def live_alone(self) -> Version | None:
        """The version that answers everything, or None in a canary or if nobody answers."""
        return self.versions[self.traffic[0][0]] if len(self.traffic) == 1 else None

    @property
    def before(self) -> Traffic:
        """Who answered before those who answer now; () if nobody else did."""
        return next((traffic for traffic in reversed(self.history) if traffic not in ((), self.traffic)), ())

    @property
    def is_from_inbox(self) -> bool:
        """Whether what answers now was put there by the inbox."""
        live = self.live_alone
        return live is not None and live.source == "inbox" and live.content.identity == self.inbox_identity

    def let_answer(self, traffic: Traffic) -> None:
        """Put these on top of the history."""
        if traffic != self.traffic:
            self.history.append(traffic)

    def go_back(self) -> None:
        """Take what answers now off the history, down to what was different and answered something."""
        now = self.traffic
        while self.history and self.history[-1] in ((), now):
            self.history.pop()

    def forget(self, number: int) -> None:
        """Remove a version, and from the history every entry that needs it."""
        del self.versions[number]
        self.history = [traffic for traffic in self.history if number not in dict(traffic)]


class State:
    """The fold of all events: every task that ever was. An event that does not follow changes nothing.

    Attributes:
        tasks: by name.
        last_event: number of the last event that was taken.
        digests: digest -> versions that have it.
        prefixes: prefix hash -> versions that have it.
    """

    def __init__(self, events: Iterable[Event] = ()) -> None:
        """Fold events in the order of their numbers."""
        self.tasks: dict[str, TaskState] = {}
        self.last_event = 0
        self.digests: Counter[str] = Counter()
        self.prefixes: Counter[str] = Counter()
        for event in events:
            self.apply(event)

    def apply(self, event: Event) -> tuple[set[str], list[Version]]:
        """Take one more event.

        Returns:
            The tasks that it changed, and the versions that it removed.

        Raises:
            StoreError: it does not follow from the events before it.
        """
        try:
            removed = self._change(event)
        except KeyError as exc:
            raise StoreError(
                f"The store's event {event.number} changes {exc}, which the events before it do not know.",
                remedy="Restore the store's events from a backup.",
            ) from exc
        self.last_event = event.number
        touched = tasks_of(event.change)
        for name in touched:
            self.tasks[name].last_event = event.number
        for version in removed:
            _decrement(self.digests, version.content.digest)
            _decrement(self.prefixes, version.content.prefix_hash)
        return touched, removed

    def ahead(self, events: Sequence[Event]) -> State:
        """The tasks that these events are about, as they will be once they are taken; this state stays as it is.

        An event that does not follow is left out, with all after it: taking it will say why.
        """
        state = State()
        for name in {name for event in events for name in tasks_of(event.change)} & self.tasks.keys():
            task = self.tasks[name]
            state.tasks[name] = replace(task, versions=dict(task.versions), history=list(task.history))
        with suppress(StoreError):
            for event in events:
                state.apply(event)
        return state

    def next_version(self, task: str) -> int:
        """The number that the next publish under this name gets."""
        return self.tasks[task].last_version + 1 if task in self.tasks else 1

    def _change(self, event: Event) -> list[Version]:
        change = event.change
        if isinstance(change, Publish):
            for item in change.published:
                self._publish(item, event, change.activate)
            return []
        if isinstance(change, Retire):
            for task in [self.tasks[name] for name in change.tasks]:
                self._retire(task)
            return []
        task = self.tasks[change.task]
        removed: list[Version] = []
        match change:
            case Activate():
                task.let_answer(alone(task.versions[change.version].number))
            case SetTraffic():
                task.let_answer(tuple((task.versions[number].number, weight) for number, weight in change.traffic))
            case RollBack():
                task.go_back()
            case DeleteVersion():
                removed = [task.versions[change.version]]
                task.forget(change.version)
            case Delete():
                removed = list(task.versions.values())
                task.versions.clear()
                task.history.clear()
        return removed

    def _publish(self, item: NewVersion, event: Event, activate: bool) -> None:
        task = self.tasks.setdefault(item.task, TaskState())
        if event.source == "inbox":
            task.inbox_identity = item.content.identity
        if item.version in task.versions:
            return
        task.versions[item.version] = Version(item.task, item.version, item.content, event.at, event.source, event.by)
        task.last_version = max(task.last_version, item.version)
        self.digests[item.content.digest] += 1
        self.prefixes[item.content.prefix_hash] += 1
        if activate:
            task.let_answer(alone(item.version))

    @staticmethod
    def _retire(task: TaskState) -> None:
        if task.is_from_inbox:
            task.let_answer(())
        task.inbox_identity = None


def tasks_of(change: Change) -> set[str]:
    """The tasks that a change is about."""
    if isinstance(change, Publish):
        return {item.task for item in change.published}
    return set(change.tasks) if isinstance(change, Retire) else {change.task}


def _decrement(counter: Counter[str], key: str) -> None:
    counter[key] -= 1
    if not counter[key]:
        del counter[key]


def compact_json(value: Any) -> str:
    """JSON without white space."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
