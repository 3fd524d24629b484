"""Checks `adapter_config.json` against the frozen model; no declaration is ignored silently.

A key that contradicts the tensor or the model causes a refusal. Keys about training are accepted. Any other key is
reported to the publisher in a note.
"""

import reprlib
from collections.abc import Iterable
from typing import Any

from server.contracts import ModelSpec
from server.errors import InvalidSoftPrompt, UnsupportedPeftType
from server.soft_prompts.manifest import Manifest
from server.soft_prompts.soft_prompt import EMBEDDING_TYPES, KV_TYPES

CONFIG_FILE = "adapter_config.json"
MULTITASK = "MULTITASK_PROMPT_TUNING"
SERVED_TYPES = (*EMBEDDING_TYPES, *KV_TYPES, MULTITASK)
SERVED_TASK_TYPES = (None, "CAUSAL_LM")

TENSORS = {MULTITASK: ("prompt_embeddings", "prefix_task_cols", "prefix_task_rows")}
"""The tensors of a soft prompt's file, by peft_type; all other types have only `prompt_embeddings`."""

CHECKED_KEYS = {
    *("base_model_name_or_path", "cpt_token_ids", "modules_to_save", "num_attention_heads", "num_layers", "num_ranks"),
    *("num_transformer_submodules", "num_virtual_tokens", "peft_type", "task_type", "token_dim"),
    *("num_tasks", "trainable_token_indices"),
}
MULTITASK_KEYS = {"num_ranks", "num_tasks"}
FOR_PEOPLE = {"examples"}
"""Fields of a manifest that only pages show."""

TRAINING_KEYS = {
    *("auto_mapping", "cpt_mask", "cpt_tokens_type_mask", "encoder_dropout", "encoder_hidden_size"),
    *("encoder_num_layers", "encoder_reparameterization_type", "inference_mode", "init_weights", "num_frozen_tokens"),
    *("opt_loss_decay_factor", "opt_projection_epsilon", "opt_projection_format_epsilon", "opt_weighted_loss_type"),
    *("peft_version", "prefix_projection", "prompt_tuning_init", "prompt_tuning_init_state_dict_path"),
    *("prompt_tuning_init_task", "prompt_tuning_init_text", "revision", "tokenizer_kwargs", "tokenizer_name_or_path"),
}
"""Keys that PEFT writes about training; PEFT itself does not need them to apply a soft prompt."""

MOST_NAMES = 5
RETRAIN = "Train it on {model}, or serve the model that it was trained on."


def peft_type_of(config: dict[str, Any]) -> str:
    """The peft_type that a config declares.

    Raises:
        InvalidSoftPrompt: the config declares none.
        UnsupportedPeftType: the type is not served, or the adapter is not for a decoder-only language model.
    """
    peft_type = config.get("peft_type")
    served = ", ".join(SERVED_TYPES)
    if not isinstance(peft_type, str) or not peft_type:
        raise InvalidSoftPrompt(f"{CONFIG_FILE} has no peft_type.", remedy=f"Served are {served}.")
    if peft_type not in SERVED_TYPES:
        raise UnsupportedPeftType(f"peft_type {peft_type[:64]!r} is not a soft prompt; served are {served}.")
    task_type = config.get("task_type")
    if task_type not in SERVED_TASK_TYPES:
        raise UnsupportedPeftType(
            f"task_type is {_shown(task_type)}; this server generates text, which is CAUSAL_LM.",
            remedy="Train the soft prompt with task_type CAUSAL_LM on the model that this server holds.",
        )
    submodules = config.get("num_transformer_submodules")
    if submodules not in (None, 1):
        raise UnsupportedPeftType(
            f"num_transformer_submodules is {_shown(submodules)}: a soft prompt of an encoder-decoder model.",
            remedy="Train the soft prompt on the decoder-only model that this server holds.",
        )
    for key in ("modules_to_save", "trainable_token_indices"):
        if config.get(key):
            raise UnsupportedPeftType(
                f"{key} is {_shown(config[key])}: parts of the model were trained too.",
                remedy=f"Train the soft prompt alone, without {key}.",
            )
    return peft_type


def check_tensor_names(peft_type: str, names: Iterable[str], file_name: str) -> None:
    """Raise InvalidSoftPrompt, with a description, for a tensor that the server would ignore."""
    expected = TENSORS.get(peft_type, ("prompt_embeddings",))
    found = set(names)
    extra = sorted(found.difference(expected))
    if extra and found.issuperset(expected):  # otherwise the error about missing tensors is more helpful
        meaning, remedy = _meaning(extra[0])
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise InvalidSoftPrompt(
            f"{file_name} holds {extra[0][:200]!r}{more} beside {', '.join(expected)}: {meaning}.", remedy=remedy
        )


def check_declared(config: dict[str, Any], peft_type: str, rows: int, model: ModelSpec) -> None:
    """Refuse a config that contradicts the tensor, of `rows` virtual tokens, or the frozen model.

    The number of layers and heads is checked too: with other numbers, the width could be right but the meaning wrong.
    The InvalidSoftPrompt names the key, its value and the expected value.
    """
    ids = config.get("cpt_token_ids") if peft_type == "CPT" else None
    lengths = {"num_virtual_tokens": config.get("num_virtual_tokens")}
    if isinstance(ids, list):
        lengths["length of cpt_token_ids"] = len(ids)
    for key, declared in lengths.items():
        if declared is not None and declared != rows:
            raise InvalidSoftPrompt(
                f"{CONFIG_FILE} says {key} {_shown(declared)}, but prompt_embeddings has {rows} rows.",
                remedy="Send the config and the tensor of the same save_pretrained call.",
            )
    if peft_type in KV_TYPES:
        heads: int | None = model.num_key_value_heads
        width = model.num_key_value_heads * model.head_dim
    else:
        heads, width = model.num_attention_heads, model.hidden_size
    held = {"num_layers": model.num_hidden_layers, "num_attention_heads": heads, "token_dim": width}
    for key, expected in held.items():
        if expected is not None and config.get(key) not in (None, expected):
            raise InvalidSoftPrompt(
                f"{CONFIG_FILE} says {key} {_shown(config[key])}; a {peft_type} soft prompt for {model.name} has "
                f"{expected}.",
                remedy=RETRAIN.format(model=model.name),
            )


def check_multitask(config: dict[str, Any], tasks: int, ranks: int) -> None:
    """Raise InvalidSoftPrompt if the config's number of tasks or ranks differs from the tensors'."""
    for key, held in {"num_tasks": tasks, "num_ranks": ranks}.items():
        if config.get(key) not in (None, held):
            raise InvalidSoftPrompt(
                f"{CONFIG_FILE} says {key} {_shown(config[key])}; the tensors have {held}.",
                remedy="Send the config and the tensors of the same save_pretrained call.",
            )


def notes_of(config: dict[str, Any], manifest: Manifest, model: ModelSpec) -> tuple[str, ...]:
    """Warnings for the publisher of an accepted soft prompt, one sentence each.

    A different name of the base model is only a warning, because the name is often the path of a local copy.
    """
    notes = []
    base = config.get("base_model_name_or_path")
    is_known = manifest.base_model is not None and manifest.base_model.fingerprint == model.fingerprint
    if isinstance(base, str) and base and not is_known and _last(base) != _last(model.name):
        notes.append(
            f"{CONFIG_FILE} names the base model {base[:200]!r}; this server holds {model.name}. The shapes fit; "
            "whether it was trained on this model cannot be told from the files."
        )
    used = (CHECKED_KEYS | TRAINING_KEYS) - (set() if config.get("peft_type") == MULTITASK else MULTITASK_KEYS)
    unused = sorted(key for key, value in config.items() if key not in used and value is not None)
    if unused:
        names = _names(unused)
        notes.append(f"{CONFIG_FILE} has keys that no such soft prompt uses, and they change nothing: {names}.")
    unknown = sorted({*(manifest.model_extra or ())} - FOR_PEOPLE)
    if unknown:
        notes.append(
            f"manifest.json has fields that this server does not know; they are kept and change nothing: "
            f"{_names(unknown)}."
        )
    return tuple(notes)


def _meaning(tensor: str) -> tuple[str, str]:
    """A description of an additional tensor, and a remedy."""
    parts = tensor.split(".")
    if any("lora" in part.lower() for part in parts):
        return "a LoRA matrix", "Merge the adapter into the model, or train a soft prompt alone."
    if any(part in ("embed_tokens", "word_embeddings", "wte", "embeddings", "lm_head") for part in parts):
        return (
            "a layer of a model whose vocabulary was resized or whose embeddings were trained or saved",
            "Train on the model as it is; if its vocabulary is unchanged, save with save_embedding_layers=False.",
        )
    if any(part in ("score", "classifier", "qa_outputs", "modules_to_save") for part in parts):
        return "a head that was trained too", "Train the soft prompt alone, with task_type CAUSAL_LM."
    return "no part of a soft prompt", "Save the soft prompt alone, as PEFT's save_pretrained does."


def _last(name: str) -> str:
    return name.replace("\\", "/").rstrip("/").rpartition("/")[2].lower()


def _names(names: list[str]) -> str:
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(name[:64] for name in names[:MOST_NAMES]) + more


def _shown(value: Any) -> str:
    return reprlib.repr(value)
