"""Chooses the device and the dtype; if a GPU cannot be used, reports the reason from torch and its driver."""

import logging

import torch

from server.errors import ConfigurationError

log = logging.getLogger(__name__)

NO_DRIVER = "Found no NVIDIA driver"
"""Beginning of torch's message on machines without a GPU."""


def choose_device(device: str) -> torch.device:
    """Choose the device; 'auto' is the first CUDA device, else the CPU.

    Raises ConfigurationError for a name that is no device, or, with the reason, if CUDA cannot be used.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        reason = why_no_cuda()
        if reason is not None and not reason.startswith(NO_DRIVER):
            log.warning("the CPU serves, because torch %s cannot use a GPU: %s", torch.__version__, reason)
        return torch.device("cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = None
    if chosen is None or chosen.type not in ("cpu", "cuda"):
        raise ConfigurationError(f"PRELUDE_DEVICE is {device!r}.", remedy="Use auto, cpu, cuda or cuda:0.")
    if chosen.type == "cuda":
        _refuse_missing(chosen)
    return chosen


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Choose the dtype; 'auto' is bfloat16 if the hardware supports it natively, else float32."""
    if dtype != "auto":
        chosen: torch.dtype = getattr(torch, dtype)
        return chosen
    if device.type == "cuda":
        with torch.cuda.device(device):
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        if not native:
            log.warning("%s has no bfloat16, so PRELUDE_DTYPE=auto is float32, which takes twice the memory", device)
    else:
        capabilities = torch.cpu.get_capabilities()
        native = bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    return torch.bfloat16 if native else torch.float32


def why_no_cuda() -> str | None:
    """The first line of torch's error about CUDA devices; None if torch is built without CUDA."""
    if _built_for() is None:
        return None
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as exc:
        return next(iter(str(exc).splitlines()), "") or type(exc).__name__
    return "it sees no device"


def _built_for() -> str | None:
    """The version of CUDA or ROCm that torch is built for; None if it is built for neither."""
    if torch.version.hip is not None:
        return f"ROCm {torch.version.hip}"
    return None if torch.version.cuda is None else f"CUDA {torch.version.cuda}"


def _refuse_missing(device: torch.device) -> None:
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        if device.index is not None and device.index >= count:
            raise ConfigurationError(
                f"PRELUDE_DEVICE asks for {device}, and torch sees {count} CUDA device{'s' * (count != 1)}.",
                remedy=f"Use one from cuda:0 to cuda:{count - 1}; CUDA_VISIBLE_DEVICES may hide others.",
            )
        return
    built_for = _built_for()
    if built_for is None:
        raise ConfigurationError(
            f"PRELUDE_DEVICE asks for CUDA, and torch {torch.__version__} is built without it.",
            remedy="Install a CUDA build of torch (https://pytorch.org names the command), or use PRELUDE_DEVICE=cpu.",
        )
    raise ConfigurationError(
        f"PRELUDE_DEVICE asks for CUDA, and torch {torch.__version__}, built for {built_for}, cannot use it: "
        f"{why_no_cuda()}",
        remedy=f"nvidia-smi shows the driver and the CUDA version that it serves. Install a driver for {built_for}, or "
        "a torch built for the driver's version (https://pytorch.org names the command); or use PRELUDE_DEVICE=cpu.",
    )
