"""Contents of versions as this server can serve them: read from the store, and checked for its frozen model."""

from collections.abc import Callable, Collection, Iterable

from server.contracts import ModelSpec
from server.errors import PreludeError, VersionUnavailable
from server.registry.events import VersionContent
from server.registry.store import Store
from server.soft_prompts.manifest import Manifest
from server.soft_prompts.soft_prompt import (
    EMBEDDING_TYPES,
    KV_TYPES,
    SoftPrompt,
    check_base_model,
    check_finite,
    check_shape,
)

SINGLE_TYPES = (*EMBEDDING_TYPES, *KV_TYPES)


class Contents:
    """Reads contents, and remembers which of them cannot be served.

    Attributes:
        broken: key of a content -> why it cannot be served.
    """

    def __init__(
        self,
        store: Store,
        model: ModelSpec,
        max_virtual_tokens: int,
        is_wanted: Callable[[str], bool],
        on_change: Callable[[VersionContent], None],
    ) -> None:
        """Nothing is read yet.

        Args:
            is_wanted: says whether a version has these numbers, or is about to: a content that was deleted while it
                was read is not broken.
            on_change: called on any thread after a content turned out to be broken, or to be no longer.
        """
        self.broken: dict[str, str] = {}
        self._is_wanted = is_wanted
        self._on_change = on_change
        self._store = store
        self._model = model
        self._max_virtual_tokens = max_virtual_tokens

    def load(self, content: VersionContent) -> SoftPrompt:
        """Read and check a content, on a thread of the host cache; VersionUnavailable if it cannot be served."""
        try:
            self.check_fit(content)
            soft_prompt = self._store.get_blob(content)
            check_finite(soft_prompt.tensor, self._model.dtype)
        except PreludeError as exc:
            self.broken[_key(content)] = str(exc)
            self._on_change(content)
            if not self._is_wanted(content.prefix_hash):  # after the line above: a delete forgets it last
                self.forget(content)
            raise _unavailable(exc) from exc
        self.forget(content)
        return soft_prompt

    def require_fit(self, content: VersionContent) -> None:
        """Raise VersionUnavailable for a content that this server cannot serve; its blob is not read."""
        try:
            self.check_fit(content)
        except PreludeError as exc:
            raise _unavailable(exc) from exc

    def check_all(self, contents: Iterable[VersionContent], deleted: Collection[str] = ()) -> None:
        """At start, find the versions that cannot be served, from the events and the list of blobs.

        Blobs of `deleted` versions are removed. Raises StoreError if the store cannot be listed.
        """
        contents = list(contents)
        missing = self._store.missing_blobs({content.blob for content in contents}, deleted)
        self.check(contents)
        for content in contents:
            if content.blob in missing:
                self.broken.setdefault(_key(content), f"The store's blob {content.blob} is missing.")

    def check(self, contents: Iterable[VersionContent]) -> None:
        """Find out what cannot be served by what events say; nothing is read from the store."""
        known: dict[tuple[object, ...], str | None] = {}  # contents are alike
        for content in contents:
            about = content.about
            base = None if about.base_model is None else (about.base_model.name, about.base_model.fingerprint)
            facts = (about.problem, content.peft_type, content.shape, base)
            if facts not in known:
                known[facts] = self._why_unfit(content)
            why = known[facts]
            if why is not None:
                self.broken[_key(content)] = why

    def _why_unfit(self, content: VersionContent) -> str | None:
        try:
            self.check_fit(content)
        except PreludeError as exc:
            return str(exc)
        return None

    def is_broken(self, content: VersionContent) -> bool:
        """Whether it could not be served when that was last tried."""
        return _key(content) in self.broken

    def why_broken(self, content: VersionContent) -> str | None:
        """Why it cannot be served; None if nothing is known against it."""
        return self.broken.get(_key(content))

    def forget(self, content: VersionContent) -> None:
        """Nothing is known against it, or no version has it any more."""
        if self.broken and self.broken.pop(_key(content), None) is not None:
            self._on_change(content)

    def check_fit(self, content: VersionContent) -> None:
        """Refuse a content that this server cannot serve whatever the store answers.

        Raises:
            VersionUnavailable: a newer Prelude wrote it.
            InvalidSoftPrompt, BaseModelMismatch: it does not fit the frozen model.
        """
        about = content.about
        if about.problem is not None:
            raise VersionUnavailable(f"This server cannot read the version: {about.problem}", remedy=_NEWER)
        if content.peft_type not in SINGLE_TYPES:
            raise VersionUnavailable(
                f"This server does not know the version's peft_type {content.peft_type[:64]!r}.", remedy=_NEWER
            )
        check_base_model(Manifest(base_model=about.base_model), self._model)
        check_shape(content.peft_type, content.shape, self._model, self._max_virtual_tokens)


_NEWER = "Run the version of Prelude that wrote it, or activate another version."


def _key(content: VersionContent) -> str:
    """The cache key of a version's content.

    A blob's name alone would do, but a newer Prelude may share blobs between versions.
    """
    return f"{content.blob} {content.about.identity}"


def _unavailable(exc: PreludeError) -> VersionUnavailable:
    if isinstance(exc, VersionUnavailable):
        return exc
    return VersionUnavailable(f"The version cannot be served: {exc.message}", remedy=exc.remedy)
