"""The user's soft prompt files: finds them in a directory, a zip or on the hub, and writes directories."""

import os
import re
import shutil
import stat
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from server.errors import ConfigurationError, InvalidSoftPrompt, InvalidTaskName
from server.soft_prompts.names import TASK_NAME, check_task_name

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
MANIFEST_FILE = "manifest.json"
FILES = (CONFIG_FILE, TENSOR_FILE, MANIFEST_FILE)
"""The files of a soft prompt; repeated from soft_prompts/formats.py, because that module imports torch."""
PICKLE_FILE = "adapter_model.bin"
CONVERT = "Convert it: load it with PEFT and call save_pretrained(..., safe_serialization=True)."
MAX_PULLED_BYTES = 2**32

_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", re.ASCII)


@dataclass(frozen=True)
class Upload:
    """Files to send: the two or three files of a soft prompt, or one zip."""

    name: str
    """Name of the directory, zip or repository."""
    files: tuple[Path, ...]

    @property
    def num_bytes(self) -> int:
        """Size of all files in bytes."""
        return sum(file.stat().st_size for file in self.files)

    def task(self, given: str | None) -> str:
        """The task to publish as: the given name, else that of the source; raises InvalidTaskName."""
        if given is not None:
            return check_task_name(given)
        if not TASK_NAME.fullmatch(self.name.lower()):
            raise InvalidTaskName(
                f"{self.name!r} cannot be the name of a task, even in lower case.", remedy="Name one with --task."
            )
        return self.name.lower()


def find_upload(source: str) -> Upload:
    """Find the files to send; a local path takes precedence over a hub repository of the same name.

    Raises InvalidSoftPrompt if nothing has that name, or it contains no soft prompt.
    """
    with _readings(source):
        found = _find_locally(source)
    if found is not None:
        return found
    hub_id = _HUB_ID.fullmatch(source)
    if hub_id is None or source.startswith(".") or source.lower().endswith(".zip"):
        raise InvalidSoftPrompt(
            f"There is no {source}.",
            remedy="Name a PEFT directory, a .zip of one, or a repository on the hub: org/name or org/name@revision.",
        )
    return _from_hub(hub_id[1], hub_id[2])


def local_path(text: str) -> Path:
    """A path with `~` expanded, even if no shell has done so."""
    try:
        return Path(text).expanduser()
    except RuntimeError as exc:
        raise InvalidSoftPrompt(f"{text} cannot be read: no such user.", remedy="Check the path.") from exc


def files_of(directory: Path, shown: str) -> tuple[Path, ...]:
    """The files of a soft prompt in a directory; raises InvalidSoftPrompt if one is missing or cannot be read."""
    with _readings(shown):
        if not (directory / TENSOR_FILE).exists() and (directory / PICKLE_FILE).exists():
            raise _pickled(shown)
        for name in (CONFIG_FILE, TENSOR_FILE):
            if not (directory / name).exists():
                remedy = "Name a directory that PEFT's save_pretrained wrote."
                raise InvalidSoftPrompt(f"{shown} holds no {name}.", remedy=remedy)
        return tuple(_readable(directory / name) for name in FILES if (directory / name).exists())


def check_target(directory: Path, *, force: bool) -> None:
    """Refuse (ConfigurationError) to overwrite existing files, unless `force`, or what is not a directory."""
    with _writings(directory):
        is_directory = directory.is_dir()
        if directory.exists() and not is_directory:
            raise ConfigurationError(f"{directory} is not a directory.", remedy="Name another one with --out.")
        is_taken = is_directory and any(directory.iterdir())
    if is_taken and not force:
        raise ConfigurationError(
            f"{directory} is not empty.",
            remedy="Name another directory with --out, or overwrite the soft prompt in it with --force.",
        )


def unpack(archive: Path, directory: Path) -> None:
    """Write the files of a downloaded soft prompt into a directory; other files in the zip are ignored."""
    try:
        with zipfile.ZipFile(archive) as opened:
            entries = [entry for entry in opened.infolist() if entry.filename in FILES]
            if sum(entry.file_size for entry in entries) > MAX_PULLED_BYTES:
                raise InvalidSoftPrompt("The unpacked download is larger than any soft prompt.")
            for entry in entries:
                with opened.open(entry) as source, (directory / entry.filename).open("xb") as target:
                    shutil.copyfileobj(source, target)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError, FileExistsError) as exc:
        raise InvalidSoftPrompt(f"The download is damaged: {exc}.", remedy="Pull it again.") from exc
    files_of(directory, "The download")


@contextmanager
def new_directory(directory: Path) -> Iterator[Path]:
    """Context manager: a folder to fill, whose files are all moved to `directory` if the block succeeds.

    Existing files with other names stay, so that the README of an older soft prompt is not lost.
    """
    with _writings(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=directory.parent) as folder:
            filled = Path(folder, "new")
            filled.mkdir()
            yield filled
            if not directory.exists():
                filled.rename(directory)
                return
            for name in FILES:
                if (filled / name).exists():
                    (filled / name).replace(directory / name)
                else:
                    (directory / name).unlink(missing_ok=True)


@contextmanager
def _readings(shown: str) -> Iterator[None]:
    """Context manager: turn OSErrors of reading into InvalidSoftPrompt."""
    try:
        yield
    except OSError as exc:
        raise InvalidSoftPrompt(f"{shown} cannot be read: {exc.strerror}.", remedy="Check the path.") from exc


@contextmanager
def _writings(directory: Path) -> Iterator[None]:
    """Context manager: turn OSErrors of writing into ConfigurationError."""
    try:
        yield
    except OSError as exc:
        raise ConfigurationError(
            f"{directory} cannot be written: {exc.strerror or exc}.", remedy="Name another directory with --out."
        ) from exc


def _find_locally(source: str) -> Upload | None:
    path = local_path(source)
    if path.is_dir():
        return Upload(path.resolve().name, files_of(path, source))
    if not path.exists():
        return None
    if path.suffix.lower() != ".zip":
        raise InvalidSoftPrompt(
            f"{source} is neither a directory nor a .zip.", remedy=f"Name the directory that holds {TENSOR_FILE}."
        )
    return Upload(path.stem, (_readable(path),))


def _readable(file: Path) -> Path:
    if not stat.S_ISREG(file.stat().st_mode) or not os.access(file, os.R_OK):
        raise InvalidSoftPrompt(f"{file} cannot be read.", remedy="Check that it is a file, and who may read it.")
    return file


def _pickled(shown: str) -> InvalidSoftPrompt:
    return InvalidSoftPrompt(
        f"{shown} holds only {PICKLE_FILE}, a pickle, which can run code when it is opened: it is never read.",
        remedy=CONVERT,
    )


def _from_hub(repository: str, revision: str | None) -> Upload:
    """Download the files of a repository into the hub's cache; the hub's library reads HF_TOKEN, HF_ENDPOINT, …."""
    import huggingface_hub
    from huggingface_hub import errors
    from huggingface_hub.utils.logging import set_verbosity_error
    from huggingface_hub.utils.tqdm import disable_progress_bars

    set_verbosity_error()  # type: ignore[no-untyped-call]  # it would also warn about what is an error here
    if not sys.stderr.isatty():
        disable_progress_bars()
    shown = repository if revision is None else f"{repository}@{revision}"
    try:
        folder = Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=list(FILES)))
        if not (folder / TENSOR_FILE).exists() and PICKLE_FILE in huggingface_hub.list_repo_files(
            repository, revision=revision
        ):
            raise _pickled(shown)
    except InvalidSoftPrompt:
        raise
    except errors.GatedRepoError as exc:
        raise InvalidSoftPrompt(
            f"{repository} is gated.", remedy="Ask for access on the hub, and log in with `hf auth login` or HF_TOKEN."
        ) from exc
    except errors.RevisionNotFoundError as exc:
        raise InvalidSoftPrompt(
            f"{repository} has no revision {revision}.", remedy="Name a branch, a tag or a commit of it."
        ) from exc
    except errors.RepositoryNotFoundError as exc:
        raise InvalidSoftPrompt(
            f"There is no directory {repository} here, and no repository {repository} on the hub that you may see.",
            remedy="Check the name; for a private repository, log in with `hf auth login` or HF_TOKEN.",
        ) from exc
    except Exception as exc:  # its HTTP library, and so its exceptions, differ between versions
        raise InvalidSoftPrompt(
            f"There is no directory {repository} here, and the hub cannot be asked: {_first_line(exc)}.",
            remedy="Check the path, or try again once the hub can be reached.",
        ) from exc
    return Upload(repository.rpartition("/")[2], files_of(folder, shown))


def _first_line(exc: Exception) -> str:
    lines = str(exc).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(exc).__name__


def read_text(path: Path) -> str:
    """Read a text file; raises ConfigurationError."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        why = exc.strerror if isinstance(exc, OSError) else "it is not UTF-8"
        raise ConfigurationError(f"{path} cannot be read: {why}.", remedy="Name a text file in UTF-8.") from exc
