"""Blobs, events and snapshots in a place for objects, and the order of writes that keeps them safe.

    blobs/<digest>-<nonce>.safetensors   one per version: tensor, with peft_type and manifest; never rewritten
    events/000000000042.json             create-if-absent: of two writers exactly one wins a number
    snapshots/000000001000.json.gz       the state at an event, so that those before it can go (`log_snapshots.py`)

A blob is whole and durable before an event names it, and an event is whole and durable before anybody hears of the
change. A blob that no event names is garbage: its publisher lost, or was killed between the two.
"""

import contextlib
import json
import logging
import random
import re
import secrets
import time
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor

from safetensors import SafetensorError
from safetensors.torch import load, save

from server.errors import InvalidSoftPrompt, StoreError, StoreFull
from server.registry.events import Delete, DeleteVersion, Event, Publish, VersionContent
from server.registry.log_snapshots import MOST_REMOVED, SNAPSHOT_EVENTS, TASKS_PER_EVENT, Snapshots
from server.registry.objects import FOR_CHANGES, FOR_DELETES, Objects, Reserved
from server.registry.state import RegistryState
from server.registry.unreadable_events import Entry, read_event
from server.soft_prompts.manifest import Manifest
from server.soft_prompts.soft_prompt import SoftPrompt

log = logging.getLogger(__name__)

ABANDONED_SECONDS = 24 * 3600.0
"""A blob that no event names may belong to a publish in progress, so it is deleted only after a day."""

READERS = 16
"""Events that are read at once when a server starts: an object store answers each in tens of milliseconds."""

PRUNE_SECONDS = 3600.0
"""How often it is looked whether old snapshots and events can go."""

RETRY_EVENTS = 100
"""Events after which a snapshot that could not be written is tried again."""

REACH_SECONDS = 6 * 3600.0
"""How long an empty list of later events is trusted. Must be much shorter than the time for which events are kept after
the snapshot that replaces them."""

TENSOR_NAME = "prompt_embeddings"
_IN_EVENT = "manifest_in_event"
"""Metadata key of blobs that hold only a part of the manifest; the event holds the whole manifest."""
_EVENT_NAME = re.compile(r"\d{12}\.json")


class Behind(Exception):
    """This server has not read the store for so long that it must load it again."""


class Store:
    """Blobs, events and snapshots."""

    def __init__(self, objects: Objects) -> None:
        """Use an open place for objects; a folder keeps some space free for deletes from now on."""
        self._objects = objects
        self.snapshots = Snapshots(objects)
        self._seen_at = time.time()
        self._snapshot_at = 0
        self._prune_at = time.monotonic() + random.uniform(0, PRUNE_SECONDS)  # of several servers each at another time
        refused = objects.reserve() if isinstance(objects, Reserved) else None
        if refused is not None:
            log.warning("The store cannot be written to (%s): tasks are served, and changes are refused.", refused)

    def load(self) -> RegistryState:
        """The state of all tasks: the newest snapshot that can be read, and the events after it.

        Raises StoreError if the store cannot be listed or read, or an event is missing.
        """
        while True:
            numbers = self.snapshots.numbers()
            state = self.snapshots.newest(numbers)
            try:
                state.take_all(self.events(state.last_event))
            except StoreError:
                if self.snapshots.numbers() == numbers:
                    raise
                continue  # another server has made a snapshot meanwhile, and removed events
            self._seen_at = time.time()
            self._snapshot_at = numbers[-1] if numbers else 0
            return state

    def events(self, after: int = 0) -> list[Entry]:
        """All events after a number, in order; for a server that starts. One that cannot be read stands for itself.

        Raises StoreError if the store cannot be listed or read, or a number is missing.
        """
        names = [name for name in self._objects.list("events") if _EVENT_NAME.fullmatch(name)]
        names = [name for name in names if name > _event_name(after)]
        last = int(names[-1].partition(".")[0]) if names else after
        # A listing made while another server writes may lack an event although it contains a later one.
        gap = next((n for n, name in enumerate(names, after + 1) if name != _event_name(n)), None)
        if gap is not None and self._objects.get(_event_key(gap)) is None:
            raise _missing(gap)
        with ThreadPoolExecutor(READERS, "events") as readers:
            return list(readers.map(self._read_event, range(after + 1, last + 1)))

    def events_after(self, number: int, most: int | None = None) -> list[Entry]:
        """The first `most` events after `number`, in order.

        If there are none, this costs one request to the store.

        Raises:
            StoreError: the store cannot be read.
            Behind: events after the number are gone already.
        """
        found: list[Entry] = []
        while len(found) != most and (data := self._objects.get(_event_key(number + 1))) is not None:
            number += 1
            found.append(read_event(number, data, _event_name(number)))
        if found:
            self._seen_at = time.time()
        else:
            self._check_reach(number)
        return found

    def compact(self, state: Callable[[], RegistryState], last_event: int, num_tasks: int = 0) -> None:
        """Write a snapshot if it is time to, and remove what old ones make superfluous.

        Args:
            state: function that copies the state at `last_event` or later.
            last_event: the last event that was taken.
            num_tasks: how many tasks a snapshot would hold; large ones are written less often.

        Raises:
            StoreError: the store refuses.
        """
        distance = max(SNAPSHOT_EVENTS, num_tasks // TASKS_PER_EVENT)
        if last_event - self._snapshot_at >= distance:
            self._snapshot_at = max(self.snapshots.numbers(), default=0)
            if last_event - self._snapshot_at >= distance:
                now = state()
                self._snapshot_at = now.last_event - distance + RETRY_EVENTS  # a full store is not asked for ever
                if now.is_whole:  # else after an update, which knows more kinds of events
                    self.snapshots.write(now)
                    self._snapshot_at = now.last_event
        if time.monotonic() >= self._prune_at:
            self._prune_at = time.monotonic() + PRUNE_SECONDS
            self._remove_events(self.snapshots.prune())

    def _remove_events(self, cut: int | None) -> None:
        """In order, so that the events left are the end of the log, even if this is interrupted."""
        if cut is not None:
            names = [name for name in self._objects.list("events") if _EVENT_NAME.fullmatch(name)]
            for name in [name for name in names if name <= _event_name(cut)][:MOST_REMOVED]:
                self._objects.delete(f"events/{name}")

    def _check_reach(self, number: int) -> None:
        """Raise Behind if later events were removed after a snapshot, which an empty list of them can also mean.

        Events stay for GRACE_SECONDS after the snapshot that replaces them, so this is asked far more often than that.
        """
        if abs(time.time() - self._seen_at) < REACH_SECONDS:
            return
        if self._objects.age(_event_key(number)) is None if number else bool(self.snapshots.numbers()):
            raise Behind(f"Event {number} was removed while this server did not look at the store.")
        self._seen_at = time.time()

    def append(self, event: Event) -> bool:
        """Write an event durably; False if another writer has taken its number.

        After a StoreError it is unknown whether the event was kept, until it is read back.
        """
        try:
            self._check_reach(event.number - 1)
        except Behind as exc:
            raise StoreError(str(exc), remedy="Send the request again.") from exc
        data = event.to_json()
        key = _event_key(event.number)
        # A write that is sent again after a lost reply finds itself, or a bucket that has no space left since then.
        try:
            return self._create_event(event, key, data) or self._objects.get(key) == data
        except StoreFull:
            if self._objects.get(key) != data:
                raise
            return True

    def _create_event(self, event: Event, key: str, data: bytes) -> bool:
        objects = self._objects
        if isinstance(objects, Reserved) and not isinstance(event.change, Publish):
            is_delete = isinstance(event.change, Delete | DeleteVersion)
            for reserve in (FOR_CHANGES, FOR_DELETES) if is_delete else (FOR_CHANGES,):
                try:
                    return self._objects.create(key, data)
                except StoreFull:
                    objects.release(reserve)
        return self._objects.create(key, data)

    def put(self, soft_prompt: SoftPrompt) -> str:
        """Store a content durably, and return the name of its blob; raises StoreError if the store refuses.

        A row of a multitask soft prompt keeps only the part of its manifest that changes answers; the event has it all.
        """
        manifest = soft_prompt.manifest
        metadata = {"peft_type": soft_prompt.peft_type, "manifest": manifest.to_json()}
        if soft_prompt.is_multitask_row:
            own = manifest.answering()
            assert own.answers_identity() == manifest.answers_identity(), "ANSWER_FIELDS has them all"
            metadata |= {"manifest": own.to_json(), _IN_EVENT: "true"}
        data = save({TENSOR_NAME: soft_prompt.tensor.contiguous()}, metadata)
        blob = f"{soft_prompt.digest}-{secrets.token_hex(8)}"
        if not self._objects.create(_blob_key(blob), data) and self._objects.get(_blob_key(blob)) != data:
            raise StoreError(f"The store already has a blob {blob}, of another content.")
        return blob

    def get_blob(self, content: VersionContent) -> SoftPrompt:
        """Read a content and check its digest; raises StoreError if the blob is missing or damaged."""
        data = self._objects.get(_blob_key(content.blob))
        if data is None:
            raise StoreError(f"The store's blob {content.blob} is missing.", remedy=_RESTORE)
        try:
            soft_prompt = _parse_blob(data, content)
        except (SafetensorError, KeyError, TypeError, ValueError, InvalidSoftPrompt) as exc:
            raise StoreError(f"The store's blob {content.blob} cannot be read: {exc}.", remedy=_RESTORE) from exc
        if soft_prompt.digest != content.digest:
            raise StoreError(
                f"The store's blob {content.blob} is damaged: its content has digest {soft_prompt.digest}.",
                remedy=_RESTORE,
            )
        return soft_prompt

    def remove_blobs(self, contents: Iterable[VersionContent]) -> None:
        """Forget contents that no version names any more.

        After a StoreError, what is left is garbage, and collected later.
        """
        for content in contents:
            self._objects.delete(_blob_key(content.blob))
        if isinstance(self._objects, Reserved):
            self._objects.reserve()

    def missing_blobs(self, named: Collection[str], deleted: Collection[str] = ()) -> set[str]:
        """Those of the `named` blobs of versions that the store does not have; also collects garbage.

        Blobs of `deleted` versions are garbage at once, which a server that was killed left. Other garbage may belong
        to a publish that is under way, and is collected after a day. Raises StoreError if the store cannot be listed.
        """
        wanted, missing = frozenset(named), set(named)
        for name in self._objects.list("blobs"):
            blob = name.removesuffix(".safetensors")
            if blob in wanted:
                missing.discard(blob)
                continue
            with contextlib.suppress(StoreError):  # a store that may only be read keeps its garbage
                age = self._objects.age(_blob_key(blob))
                if blob in deleted or (age is not None and age > ABANDONED_SECONDS):
                    self._objects.delete(_blob_key(blob))
        return missing

    def _read_event(self, number: int) -> Entry:
        data = self._objects.get(_event_key(number))
        if data is None:
            raise _missing(number)
        return read_event(number, data, _event_name(number))


_RESTORE = "Restore it from a backup of the store, or publish the task again."


def _parse_blob(data: bytes, content: VersionContent) -> SoftPrompt:
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    metadata = header["__metadata__"]
    manifest = content.parse_manifest() if metadata.get(_IN_EVENT) else Manifest.parse(metadata["manifest"])
    return SoftPrompt(metadata["peft_type"], load(data)[TENSOR_NAME], manifest)


def _missing(number: int) -> StoreError:
    return StoreError(f"The store's event {number} is missing.", remedy="Restore it from a backup of the store.")


def _event_name(number: int) -> str:
    return f"{number:012d}.json"


def _event_key(number: int) -> str:
    return f"events/{_event_name(number)}"


def _blob_key(blob: str) -> str:
    return f"blobs/{blob}.safetensors"
