"""A device is used, or refused with the reason that torch and its driver give."""

from __future__ import annotations

from contextlib import nullcontext
from typing import NoReturn

import pytest
import torch

from server.engine.model.devices import choose_device, choose_dtype
from server.errors import ConfigurationError

TOO_OLD = "The NVIDIA driver on your system is too old (found version 12020). Please update your GPU driver."


def with_cuda(monkeypatch: pytest.MonkeyPatch, words: str | None, devices: int = 0) -> None:
    """Make torch look like a CUDA build that finds `devices` devices, or says why it finds none."""

    def init() -> None:
        if words is not None:
            raise RuntimeError(words)

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: devices > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr(torch.cuda, "init", init)


def test_a_driver_that_is_too_old_is_named_with_the_cuda_that_torch_is_built_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with_cuda(monkeypatch, f"{TOO_OLD}\nMore lines.")
    with pytest.raises(ConfigurationError) as caught:
        choose_device("cuda")
    assert f"torch {torch.__version__}, built for CUDA 13.0, cannot use it: {TOO_OLD}" in caught.value.message
    assert "More lines" not in caught.value.message
    assert "Install a driver for CUDA 13.0" in caught.value.remedy
    assert choose_device("auto") == torch.device("cpu")
    assert TOO_OLD in caplog.text, "who has a GPU and did not ask for it hears why it is not used"


@pytest.mark.parametrize("words", ["Found no NVIDIA driver on your system. Please check …", None])
def test_a_machine_without_a_gpu_is_not_warned(
    words: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with_cuda(monkeypatch, words)
    if words is None:
        monkeypatch.setattr(torch.version, "cuda", None)
    assert choose_device("auto") == torch.device("cpu")
    assert caplog.messages == []


def test_a_torch_without_cuda_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def init() -> NoReturn:
        raise AssertionError("Torch not compiled with CUDA enabled")

    with_cuda(monkeypatch, None)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "init", init)
    with pytest.raises(ConfigurationError, match="is built without it") as caught:
        choose_device("cuda:0")
    assert "CUDA build of torch" in caught.value.remedy


def test_a_device_beyond_the_last_is_refused_with_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    with_cuda(monkeypatch, None, devices=2)
    assert choose_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ConfigurationError, match="torch sees 2 CUDA devices") as caught:
        choose_device("cuda:2")
    assert "cuda:0 to cuda:1" in caught.value.remedy


@pytest.mark.parametrize("name", ["abacus", "meta", "mps", ""])
def test_what_is_no_device_of_ours_is_refused_by_its_name(name: str) -> None:
    with pytest.raises(ConfigurationError, match=repr(name)):
        choose_device(name)


def test_devices_and_dtypes_are_chosen_or_refused() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_dtype("auto", torch.device("cpu")) in (torch.bfloat16, torch.float32)
    assert choose_dtype("float64", torch.device("cpu")) == torch.float64
    if not torch.cuda.is_available():
        assert choose_device("auto") == torch.device("cpu")
        with pytest.raises(ConfigurationError, match="CUDA"):
            choose_device("cuda")


@pytest.mark.parametrize(("capability", "chosen"), [((7, 5), torch.float32), ((8, 0), torch.bfloat16)])
def test_auto_is_bfloat16_only_where_a_gpu_multiplies_it(
    capability: tuple[int, int], chosen: torch.dtype, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Below compute capability 8.0 it is emulated, slowly."""
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or capability >= (8, 0)
    )
    assert choose_dtype("auto", torch.device("cuda")) == chosen
    assert ("PRELUDE_DTYPE=auto is float32" in caplog.text) == (chosen == torch.float32)
