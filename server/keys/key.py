"""An API key: an id, the hash of a secret, and the key's scopes and tasks.

The text of a key is `prelude_<id>_<secret>`; the secret is 256 random bits. Unlike a password, it cannot be guessed
from its hash, so one plain SHA-256 is sufficient. It takes a request a microsecond; a slow hash would take a tenth of a
second.
"""

import datetime
import hashlib
import hmac
import re
import secrets
from collections.abc import Sequence
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Annotated, Self

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, field_validator, model_validator

NO_HASH = "0" * 64
"""Compared if the key does not exist, so that the time of a refusal does not reveal which ids exist."""

_PRESENTED = re.compile(r"prelude_([a-z0-9]{4,32})_([0-9a-f]{64})")

_NAME = re.compile(r"[^\x00-\x1f\x7f-\x9f]{1,100}")
_PATTERN = re.compile(r"[a-z0-9*][a-z0-9._*-]{0,63}")


def _check_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError("a key is called by 1 to 100 characters on one line")
    return name


def _check_pattern(pattern: str) -> str:
    if not _PATTERN.fullmatch(pattern):
        raise ValueError("this is no task's name, in which * may stand for any characters, such as team-a-*")
    return pattern


TaskPattern = Annotated[str, AfterValidator(_check_pattern)]
"""A task name in which `*` matches any number of characters, including none."""


class Scope(StrEnum):
    """What a key may do; every key may also read its own tasks."""

    GENERATE = "generate"
    PUBLISH = "publish"
    METRICS = "metrics"
    ADMIN = "admin"


class ApiKey(BaseModel):
    """One key, without its secret."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(pattern=r"^[a-z0-9]{4,32}$")
    name: Annotated[str, AfterValidator(_check_name)]
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", repr=False)
    scopes: tuple[Scope, ...]
    tasks: tuple[TaskPattern, ...] | None = None
    created_at: AwareDatetime

    @field_validator("scopes", "tasks")
    @classmethod
    def _some_and_no_duplicates(cls, values: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if values == ():
            raise ValueError("at least one is required")
        if values is not None and len(set(values)) < len(values):
            raise ValueError("it contains a duplicate")
        return values

    @model_validator(mode="after")
    def _admin_is_for_all_tasks(self) -> Self:
        if Scope.ADMIN in self.scopes and self.tasks is not None:
            raise ValueError("a key with the scope admin is for all tasks; leave out its task patterns")
        return self

    def may(self, scope: Scope) -> bool:
        """Whether the key has a scope; `admin` includes all scopes."""
        return scope in self.scopes or Scope.ADMIN in self.scopes

    def is_for(self, task: str) -> bool:
        """Whether the key may use a task."""
        return self.tasks is None or any(matches(pattern, task) for pattern in self.tasks)


def make_key(name: str, scopes: Sequence[Scope], tasks: Sequence[str] | None) -> tuple[ApiKey, str]:
    """Create a key from valid fields (or raise ValidationError); returns it with its text, which is not stored."""
    secret = secrets.token_hex(32)
    key = ApiKey(
        id=secrets.token_hex(4),
        name=name,
        sha256=_hash(secret),
        scopes=tuple(scopes),
        tasks=tuple(tasks) if tasks else None,
        created_at=datetime.datetime.now(datetime.UTC).replace(microsecond=0),
    )
    return key, f"prelude_{key.id}_{secret}"


def split_key(presented: str) -> tuple[str, str]:
    """The id and secret in a key's text; both empty if it does not have the form of a key."""
    match = _PRESENTED.fullmatch(presented)
    return (match[1], match[2]) if match else ("", "")


def is_secret_of(key: ApiKey | None, secret: str) -> bool:
    """Whether a secret belongs to a key, compared in constant time; False if `key` is None."""
    return hmac.compare_digest(_hash(secret), NO_HASH if key is None else key.sha256)


def matches(pattern: str, task: str) -> bool:
    """Whether a pattern matches a task's name; `*` is the only special character that patterns may contain."""
    return fnmatchcase(task, pattern)


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
