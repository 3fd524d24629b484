"""obstore's errors as sentences with a remedy.

obstore has a few classes and a long text: a line for people, what the service answered, and a dump of Rust structures.
The class alone says little (a missing bucket, wrong credentials and a refused connection are all GenericError when
listing), so the cause is looked for in the text. Nothing of the text is repeated where the cause is known.
"""

import re
from typing import NamedTuple

from server.errors import StoreError, StoreFull

LONGEST = 200
"""Characters of a text that is not understood and therefore repeated."""


class Cause(NamedTuple):
    """What is wrong if a pattern is found in an error's text; remedies may name {credentials} and {endpoint}."""

    pattern: str
    sentence: str
    remedy: str


_FULL = Cause(
    r"QuotaExceeded|StorageFull|InsufficientStorage|InsufficientCapacity|status code: 507\b",
    "it has no space left",
    "Make room in the bucket or raise its quota (or delete tasks and versions), then send it again.",
)
_NO_BUCKET = Cause(
    r"NoSuchBucket|ContainerNotFound|BucketNotFound|specified bucket does not exist",
    "the bucket does not exist",
    "Create the bucket, or correct its name in PRELUDE_STORE.",
)
_PLAIN_HTTP = re.compile(r"\bBadScheme\b")

_CAUSES = (
    _FULL,
    _NO_BUCKET,
    Cause(
        # Where there are no credentials, those of the machine are asked for, at the clouds' metadata addresses.
        r"169\.254\.\d|/latest/(?:api/token|meta-data)|/computeMetadata/|/metadata/identity|GCP credential error",
        "no usable credentials were found",
        "Set {credentials}, or run on a machine with a role for the bucket.",
    ),
    Cause(r"Account must be specified", "no storage account is named", "Set {credentials}."),
    Cause(
        r"PermanentRedirect|AuthorizationHeaderMalformed|incorrectly configured region|status code: 301\b",
        "the bucket is in another region",
        "Set AWS_REGION to the bucket's region.",
    ),
    Cause(
        r"status code: 40[13]\b|AccessDenied|SignatureDoesNotMatch|InvalidAccessKeyId|AuthenticationFailed",
        "the credentials are wrong, or do not allow it",
        "Check {credentials}, and that they may list, read, write and delete in the bucket.",
    ),
    Cause(
        r"ConnectionRefused",
        "the connection is refused",
        "Check that the service runs and that the endpoint ({endpoint}) is right.",
    ),
    Cause(
        r"dns error",
        "the endpoint's host is unknown",
        "Check the endpoint ({endpoint}), PRELUDE_STORE and the machine's DNS.",
    ),
    Cause(
        r"InvalidUri|RelativeUrlWithoutBase",
        "the endpoint is not a URL",
        "Write the endpoint ({endpoint}) with http:// or https://, or unset it.",
    ),
    Cause(
        r"InvalidContentType",
        "the endpoint does not speak https",
        "Write the endpoint ({endpoint}) with http://, or let the service speak https.",
    ),
    Cause(
        r"invalid peer certificate|InvalidCertificate",
        "the endpoint's TLS certificate is not trusted",
        "Add the authority that signed it to the machine's certificates.",
    ),
    Cause(
        r"timed out|TimedOut|kind: Timeout",
        "it does not answer in time",
        "Check the network, the proxy settings and the endpoint ({endpoint}), then retry.",
    ),
    Cause(
        r"conditional put is disabled",
        "AWS_CONDITIONAL_PUT turns conditional writes off",
        "Unset AWS_CONDITIONAL_PUT; without conditional writes servers overwrite each other's changes.",
    ),
)
_REMEDY = "Check PRELUDE_STORE, the endpoint ({endpoint}) and {credentials}, then retry."

_NAMES = {
    "s3": {"credentials": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY", "endpoint": "AWS_ENDPOINT_URL"},
    "gs": {"credentials": "GOOGLE_APPLICATION_CREDENTIALS", "endpoint": "GOOGLE_BASE_URL"},
    "az": {
        "credentials": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
        "endpoint": "AZURE_STORAGE_ENDPOINT",
    },
}


def refusal(url: str, action: str, exc: Exception) -> StoreError:
    """The error to raise instead of obstore's."""
    text = str(exc)
    names = _NAMES[url.partition(":")[0]]
    cause = next((cause for cause in _CAUSES if re.search(cause.pattern, text)), None)
    kind = StoreFull if cause is _FULL else StoreError
    sentence, remedy = (cause.sentence, cause.remedy) if cause else (_first_line(text), _REMEDY)
    return kind(f"The store {url} cannot {action}: {sentence}.", remedy=remedy.format(**names))


def is_bucket_missing(exc: Exception) -> bool:
    """Whether the error means that the bucket (not an object) does not exist."""
    return re.search(_NO_BUCKET.pattern, str(exc)) is not None


def is_plain_http(exc: Exception) -> bool:
    """Whether the endpoint is refused because its URL is http:, before anything is sent."""
    return _PLAIN_HTTP.search(str(exc)) is not None


def _first_line(text: str) -> str:
    """What an error says before its dump, without the request's URL and the service's XML."""
    line = text.partition("\n\nDebug source:")[0]
    line = re.sub(r"Error performing (?:\w+ request: |[A-Z]+ \S+ in .*? - )", "", line)
    line, _, xml = line.partition("<?xml")
    line = " ".join([line, *re.findall(r"<(?:Code|Message)>(.*?)<", xml)])
    line = " ".join(line.split()).rstrip(".: ")
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}…"
