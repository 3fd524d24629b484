"""The files of a job: named or uploaded, under the client's name, and nothing stays of what is refused."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

import pytest
from starlette.datastructures import UploadFile

from server.api.evaluations.schemas import EvaluationRequest
from server.api.jobs import job_bodies
from server.api.jobs.job_bodies import GivenFile, Order, find_files, keep_uploads
from server.errors import InvalidRequest, PayloadTooLarge, StoreError, StoreFull


def upload(content: bytes = b"{}\n", name: str | None = "rows.jsonl") -> UploadFile:
    return UploadFile(io.BytesIO(content), filename=name)


@pytest.mark.parametrize(
    ("sent", "shown"),
    [
        ("rows.jsonl", "rows.jsonl"),
        ("C:\\data\\rows.jsonl", "rows.jsonl"),
        ("../../etc/rows.jsonl", "rows.jsonl"),
        ("a\nb", "data.jsonl"),
        ("", "data.jsonl"),
        (None, "data.jsonl"),
        ("x" * 500, "x" * job_bodies.MAX_FILE_NAME),
    ],
)
def test_an_upload_is_called_by_its_name_without_folders(sent: str | None, shown: str) -> None:
    order = Order(EvaluationRequest(task="mood"), {"data": upload(name=sent)})
    assert find_files(order, EvaluationRequest.files, None)["data"].name == shown


def test_a_file_is_named_or_uploaded_and_not_both(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b"{}\n")
    named = EvaluationRequest(task="mood", data="rows.jsonl")
    assert find_files(Order(named, {}), EvaluationRequest.files, tmp_path)["data"].path == tmp_path / "rows.jsonl"
    with pytest.raises(InvalidRequest, match="both uploaded and named"):
        find_files(Order(named, {"data": upload()}), EvaluationRequest.files, tmp_path)


def test_uploads_are_kept_until_the_job_lets_them_go(tmp_path: Path) -> None:
    given = {"data": GivenFile(upload(b"rows"), "a"), "shots": GivenFile(tmp_path, "b")}
    kept, folder = keep_uploads(given)
    assert (kept["data"].path.read_bytes(), kept["data"].name) == (b"rows", "a")
    assert kept["shots"] == given["shots"]
    folder.cleanup()
    assert not kept["data"].path.exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), OSError(13, "Permission denied")])
def test_nothing_stays_of_uploads_that_there_is_no_place_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def full(*_: object) -> int:
        raise error

    monkeypatch.setattr(job_bodies, "copy_within", full)
    with pytest.raises(StoreFull if error.errno == 28 else StoreError, match="cannot be kept"):
        keep_uploads({"data": GivenFile(upload(), "a")})
    assert not list(tmp_path.iterdir())


def test_nothing_stays_of_uploads_that_are_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(PayloadTooLarge):
        GivenFile(upload(b"rows"), "a").copy(tmp_path / "x", room=3)
    (tmp_path / "x").unlink()

    def refuse(*_: object) -> int:
        raise PayloadTooLarge("It is too large.")

    monkeypatch.setattr(job_bodies, "copy_within", refuse)
    with pytest.raises(PayloadTooLarge):
        keep_uploads({"data": GivenFile(upload(), "a")})
    assert not list(tmp_path.iterdir())
