"""Changes of the live map: by requests to this server, and by other servers on the same store.

A change is: validate everything -> warm -> blob -> event -> one assignment; it is durable before it is visible, and
visible before it is acknowledged. A change never reaches a request in flight.
"""

import datetime
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence

from server.contracts import ModelSpec
from server.errors import InvalidTaskName, PreconditionFailed, PreludeError, StoreError, StoreFull
from server.registry import commands as plans
from server.registry.bounded import BoundedLock, result_of
from server.registry.commands import Expected, PublishPlan
from server.registry.events import Change, Event, Publish, Retire, Source, VersionContent, content_of, contents_of
from server.registry.live_map import HOST_MEMORY, LiveMap
from server.registry.state import RegistryState, TaskState
from server.registry.store import Behind, Store
from server.registry.task_views import Published, Task
from server.registry.unreadable_events import Entry
from server.soft_prompts.names import check_task_name, names_of
from server.soft_prompts.soft_prompt import SoftPrompt

log = logging.getLogger(__name__)

EVENTS_AT_ONCE = 64
"""Maximum number of other servers' events applied at once, which limits how many soft prompts are in memory."""

WARMERS = 4
WARM_SECONDS = 10.0
"""How long other servers' changes wait until the contents that they let answer are warm."""


class Registry(LiveMap):
    """Tasks and their versions for one frozen model: the live map, and all that can be done to it.

    Changes come from any thread, and are made one at a time. Before each change the registry reads the other servers'
    events, so that neither a refusal nor "nothing to change" is based on an outdated state.
    """

    def __init__(self, store: Store, model: ModelSpec, max_virtual_tokens: int, host_memory: int = HOST_MEMORY) -> None:
        super().__init__(store, model, max_virtual_tokens, host_memory)
        self.on_change: Callable[[int], None] = lambda event: None
        """Called with the number of an event that this server has just added, on any thread."""
        self._changing = BoundedLock()
        self._syncing = BoundedLock()  # if several threads sync, one reads and warms; requests need no lock

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
            soft_prompts: validated by `load_soft_prompts`.
            by: the key that it was done with, or the inbox's place.
            activate: let them answer; otherwise they can only be asked for by their number.
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

        def plan_publish(contents: Sequence[VersionContent]) -> PublishPlan:
            items = list(zip(names, contents, strict=True))
            return plans.publish(self._state, items, source, activate, expected, self._contents.is_broken, by)

        self.sync()
        with self._changing:  # before any work: most of what is refused is refused here
            planned = plan_publish(contents_of(soft_prompts, [""] * len(soft_prompts)))
        if planned.change is None:
            return Published(created=False, live=True, tasks=planned.versions, etag=planned.etag)

        def plan() -> Publish | None:
            nonlocal planned
            planned = plan_publish(contents)
            return planned.change

        with self._hold(soft_prompt.prefix_hash for soft_prompt in soft_prompts):
            self._engine.warm(soft_prompts)
            if dry_run:
                return Published(created=False, live=False, tasks=planned.versions, etag=planned.etag)
            contents = self._put_blobs(soft_prompts)
            live = self._change_with(contents, plan, source, by)
        blobs = {item.content.blob for item in planned.versions}
        unused = [content for content in contents if content.blob not in blobs]
        self._remove(unused)
        for soft_prompt in soft_prompts:
            self.host.put(soft_prompt)
        created, is_live = len(unused) < len(contents), activate or contents[0] in unused
        return Published(created=created, live=is_live, tasks=planned.versions, etag=live[names[0]].last_event)

    def activate(self, name: str, version: int, *, by: str | None = None, expected: Expected = None) -> Task:
        """Let one version answer, alone; ends a canary.

        Raises UnknownTask, PreconditionFailed, VersionUnavailable or StoreError.
        """
        return self._let_answer(name, (version,), lambda: plans.activate(self._state, name, version, expected), by)

    def set_traffic(
        self, name: str, weights: Mapping[int, int], *, by: str | None = None, expected: Expected = None
    ) -> Task:
        """Let versions answer by weight: a canary.

        Raises InvalidRequest if the weights are not shares of 100; else as `activate`.
        """
        wanted = tuple(version for version, weight in weights.items() if weight)
        return self._let_answer(name, wanted, lambda: plans.set_traffic(self._state, name, weights, expected), by)

    def roll_back(self, name: str, *, by: str | None = None, expected: Expected = None) -> Task:
        """Let what answered before answer again; twice in a row goes back twice.

        Raises NothingToRollBackTo, UnknownTask, PreconditionFailed, VersionUnavailable or StoreError.
        """
        return self._let_answer(name, (), lambda: plans.roll_back(self._state, name, expected), by)

    def delete_version(self, name: str, version: int, *, by: str | None = None, expected: Expected = None) -> None:
        """Forget a version that does not answer; raises VersionInUse, UnknownTask, PreconditionFailed or StoreError."""
        self.sync()
        self._change(lambda: plans.delete_version(self._state, name, version, expected), "api", by)

    def delete(self, name: str, *, by: str | None = None, expected: Expected = None) -> None:
        """Forget a task: no later request finds it, its contents leave the store.

        Raises UnknownTask, PreconditionFailed or StoreError.
        """
        self.sync()
        self._change(lambda: plans.delete(self._state, name, expected), "api", by)

    def retire(self, tasks: Mapping[str, str], *, by: str | None = None) -> tuple[str, ...]:
        """Retire tasks whose directory left the inbox: a version that came only from that inbox stops answering.

        Args:
            tasks: with the identity of what the inbox published. If it is no longer what an inbox at this place
                published last, another server has taken the task over, and it stays as it is.
            by: the inbox's place.

        Returns:
            The tasks that were retired.

        Raises:
            StoreError: the store refuses.
        """
        self.sync()
        event, _ = self._change(lambda: plans.retire(self._state, tasks, by), "inbox", by)
        return event.change.tasks if event is not None and isinstance(event.change, Retire) else ()

    def is_from_inbox(self, name: str, soft_prompt: SoftPrompt, by: str | None = None) -> bool:
        """Whether the inbox at this place has published this content, and publishing it again would change nothing."""
        with self._changing:
            state = self._state.tasks.get(name)
            if state is None or state.inbox_identity(by) != content_of(soft_prompt, "").identity:
                return False
            live = state.live_alone
            return (
                live is None or live.content.digest != soft_prompt.digest or not self._contents.is_broken(live.content)
            )

    def from_inbox(self, by: str) -> dict[str, str]:
        """Tasks that the inbox at this place contains according to the store, with their contents' identities."""
        with self._changing:
            return {name: task.inbox[by] for name, task in self._state.tasks.items() if by in task.inbox}

    def sync(self) -> None:
        """Take over what other servers on the same store have changed since; what goes live is warmed first.

        Raises StoreError if the store cannot be read.
        """
        with self._syncing:
            try:
                while events := self._store.events_after(self._state.last_event, EVENTS_AT_ONCE):
                    self._take_over(events)
                    if len(events) < EVENTS_AT_ONCE:
                        return
            except Behind as exc:
                log.warning("%s The store is loaded again.", exc)
                state = self._store.load()
                with self._changing:
                    if state.last_event > self._state.last_event:
                        self._replace(state)

    @property
    def last_event(self) -> int:
        """Number of the last event of the store that this server has taken over."""
        return self._state.last_event

    def compact(self) -> None:
        """Write a snapshot now and then, and remove the events that old ones replace; raises StoreError."""
        self._store.compact(self._copy_state, self._state.last_event, len(self._state.tasks))

    # Within.

    def _copy_state(self) -> RegistryState:
        with self._changing:
            return self._state.copy()

    def _take_over(self, events: Sequence[Entry]) -> None:
        """Apply other servers' events, except those that a change on this server has applied in the meantime."""

        def news() -> list[Entry]:
            return [event for event in events if event.number > self._state.last_event]

        with self._changing:
            going_live = self._going_live(news())
        with self._hold(content.prefix_hash for content in going_live):
            warmed = self._warm_in_time(going_live)
            with self._changing:
                self._apply(news())
            for soft_prompt in warmed:
                self.host.put(soft_prompt)

    def _warm_in_time(self, contents: Sequence[VersionContent]) -> list[SoftPrompt]:
        """Warm versions that other servers have made live; on threads, so that one that hangs delays no later event.

        Returns those that are warm. The others will answer all the same, as their change was acknowledged.
        """
        waiting, warmed = deque(contents), list[SoftPrompt]()

        def warm() -> None:
            while waiting:
                try:
                    soft_prompt = self.host.fetch(waiting.popleft()).result()
                    self._engine.warm([soft_prompt])
                    warmed.append(soft_prompt)
                except IndexError:  # another thread took the last one
                    return
                except PreludeError as exc:
                    log.warning("a version that another server published cannot be served: %s", exc)
                except Exception:  # a bug of ours, which must not hide the change either
                    log.exception("a version that another server published cannot be warmed")

        threads = [threading.Thread(target=warm, name="warm", daemon=True) for _ in contents[:WARMERS]]
        end = time.monotonic() + WARM_SECONDS
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))
        if any(thread.is_alive() for thread in threads):
            waiting.clear()
            log.warning("versions that another server published go live before they are warm")
        return list(warmed)

    def _let_answer(
        self, name: str, versions: Collection[int], plan: Callable[[], Change | None], by: str | None
    ) -> Task:
        """Warm the versions that the planned change makes live, then make the change. All checks come first.

        This server must be able to serve every version that the plan names, even one that is live already.
        """
        self.sync()
        with self._changing:
            change = plan()
            for version in versions:
                self._contents.require_fit(self._state.tasks[name].versions[version].content)
            ahead = [] if change is None else [Event(self._state.last_event + 1, "", "api", by, change)]
            going_live = self._going_live(ahead)
        self._engine.warm([result_of(self.host.fetch(content)) for content in going_live])
        return Task.of(name, self._change(plan, "api", by)[1][name])

    def _change_with(
        self, contents: Sequence[VersionContent], plan: Callable[[], Change | None], source: Source, by: str | None
    ) -> Mapping[str, TaskState]:
        """Make a change that needs new blobs and return the new live map; without an event the blobs are removed."""
        try:
            return self._change(plan, source, by)[1]
        except (PreconditionFailed, StoreFull):  # after any other error there may be an event that names them
            self._remove(contents)
            raise

    def _change(
        self, plan: Callable[[], Change | None], source: Source, by: str | None
    ) -> tuple[Event | None, Mapping[str, TaskState]]:
        """Append the planned event. If another server has taken its number, apply its events and plan again.

        Returns the event, or None if there was nothing to change, and the live map as it left it.
        """
        with self._changing:
            while True:
                change = plan()
                if change is None:
                    return None, self._tasks
                now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
                event = Event(self._state.last_event + 1, now, source, by, change, secrets.token_hex(8))
                if self._store.append(event):
                    removed = self._apply([event])
                    live = self._tasks
                    break
                won = self._store.events_after(self._state.last_event)
                if not won:
                    raise StoreError(
                        f"The store refuses event {event.number} and does not show which event has its number."
                    )
                self._apply(won)
        self.on_change(event.number)
        self._remove(removed)  # without the lock: an object store takes its time for each
        return event, live

    def _put_blobs(self, soft_prompts: Sequence[SoftPrompt]) -> list[VersionContent]:
        blobs: list[str] = []
        try:
            blobs.extend(map(self._store.put, soft_prompts))
        except StoreError:
            self._remove(contents_of(soft_prompts[: len(blobs)], blobs))
            raise
        return contents_of(soft_prompts, blobs)

    def _remove(self, contents: Sequence[VersionContent]) -> None:
        """Remove blobs that no version uses. A blob that the store does not delete is collected as garbage later."""
        try:
            self._store.remove_blobs(contents)
        except StoreError as exc:
            log.warning("unused blobs are removed later: %s", exc)

    def _check_free(self, name: str) -> None:
        check_task_name(name)
        if name == self.model.name:
            raise InvalidTaskName(f"{name!r} is the frozen model's name.", remedy="Choose another name for the task.")
