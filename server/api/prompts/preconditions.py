"""`If-Match` and `If-None-Match`, with a task's ETag: the number of its last event."""

import re
from typing import Annotated

from fastapi import Depends, Header, Request, Response

from server.errors import InvalidRequest
from server.registry.commands import Expected

_ETAG = re.compile(r'"?([0-9]{1,12})"?')


async def _expected(
    request: Request,
    if_match: Annotated[str | None, Header(description='"*", or the ETag that the task must still have.')] = None,
    if_none_match: Annotated[str | None, Header(description='"*": the task must not exist yet.')] = None,
) -> Expected:
    for name in ("If-Match", "If-None-Match"):
        if len(request.headers.getlist(name)) > 1:
            raise InvalidRequest(f"The header {name} comes twice.", remedy="Send it once, with one ETag.")
    if if_match is not None and if_none_match is not None:
        raise InvalidRequest("If-Match and If-None-Match exclude each other.", remedy="Send one of them.")
    if if_none_match is not None:
        if if_none_match.strip() != "*":
            raise InvalidRequest(f"If-None-Match is {if_none_match[:80]!r}.", remedy="Only * is accepted.")
        return "none"
    if if_match is None:
        return None
    if if_match.strip() == "*":
        return "any"
    tag = _ETAG.fullmatch(if_match.strip())
    if tag is None:
        raise InvalidRequest(
            f"If-Match is {if_match[:80]!r}.", remedy='Send the ETag of GET /prompts/{task} as it is ("42"), or *.'
        )
    return int(tag[1])


ExpectedDep = Annotated[Expected, Depends(_expected)]


def set_etag(response: Response, event: int) -> None:
    """Set the reply's ETag, which the client sends as If-Match of its next change."""
    response.headers["ETag"] = f'"{event}"'
