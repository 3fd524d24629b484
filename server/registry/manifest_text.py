"""A manifest as JSON text, and a summary for lists.

The summary is made once, when the event is applied, and not by requests.
"""

import hashlib
import json
import weakref
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from server.errors import InvalidSoftPrompt
from server.soft_prompts.limits import MAX_DESCRIPTION, MAX_METRICS_BYTES
from server.soft_prompts.manifest import BaseModelRef, Manifest

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


@dataclass(frozen=True, slots=True)
class ManifestSummary:
    """What is known of a manifest without reading it again.

    Attributes:
        identity: hash of the manifest without the fields that the server fills in.
        problem: why this server cannot read it; None if it can.
        description: at most MAX_DESCRIPTION characters of it.
        metrics: as JSON; None if there are none, or more than MAX_METRICS_BYTES, which only old stores hold.
        base_model: the frozen model that the soft prompt was trained on.
    """

    identity: str
    problem: str | None = None
    description: str | None = None
    metrics: str | None = None
    base_model: BaseModelRef | None = None


class ManifestText(str):
    """A manifest as JSON without white space; ten thousand parsed manifests would take ten times the room.

    All rows of a multitask soft prompt share one.
    """

    @cached_property
    def about(self) -> ManifestSummary:
        """What lists show of it."""
        fields = {name: value for name, value in json.loads(self).items() if name not in FILLED_IN}
        identity = hashlib.sha256(compact_json(fields).encode()).hexdigest()[:16]
        try:
            manifest = self.parse()
        except InvalidSoftPrompt as exc:
            return ManifestSummary(identity, exc.message)
        description, metrics = manifest.description, None
        if description is not None and len(description) > MAX_DESCRIPTION:
            description = f"{description[:MAX_DESCRIPTION]}…"
        if manifest.metrics is not None:
            metrics = compact_json(manifest.metrics)
        if metrics is not None and len(metrics.encode()) > MAX_METRICS_BYTES:
            metrics = None
        base = manifest.base_model
        known = None if base is None else BaseModelRef(name=base.name, fingerprint=base.fingerprint)
        return ManifestSummary(identity, None, description, metrics, known)

    @property
    def manifest(self) -> Manifest:
        """The parsed manifest, shared by callers that hold it at once; raises InvalidSoftPrompt as `parse`."""
        kept: Manifest | None = self.__dict__.get("_kept", lambda: None)()
        if kept is None:
            kept = self.parse()
            self.__dict__["_kept"] = weakref.ref(kept)
        return kept

    def parse(self) -> Manifest:
        """The manifest as a new object; raises InvalidSoftPrompt if a newer Prelude wrote it."""
        return Manifest.parse(str(self))


def compact_json(value: Any) -> str:
    """JSON without white space."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
