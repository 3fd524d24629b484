"""A manifest as JSON text, and a summary for lists.

The summary is made once, when the event is applied, and not by requests.
"""

import hashlib
import json
import weakref
import zlib
from dataclasses import dataclass, replace
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


SUMMARIES = 1
"""The kind of summaries in a snapshot: raise it when a manifest's summary changes, or more manifests can be read."""
WINDOW_BITS = 13
MOST_DICTIONARIES = 16
PACKED_SHARE = 3
"""A text that is not packed into this fraction of its size becomes part of the dictionary for later ones."""


@dataclass(frozen=True, slots=True)
class ManifestSummary:
    """What is known of a manifest without reading it again.

    Attributes:
        identity: hash of the manifest without the fields that the server fills in.
        problem: why this server cannot read it; None if it can.
        description: at most MAX_DESCRIPTION characters of it.
        base_model: the frozen model that the soft prompt was trained on.
    """

    identity: str
    problem: str | None = None
    description: str | None = None
    base_model: BaseModelRef | None = None


class ManifestText:
    """A manifest as JSON without white space, compressed once the registry keeps it; and its summary.

    A parsed manifest takes ten times the room. All rows of a multitask soft prompt share one text.
    """

    __slots__ = ("__weakref__", "_about", "_data", "_dictionary", "_kept")

    def __init__(self, text: str, about: ManifestSummary | None = None) -> None:
        """Keep a text, and its summary if it is known."""
        self._data: str | bytes = text  # bytes are compressed with `_dictionary`
        self._dictionary = b""
        self._about = about
        self._kept: weakref.ref[Manifest] | None = None

    @property
    def text(self) -> str:
        """The manifest as JSON."""
        data = self._data
        if isinstance(data, str):
            return data
        return zlib.decompressobj(-WINDOW_BITS, self._dictionary).decompress(data).decode()

    @property
    def is_packed(self) -> bool:
        """Whether it is compressed."""
        return isinstance(self._data, bytes)

    @property
    def about(self) -> ManifestSummary:
        """What lists show of it."""
        about = self._about
        if about is None:
            about = self._about = _summary(self.text)
        return about

    @property
    def metrics(self) -> dict[str, Any] | None:
        """Its metrics; None if there are none, or more than MAX_METRICS_BYTES, which only old stores hold."""
        metrics: dict[str, Any] | None = (
            None if self.about.problem is not None else json.loads(self.text).get("metrics")
        )
        return None if metrics is None or len(compact_json(metrics).encode()) > MAX_METRICS_BYTES else metrics

    @property
    def manifest(self) -> Manifest:
        """The parsed manifest, shared by callers that hold it at once; raises InvalidSoftPrompt as `parse`."""
        kept = None if self._kept is None else self._kept()
        if kept is None:
            kept = self.parse()
            self._kept = weakref.ref(kept)
        return kept

    def parse(self) -> Manifest:
        """The manifest as a new object; raises InvalidSoftPrompt if a newer Prelude wrote it."""
        return Manifest.parse(self.text)

    def pack(self, data: bytes, dictionary: bytes, about: ManifestSummary) -> None:
        """Keep the text as this compressed form of it instead, and this summary, which is equal to its own."""
        self._about = about
        self._dictionary = dictionary  # before the data: other threads may read the text now
        self._data = data

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, ManifestText) and self.text == other.text)

    def __hash__(self) -> int:
        return hash(self.text)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.text!r})"


class ManifestPacker:
    """Compresses the manifests of a store, which are alike: each with those before it as its dictionary.

    For one thread at a time.
    """

    def __init__(self) -> None:
        self._dictionary = b""
        self._empty = _deflater(b"")
        self._dictionaries = 0
        self._base_models: dict[tuple[str | None, str | None], BaseModelRef] = {}

    def pack(self, manifest: ManifestText) -> None:
        """Compress a manifest in place, and let its summary share what others have too."""
        if manifest.is_packed:
            return
        about, text = manifest.about, manifest.text.encode()
        data = self._deflate(text)
        if len(data) * PACKED_SHARE > len(text) and self._dictionaries < MOST_DICTIONARIES:
            self._dictionaries += 1
            self._dictionary = (self._dictionary + text)[-(2**WINDOW_BITS) :]
            self._empty = _deflater(self._dictionary)
            data = self._deflate(text)
        base = about.base_model
        if base is not None:
            shared = self._base_models.setdefault((base.name, base.fingerprint), base)
            about = about if shared is base else replace(about, base_model=shared)
        manifest.pack(data, self._dictionary, about)

    def _deflate(self, text: bytes) -> bytes:
        deflater = self._empty.copy()  # cheaper than a new one, which reads the dictionary
        return deflater.compress(text) + deflater.flush()


def _deflater(dictionary: bytes) -> "zlib._Compress":
    return zlib.compressobj(1, zlib.DEFLATED, -WINDOW_BITS, 5, zlib.Z_DEFAULT_STRATEGY, dictionary)


def _summary(text: str) -> ManifestSummary:
    fields = {name: value for name, value in json.loads(text).items() if name not in FILLED_IN}
    identity = hashlib.sha256(compact_json(fields).encode()).hexdigest()[:16]
    try:
        manifest = Manifest.parse(text)
    except InvalidSoftPrompt as exc:
        return ManifestSummary(identity, exc.message)
    description, base = manifest.description, manifest.base_model
    if description is not None and len(description) > MAX_DESCRIPTION:
        description = f"{description[:MAX_DESCRIPTION]}…"
    known = None if base is None else BaseModelRef(name=base.name, fingerprint=base.fingerprint)
    return ManifestSummary(identity, None, description, known)


def compact_json(value: Any) -> str:
    """JSON without white space."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
