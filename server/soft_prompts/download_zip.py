"""Packs a soft prompt into a zip. Uploads accept it, and `PeftModel.from_pretrained` loads the unpacked files."""

import io
import tempfile
import zipfile
from pathlib import Path

from server.contracts import ModelSpec
from server.soft_prompts.formats import save_soft_prompt
from server.soft_prompts.soft_prompt import SoftPrompt

_LONG_AGO = (1980, 1, 1, 0, 0, 0)
"""A constant time for all files, so that the same content gives the same bytes."""


def zip_soft_prompt(soft_prompt: SoftPrompt, model: ModelSpec) -> bytes:
    """Pack the three files of a PEFT directory into a zip; the bytes are reproducible."""
    buffer = io.BytesIO()
    with tempfile.TemporaryDirectory(prefix="prelude-download-") as folder, zipfile.ZipFile(buffer, "w") as archive:
        save_soft_prompt(Path(folder), soft_prompt, model)
        for path in sorted(Path(folder).iterdir()):
            entry = zipfile.ZipInfo(path.name, _LONG_AGO)
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, path.read_bytes(), zipfile.ZIP_DEFLATED)
    return buffer.getvalue()
