"""A registry on a bucket whose replies get lost does not contradict what the bucket holds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from server.errors import StoreFull
from server.registry import bucket
from server.registry.objects import open_objects
from server.registry.registry import Registry
from server.registry.store import Store
from tests.chaos.faulty_store import FaultyStore
from tests.registry.s3 import S3
from tests.registry.shelf import SPEC, content, serving


@pytest.fixture
def way(s3: S3, s3_store_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyStore]:
    """The way to the bucket, for stores that are opened from now on; little is sent again."""
    monkeypatch.setattr(bucket, "MAX_RETRIES", 1)
    with FaultyStore(s3.url).running() as store:
        monkeypatch.setenv("AWS_ENDPOINT_URL", store.url)
        yield store


def test_a_change_is_made_if_its_reply_was_lost_and_the_store_is_full_when_it_is_sent_again(
    way: FaultyStore, s3_store_url: str
) -> None:
    registry = Registry(Store(open_objects(s3_store_url)), SPEC, 32)
    registry.publish("a", [content(1)], "api")
    way.only = "/events/"
    way.fault = "filling"
    assert registry.publish("a", [content(2)], "api").tasks[0].version == 2
    assert way.counted["filling"] > 2
    way.fault = None
    again = Registry(Store(open_objects(s3_store_url)), SPEC, 32)
    assert serving(again, "a").digest == content(2).digest, "its blob is there"


def test_a_change_that_a_full_store_refuses_is_refused(way: FaultyStore, s3_store_url: str) -> None:
    registry = Registry(Store(open_objects(s3_store_url)), SPEC, 32)
    way.fault = "full"
    with pytest.raises(StoreFull):
        registry.publish("a", [content(1)], "api")
    way.fault = None
    assert Store(open_objects(s3_store_url)).events() == []
