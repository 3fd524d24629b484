"""The inbox: PEFT directories that people put into `prompts/`, published through the one publish path.

An entry is published on first sight and whenever its content has changed since, once it has been left alone for a
moment: a directory that is being copied is not looked at before it is whole. What was published and then deleted, or
replaced by an upload, does not come back by itself. A directory that is removed retires its tasks if what answers came
from it. The store, which lies in the inbox by default, is not watched.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from watchfiles import watch

from server.errors import PreludeError
from server.registry.registry import Registry
from server.soft_prompts.formats import load_soft_prompts
from server.soft_prompts.names import check_task_name, names_of

log = logging.getLogger(__name__)

SETTLE_SECONDS = 0.5
"""How long nobody must have written to an entry before it is read."""

GONE_SECONDS = 1.0
"""How long an entry must be gone before its tasks retire: replacing a directory removes it for a moment."""

LOOK_SECONDS = 1.0
"""How often everything is looked at, whether or not the file system tells of changes; some never do."""

LOOK_SHARE = 0.02
"""Of the time, what looking may take: with very many entries it is done less often."""

WAKE_MILLISECONDS = 200

Signature = tuple[tuple[str, int, int, int], ...]
"""Name, inode, size and time of the last change of every file: if it is the same, nothing was written."""


@dataclass
class _Entry:
    """A directory of the inbox as it was last read.

    Attributes:
        signature: of its files then.
        tasks: that it was published as; empty if it never could be.
        gone_at: since when it is missing.
    """

    signature: Signature
    tasks: tuple[str, ...] = ()
    gone_at: float | None = None


class Inbox:
    """Keeps a registry in line with a directory; `scan` once, or from `start` to `stop` on a thread."""

    def __init__(self, directory: Path, registry: Registry) -> None:
        """Nothing is read yet."""
        self._directory = directory
        self._registry = registry
        self._place = f"{socket.gethostname()}:{directory.absolute()}"
        self._entries: dict[str, _Entry] = {}
        self._unsettled: set[str] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="inbox", daemon=True)

    def scan(self, on_entry: Callable[[str], None] = lambda name: None, settle_seconds: float = SETTLE_SECONDS) -> None:
        """Publish every new or changed entry, and retire what was removed while no server ran.

        A broken entry is logged and reported, and the others are served.
        """
        for name in self._present():
            on_entry(_shown(name))
            self._look_at(name, settle_seconds)
        if self._directory.is_dir():  # if it is not, it is more likely not mounted than emptied
            self._retire_missing()

    def start(self) -> None:
        """Watch from now on."""
        self._thread.start()

    def stop(self) -> None:
        """Watch no more."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(5)

    def _run(self) -> None:
        next_look = 0.0
        for changed in self._wake_ups():
            now = time.monotonic()
            if now >= next_look:
                names = {*self._present(), *self._entries}
            else:
                names = {*changed, *self._unsettled, *(n for n, entry in self._entries.items() if entry.gone_at)}
            try:
                for name in sorted(names):
                    self._look_at(name, SETTLE_SECONDS)
            except Exception:
                log.exception("the inbox could not be looked at")
            if now >= next_look:
                spent = time.monotonic() - now
                next_look = now + max(LOOK_SECONDS, spent / LOOK_SHARE)

    def _wake_ups(self) -> Iterator[set[str]]:
        """Several times a second, the names of entries in which the file system saw a change, often none."""
        while not self._stop.is_set():
            watched = sorted(str(self._directory / name) for name in self._present())
            try:
                for changes in watch(
                    self._directory,
                    *watched,
                    recursive=False,  # an entry has no folders, and `.store` is not ours to watch
                    watch_filter=None,
                    stop_event=self._stop,
                    debounce=WAKE_MILLISECONDS,
                    rust_timeout=WAKE_MILLISECONDS,
                    yield_on_timeout=True,
                    raise_interrupt=False,
                ):
                    yield self._names(path for _, path in changes)
                    if watched != sorted(str(self._directory / name) for name in self._present()):
                        break  # watch the new entries too
            except (OSError, RuntimeError) as exc:  # no such directory yet, no events here, or no more watches to have
                log.debug("the inbox is polled, as it cannot be watched: %s", exc)
                self._stop.wait(WAKE_MILLISECONDS / 1000)
                yield set()

    def _names(self, paths: Iterable[str]) -> set[str]:
        root = self._directory.absolute()
        found: set[str] = set()
        for path in paths:
            with contextlib.suppress(ValueError):
                parts = Path(path).absolute().relative_to(root).parts
                found.update(name for name in parts[:1] if not name.startswith("."))
        return found

    def _present(self) -> list[str]:
        try:
            with os.scandir(self._directory) as entries:
                return sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())
        except OSError:
            return []

    def _look_at(self, name: str, settle_seconds: float) -> None:
        """Read an entry if it has changed and is at rest; let go of one that is gone."""
        known = self._entries.get(name)
        signature, changed_at = _signature(self._directory / name)
        if signature is None:
            self._unsettled.discard(name)
            self._registry.report(_shown(name), None)
            if known is not None:
                self._missed(name, known)
            return
        if known is not None:
            known.gone_at = None
            if known.signature == signature:
                self._unsettled.discard(name)
                return
        if 0 <= time.time() - changed_at < settle_seconds:
            self._unsettled.add(name)
            return
        self._unsettled.discard(name)
        self._entries[name] = _Entry(signature, known.tasks if known else ())
        self._read(name)

    def _read(self, name: str) -> None:
        """Publish an entry; why it cannot be is told to whoever asks for the list of soft prompts."""
        entry = self._directory / name
        try:
            if any(entry.iterdir()):
                self._entries[name].tasks = self._publish(entry)
            self._registry.report(_shown(name), None)
        except (PreludeError, OSError) as exc:
            why = str(exc).encode(errors="backslashreplace").decode()
            if self._registry.inbox_errors.get(_shown(name)) != why:
                log.warning("%s is not served: %s", self._directory / _shown(name), why)
            self._registry.report(_shown(name), why)
            if not isinstance(exc, PreludeError) or exc.status >= 500:
                self._entries[name].signature = ()  # not the entry's fault: try again at the next look

    def _publish(self, entry: Path) -> tuple[str, ...]:
        check_task_name(entry.name)
        registry = self._registry
        contents = load_soft_prompts(entry, registry.model, registry.max_virtual_tokens)
        names = tuple(names_of(entry.name, contents))
        if not all(registry.is_from_inbox(name, content) for name, content in zip(names, contents, strict=True)):
            for task in registry.publish(entry.name, contents, "inbox", by=self._place).tasks:
                log.info("%s: version %d from %s", task.task, task.version, entry)
        return names

    def _missed(self, name: str, entry: _Entry) -> None:
        now = time.monotonic()
        entry.gone_at = entry.gone_at or now
        if now - entry.gone_at >= GONE_SECONDS:
            self._retire(entry.tasks)
            del self._entries[name]

    def _retire(self, tasks: Iterable[str]) -> None:
        names = list(tasks)
        try:
            self._registry.retire(names, by=self._place)
        except PreludeError as exc:
            log.warning("%s cannot be retired: %s", ", ".join(names), exc)

    def _retire_missing(self) -> None:
        """Retire what this very inbox put live, and what is not in it any more."""
        held = {task for entry in self._entries.values() for task in entry.tasks}
        unread = [name for name in self._present() if not (name in self._entries and self._entries[name].tasks)]
        gone = [
            task
            for task in self._registry.from_inbox(self._place)
            if task not in held and not any(task == name or task.startswith(f"{name}-") for name in unread)
        ]
        if gone:
            log.info("no longer in %s: %s", self._directory, ", ".join(gone))
            self._retire(gone)


def _signature(entry: Path) -> tuple[Signature | None, float]:
    """A directory's signature and the time of its last change; None if there is no such directory."""
    try:
        changed_at = entry.stat().st_ctime
        with os.scandir(entry) as files:
            stats = sorted((file.name, file.stat()) for file in files)
    except OSError:
        return None, 0.0
    signature = tuple((name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stats)
    return signature, max([changed_at, *(stat.st_ctime for _, stat in stats)])


def _shown(name: str) -> str:
    """A file system's names need not be text."""
    return os.fsencode(name).decode(errors="backslashreplace")
