"""The inbox: PEFT directories in `prompts/`, published on the same path as uploads.

An entry is published on first sight and whenever its content has changed since, once it has been left alone for a
moment: a directory that is being copied is not read before it is whole. If a task was deleted through the API or
replaced by an upload, an unchanged directory does not bring it back. It is published again only after the directory is
changed, or removed and put back. When a directory is removed, its tasks are retired if their live version came from it.
The store, which lies in the inbox by default, is not watched.
"""

import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from server.background_service import Service
from server.errors import InvalidTaskName, PreludeError, UnknownTask
from server.registry.events import content_of
from server.registry.inbox_entry import Files, InboxEntry, Missing, Read, Settling, Unseen, changed
from server.registry.inbox_watcher import Folder
from server.registry.registry import Registry
from server.registry.state import StoredVersion
from server.soft_prompts.declared import CONFIG_FILE
from server.soft_prompts.formats import MANIFEST_FILE, TENSOR_FILE, load_soft_prompts
from server.soft_prompts.names import check_task_name, names_of

log = logging.getLogger(__name__)

SETTLE_SECONDS = 0.5
"""An entry is read once its files have not changed for this long. Its tasks are retired once it has been missing for
twice this time, because replacing a directory removes it for a moment."""

LOOK_SECONDS = 1.0
"""How often every file is looked at, whether or not the file system tells of changes; some never do."""

LOOK_SHARE = 0.01
"""The largest share of one core's time that full scans may take; with very many entries, scans become less frequent."""

FILES = (CONFIG_FILE, TENSOR_FILE, MANIFEST_FILE)
COMPANIONS = ("README.md", "metrics.json", "teacher.txt")
"""Files for people that `prelude train`, or a user, puts beside the soft prompt's files; so are all SVG pictures."""
MOST_UNUSED = 10

BUG_SECONDS = 30.0
STOP_SECONDS = 0.8


class Inbox(Service):
    """Publishes a directory's contents into a registry: once with `scan`, or on a thread from `start` to `stop`."""

    def __init__(self, directory: Path, registry: Registry) -> None:
        super().__init__("inbox", STOP_SECONDS)
        self._folder = Folder(directory)
        self._registry = registry
        self._inbox_id = f"{socket.gethostname()}:{directory.absolute()}"
        self._entries: dict[str, InboxEntry] = {}
        self._is_first_look = True
        self._retire_fails = False

    def scan(self, on_entry: Callable[[str], None] = lambda name: None, settle_seconds: float = SETTLE_SECONDS) -> None:
        """Publish every new or changed entry, and retire what was removed, also while no server ran.

        A broken entry is logged and reported, and the others are served.
        """
        self._look(None, settle_seconds, on_entry)

    def _run(self) -> None:
        next_full_look = 0.0
        for changes in self._folder.wake_ups(self._stop):
            now = time.monotonic()
            for name in [name for name, is_removed in changes.items() if is_removed and name in self._entries]:
                entry = self._entries[name]
                entry.state = replace(entry.miss(now), since=now)  # even if it is there again
            is_full = now >= next_full_look
            began = time.thread_time()
            try:
                self._look(None if is_full else changes, SETTLE_SECONDS)
            except Exception:
                log.exception("the inbox cannot be read")
                self._stop.wait(BUG_SECONDS)  # a bug in Prelude, which need not be logged at every scan
            if is_full:
                spent = time.thread_time() - began
                next_full_look = time.monotonic() + max(LOOK_SECONDS, spent / LOOK_SHARE)

    def _look(
        self,
        changed: Collection[str] | None,
        settle_seconds: float,
        on_entry: Callable[[str], None] = lambda name: None,
    ) -> None:
        """Check these entries and all open ones; None checks every entry."""
        names = self._folder.entries(anew=changed is None or bool(changed))
        if names is None:  # not a removal: how long an entry is missing counts from the folder's return
            for entry in self._entries.values():
                if isinstance(entry.state, Missing):
                    entry.state = replace(entry.state, since=time.monotonic())
            return
        for name in names:
            if name not in self._entries:
                self._entries[name] = InboxEntry()
            entry = self._entries[name]
            if changed is None or name in changed or entry.is_open:
                if self._stop.is_set():
                    return
                on_entry(_shown(name))
                self._look_at(name, entry, settle_seconds, may_retry=changed is None)
        for name in self._entries.keys() - set(names):
            self._miss(name, 2 * settle_seconds)
        if self._is_first_look:
            self._is_first_look = not self._retire_unheld()

    def _look_at(self, name: str, entry: InboxEntry, settle_seconds: float, *, may_retry: bool) -> None:
        """Read an entry if it has changed and is at rest."""
        state, now = entry.find(), time.monotonic()
        signature = self._folder.signature(name)
        if isinstance(state, Unseen) or signature != state.files.signature:
            since = now
            if self._is_first_look:  # later, nothing hangs on the file system's clock
                written = max((file[-1] for file in signature), default=0) / 1e9
                since -= max(0.0, time.time() - written)
            state = entry.state = changed(state, Files(signature, since))
        if isinstance(state, Read) and not (state.may_pass and may_retry):
            return
        if now - state.files.since >= settle_seconds:
            self._read(name, entry, state)

    def _read(self, name: str, entry: InboxEntry, state: Settling | Read) -> None:
        """Publish an entry; the list of soft prompts says why it cannot be."""
        path = self._folder.path / name
        # The error that was reported for the previous files does not apply to these.
        entry.state = read = Read(state.files, state.failure if isinstance(state, Read) else None)
        try:
            entry.state = self._publish(path, entry, read.files) if any(path.iterdir()) else Read(read.files)
        except (PreludeError, OSError) as exc:
            entry.state = self._report(name, read, exc)
        except Exception as exc:  # a bug of ours; the other entries are served
            log.exception("%s is not served", path)
            self._registry.report(_shown(name), repr(exc))
        else:
            self._registry.report(_shown(name), None)

    def _publish(self, path: Path, entry: InboxEntry, files: Files) -> Unseen | Read:
        """Publish what has changed in an entry; returns the state that it has then."""
        check_task_name(path.name)
        registry = self._registry
        contents = load_soft_prompts(path, registry.model, registry.max_virtual_tokens)
        names = names_of(path.name, contents)
        self._check_clash(path.name, names)
        if self._folder.signature(path.name) != files.signature:  # somebody began to write while it was read
            return Unseen()
        known = [registry.is_from_inbox(*pair, self._inbox_id) for pair in zip(names, contents, strict=True)]
        if not all(known) or (entry.is_put_back and None in map(self._live, names)):
            published = registry.publish(path.name, contents, "inbox", by=self._inbox_id)
            for task in published.tasks if published.created else ():
                log.info("%s: version %d from %s", task.task, task.version, path)
            self._say_what_is_unused(path, files, contents[0].notes)
        entry.is_put_back = False
        left = {task: identity for task, identity in entry.tasks.items() if task not in names}  # rows that are no more
        entry.tasks = {name: content_of(content, "").identity for name, content in zip(names, contents, strict=True)}
        is_retired = self._retire(left)
        if not is_retired:
            entry.tasks |= left
        return Read(files, may_pass=not is_retired)

    def _say_what_is_unused(self, path: Path, files: Files, notes: Sequence[str]) -> None:
        for note in notes:
            log.warning("%s: %s", path, note)
        others = (file[0] for file in files.signature if file[0] not in (*FILES, *COMPANIONS))
        unused = [_shown(name) for name in others if not name.endswith(".svg")]
        if unused:
            log.warning("%s: not used: %s", path, ", ".join(unused[:MOST_UNUSED]))

    def _check_clash(self, name: str, tasks: Collection[str]) -> None:
        """Refuse a task that another entry makes: `many-0`, if it is the first row of the multitask `many`."""
        for task in tasks:
            for other in {task, task.rpartition("-")[0]} - {name}:
                if other in self._entries and task in self._entries[other].tasks:
                    raise InvalidTaskName(
                        f"The directory {other!r} already makes the task {task!r}.", remedy="Rename one of the two."
                    )

    def _report(self, name: str, read: Read, exc: PreludeError | OSError) -> Read:
        """Log and report why an entry is not served; returns the state that it has then."""
        if not os.path.lexists(self._folder.path / name):
            return read  # it was removed meanwhile
        if type(exc) is not read.failure:  # a store's message may have another key in it each time
            log.warning("%s is not served: %s", self._folder.path / _shown(name), exc)
        self._registry.report(_shown(name), str(exc))
        return Read(read.files, type(exc), may_pass=isinstance(exc, OSError) or exc.status >= 500)

    def _miss(self, name: str, seconds: float) -> None:
        """Retire the tasks of an entry that has been gone long enough."""
        entry, now = self._entries[name], time.monotonic()
        state = entry.miss(now)
        if now - state.since < seconds:
            return
        if not self._retire(entry.tasks):
            entry.state = replace(state, since=now)
            return
        del self._entries[name]
        self._registry.report(_shown(name), None)
        for other in self._entries.values():
            if isinstance(other.state, Read) and other.state.failure is InvalidTaskName:
                other.state = replace(other.state, may_pass=True)  # a clash may be over

    def _retire_unheld(self) -> bool:
        """Retire tasks that this inbox published and no longer contains.

        Unreadable entries may still contain them, so their tasks are left alone.
        """
        held = {task for entry in self._entries.values() for task in entry.tasks}
        unread = [name for name, entry in self._entries.items() if not entry.tasks]
        return self._retire(
            {
                task: identity
                for task, identity in self._registry.from_inbox(self._inbox_id).items()
                if task not in held and not any(task == name or task.startswith(f"{name}-") for name in unread)
            }
        )

    def _retire(self, tasks: Mapping[str, str]) -> bool:
        """Retire tasks that were published with these identities; False if the store failed and it must be retried."""
        if not tasks:
            return True
        try:
            names = self._registry.retire(tasks, by=self._inbox_id)
        except PreludeError as exc:
            if not self._retire_fails:
                log.warning("%s cannot be retired yet: %s", ", ".join(tasks), exc)
            self._retire_fails = True
            return False
        self._retire_fails = False
        if names:
            log.info("no longer in %s: %s", self._folder.path, ", ".join(names))
        return True

    def _live(self, task: str) -> StoredVersion | None:
        with contextlib.suppress(UnknownTask):
            return self._registry.task(task).live
        return None


def _shown(name: str) -> str:
    """A file system's names need not be text."""
    return os.fsencode(name).decode(errors="backslashreplace")
