"""Contents of versions as this server can serve them: read from the store, and judged by its frozen model."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from server.core import ModelSpec
from server.errors import PreludeError, VersionUnavailable
from server.registry.events import Content
from server.registry.store import Store
from server.soft_prompts.soft_prompt import SoftPrompt, check_base_model, check_finite, check_shape


class Contents:
    """Reads contents, and remembers which of them cannot be served.

    Attributes:
        broken: blob -> why it cannot be served.
    """

    def __init__(
        self, store: Store, model: ModelSpec, max_virtual_tokens: int, is_wanted: Callable[[str], bool]
    ) -> None:
        """Nothing is read yet.

        Args:
            store: where they are.
            model: the frozen model that they must fit.
            max_virtual_tokens: the longest soft prompt that is taken.
            is_wanted: whether a version has these numbers, or is about to; what was deleted while it was read is not
                broken.
        """
        self.broken: dict[str, str] = {}
        self._is_wanted = is_wanted
        self._store = store
        self._model = model
        self._max_virtual_tokens = max_virtual_tokens

    def load(self, content: Content) -> SoftPrompt:
        """Read a content and check that this model can serve it; on a thread of the host cache.

        Raises:
            VersionUnavailable: it cannot be read, or not be served.
        """
        try:
            self._check_fit(content)
            soft_prompt = self._store.get_blob(content)
            check_finite(soft_prompt.tensor, self._model.dtype)
        except PreludeError as exc:
            self.broken[content.blob] = str(exc)
            if not self._is_wanted(content.prefix_hash):  # in this order: who deletes it forgets it last
                self.forget(content)
            raise VersionUnavailable(f"The version cannot be served: {exc.message}", remedy=exc.remedy) from exc
        self.broken.pop(content.blob, None)
        return soft_prompt

    def check_all(self, contents: Iterable[Content]) -> None:
        """Find out at start what cannot be served, by what events say and which blobs there are.

        Raises:
            StoreError: the store cannot be listed.
        """
        by_blob = {content.blob: content for content in contents}
        missing = self._store.missing_blobs(by_blob)
        for blob, content in by_blob.items():
            if blob in missing:
                self.broken[blob] = f"The store's blob {blob} is missing."
                continue
            try:
                self._check_fit(content)
            except PreludeError as exc:
                self.broken[blob] = str(exc)

    def is_broken(self, content: Content) -> bool:
        """Whether it could not be served when that was last tried."""
        return content.blob in self.broken

    def forget(self, content: Content) -> None:
        """No version has it any more."""
        self.broken.pop(content.blob, None)

    def _check_fit(self, content: Content) -> None:
        check_base_model(content.parse_manifest(), self._model)
        check_shape(content.peft_type, content.shape, self._model, self._max_virtual_tokens)
