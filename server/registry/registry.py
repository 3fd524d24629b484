"""The live map: task -> who answers -> soft prompt.

Readers look up one dictionary, on any thread, without a lock. A change is: validate everything -> warm -> blob ->
event -> one assignment; it is durable before it is visible, and visible before it is acknowledged. Whoever holds a soft
prompt keeps the immutable value, so a change never reaches a request in flight.
"""

from __future__ import annotations

import datetime
import logging
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from types import MappingProxyType
from typing import Protocol

from server.core import ModelSpec
from server.errors import InvalidTaskName, PreconditionFailed, PreludeError, StoreError, UnknownTask, VersionUnavailable
from server.registry import plans
from server.registry.events import Change, Content, Event, Publish, Retire, Source, content_of
from server.registry.host_cache import HostCache
from server.registry.plans import Expected, Placed
from server.registry.state import State, Version
from server.registry.store import Store
from server.registry.views import Published, Resolved, Task
from server.soft_prompts.names import check_task_name, names_of, split_version, unknown_task
from server.soft_prompts.soft_prompt import SoftPrompt, check_base_model, check_finite, check_shape

log = logging.getLogger(__name__)

HOST_MEMORY = 2**30


class PrefixHolder(Protocol):
    """What the registry asks of an engine; it knows no more of it."""

    def warm(self, soft_prompts: Sequence[SoftPrompt]) -> None:
        """Compute their prefixes, so that the first request does not pay; raises if one cannot be computed."""

    def drop_unused(self, prefix_hashes: Iterable[str]) -> None:
        """Forget these prefixes, each as the last sequence that uses it ends."""


class NoEngine:
    """For a registry without an engine: nothing is warmed, nothing is held."""

    def warm(self, soft_prompts: Sequence[SoftPrompt]) -> None:
        """Nothing to warm."""

    def drop_unused(self, prefix_hashes: Iterable[str]) -> None:
        """Nothing to drop."""


class Registry:
    """Tasks and their versions for one frozen model.

    Attributes:
        model: the frozen model that soft prompts must fit.
        max_virtual_tokens: the longest soft prompt that is taken.
        host: soft prompts in memory.
        inbox_errors: inbox entry -> why it is not served, as of the last scan.
    """

    def __init__(self, store: Store, model: ModelSpec, max_virtual_tokens: int, host_memory: int = HOST_MEMORY) -> None:
        """Fold the store's events; tensors stay in the store until somebody asks for them.

        Raises:
            StoreError: an event cannot be read.
        """
        self.model = model
        self.max_virtual_tokens = max_virtual_tokens
        self.inbox_errors: dict[str, str] = {}
        self._store = store
        self._engine: PrefixHolder = NoEngine()
        self._changing = threading.Lock()
        self._holding = threading.Lock()
        self._held: Counter[str] = Counter()  # prefix hashes of publishes under way
        self._state = State(store.events())
        self.host = HostCache(host_memory, self._load, lambda digest: digest in self._state.digests)
        self._tasks: dict[str, Task] = {}
        self._broken: dict[str, str] = {}  # blob -> why it cannot be served
        self._refresh(self._state.tasks)
        self._check_all()

    def connect(self, engine: PrefixHolder) -> None:
        """From now on warm what is published, and drop what is deleted; start-up itself warms nothing."""
        self._engine = engine

    # Reading: any thread, no lock.

    def resolve(self, reference: str, key: str = "") -> Resolved:
        """What `task` or `task@version` stands for now.

        Args:
            reference: the name that a request gives.
            key: who asks: in a canary the same key is always on the same side.

        Raises:
            InvalidTaskName: it is not a task's name.
            UnknownTask: it is not live, or has no such version; names the nearest ones.
        """
        name, version = split_version(reference)
        task = self._tasks.get(name)
        if task is None:
            raise unknown_task(name, self._live_names())
        number = task.pick(key) if version is None else version
        if number is None:
            staged = ", ".join(f"{name}@{n}" for n in sorted(task.versions)[-5:])
            raise UnknownTask(f"No version of {name!r} is live.", remedy=f"Activate one, or ask for {staged}.")
        plans.check_version(name, task.versions, number)
        found = task.versions[number]
        return Resolved(name, number, found.content, found.at)

    def cached(self, resolved: Resolved) -> SoftPrompt | None:
        """The soft prompt, if it is in memory."""
        return self.host.get(resolved.content.digest)

    def fetch(self, resolved: Resolved) -> Future[SoftPrompt]:
        """The soft prompt from memory or from the store; the future may raise VersionUnavailable."""
        return self.host.fetch(resolved.content)

    def task(self, name: str) -> Task:
        """One task that has versions, live or not.

        Raises:
            InvalidTaskName, UnknownTask.
        """
        task = self._tasks.get(check_task_name(name))
        if task is None:
            error = unknown_task(name, self._live_names())
            raise UnknownTask(error.message, remedy=self.errors.get(name, error.remedy))
        return task

    def tasks(self) -> list[Task]:
        """All tasks that have versions, by name."""
        return [task for _, task in sorted(self._tasks.items())]

    def is_referenced(self, prefix_hash: str) -> bool:
        """Whether a version has these numbers, or one is about to."""
        # In this order: a publish lets go of what it holds only once its version is in the state.
        return prefix_hash in self._held or prefix_hash in self._state.prefixes

    @property
    def errors(self) -> dict[str, str]:
        """Task or inbox entry -> why it, or a version of it, is not served."""
        broken = dict(self._broken)
        found = {
            task.name: broken[version.content.blob]
            for task in (self._tasks.values() if broken else ())
            for version in task.versions.values()
            if version.content.blob in broken
        }
        return {**found, **self.inbox_errors}

    # Changing: any thread, one at a time. Each starts with a look at what other servers have changed meanwhile, so that
    # neither a refusal nor "it is so already" rests on what was so once.

    def publish(
        self,
        name: str,
        soft_prompts: Sequence[SoftPrompt],
        source: Source,
        *,
        by: str | None = None,
        activate: bool = True,
        expected: Expected = None,
        dry_run: bool = False,
    ) -> Published:
        """Make validated contents versions of a task, or of `name-0`, `name-1`, … if there are several.

        Args:
            name: the task's.
            soft_prompts: validated by `load_soft_prompts`.
            source: who brings them.
            by: the key that it was done with, or the inbox's place.
            activate: let them answer; otherwise they can only be asked for by their number.
            expected: what the client believes of the task.
            dry_run: do everything but the change.

        Raises:
            InvalidTaskName: the name is not one, or is the frozen model's.
            InvalidSoftPrompt: the prefix cannot be computed.
            PreconditionFailed: somebody changed the task meanwhile.
            StoreError: the store refuses; nothing has changed then.
        """
        names = names_of(name, soft_prompts)
        for task in names:
            self._check_free(task)

        def place(contents: Sequence[Content]) -> Placed:
            items = list(zip(names, contents, strict=True))
            return plans.publish(self._state, items, source, activate, expected, self._is_broken, by)

        self.sync()
        with self._changing:  # before any work: most of what is refused is refused here
            placed = place([content_of(soft_prompt, "") for soft_prompt in soft_prompts])
        if placed.change is None:
            return Published(created=False, live=True, tasks=placed.versions, etag=placed.etag)

        def plan() -> Publish | None:
            nonlocal placed
            placed = place(contents)
            return placed.change

        with self._hold(soft_prompt.prefix_hash for soft_prompt in soft_prompts):
            self._engine.warm(soft_prompts)
            if dry_run:
                return Published(created=False, live=False, tasks=placed.versions, etag=placed.etag)
            contents = self._put_blobs(soft_prompts)
            try:
                event = self._change(plan, source, by)
            except PreconditionFailed:
                self._remove(contents)
                raise
        blobs = {item.content.blob for item in placed.versions}
        unused = [content for content in contents if content.blob not in blobs]
        self._remove(unused)
        for soft_prompt in soft_prompts:
            self.host.put(soft_prompt)
        return Published(
            created=len(unused) < len(contents),
            live=activate or contents[0] in unused,
            tasks=placed.versions,
            etag=event.number if event else placed.etag,
        )

    def activate(self, name: str, version: int, *, by: str | None = None, expected: Expected = None) -> Task:
        """Let one version answer, alone; ends a canary.

        Raises:
            UnknownTask, PreconditionFailed, VersionUnavailable, StoreError.
        """
        self.sync()
        self._warm_versions(name, [version])
        self._change(lambda: plans.activate(self._state, name, version, expected), "api", by)
        return self.task(name)

    def set_traffic(
        self, name: str, weights: Mapping[int, int], *, by: str | None = None, expected: Expected = None
    ) -> Task:
        """Let versions answer by weight: a canary.

        Raises:
            InvalidRequest: the weights are not shares of 100.
            UnknownTask, PreconditionFailed, VersionUnavailable, StoreError.
        """
        self.sync()
        with self._changing:
            plans.set_traffic(self._state, name, weights, expected)  # a refusal comes before the work
        self._warm_versions(name, [version for version, weight in weights.items() if weight])
        self._change(lambda: plans.set_traffic(self._state, name, weights, expected), "api", by)
        return self.task(name)

    def roll_back(self, name: str, *, by: str | None = None, expected: Expected = None) -> Task:
        """Let what answered before answer again; twice in a row goes back twice.

        Raises:
            NothingToRollBackTo, UnknownTask, PreconditionFailed, VersionUnavailable, StoreError.
        """
        self.sync()
        with self._changing:
            plans.roll_back(self._state, name, expected)
            before = self._state.tasks[name].before
        self._warm_versions(name, [version for version, _ in before])
        self._change(lambda: plans.roll_back(self._state, name, expected), "api", by)
        return self.task(name)

    def delete_version(self, name: str, version: int, *, by: str | None = None, expected: Expected = None) -> None:
        """Forget a version that does not answer.

        Raises:
            VersionInUse, UnknownTask, PreconditionFailed, StoreError.
        """
        self.sync()
        self._change(lambda: plans.delete_version(self._state, name, version, expected), "api", by)

    def delete(self, name: str, *, by: str | None = None, expected: Expected = None) -> None:
        """Forget a task: no later request finds it, its contents leave the store.

        Raises:
            UnknownTask, PreconditionFailed, StoreError.
        """
        self.sync()
        self._change(lambda: plans.delete(self._state, name, expected), "api", by)

    def retire(self, tasks: Mapping[str, str], *, by: str | None = None) -> tuple[str, ...]:
        """Let go of tasks whose directory left the inbox: what is live from it alone answers no more.

        Args:
            tasks: with the identity of what the inbox published. If it is no longer what an inbox at this place
                published last, another server has taken the task over, and it stays as it is.
            by: the inbox's place.

        Returns:
            The tasks that were let go of.

        Raises:
            StoreError: the store refuses.
        """
        self.sync()
        event = self._change(lambda: plans.retire(self._state, tasks, by), "inbox", by)
        return event.change.tasks if event is not None and isinstance(event.change, Retire) else ()

    def is_from_inbox(self, name: str, soft_prompt: SoftPrompt, by: str | None = None) -> bool:
        """Whether the inbox at this place published this content already, and to do so again would mend nothing."""
        with self._changing:
            state = self._state.tasks.get(name)
            if state is None or state.held_by(by) != content_of(soft_prompt, "").identity:
                return False
            live = state.live_alone
            return live is None or live.content.digest != soft_prompt.digest or not self._is_broken(live.content)

    def from_inbox(self, by: str) -> dict[str, str]:
        """Tasks that the inbox at this very place holds as far as the store knows, with the contents' identities."""
        with self._changing:
            return {name: task.inbox[by] for name, task in self._state.tasks.items() if by in task.inbox}

    def report(self, entry: str, error: str | None) -> None:
        """Take note of why an entry of the inbox is not served, or that nothing is wrong with it any more."""
        others = {name: why for name, why in self.inbox_errors.items() if name != entry}
        self.inbox_errors = others if error is None else {**others, entry: error}

    def sync(self) -> None:
        """Take over what other servers on the same store have changed since; what goes live is warmed first.

        Raises:
            StoreError: the store cannot be read.
        """
        events = self._store.events_after(self._state.last_event)
        if not events:
            return
        with self._changing:
            going_live = self._going_live(events)
        with self._hold(content.prefix_hash for content in going_live):
            warmed: list[SoftPrompt] = []
            for content in going_live:
                try:
                    warmed.append(self.host.fetch(content).result())
                    self._engine.warm(warmed[-1:])
                except PreludeError as exc:  # the change is made all the same: another server has acknowledged it
                    log.warning("a version that another server published cannot be served: %s", exc)
            with self._changing:
                self._apply([event for event in events if event.number > self._state.last_event])
            for soft_prompt in warmed:
                self.host.put(soft_prompt)

    # Within.

    def _change(self, plan: Callable[[], Change | None], source: Source, by: str | None) -> Event | None:
        """Append the event of a plan; a loser of the race for its number reads what won, and plans again.

        Returns:
            The event, or None if there was nothing to change.
        """
        with self._changing:
            while True:
                change = plan()
                if change is None:
                    return None
                now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
                event = Event(self._state.last_event + 1, now, source, by, change)
                if self._store.append(event):
                    removed = self._apply([event])
                    break
                won = self._store.events_after(self._state.last_event)
                if not won:
                    raise StoreError(f"The store refuses event {event.number} and does not show who has it.")
                self._apply(won)
        self._remove(removed)  # without the lock: an object store takes its time for each
        return event

    def _apply(self, events: Sequence[Event]) -> list[Content]:
        """Take events over, with one assignment of the live map at the end.

        Returns:
            Contents that no version names any more.
        """
        touched: set[str] = set()
        removed: list[Version] = []
        try:
            for event in events:
                names, gone = self._state.apply(event)
                touched |= names
                removed += gone
        finally:  # an event that does not follow does not hide those before it
            self._refresh(touched)
            contents = [version.content for version in removed]
            self._drop(contents)
        return contents

    def _drop(self, contents: Sequence[Content]) -> None:
        """Forget, in all memory, contents of versions that are gone, as far as no other version has them."""
        for content in contents:
            self._broken.pop(content.blob, None)
            if content.digest not in self._state.digests:
                self.host.drop(content.digest)
        self._engine.drop_unused({c.prefix_hash for c in contents if not self.is_referenced(c.prefix_hash)})

    def _put_blobs(self, soft_prompts: Sequence[SoftPrompt]) -> list[Content]:
        contents: list[Content] = []
        try:
            contents.extend(map(self._store.put_blob, soft_prompts))
        except StoreError:
            self._remove(contents)
            raise
        return contents

    def _remove(self, contents: Sequence[Content]) -> None:
        """Remove blobs that no event names, or none any more; what the store refuses is left as garbage."""
        try:
            self._store.remove_blobs(contents)
        except StoreError as exc:
            log.warning("blobs that nobody needs are left for later: %s", exc)

    def _refresh(self, names: Collection[str]) -> None:
        """Bring the live map of these tasks in line with the state, by one assignment for all of them."""
        tasks = dict(self._tasks)
        for name in names:
            state = self._state.tasks[name]
            tasks.pop(name, None)
            if state.versions:
                tasks[name] = Task(name, state.traffic, MappingProxyType(dict(state.versions)), state.last_event)
        self._tasks = tasks

    @contextmanager
    def _hold(self, prefix_hashes: Iterable[str]) -> Iterator[None]:
        """Keep prefixes from being dropped while the version that needs them is on its way."""
        hashes = list(prefix_hashes)
        with self._holding:
            self._held.update(hashes)
        try:
            yield
        finally:
            with self._holding:
                self._held.subtract(hashes)
                self._held += Counter()  # without those that nobody holds any more
            self._engine.drop_unused({prefix for prefix in hashes if not self.is_referenced(prefix)})

    def _warm_versions(self, name: str, numbers: Iterable[int]) -> None:
        versions = self.task(name).versions
        for number in numbers:
            plans.check_version(name, versions, number)
            self._engine.warm([self.host.fetch(versions[number].content).result()])

    def _going_live(self, events: Sequence[Event]) -> list[Content]:
        """Contents that answer once these events are taken over, and do not yet."""
        ahead = self._state.ahead(events)
        return [
            task.versions[number].content
            for name, task in ahead.tasks.items()
            for number, _ in task.traffic
            if name not in self._state.tasks or number not in dict(self._state.tasks[name].traffic)
        ]

    def _load(self, content: Content) -> SoftPrompt:
        """Read a content and check that this model can serve it; on a thread of the host cache."""
        try:
            self._check_fit(content)
            soft_prompt = self._store.get_blob(content)
            check_finite(soft_prompt.tensor, self.model.dtype)
        except PreludeError as exc:
            self._broken[content.blob] = str(exc)
            raise VersionUnavailable(f"The version cannot be served: {exc.message}", remedy=exc.remedy) from exc
        self._broken.pop(content.blob, None)
        return soft_prompt

    def _check_fit(self, content: Content) -> None:
        check_base_model(content.parse_manifest(), self.model)
        check_shape(content.peft_type, content.shape, self.model, self.max_virtual_tokens)

    def _check_all(self) -> None:
        """Find out at start what cannot be served, by what events say and which blobs there are."""
        contents = {
            version.content.blob: version.content
            for task in self._state.tasks.values()
            for version in task.versions.values()
        }
        missing = self._store.missing_blobs(contents)
        for blob, content in contents.items():
            if blob in missing:
                self._broken[blob] = f"The store's blob {blob} is missing."
                continue
            try:
                self._check_fit(content)
            except PreludeError as exc:
                self._broken[blob] = str(exc)

    def _is_broken(self, content: Content) -> bool:
        return content.blob in self._broken

    def _live_names(self) -> Iterator[str]:
        return (name for name, task in self._tasks.items() if task.traffic)

    def _check_free(self, name: str) -> None:
        check_task_name(name)
        if name == self.model.name:
            raise InvalidTaskName(f"{name!r} is the frozen model's name.", remedy="Choose another name for the task.")
