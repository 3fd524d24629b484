"""Events, one per change: publish, activate, roll back, traffic, delete, retire.

Events say what was done; `state.py` says what that means.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, PlainValidator, TypeAdapter, ValidationError

from server.errors import StoreError
from server.registry.manifest_text import ManifestSummary, ManifestText, compact_json
from server.soft_prompts.manifest import Manifest, check_pairs
from server.soft_prompts.names import TASK_NAME
from server.soft_prompts.soft_prompt import SoftPrompt
from server.validation import first_problems

Source = Literal["api", "inbox"]

BLOB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

Traffic = tuple[tuple[int, int], ...]
"""The live versions: pairs (version, weight), sorted by version, with weights that sum to 100. Usually one pair,
several in a canary, none if no version is live."""


def _as_text(value: Any) -> ManifestText:
    if isinstance(value, ManifestText):  # what several rows share
        return value
    if not isinstance(value, dict):
        raise ValueError("must be an object")
    return ManifestText(compact_json(value))


JsonText = Annotated[ManifestText, PlainValidator(_as_text)]
"""A JSON object in an event's file, its text in memory."""


def alone(version: int) -> Traffic:
    """One version that answers everything."""
    return ((version, 100),)


class _Strict:
    __slots__ = ()
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")


@dataclass(frozen=True, slots=True)
class VersionContent(_Strict):
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
    def about(self) -> ManifestSummary:
        """What is known of its manifest."""
        return self.manifest.about

    @property
    def identity(self) -> str:
        """The identity of a content: digest plus manifest.

        A content with a different identity becomes a new version.
        """
        return f"{self.digest} {self.about.identity}"

    def parse_manifest(self) -> Manifest:
        """The manifest as an object; raises InvalidSoftPrompt if a newer Prelude wrote it."""
        return self.manifest.manifest


def content_of(soft_prompt: SoftPrompt, blob: str) -> VersionContent:
    """What an event says of a soft prompt."""
    return contents_of([soft_prompt], [blob])[0]


def contents_of(soft_prompts: Sequence[SoftPrompt], blobs: Sequence[str]) -> list[VersionContent]:
    """What an event says of soft prompts; those of one manifest share its text."""
    texts: dict[int, ManifestText] = {}
    found = []
    for soft_prompt, blob in zip(soft_prompts, blobs, strict=True):
        manifest = soft_prompt.manifest
        if id(manifest) not in texts:
            texts[id(manifest)] = ManifestText(compact_json(json.loads(manifest.to_json())))
        rows, width = soft_prompt.tensor.shape
        found.append(
            VersionContent(
                digest=soft_prompt.digest,
                prefix_hash=soft_prompt.prefix_hash,
                peft_type=soft_prompt.peft_type,
                shape=(rows, width),
                num_bytes=soft_prompt.num_bytes,
                blob=blob,
                manifest=texts[id(manifest)],
            )
        )
    return found


@dataclass(frozen=True, slots=True)
class NewVersion(_Strict):
    """A content under a number of a task."""

    task: str
    version: int
    content: VersionContent


@dataclass(frozen=True, slots=True)
class Publish(_Strict):
    """New versions, one or all rows of a multitask soft prompt; `activate` also lets them answer.

    If the version exists already, the event only records that the inbox contains it.
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
    """The inbox at `by` no longer contains these tasks. Versions that came from it stop answering, but are kept."""

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

    The `nonce` distinguishes events of two servers that make the same change at the same moment. Events of older
    versions have none.
    """

    number: int
    at: str
    source: Source
    by: str | None
    change: Change
    nonce: str = ""

    def to_json(self) -> bytes:
        """The event's file. A manifest that several versions share is written once, as the change's."""
        fields = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        change = self.change
        fields["change"] = _publish_fields(change) if isinstance(change, Publish) else asdict(change)
        return json.dumps(fields, sort_keys=True, ensure_ascii=False).encode()

    @classmethod
    def parse(cls, data: bytes, name: str) -> Event:
        """Read an event's file; raises StoreError if it is damaged, or of a kind that only a newer Prelude knows."""
        try:
            text = data.decode()  # strictly: json.loads lets halves of surrogate pairs through
            fields = json.loads(text)
            check_pairs(text, fields)
            _share_manifest(fields)
            event = _EVENT.validate_python(fields)
            _check_names(event.change)
            return event
        except ValidationError as exc:
            problem = first_problems(exc)
            raise StoreError(f"The store's event {name} cannot be read: {problem}.", remedy=_UNREADABLE) from exc
        except (ValueError, RecursionError) as exc:
            raise StoreError(f"The store's event {name} cannot be read: {exc}.", remedy=_UNREADABLE) from exc


def _check_names(change: Change) -> None:
    """Raise ValueError for a task or blob name that this server never gives: no command could address it."""
    for task in tasks_of(change):
        if not TASK_NAME.fullmatch(task):
            raise ValueError(f"{task[:80]!r} is no name of a task")
    for item in change.published if isinstance(change, Publish) else ():
        if not BLOB_NAME.fullmatch(item.content.blob):
            raise ValueError(f"{item.content.blob[:80]!r} is no name of a blob")


_UNREADABLE = "Restore it from a backup of the store, or run the version of Prelude that wrote it."

_EVENT, _PUBLISH = TypeAdapter(Event), TypeAdapter(Publish)


def tasks_of(change: Change) -> set[str]:
    """The tasks that a change is about."""
    if isinstance(change, Publish):
        return {item.task for item in change.published}
    return set(change.tasks) if isinstance(change, Retire) else {change.task}


def _publish_fields(change: Publish) -> dict[str, Any]:
    fields: dict[str, Any] = _PUBLISH.dump_python(change)
    contents = [item["content"] for item in fields["published"]]
    manifests = [content.pop("manifest") for content in contents]
    if len(contents) > 1 and len(set(manifests)) == 1:
        return {**fields, "manifest": json.loads(manifests[0].text)}
    for content, manifest in zip(contents, manifests, strict=True):
        content["manifest"] = json.loads(manifest.text)
    return fields


def _share_manifest(fields: Any) -> None:
    """Give every version of a publish the manifest that its event holds once."""
    change = fields.get("change") if isinstance(fields, dict) else None
    if not isinstance(change, dict) or change.get("kind") != "publish" or not isinstance(change.get("manifest"), dict):
        return
    published, text = change.get("published"), ManifestText(compact_json(change.pop("manifest")))
    for item in published if isinstance(published, list) else ():
        content = item.get("content") if isinstance(item, dict) else None
        if isinstance(content, dict):
            content.setdefault("manifest", text)


def seconds_of(at: str) -> int | None:
    """An event's time in seconds since 1970; None if it is not one."""
    try:
        return int(datetime.fromisoformat(at).timestamp())
    except (ValueError, OverflowError):
        return None
