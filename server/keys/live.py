"""The keys of a running server, which follows changes of the file: a revoked key stops working without a restart."""

import contextvars
import logging
import stat
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from server.errors import ConfigurationError
from server.keys.file import how_to_make_a_key, read_keys
from server.keys.key import ApiKey, Scope, is_secret_of, split_key

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""Minimum time between two checks of the file."""
PATIENCE_SECONDS = 0.1
"""How long a request waits for a check; a file system that hangs must not block the event loop."""

Stamp = tuple[int, ...]


class ApiKeys:
    """The keys of a file, at most about a second old.

    If the file becomes unreadable or is removed, the last keys stay valid, so that an accident does not lock out all
    users. This is logged once for each state of the file.
    """

    def __init__(self, path: Path) -> None:
        """Read the file for the first time; raises ConfigurationError, also if it contains no key."""
        self._path = path
        self._stamp = _stamp(path)  # taken before the file is read, so that the next check sees changes made meanwhile
        self._looked = time.monotonic()
        self._look_ends = threading.Lock()  # held by the thread that checks
        self._keys = self._read()
        if not self._keys:
            raise ConfigurationError(
                f"The keys file {path} holds no key, so every request would be refused.", remedy=how_to_make_a_key(path)
            )

    def find(self, presented: str) -> ApiKey | None:
        """The key with this text; None if it does not exist or was revoked."""
        self._follow_file()
        key_id, secret = split_key(presented)
        key = self._keys.get(key_id)
        return key if is_secret_of(key, secret) else None

    def get(self, key_id: str) -> ApiKey | None:
        """The current key with this id; None if it does not exist or was revoked. Safe from any thread."""
        self._follow_file()
        return self._keys.get(key_id)

    def why_not(self, key_id: str, scopes: Iterable[Scope], tasks: Iterable[str]) -> str | None:
        """The reason, as a sentence, why a key no longer allows something; None if it still does."""
        key = self.get(key_id)
        if key is None:
            return f"The key {key_id} was revoked."
        for scope in scopes:
            if not key.may(scope):
                return f"The key {key_id} no longer has the scope {scope}."
        for task in tasks:
            if not key.is_for(task):
                return f"The key {key_id} is no longer for the task {task!r}."
        return None

    def _follow_file(self) -> None:
        """Check on a thread whether the file has changed; at most one check runs at a time."""
        if time.monotonic() - self._looked < LOOK_SECONDS or not self._look_ends.acquire(blocking=False):
            return
        self._looked = time.monotonic()
        look = threading.Thread(target=contextvars.copy_context().run, args=(self._look,), name="keys", daemon=True)
        look.start()
        look.join(PATIENCE_SECONDS)
        if look.is_alive():
            log.error("The keys file %s does not answer. The keys that were read before stay valid.", self._path)

    def _look(self) -> None:
        try:
            self._read_if_changed()
        finally:
            self._look_ends.release()

    def _read_if_changed(self) -> None:
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._keys = self._read()
        except ConfigurationError as exc:
            log.error("%s The keys that were read before stay valid.", exc.message)
        else:
            log.info("%s has changed; it now holds %d keys", self._path, len(self._keys))

    def _read(self) -> dict[str, ApiKey]:
        keys = {key.id: key for key in read_keys(self._path)}
        if _mode(self._path) & (stat.S_IWGRP | stat.S_IWOTH):
            log.warning("%s can be written by others, who could give themselves a key: chmod go-w it", self._path)
        return keys


def _stamp(path: Path) -> Stamp | None:
    """A value that changes with the file, including when it is replaced; None if there is no file."""
    try:
        state = path.stat()
    except OSError:
        return None
    return state.st_mtime_ns, state.st_ctime_ns, state.st_size, state.st_ino


def _mode(path: Path) -> int:
    try:
        return path.stat().st_mode
    except OSError:  # the file was removed after it was read
        return 0
