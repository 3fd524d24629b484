"""The lowest layer of the store: a flat, durable place for objects, each written once, completely or not at all.

`create` is create-if-absent and has exactly one winner, even if others write at the same time: other threads, other
processes, other machines. What it has answered True for survives a loss of power. A folder does this by itself
(`LocalObjects`); a bucket needs the extra `store` (`remote.RemoteObjects`). Everything else about the store, what its
objects mean and which belong together, is built on these five operations.
"""

import contextlib
import errno
import os
import re
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

from server.durable import NO_SPACE, sync
from server.errors import StoreError, StoreFull

FOLDERS = ("blobs", "events", "snapshots")

ABANDONED_SECONDS = 24 * 3600.0
"""A temporary file of this age belongs to a writer that was killed; nobody writes for a day."""

FOR_DELETES, FOR_CHANGES = ".reserve", ".reserve-changes"
RESERVE_BYTES = 2**15
"""Size of each of two reserve files. On a full disk, even a delete must first write an event. A change that writes only
an event (such as a rollback) may use the space of `.reserve-changes`; a delete may use both, so such changes cannot use
up the space that deletes need."""

_TEMPORARY = ".tmp-"
_KEY = re.compile(rf"(?:{'|'.join(FOLDERS)})/[A-Za-z0-9][A-Za-z0-9._-]*")
_NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
_USE_A_FOLDER = "Let PRELUDE_STORE name a folder that can be written to, such as file:/var/lib/prelude."
_USE_A_URL = "Use file:PATH, s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or az://CONTAINER/PREFIX."


class Objects(Protocol):
    """A place for objects, by keys such as `events/000000000042.json`; any thread may use it at any time.

    Every operation raises a StoreError if the place refuses, or does not answer.
    """

    def list(self, folder: str) -> list[str]:
        """Names, without their folder and sorted, of the whole objects in it; empty if there are none."""

    def get(self, key: str) -> bytes | None:
        """An object's content; None if there is no such object."""

    def create(self, key: str, data: bytes) -> bool:
        """Keep a new object durably; False, with nothing changed, if there is one of this name already.

        Raises:
            StoreFull: there is no space left, and nothing has changed.
            StoreError: the store failed. Whether the object was kept is unknown until it is read back.
        """

    def delete(self, key: str) -> None:
        """Remove an object, if there is one."""

    def age(self, key: str) -> float | None:
        """Seconds since an object was written; None if there is no such object."""


@runtime_checkable
class Reserved(Protocol):
    """An object store that reserves disk space for changes that free space."""

    def release(self, reserve: str) -> None:
        """Free the space of one reserve, if it is filled."""

    def reserve(self) -> str | None:
        """Fill all reserves again. Returns the error that prevents it, or None."""


def open_objects(url: str) -> Objects:
    """Open the store that PRELUDE_STORE names; a folder is created if needed.

    Raises StoreError for a URL of another kind, or a store that cannot be opened.
    """
    scheme, colon, path = url.partition(":")
    if not colon or not path:
        raise StoreError(f"PRELUDE_STORE is {url!r}.", remedy=_USE_A_URL)
    if scheme == "file":
        if path.startswith("//") and path[2:3] not in ("/", "~"):  # file://var/lib names the host "var"
            raise StoreError(f"PRELUDE_STORE is {url!r}.", remedy="Write file:PATH, with no // before a relative path.")
        return LocalObjects(Path(path.removeprefix("//")).expanduser())
    if scheme not in ("s3", "gs", "az"):
        raise StoreError(f"PRELUDE_STORE is of an unknown kind, {scheme!r}.", remedy=_USE_A_URL)
    try:
        from server.registry.bucket import RemoteObjects
    except ImportError as exc:
        raise StoreError(
            f"PRELUDE_STORE is {scheme}:…, and obstore, which accesses it, cannot be imported: {exc}.",
            remedy='Install it with `pip install "prelude-server[store]"`.',
        ) from exc
    return RemoteObjects(url)


class LocalObjects:
    """Objects as files under one directory, which several servers may share.

    A write goes to a temporary file, which is synced and then linked to its name: unlike a rename, a link fails if
    the name exists. The directory is synced last, and only then does anybody hear of the object.
    """

    def __init__(self, root: Path) -> None:
        """Open the directory, or make it, durably, or raise StoreError; removes what killed writers left in it."""
        self._root = root.absolute()
        with _refusals(f"be made in {root}", _USE_A_FOLDER):
            for folder in FOLDERS:
                self._make(folder)
            sync(self._root)
        for folder in FOLDERS:
            _remove_abandoned(self._root / folder)

    def _make(self, folder: str) -> None:
        try:
            _make_directory(self._root / folder)
        except OSError:
            # An older Prelude made this store, which may only be read now, or is full: it has no snapshots.
            if folder != "snapshots" or not (self._root / "events").is_dir():
                raise

    def list(self, folder: str) -> list[str]:
        """See Objects; temporary and other hidden files are no objects."""
        assert folder in FOLDERS, folder
        if folder == "snapshots" and not (self._root / folder).is_dir():
            return []
        with _refusals(f"list {folder}"):
            return sorted(name for name in os.listdir(self._root / folder) if not name.startswith("."))

    def get(self, key: str) -> bytes | None:
        with _refusals(f"read {key}"), contextlib.suppress(FileNotFoundError):
            return self._path(key).read_bytes()
        return None

    def create(self, key: str, data: bytes) -> bool:
        path = self._path(key)
        with _refusals(f"write {key}"):
            created = _link_whole(path, data)
        try:
            # Sync the directory even if another writer created the object: that writer may not have synced yet, and
            # this server now relies on the object.
            sync(path.parent)
        except OSError as exc:  # never StoreFull, which promises that nothing has changed
            raise StoreError(f"The store cannot make {key} durable: {exc.strerror or exc}.") from exc
        return created

    def delete(self, key: str) -> None:
        """See Objects; not synced, as what comes back after a loss of power is garbage that nobody names."""
        path = self._path(key)
        with _refusals(f"delete {key}"):
            path.unlink(missing_ok=True)

    def age(self, key: str) -> float | None:
        with _refusals(f"read {key}"), contextlib.suppress(FileNotFoundError):
            return max(0.0, time.time() - self._path(key).stat().st_mtime)
        return None

    def release(self, reserve: str) -> None:
        with contextlib.suppress(OSError):
            (self._root / reserve).unlink()

    def reserve(self) -> str | None:
        """See Reserved; random bytes, because some file systems keep none for zeros."""
        for path in (self._root / FOR_DELETES, self._root / FOR_CHANGES):
            try:
                if not path.exists() or path.stat().st_size < RESERVE_BYTES:
                    path.write_bytes(secrets.token_bytes(RESERVE_BYTES))
            except OSError as exc:
                with contextlib.suppress(OSError):  # half a reserve would take the space of an event
                    path.unlink(missing_ok=True)
                return exc.strerror or str(exc)
        return None

    def _path(self, key: str) -> Path:
        assert _KEY.fullmatch(key), key
        return self._root / key


@contextlib.contextmanager
def _refusals(action: str, remedy: str | None = None) -> Iterator[None]:
    """Turn what the file system says into what a user can read."""
    try:
        yield
    except OSError as exc:
        message = f"The store cannot {action}: {exc.strerror or exc}."
        if exc.errno in NO_SPACE:
            raise StoreFull(message) from exc
        raise StoreError(message, remedy=remedy) from exc


def _link_whole(path: Path, data: bytes) -> bool:
    """Link the synced file to its final name atomically; False if the name exists."""
    temporary = path.with_name(f"{_TEMPORARY}{secrets.token_hex(8)}")
    # The umask decides who may read it, as with any file: a shared store may be written by several users.
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        _link(temporary, path)
    except FileExistsError:
        return False
    finally:
        # One that stays is removed when a store is opened a day later; the outcome is already decided.
        with contextlib.suppress(OSError):
            os.unlink(temporary)
    return True


def _link(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
    except OSError as exc:
        if exc.errno not in _NO_HARD_LINKS:
            raise
        raise StoreError(
            f"The store's file system in {path.parent} has no hard links ({exc.strerror}), so it cannot tell which of "
            "two writers was first.",
            remedy="Let PRELUDE_STORE name a folder on a file system with hard links (ext4, XFS, NFS, APFS), or a "
            "bucket: s3://BUCKET/PREFIX.",
        ) from exc


def _make_directory(directory: Path) -> None:
    """Make a directory and its missing parents, so that they survive a loss of power."""
    missing = [place for place in (directory, *directory.parents) if not place.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    for place in missing:
        with contextlib.suppress(PermissionError):  # a parent that may be written to, but not read, cannot be synced
            sync(place.parent)


def _remove_abandoned(directory: Path) -> None:
    with contextlib.suppress(OSError):  # a store that may only be read keeps them
        for path in directory.glob(f"{_TEMPORARY}*"):
            if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                path.unlink()
