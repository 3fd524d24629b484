"""The inbox in the file system: which directories it has, whether one has changed, when to look again.

The file system is asked to tell of changes, without being relied on: network file systems tell nothing, a system can
run out of watches, and what happens while a watch is set up is not told either.
"""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from watchfiles import Change, watch

from server.soft_prompts.names import TASK_NAME

log = logging.getLogger(__name__)

WAKE_SECONDS = 0.2
REWATCH_SECONDS = 30.0

Signature = tuple[tuple[str, int, int, int, int], ...]
"""Name, inode, size and times of the last changes of every file: if it is the same, nothing was written."""


class Folder:
    """A directory of directories, its entries."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._root: tuple[int, int] | None = None  # device and inode of the directory that was listed
        self._changed_at: tuple[int, int] | None = None  # by the file system's clock, when it was listed
        self._listed: dict[str, int] = {}  # name -> inode

    def entries(self, *, anew: bool = True) -> list[str] | None:
        """Their names, sorted; None if the folder is not there. It is listed if it seems to have changed, or `anew`.

        If the folder is empty and has the same inode as before, somebody has emptied it. If it is empty and has another
        inode, it is probably an unmounted mount point.
        """
        try:
            stat = self.path.stat()
            root, changed_at = (stat.st_dev, stat.st_ino), (stat.st_mtime_ns, stat.st_ctime_ns)
            if not anew and (root, changed_at) == (self._root, self._changed_at):
                return list(self._listed)
            with os.scandir(self.path) as items:
                found = sorted(items, key=lambda item: item.name)
        except OSError:
            return None
        if not found and root != self._root:
            return None
        self._root, self._changed_at = root, changed_at
        self._listed = {item.name: item.inode() for item in found if _is_entry(item)}
        return list(self._listed)

    def signature(self, name: str) -> Signature:
        """The signature of the visible files of an entry.

        If some files cannot be listed, reading the entry reports why.
        """
        found = []
        with contextlib.suppress(OSError), os.scandir(self.path / name) as files:
            for file in files:
                with contextlib.suppress(OSError):
                    stat = file.stat()
                    found.append((file.name, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
        return tuple(sorted(found))

    def wake_ups(self, stop: threading.Event) -> Iterator[dict[str, bool]]:
        """Several times a second, until `stop`: entries in which a change was seen -> whether they were removed."""
        while not stop.is_set():
            listed = self._listed
            try:
                for changes in watch(
                    self.path,
                    *self._watched(),
                    recursive=False,  # an entry has no folders, and `.store` is not ours to watch
                    watch_filter=None,
                    debounce=int(WAKE_SECONDS * 1000),
                    rust_timeout=int(WAKE_SECONDS * 1000),
                    yield_on_timeout=True,
                    raise_interrupt=False,
                    ignore_permission_denied=True,
                ):
                    yield self._names(changes)
                    if stop.is_set() or self._listed != listed:
                        break  # watch the new entries too
            except Exception:  # no folder yet, no events here, no watches left, a name that is not text
                log.debug("%s is polled, as it cannot be watched", self.path, exc_info=True)
            end = time.monotonic() + REWATCH_SECONDS
            while self._listed == listed and time.monotonic() < end and not stop.wait(WAKE_SECONDS):
                yield {}

    def _watched(self) -> Iterator[Path]:
        paths = (self.path / name for name in self._listed if TASK_NAME.fullmatch(name))
        return (path for path in paths if path.is_dir())

    def _names(self, changes: Iterable[tuple[Change, str]]) -> dict[str, bool]:
        found: dict[str, bool] = {}
        for change, path in changes:
            name, _, file = os.path.relpath(path, self.path).partition(os.sep)
            found[name] = found.get(name, False) or (change == Change.deleted and not file)
        return found


def _is_entry(item: os.DirEntry[str]) -> bool:
    """Whether the name is a directory, or a symbolic link (whose target may come back)."""
    if item.name.startswith(".") or item.name == "lost+found":
        return False
    try:
        return item.is_dir() or (item.is_symlink() and not item.is_file())
    except OSError:
        return True
