"""Manifests in memory: compressed, and the same for everybody who reads them."""

from __future__ import annotations

import json
import random
import string

import pytest

from server.registry.manifest_text import MOST_DICTIONARIES, ManifestPacker, ManifestText, compact_json
from server.soft_prompts.limits import MAX_METRICS_BYTES


def noise(length: int, seed: int) -> str:
    return "".join(random.Random(seed).choices(string.printable + "äöü€", k=length))


def texts(kind: str) -> list[str]:
    """Manifests that are alike, or have nothing in common."""
    own = [f"of customer {n}" if kind == "alike" else noise(3000, n) for n in range(60)]
    common = {"labels": [noise(12, n) for n in range(100)], "base_model": {"name": "m", "fingerprint": "f"}}
    return [compact_json({"description": text, **(common if kind == "alike" else {})}) for text in own]


@pytest.mark.parametrize("kind", ["alike", "different"])
def test_a_packed_manifest_is_what_it_was(kind: str) -> None:
    packer = ManifestPacker()
    for text in texts(kind):
        manifest, same = ManifestText(text), ManifestText(text)
        packer.pack(manifest)
        packer.pack(manifest)
        assert manifest.is_packed
        assert manifest.text == text
        assert (manifest, hash(manifest), manifest.about) == (same, hash(same), same.about)
        assert manifest.parse() == same.parse()


def test_manifests_that_are_alike_take_little_memory() -> None:
    packer, found = ManifestPacker(), [ManifestText(text) for text in texts("alike")]
    for manifest in found:
        packer.pack(manifest)
    assert sum(len(manifest._data) for manifest in found) < sum(map(len, texts("alike"))) / 10
    assert len({id(manifest.about.base_model) for manifest in found}) == 1
    assert len({id(manifest._dictionary) for manifest in found}) < 3


def test_manifests_that_differ_do_not_each_bring_a_dictionary() -> None:
    packer, found = ManifestPacker(), [ManifestText(text) for text in texts("different")]
    for manifest in found:
        packer.pack(manifest)
    assert len({id(manifest._dictionary) for manifest in found}) <= MOST_DICTIONARIES


@pytest.mark.parametrize(
    ("fields", "metrics"),
    [
        ({}, None),
        ({"metrics": {"f1": 0.5}}, {"f1": 0.5}),
        ({"metrics": {"much": "x" * MAX_METRICS_BYTES}}, None),
        ({"metrics": {"f1": 0.5}, "labels": 7}, None),
    ],
)
def test_lists_show_the_metrics_of_what_can_be_read(fields: dict[str, object], metrics: object) -> None:
    assert ManifestText(json.dumps(fields)).metrics == metrics
