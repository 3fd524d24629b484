"""Objects in a bucket, through obstore: S3 and compatible services, Google Cloud Storage, Azure Blob Storage.

Credentials and endpoint are those of the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, …, as each cloud's own tools
read them); obstore reads them. Create-if-absent is the cloud's conditional write (`If-None-Match: *`), which has one
winner. A write that is sent again after a lost reply finds its own object and answers False: a caller that needs to
know compares the content.
"""

import contextlib
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PermissionDeniedError
from obstore.store import ObjectStore, from_url

from server.errors import StoreError
from server.registry.bucket_errors import is_bucket_missing, is_plain_http, refusal

CONNECT_SECONDS = 5
REQUEST_SECONDS = 60
"""For a whole request, a blob's upload included; obstore has no shorter limit that spares a slow upload."""

MAX_RETRIES = 5
RETRY_SECONDS = 30
PAGE = 1000
"""Names per answer of a listing, as many as S3 gives."""

_PROBE = "refuses-to-overwrite"
_PROBE_CONTENT = b"Prelude finds out with this object that the bucket refuses to overwrite one.\n"


class RemoteObjects:
    """Objects under a bucket's prefix, which several servers may share."""

    def __init__(self, url: str) -> None:
        """Open an existing bucket, and check that it responds and honours conditional writes.

        The StoreError says which of bucket, credentials, endpoint or network is at fault.
        """
        _check_url(url)
        self._url = url
        with self._refusals("be opened"):
            self._store = self._connect()
        self._check_conditional_writes()

    def list(self, folder: str) -> list[str]:
        with self._refusals(f"list {folder}"):
            pages = obstore.list(self._store, prefix=folder, chunk_size=PAGE)
            names = [item["path"].removeprefix(f"{folder}/") for page in pages for item in page]
        return sorted(name for name in names if "/" not in name)

    def get(self, key: str) -> bytes | None:
        with self._refusals(f"read {key}"), _none_if_absent():
            return bytes(obstore.get(self._store, key).bytes())
        return None

    def create(self, key: str, data: bytes) -> bool:
        with self._refusals(f"write {key}"):
            return self._create(key, data)

    def delete(self, key: str) -> None:
        with self._refusals(f"delete {key}"), _none_if_absent():
            obstore.delete(self._store, key)

    def age(self, key: str) -> float | None:
        """See Objects; by this machine's clock and the bucket's."""
        with self._refusals(f"read {key}"), _none_if_absent():
            written = obstore.head(self._store, key)["last_modified"]
            return max(0.0, (datetime.now(UTC) - written).total_seconds())
        return None

    def _create(self, key: str, data: bytes) -> bool:
        try:
            # In one request: only that has a condition.
            obstore.put(self._store, key, data, mode="create", use_multipart=False)
        except AlreadyExistsError:
            return False
        return True

    def _connect(self) -> ObjectStore:
        """A store that has answered; by http only if the environment names an http endpoint."""
        try:
            return _open(self._url, allow_http=False)
        except BaseError as exc:
            # obstore does not tell the endpoint that it found, but refuses an http one before it sends anything.
            if not is_plain_http(exc):
                raise
            return _open(self._url, allow_http=True)

    def _check_conditional_writes(self) -> None:
        """Refuse a bucket that ignores the condition: one of two servers' changes would be lost unnoticed."""
        with self._refusals("be written to"):
            try:
                ignored = self._create(_PROBE, _PROBE_CONTENT) and self._create(_PROBE, _PROBE_CONTENT)
            except PermissionDeniedError:
                return  # a store that may only be read
        if ignored:
            raise StoreError(
                f"The store {self._url} overwrites an object that was to be created only if absent.",
                remedy="Use a service with conditional writes (If-None-Match: *), as S3, MinIO and R2 have.",
            )

    @contextlib.contextmanager
    def _refusals(self, action: str) -> Iterator[None]:
        """Turn what obstore says into what a user can read."""
        try:
            yield
        except (BaseError, OSError, ValueError, NotImplementedError) as exc:
            raise refusal(self._url, action, exc) from exc


def _check_url(url: str) -> None:
    """Only a bucket and a prefix: credentials in a URL would end up in logs, and options would be ignored."""
    try:
        parts = urlsplit(url)
    except ValueError:
        parts = urlsplit("")
    if not parts.netloc or "@" in parts.netloc or parts.query or parts.fragment:
        scheme = url.partition(":")[0]
        raise StoreError(
            f"PRELUDE_STORE is not {scheme}://BUCKET/PREFIX.",
            remedy="Name only a bucket and a prefix; credentials and endpoint come from the environment.",
        )


def _open(url: str, *, allow_http: bool) -> ObjectStore:
    """Open a bucket and ask it something, which needs its name, the endpoint and the credentials to be right."""
    try:
        store = from_url(
            url,
            client_options={
                "allow_http": allow_http,
                "connect_timeout": timedelta(seconds=CONNECT_SECONDS),
                "timeout": timedelta(seconds=REQUEST_SECONDS),
            },
            retry_config={"max_retries": MAX_RETRIES, "retry_timeout": timedelta(seconds=RETRY_SECONDS)},
        )
        next(iter(obstore.list(store, prefix="events", chunk_size=1)), None)
    except BaseException as exc:
        # obstore panics, which is no Exception, at an endpoint that is no URL, such as localhost:9000.
        if type(exc).__name__ != "PanicException":
            raise
        raise ValueError(str(exc)) from exc
    return store


@contextlib.contextmanager
def _none_if_absent() -> Iterator[None]:
    """Go on after a missing object; not after a missing bucket, which is an error and no empty store."""
    try:
        yield
    except FileNotFoundError as exc:
        if is_bucket_missing(exc):
            raise
