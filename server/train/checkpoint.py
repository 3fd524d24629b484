"""A run's state in a folder, from which it resumes: one safetensors file, replaced whole; nothing is unpickled."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from server.durable import sync
from server.train.run_history import Measured, TeacherForcedScore

FILE = "state.safetensors"
_PARTS = ("parameters", "best", "optimizer")


@dataclass(frozen=True)
class TrainingCheckpoint:
    """Everything that the next step depends on, beside the data and the configuration."""

    step: int
    parameters: dict[str, torch.Tensor]
    best: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    """An optimiser's `state_dict`; the groups in it hold numbers only."""
    history: tuple[Measured, ...]


def save_checkpoint(folder: Path, checkpoint: TrainingCheckpoint) -> None:
    """Write it to a temporary file, then rename that over the last one; if killed in between, the last one stays."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        f"{index}/{name}": value
        for index, values in checkpoint.optimizer["state"].items()
        for name, value in values.items()
    }
    tensors = {f"parameters/{name}": tensor for name, tensor in checkpoint.parameters.items()}
    tensors |= {f"best/{name}": tensor for name, tensor in checkpoint.best.items()}
    arrays = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    tensors |= {f"optimizer/{name}": value.detach().cpu() for name, value in arrays.items()}
    record = {
        "step": checkpoint.step,
        "groups": checkpoint.optimizer["param_groups"],
        "numbers": {name: value for name, value in state.items() if name not in arrays},
        "history": [asdict(measured) for measured in checkpoint.history],
    }
    temporary = folder / f".{FILE}"
    metadata = {"record": json.dumps(record)}
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, temporary, metadata)
    sync(temporary)
    os.replace(temporary, folder / FILE)
    sync(folder)


def load_checkpoint(folder: Path) -> TrainingCheckpoint | None:
    """What a run has left in a folder; None if there is nothing."""
    path = folder / FILE
    if not path.is_file():
        return None
    parts: dict[str, dict[str, torch.Tensor]] = {part: {} for part in _PARTS}
    with safe_open(path, framework="pt") as file:
        record = json.loads(file.metadata()["record"])
        for name in file.keys():  # noqa: SIM118 - not a dictionary
            part, rest = name.split("/", 1)
            parts[part][rest] = file.get_tensor(name)
    state: dict[int, dict[str, Any]] = {}
    for name, value in (parts["optimizer"] | record["numbers"]).items():
        index, field = name.split("/")
        state.setdefault(int(index), {})[field] = value
    history = tuple(
        Measured(item["step"], item["training_loss"], TeacherForcedScore(**item["score"])) for item in record["history"]
    )
    optimizer = {"state": state, "param_groups": record["groups"]}
    return TrainingCheckpoint(record["step"], parts["parameters"], parts["best"], optimizer, history)
