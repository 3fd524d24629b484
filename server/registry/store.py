"""The durable store on a local folder: immutable blobs by digest, numbered events, each made whole or not at all.

    blobs/<digest>.safetensors      tensor; peft_type and manifest in its metadata
    events/000000000042.json        create-if-absent: of two writers exactly one wins a number

A write goes to a temporary file, is synced, gets its name (an event by a link, which fails if the name exists; a blob
by a rename, which replaces one of the same digest), and the directory is synced; only then is the change acknowledged.
A blob that no event names is garbage and harmless.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from server.errors import InvalidSoftPrompt, StoreError
from server.registry.events import Event
from server.soft_prompts.manifest import Manifest
from server.soft_prompts.soft_prompt import SoftPrompt

ABANDONED_SECONDS = 24 * 3600.0

_EVENT_NAME = re.compile(r"\d{12}\.json")


class LocalStore:
    """Blobs and events under one directory."""

    def __init__(self, root: Path) -> None:
        """Open the store, making its directories.

        Raises:
            StoreError: they cannot be made.
        """
        self._blobs, self._events = root / "blobs", root / "events"
        try:
            for directory in (self._blobs, self._events):
                directory.mkdir(parents=True, exist_ok=True)
                _remove_abandoned(directory)
        except OSError as exc:
            raise StoreError(
                f"The store {root} cannot be made: {exc.strerror}.",
                remedy="Let PRELUDE_STORE name a folder that can be written to, such as file:/var/lib/prelude.",
            ) from exc

    @classmethod
    def open(cls, url: str) -> LocalStore:
        """Open the store that PRELUDE_STORE names.

        Raises:
            StoreError: the URL is not one that is served.
        """
        scheme, colon, path = url.partition(":")
        if scheme != "file" or not colon or not path:
            raise StoreError(f"PRELUDE_STORE is {url!r}.", remedy="Use file:PATH.")
        return cls(Path(path.removeprefix("//")).expanduser())

    def events(self) -> list[Event]:
        """All events, in order.

        Raises:
            StoreError: one cannot be read, or a number is missing.
        """
        try:
            names = sorted(name for name in os.listdir(self._events) if _EVENT_NAME.fullmatch(name))
            events = [Event.parse((self._events / name).read_bytes(), name) for name in names]
        except OSError as exc:
            raise StoreError(f"The store's events cannot be read: {exc}.") from exc
        for expected, event in enumerate(events, 1):
            if event.number != expected:
                raise StoreError(
                    f"The store's event {expected} is missing.", remedy="Restore it from a backup of the store."
                )
        return events

    def append(self, event: Event) -> bool:
        """Write an event durably; False if another writer has taken its number.

        Raises:
            StoreError: the disk refuses.
        """
        return _write(self._events / f"{event.number:012d}.json", event.to_json(), place=os.link)

    def put_blob(self, soft_prompt: SoftPrompt) -> None:
        """Keep a soft prompt's content durably; keeping it twice is one blob, and mends it if it was damaged.

        Raises:
            StoreError: the disk refuses.
        """
        metadata = {"peft_type": soft_prompt.peft_type, "manifest": soft_prompt.manifest.to_json()}
        data = save({"prompt_embeddings": soft_prompt.tensor.contiguous()}, metadata)
        _write(self._blob(soft_prompt.digest), data, place=os.replace)

    def get_blob(self, digest: str) -> SoftPrompt:
        """Read a content and check that it is the one that its name promises.

        Raises:
            StoreError: it is missing or damaged.
        """
        path = self._blob(digest)
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
                tensor = file.get_tensor("prompt_embeddings")
            soft_prompt = SoftPrompt(metadata["peft_type"], tensor, Manifest.parse(metadata["manifest"]))
        except (OSError, SafetensorError, KeyError, TypeError, InvalidSoftPrompt) as exc:
            raise StoreError(f"The store's blob {digest} cannot be read: {exc}.") from exc
        if soft_prompt.digest != digest:
            raise StoreError(
                f"The store's blob {digest} is damaged: its content has digest {soft_prompt.digest}.",
                remedy="Restore it from a backup of the store, or publish the task again.",
            )
        return soft_prompt

    def remove_blob(self, digest: str) -> None:
        """Forget a content that no version names any more."""
        with contextlib.suppress(FileNotFoundError):
            self._blob(digest).unlink()

    def _blob(self, digest: str) -> Path:
        return self._blobs / f"{digest}.safetensors"


def _write(path: Path, data: bytes, *, place: Callable[[str, Path], None]) -> bool:
    """Write a file with all of its content, durably; False if `place` refuses because it exists."""
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=".tmp-", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            place(temporary, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
        _sync_directory(path.parent)
    except FileExistsError:
        return False
    except OSError as exc:
        raise StoreError(f"The store cannot write {path.name}: {exc.strerror}.") from exc
    return True


def _remove_abandoned(directory: Path) -> None:
    """Remove what a killed writer left half-written; a day later nobody is still writing it."""
    for path in directory.glob(".tmp-*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                path.unlink()


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
