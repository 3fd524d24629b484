from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from itertools import pairwise

import pytest

from server import errors
from server.errors import PreludeError

FAMILIES = {"generation", "incomplete_generation", "overloaded", "validation"}
"""The `error_type`s that text-generation-inference's clients know."""


def class_tree(parent: type[PreludeError]) -> Iterator[type[PreludeError]]:
    yield parent
    for child in parent.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from class_tree(child)


CLASSES = list(class_tree(PreludeError))


def test_every_error_class_of_the_module_is_an_error_of_prelude() -> None:
    defined = {cls for _, cls in inspect.getmembers(errors, inspect.isclass) if cls.__module__ == errors.__name__}
    assert defined == set(CLASSES)


def test_every_class_has_a_code_of_its_own() -> None:
    assert all("code" in vars(cls) for cls in CLASSES)
    codes = sorted(cls.code for cls in CLASSES)
    assert all(one != other for one, other in pairwise(codes))
    assert all(re.fullmatch(r"[a-z][a-z_]*[a-z]", code) for code in codes)


@pytest.mark.parametrize("cls", CLASSES)
def test_every_class_has_status_family_remedy_and_docstring(cls: type[PreludeError]) -> None:
    assert 400 <= cls.status <= 599
    assert cls.family in FAMILIES
    assert cls.__doc__
    assert cls.default_remedy[0].isupper()
    assert cls.default_remedy.endswith(".")


@pytest.mark.parametrize("cls", CLASSES)
def test_what_the_client_did_wrong_is_a_4xx_of_the_validation_family(cls: type[PreludeError]) -> None:
    if cls is errors.Overloaded:  # it did nothing wrong, but 429 is what clients know to come back after
        assert (cls.status, cls.family) == (429, "overloaded")
        return
    assert (cls.status < 500) == (cls.family == "validation")


@pytest.mark.parametrize("cls", [cls for cls in CLASSES if cls.status < 500])
def test_what_the_client_did_wrong_he_is_told_how_to_mend(cls: type[PreludeError]) -> None:
    assert cls.default_remedy != PreludeError.default_remedy


def test_an_error_is_a_sentence_and_its_remedy() -> None:
    error = errors.EmptyInput("Nothing came.")
    assert (error.message, error.remedy) == ("Nothing came.", errors.EmptyInput.default_remedy)
    assert str(error) == f"Nothing came. {errors.EmptyInput.default_remedy}"
    assert str(errors.EmptyInput("Nothing came.", remedy="Write.")) == "Nothing came. Write."
