"""Errors for unknown names: they suggest the nearest known name and stay short."""

from __future__ import annotations

from typing import Any

import pytest

from sfpformat.errors import OptionError
from sfpformat.names import listed, nearest, require_known, unknown_name, unmatched


@pytest.mark.parametrize(
    ("name", "known", "expected"),
    [
        ("W", ["x", "w"], "w"),  # another case
        ("module.fc.weight", ["fc.bias", "fc.weight"], "fc.weight"),  # a prefix too many
        ("fc.weight", ["fc.bias", "model.fc.weight"], "model.fc.weight"),  # a prefix too few
        ("fc", ["bias", "fc.weight"], "fc.weight"),  # the layer's
        ("fc.weight_orig", ["fc", "fc.bias"], "fc"),
        ("fc.wieght", ["fc.bias", "fc.weight"], "fc.weight"),  # misspelt
        ("encoder", ["w", "b"], None),
        ("w", [], None),
        ("w", [""], None),
        ("", ["w"], None),
    ],
)
def test_nearest_returns_the_most_similar_name(name: str, known: list[str], expected: str | None) -> None:
    assert nearest(name, known) == expected


def test_of_equally_near_names_the_first_is_returned() -> None:
    assert nearest("w", ["a.w", "b.w"]) == "a.w"


def test_an_unknown_name_raises_with_the_nearest_name() -> None:
    assert unknown_name("W", ["w"]) == "no tensor is named 'W'; the nearest is 'w'"
    assert unknown_name("abc", ["w"]) == "no tensor is named 'abc'"
    assert unknown_name("fast", ["faster"], "preset") == "no preset is named 'fast'; the nearest is 'faster'"


def test_a_pattern_without_a_match_is_refused_with_near_names() -> None:
    assert unmatched("W", ["w"]) == "no tensor name matches 'W'; the nearest is 'w'"
    assert unmatched("W*", ["w"]) == "no tensor name matches 'W*'"
    said = "no tensor name matches 'em*'; 'embed' is stored as 'head'"
    assert unmatched("em*", ["head"], {"embed": "head"}) == said


@pytest.mark.parametrize("name", ["w" * 1_000_000, "w"])
def test_long_names_are_compared_fast_and_shortened_in_messages(name: str) -> None:
    assert len(unknown_name(name, ["v" * 1_000_000, name.upper() + "x"])) < 500


def test_known_names_are_accepted() -> None:
    require_known(["b"], iter(["a", "b"]), "masks")
    require_known([], [], "masks")


def test_an_unknown_name_is_refused_with_the_name_of_the_argument() -> None:
    with pytest.raises(OptionError, match=r"^masks: no tensor is named 'W'; the nearest is 'w'$"):
        require_known(["w", "W"], ["w"], "masks")


def test_a_name_that_is_no_string_is_refused_as_unknown() -> None:
    names: Any = [3]
    with pytest.raises(OptionError, match="no tensor is named 3"):
        require_known(names, ["w"])


def test_a_message_about_many_names_is_shortened() -> None:
    with pytest.raises(OptionError) as caught:
        require_known((f"layer.{k}" for k in range(100_000)), ["w"], "options")
    assert str(caught.value).endswith("'layer.10' and 99,989 more")  # ten are listed, the others counted
    assert len(str(caught.value)) < 400


def test_listed_returns_short_lists_in_full() -> None:
    assert listed(["a", "b"]) == "'a', 'b'"
    assert listed(["a", "b", "c"], 2) == "'a', 'b' and 1 more"
