"""One event per change: what is written when something is published, activated, rolled back, shared or deleted.

Events say what was done; `state.py` says what that means.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from server.errors import StoreError
from server.soft_prompts.manifest import Manifest
from server.soft_prompts.soft_prompt import SoftPrompt

Source = Literal["api", "inbox"]

Traffic = tuple[tuple[int, int], ...]
"""Who answers: (version, weight) by version, weights summing to 100. One pair usually, more in a canary; () nobody."""


def _as_text(value: Any) -> str:
    if not isinstance(value, dict):
        raise ValueError("must be an object")
    return compact_json(value)


JsonText = Annotated[str, BeforeValidator(_as_text)]
"""A JSON object in an event's file, its text in memory: ten thousand parsed manifests would take ten times the room."""

FILLED_IN = (
    "task",
    "digest",
    "prefix_hash",
    "created_at",
    "peft_type",
    "num_virtual_tokens",
    "hidden_size",
    "base_model",
)
"""Fields of a manifest that a download fills in: uploading it again changes nothing."""


def alone(version: int) -> Traffic:
    """One version that answers everything."""
    return ((version, 100),)


class _Strict:
    __slots__ = ()
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")


@dataclass(frozen=True, slots=True)
class Content(_Strict):
    """All that may be known of a version's content without reading its tensor.

    Attributes:
        digest: identity of what changes answers; checked whenever the blob is read.
        prefix_hash: identity of the numbers alone, the key of what the engine caches.
        peft_type: how the tensor is read.
        shape: the tensor's, `[num_virtual_tokens, width]`.
        num_bytes: size of the tensor.
        blob: name of the blob; every version has one of its own, so deleting a version never takes another's.
        manifest: what the soft prompt says about itself, as JSON.
    """

    digest: str
    prefix_hash: str
    peft_type: str
    shape: tuple[int, int]
    num_bytes: int
    blob: str
    manifest: JsonText

    @property
    def num_virtual_tokens(self) -> int:
        """Positions that it takes at the start of every sequence."""
        return self.shape[0]

    @property
    def identity(self) -> str:
        """Digest and what people wrote into the manifest: what differs here is worth a new version."""
        about = {name: value for name, value in json.loads(self.manifest).items() if name not in FILLED_IN}
        return f"{self.digest} {hashlib.sha256(compact_json(about).encode()).hexdigest()[:16]}"

    def parse_manifest(self) -> Manifest:
        """The manifest as an object."""
        return Manifest.parse(self.manifest)


def content_of(soft_prompt: SoftPrompt, blob: str) -> Content:
    """What an event says of a soft prompt."""
    n, width = soft_prompt.tensor.shape
    return Content(
        digest=soft_prompt.digest,
        prefix_hash=soft_prompt.prefix_hash,
        peft_type=soft_prompt.peft_type,
        shape=(n, width),
        num_bytes=soft_prompt.num_bytes,
        blob=blob,
        manifest=compact_json(json.loads(soft_prompt.manifest.to_json())),
    )


@dataclass(frozen=True, slots=True)
class NewVersion(_Strict):
    """A content under a number of a task."""

    task: str
    version: int
    content: Content


@dataclass(frozen=True, slots=True)
class Publish(_Strict):
    """New versions, one or all rows of a multitask soft prompt; `activate` also lets them answer.

    A version that exists already is only marked as what the inbox holds.
    """

    published: tuple[NewVersion, ...]
    activate: bool = True
    kind: Literal["publish"] = "publish"


@dataclass(frozen=True, slots=True)
class Activate(_Strict):
    """A version answers from now on, alone."""

    task: str
    version: int
    kind: Literal["activate"] = "activate"


@dataclass(frozen=True, slots=True)
class SetTraffic(_Strict):
    """Versions share the requests by weight: a canary."""

    task: str
    traffic: Traffic
    kind: Literal["traffic"] = "traffic"


@dataclass(frozen=True, slots=True)
class RollBack(_Strict):
    """What answered before answers again."""

    task: str
    kind: Literal["rollback"] = "rollback"


@dataclass(frozen=True, slots=True)
class DeleteVersion(_Strict):
    """A version that does not answer is gone."""

    task: str
    version: int
    kind: Literal["delete_version"] = "delete_version"


@dataclass(frozen=True, slots=True)
class Delete(_Strict):
    """A task and all its versions are gone."""

    task: str
    kind: Literal["delete"] = "delete"


@dataclass(frozen=True, slots=True)
class Retire(_Strict):
    """The inbox at `by` no longer holds these tasks: what came from it stops answering; its versions stay."""

    tasks: tuple[str, ...]
    kind: Literal["retire"] = "retire"


Change = Annotated[
    Publish | Activate | SetTraffic | RollBack | DeleteVersion | Delete | Retire, Field(discriminator="kind")
]

KINDS = ("publish", "activate", "traffic", "rollback", "delete_version", "delete", "retire")
"""What a change may be."""


@dataclass(frozen=True, slots=True)
class Event(_Strict):
    """One atomic change: which, when, from where, and by whom (a key's id, or an inbox's place).

    A `nonce` makes it another one than that of a server which does the same at the same moment; old events have none.
    """

    number: int
    at: str
    source: Source
    by: str | None
    change: Change
    nonce: str = ""

    def to_json(self) -> bytes:
        """The event's file."""
        fields = asdict(self)
        for item in fields["change"].get("published", ()):
            item["content"]["manifest"] = json.loads(item["content"]["manifest"])
        return json.dumps(fields, sort_keys=True, ensure_ascii=False).encode()

    @classmethod
    def parse(cls, data: bytes, name: str) -> Event:
        """Read an event's file.

        Raises:
            StoreError: it is not one, or it is of a kind that only a newer Prelude knows.
        """
        try:
            return _EVENT.validate_json(data)
        except ValidationError as exc:
            problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in exc.errors()[:3])
            raise StoreError(
                f"The store's event {name} cannot be read: {problems}.",
                remedy="Restore it from a backup of the store, or run the version of Prelude that wrote it.",
            ) from exc


_EVENT = TypeAdapter(Event)


def tasks_of(change: Change) -> set[str]:
    """The tasks that a change is about."""
    if isinstance(change, Publish):
        return {item.task for item in change.published}
    return set(change.tasks) if isinstance(change, Retire) else {change.task}


def compact_json(value: Any) -> str:
    """JSON without white space."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
