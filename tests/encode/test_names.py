"""Refusals of unknown names: the nearest known name is said, and messages stay short."""

from __future__ import annotations

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
def test_the_nearest_name_is_the_one_that_was_probably_meant(
    name: str, known: list[str], expected: str | None
) -> None:
    assert nearest(name, known) == expected


def test_of_equally_near_names_the_first_is_taken() -> None:
    assert nearest("w", ["a.w", "b.w"]) == "a.w"


def test_a_refusal_names_the_nearest_name() -> None:
    assert unknown_name("W", ["w"]) == "no tensor is named 'W'; the nearest is 'w'"
    assert unknown_name("abc", ["w"]) == "no tensor is named 'abc'"
    assert unknown_name("fast", ["faster"], "preset") == "no preset is named 'fast'; the nearest is 'faster'"


def test_a_pattern_that_matches_nothing_is_refused_with_what_is_near() -> None:
    assert unmatched("W", ["w"]) == "no tensor has a name like 'W'; the nearest is 'w'"
    assert unmatched("W*", ["w"]) == "no tensor has a name like 'W*'"
    said = "no tensor has a name like 'em*'; 'embed' is kept as 'head'"
    assert unmatched("em*", ["head"], {"embed": "head"}) == said


@pytest.mark.parametrize("name", ["w" * 1_000_000, "w"])
def test_long_names_cost_no_time_and_stay_short_in_messages(name: str) -> None:
    assert len(unknown_name(name, ["v" * 1_000_000, name.upper() + "x"])) < 500


def test_names_that_are_known_pass() -> None:
    require_known(["b"], iter(["a", "b"]), "masks")
    require_known([], [], "masks")


def test_an_unknown_name_is_refused_with_the_argument_it_came_in() -> None:
    with pytest.raises(OptionError, match=r"^masks: no tensor is named 'W'; the nearest is 'w'$"):
        require_known(["w", "W"], ["w"], "masks")


def test_something_that_is_no_name_is_refused_as_unknown() -> None:
    with pytest.raises(OptionError, match="no tensor is named 3"):
        require_known([3], ["w"])  # type: ignore[list-item]


def test_a_refusal_of_many_names_stays_short() -> None:
    with pytest.raises(OptionError) as caught:
        require_known((f"layer.{k}" for k in range(100_000)), ["w"], "options")
    assert str(caught.value).endswith("'layer.10' and 99,989 more")  # ten are listed, the others counted
    assert len(str(caught.value)) < 400


def test_short_lists_of_names_are_given_whole() -> None:
    assert listed(["a", "b"]) == "'a', 'b'"
    assert listed(["a", "b", "c"], 2) == "'a', 'b' and 1 more"
