"""What a soft prompt was before training, as its manifest declares it under `training.start`.

Only the difference between the learned values and these says what training added. The declaration holds token ids or
hashes, not numbers: `train/start.py` computes the values again. It does not change answers, so the digest leaves it
out, and a declaration that cannot be read counts as missing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from server.soft_prompts.manifest import Manifest

START_FIELD = "start"
MOST_IDS = 1000
"""Maximum number of token ids in a manifest, whose size is limited; a start of more tokens is not declared."""
MOST_NAME = 200


class TrainingStart(BaseModel):
    """A start: real tokens, random numbers of their scale, the last tokens of a teacher's text, or a soft prompt."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    initial_token_ids: tuple[int, ...] | None = None
    """The token that each virtual token began as."""
    random_seed: int | None = Field(None, ge=0, lt=2**63)
    """With token ids: the numbers were drawn with this seed, on the scale of those tokens' embeddings."""
    teacher_tokens: int | None = Field(None, ge=1)
    """Number of tokens of the teacher's text before a row's input; the keys and values of the last ones were taken."""
    token_ids_sha256: str | None = None
    """Hash of the ids of these tokens."""
    prefix_hash: str | None = None
    """The prefix hash of the soft prompt that training began with."""
    nearest_task: str | None = Field(None, max_length=MOST_NAME)
    """With a prefix hash: the task of this soft prompt, which training found to be the nearest by function."""
    similarity: float | None = None
    """With `nearest_task`: the cosine of what both do to the last hidden state."""
    num_virtual_tokens: int | None = Field(None, ge=1)
    """Number of virtual tokens that were trained, if some were removed later."""
    kept: tuple[int, ...] | None = None
    """Positions of those that remain, ascending."""

    @model_validator(mode="after")
    def _is_one_thing(self) -> Self:
        if sum(value is not None for value in (self.initial_token_ids, self.teacher_tokens, self.prefix_hash)) != 1:
            raise ValueError("a start names token ids, a teacher's tokens or a prefix hash, and only one of them")
        kept, count = self.kept, self.num_virtual_tokens
        if (kept is None) != (count is None):
            raise ValueError("kept and num_virtual_tokens belong together")
        if kept is not None and (
            not kept or list(kept) != sorted(set(kept)) or not 0 <= kept[0] <= kept[-1] < (count or 0)
        ):
            raise ValueError("kept are ascending positions of the trained virtual tokens")
        return self

    @property
    def remaining_token_ids(self) -> tuple[int, ...]:
        """The tokens that the remaining virtual tokens began as; empty if they did not begin as tokens."""
        ids = self.initial_token_ids or ()
        return ids if self.kept is None else tuple(ids[index] for index in self.kept if index < len(ids))

    def after_removal(self, num_virtual_tokens: int, kept: Sequence[int]) -> TrainingStart:
        """The start of these of the `num_virtual_tokens` virtual tokens."""
        positions = self.kept or range(num_virtual_tokens)
        count = self.num_virtual_tokens or num_virtual_tokens
        return self.model_copy(update={"num_virtual_tokens": count, "kept": tuple(positions[one] for one in kept)})

    @property
    def fits_manifest(self) -> bool:
        """Whether a manifest within its limits can hold this declaration."""
        return len(self.initial_token_ids or ()) <= MOST_IDS

    def as_dict(self) -> dict[str, Any]:
        """For the manifest: what is set."""
        return self.model_dump(mode="json", exclude_none=True)


def declared_start(manifest: Manifest) -> TrainingStart | None:
    """The start that a manifest declares; None if it declares none, or one that this version cannot read."""
    declared = (manifest.training or {}).get(START_FIELD)
    try:
        return None if declared is None else TrainingStart.model_validate(declared)
    except ValidationError:
        return None


def hash_of_ids(token_ids: Sequence[int]) -> str:
    """sha256 of token ids."""
    return hashlib.sha256(" ".join(map(str, token_ids)).encode()).hexdigest()
