"""Records the machine and its packages, and the device's speed, which all other figures depend on."""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess

import torch
import transformers

from benchmarks.gpu.devices import copied_per_second, device_of, seconds_of
from benchmarks.gpu.stage import Run
from server.engine.attention.varlen_rows import NEEDED, OPERATOR, operator_arguments

PACKAGES = {
    "engine stages": ("pydantic", "pydantic_settings", "safetensors", "tokenizers", "psutil", "tqdm", "numpy"),
    "server stages": ("fastapi", "uvicorn", "structlog", "typer", "watchfiles", "prometheus_client", "multipart"),
    "grammars": ("llguidance",),
    "tests": ("pytest", "pytest_asyncio", "pytest_timeout", "hypothesis"),
}
"""Packages that stages need beside torch and transformers; a stage without its packages is skipped."""


def measure(run: Run) -> None:
    """Record versions first, which are useful even without a device."""
    run.note(
        python=platform.python_version(),
        torch=torch.__version__,
        built_for=torch.version.cuda or torch.version.hip or "no GPU",
        transformers=transformers.__version__,
        cores=os.cpu_count() or 0,
        operator=f"{OPERATOR}: lacks {', '.join(sorted(NEEDED - operator_arguments())) or 'nothing'}",
    )
    for what, modules in PACKAGES.items():
        missing = [name for name in modules if importlib.util.find_spec(name) is None]
        if missing:
            run.skip(what, f"not installed: {', '.join(missing)}")
    run.check(not NEEDED - operator_arguments(), "torch's flash attention lacks arguments: there is no fast path")
    device = device_of(run)
    if device.type == "cuda":
        run.note(**_device(device))
        capability = torch.cuda.get_device_capability(device)
        run.check(capability >= (8, 0), f"compute capability {capability}: there is no fast path below 8.0")
    else:
        run.skip("device")
    run.note(copy_gb_s=copied_per_second(device, 2**24 if run.rehearse else 2**30) / 1e9)
    size = 256 if run.rehearse else 8192
    left, right = torch.ones(2, size, size, dtype=torch.bfloat16, device=device)
    run.note(product_tflop_s=2 * size**3 / seconds_of(lambda: left @ right, device, 10) / 1e12)
    import server.engine.build_engine  # noqa: F401 - whether the engine stages can run at all


def _device(device: torch.device) -> dict[str, object]:
    properties = torch.cuda.get_device_properties(device)
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        driver = "unknown"
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gb": properties.total_memory / 1e9,
        "multiprocessors": properties.multi_processor_count,
        "driver": driver,
    }
