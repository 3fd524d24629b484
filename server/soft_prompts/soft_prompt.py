"""The soft prompt: an immutable value with two hashes, and the checks that it must pass.

Its `prefix_hash` identifies the tensor and is the key of the engine's caches. Its `digest` identifies the tensor and
the manifest fields that change answers, and is the key of a version's content. Neither depends on a name, so caches
never become stale.
"""

import hashlib
from dataclasses import dataclass, field

import torch

from server.contracts import ModelSpec
from server.errors import BaseModelMismatch, InvalidSoftPrompt
from server.soft_prompts.manifest import Manifest

EMBEDDING_TYPES = ("PROMPT_TUNING", "P_TUNING", "CPT")
KV_TYPES = ("PREFIX_TUNING", "CARTRIDGE")
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Dtypes of stored soft prompts, by safetensors' names."""


@dataclass(frozen=True, eq=False)
class SoftPrompt:
    """The learned virtual tokens of one version of a task.

    Attributes:
        peft_type: PEFT's name of the training method; determines the meaning of `tensor`.
        tensor: `[num_virtual_tokens, hidden_size]` for embeddings, or
            `[num_virtual_tokens, layers * 2 * kv_heads * head_dim]` for a KV prefix. Never written to.
        manifest: the soft prompt's manifest.
        is_multitask_row: whether it comes from a multitask soft prompt; only affects the task's name.
        notes: warnings for the publisher about declarations that the server does not use; not part of its identity.
        prefix_hash: sha256 over name, dtype, shape and bytes of `tensor`, and whether it is a KV prefix.
        digest: sha256 over `prefix_hash` and the manifest's fields that change answers.
    """

    peft_type: str
    tensor: torch.Tensor
    manifest: Manifest = field(default_factory=Manifest)
    is_multitask_row: bool = False
    notes: tuple[str, ...] = ()
    prefix_hash: str = field(init=False)
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "prefix_hash", _prefix_hash(self.tensor, self.is_kv_prefix))
        identity = f"{self.prefix_hash}\n{self.manifest.answers_identity()}"
        object.__setattr__(self, "digest", hashlib.sha256(identity.encode()).hexdigest())

    @property
    def is_kv_prefix(self) -> bool:
        """Whether `tensor` contains keys and values instead of input embeddings."""
        return self.peft_type in KV_TYPES

    @property
    def num_virtual_tokens(self) -> int:
        """Number of positions that the soft prompt occupies at the start of every sequence."""
        return int(self.tensor.shape[0])

    @property
    def num_bytes(self) -> int:
        """Size of the tensor in bytes."""
        return self.tensor.numel() * self.tensor.element_size()


def _prefix_hash(tensor: torch.Tensor, is_kv_prefix: bool) -> str:
    kind = "kv_prefix" if is_kv_prefix else "prompt_embeddings"
    header = f"{kind} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}\n"
    digest = hashlib.sha256(header.encode())
    # The same bytes as on disk: safetensors is little-endian, as is every machine that torch runs on.
    digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_shape(peft_type: str, shape: tuple[int, ...], model: ModelSpec, max_virtual_tokens: int) -> None:
    """Refuse a tensor by its header alone, before any memory is allocated for it.

    Raises InvalidSoftPrompt for a KV prefix for a model with recurrent state, a wrong rank or width, no rows, or too
    many.
    """
    if peft_type in KV_TYPES and model.state_width:
        raise InvalidSoftPrompt(
            f"A {peft_type} soft prompt is keys and values, and {model.name} also keeps a recurrent state of what it "
            "has read, which they do not define.",
            remedy="Train input embeddings instead, with PROMPT_TUNING or P_TUNING.",
        )
    if peft_type in KV_TYPES:
        width, meaning = model.kv_width, "layers x 2 x key-value heads x head_dim"
    else:
        width, meaning = model.hidden_size, "the hidden size"
    if len(shape) != 2 or shape[1] != width:
        raise InvalidSoftPrompt(
            f"prompt_embeddings has shape {list(shape)}; a {peft_type} soft prompt for {model.name} has "
            f"[num_virtual_tokens, {width}] ({meaning}).",
            remedy=f"Train it on {model.name}, or serve the model that it was trained on.",
        )
    if not 1 <= shape[0] <= max_virtual_tokens:
        raise InvalidSoftPrompt(
            f"The soft prompt has {shape[0]} virtual tokens; this server takes 1 to {max_virtual_tokens}.",
            remedy="Use fewer virtual tokens, or raise PRELUDE_MAX_VIRTUAL_TOKENS.",
        )
    if shape[0] + 2 > model.max_model_len:
        raise InvalidSoftPrompt(
            f"{shape[0]} virtual tokens leave no room in a context of {model.max_model_len}.",
            remedy="Use fewer virtual tokens, or raise PRELUDE_MAX_MODEL_LEN.",
        )


def check_size(peft_type: str, num_virtual_tokens: int, model: ModelSpec, max_virtual_tokens: int) -> None:
    """Refuse to train a soft prompt that could not be served; raises as `check_shape`."""
    width = model.kv_width if peft_type in KV_TYPES else model.hidden_size
    check_shape(peft_type, (num_virtual_tokens, width), model, max_virtual_tokens)


def check_finite(tensor: torch.Tensor, serving_dtype: str) -> None:
    """Refuse NaN and infinity, including values that become infinite in the serving dtype.

    The InvalidSoftPrompt names the first virtual token that is not finite.
    """
    for stage, values in (
        ("", tensor),
        (f" after the cast to {serving_dtype}", tensor.to(getattr(torch, serving_dtype))),
    ):
        finite = torch.isfinite(values).all(dim=1)
        if not bool(finite.all()):
            row = int((~finite).nonzero()[0])
            raise InvalidSoftPrompt(
                f"prompt_embeddings is not finite{stage}: virtual token {row} holds NaN or infinity.",
                remedy="Train again with a lower learning rate or with gradient clipping.",
            )


def check_base_model(manifest: Manifest, model: ModelSpec) -> None:
    """Raise BaseModelMismatch if the manifest names another frozen model by its fingerprint."""
    trained_on = manifest.base_model
    if trained_on is None or trained_on.fingerprint is None or trained_on.fingerprint == model.fingerprint:
        return
    raise BaseModelMismatch(
        f"The soft prompt was trained on {trained_on.name or 'a model'} ({trained_on.fingerprint}); "
        f"this server holds {model.name} ({model.fingerprint})."
    )
