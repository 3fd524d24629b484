"""The keys file: JSON with hashes of keys, never the keys themselves.

`{"keys": [{"id": "4f0c9a1e", "name": "ci", "sha256": "…", "scopes": ["publish"], "tasks": ["team-a-*"], "created_at":
"2026-11-24T09:00:00Z"}]}`; a key without `tasks` may use all tasks.
"""

import contextlib
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from server.durable import sync
from server.errors import ConfigurationError
from server.keys.key import ApiKey, Scope, make_key
from server.validation import Location, first_problems

Keys = tuple[ApiKey, ...]

MAX_BYTES = 2**22
"""Maximum size of a keys file: about ten thousand keys. A running server reads the file again whenever it changes."""


class _Content(BaseModel):
    """The content of a keys file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    keys: Keys

    @model_validator(mode="after")
    def _ids_are_unique(self) -> Self:
        for one, times in Counter(key.id for key in self.keys).items():
            if times > 1:
                raise ValueError(f"two keys have the id {one}")
        return self


def how_to_make_a_key(path: Path) -> str:
    """The remedy for a missing or empty keys file."""
    return f"Make one with `prelude keys create --file {path} --name NAME --scope admin` (or generate, or publish)."


def read_keys(path: Path) -> Keys:
    """The keys of a file, in its order, perhaps none; ConfigurationError names invalid entries, but quotes no value."""
    try:
        data = _read_regular(path)
    except OSError as exc:
        raise ConfigurationError(
            f"The keys file {path} cannot be read: {exc.strerror}.", remedy=how_to_make_a_key(path)
        ) from exc
    try:
        return _Content.model_validate_json(data).keys
    except ValidationError as exc:
        raise ConfigurationError(
            f"The keys file {path} does not fit: {first_problems(exc, _location_text)}.",
            remedy="Mend what it names, or restore the file; `prelude keys` writes it in the right form.",
        ) from None  # the cause would quote the file


def _read_regular(path: Path) -> bytes:
    """The bytes of a regular file of at most `MAX_BYTES`; a pipe would block the reader."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        state = os.fstat(file.fileno())
        if not stat.S_ISREG(state.st_mode):
            raise ConfigurationError(
                f"The keys file {path} is not a regular file.",
                remedy="Put the keys into a file, which can be followed.",
            )
        if state.st_size > MAX_BYTES:
            raise ConfigurationError(
                f"The keys file {path} has {state.st_size:,} bytes; at most {MAX_BYTES:,} are read.",
                remedy="Restore the file; `prelude keys` writes it in the right form.",
            )
        return file.read(MAX_BYTES)


def add_key(path: Path, name: str, scopes: Sequence[Scope], tasks: Sequence[str] | None) -> tuple[ApiKey, str]:
    """Create a key and add it to the file; returns it with its text, which is not stored. Raises ConfigurationError."""
    try:
        key, text = make_key(name, scopes, tasks)
    except ValidationError as exc:
        raise ConfigurationError(
            f"There can be no such key: {first_problems(exc, _location_text)}.",
            remedy="See `prelude keys create --help` for what it takes.",
        ) from None
    _rewrite(path, lambda keys: (*keys, key), may_be_new=True)
    return key, text


def revoke_key(path: Path, key_id: str) -> ApiKey:
    """Remove a key from the file and return it; raises ConfigurationError."""
    revoked: list[ApiKey] = []

    def without(keys: Keys) -> Iterable[ApiKey]:
        revoked.extend(key for key in keys if key.id == key_id)
        if not revoked:
            raise ConfigurationError(  # does not quote the argument, which may be a whole key
                f"{path} has no key of that id.",
                remedy="Give an id from `prelude keys list`: the part of a key between its two underscores.",
            )
        return (key for key in keys if key.id != key_id)

    _rewrite(path, without)
    return revoked[0]


def _rewrite(path: Path, change: Callable[[Keys], Iterable[ApiKey]], *, may_be_new: bool = False) -> None:
    """Replace the file atomically: a reader sees either the old keys or the new keys.

    The draft file is also the lock; otherwise two concurrent changes could restore a revoked key.
    """
    path = path.resolve()  # a link is preserved
    draft = path.with_name(f"{path.name}.new")
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise ConfigurationError(
            f"{draft} exists: another process is changing the keys.",
            remedy="Try again. If no other `prelude keys` runs, remove that file.",
        ) from None
    except OSError as exc:
        raise _cannot_write(path, exc) from exc
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            is_new = may_be_new and not path.exists()
            file.write(_to_json(change(() if is_new else read_keys(path))))
            if not is_new:
                _make_alike(descriptor, path.stat())
            file.flush()
            os.fsync(descriptor)
        os.replace(draft, path)
    except BaseException as exc:
        draft.unlink(missing_ok=True)
        if isinstance(exc, OSError):
            raise _cannot_write(path, exc) from exc
        raise
    with contextlib.suppress(OSError):  # the keys are replaced, even if the folder cannot be synced
        sync(path.parent)


def _make_alike(descriptor: int, old: os.stat_result) -> None:
    """Give the new file the old file's owner and mode, so that a server can still read it and sees a revocation."""
    new = os.fstat(descriptor)
    if (new.st_uid, new.st_gid) != (old.st_uid, old.st_gid):
        os.fchown(descriptor, old.st_uid, old.st_gid)
    os.fchmod(descriptor, stat.S_IMODE(old.st_mode) & 0o644 | 0o600)


def _cannot_write(path: Path, exc: OSError) -> ConfigurationError:
    return ConfigurationError(
        f"The keys file {path} cannot be written: {exc.strerror}.",
        remedy="Name a file in a folder that you may write to, and run this as the user to whom the file belongs.",
    )


def _to_json(keys: Iterable[ApiKey]) -> str:
    entries = [key.model_dump(mode="json", exclude_none=True) for key in keys]
    return json.dumps({"keys": entries}, indent=2, ensure_ascii=False) + "\n"


def _location_text(location: Location) -> str:
    """The location of a problem as text: `key 2, tasks 1`."""
    text = "".join(f" {part + 1}" if isinstance(part, int) else f", {part[:80]}" for part in location)
    return re.sub(r"^, keys (?=\d)", ", key ", text).removeprefix(", ")
