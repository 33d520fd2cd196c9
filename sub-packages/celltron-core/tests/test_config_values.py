import dataclasses
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from celltron.core.config_values import (
    describe_unknown,
    find_key,
    show_value,
    takes_value,
    to_plain,
    validate_values,
)
from celltron.core.errors import InputError


class Device(Enum):
    CPU = "cpu"
    CUDA = "cuda"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    rate: float = 1.0
    names: dict[str, int] = field(default_factory=dict)
    free: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    part: Part = field(default_factory=Part)
    count: int = 0

    def __post_init__(self) -> None:
        if self.count == 13:
            raise InputError("count 13 is unlucky; choose another")
        assert self.count != 14, "fourteen"


def test_the_origin_of_a_key_is_in_the_sentence() -> None:
    with pytest.raises(InputError, match=r"^from part.rate: 'part.rate' is"):
        validate_values(Whole, {"part": {"rate": "x"}}, lambda name: f"from {name}")
    with pytest.raises(InputError, match=r"^top: count 13 is unlucky"):
        validate_values(Whole, {"count": 13}, lambda name: "top")
    with pytest.raises(InputError, match="fourteen"):
        validate_values(Whole, {"count": 14}, lambda name: "top")


def test_the_given_values_are_left_alone() -> None:
    values = {"part": {"rate": "1e-4"}}
    assert validate_values(Whole, values, lambda name: "").part.rate == 1e-4
    assert values == {"part": {"rate": "1e-4"}}


def test_any_value_is_kept_as_it_is() -> None:
    given = {"a": [1, "1e-4", None, {"b": True}]}
    assert validate_values(Whole, {"part": {"free": given}}, lambda name: "").part.free == given


def test_plain_values() -> None:
    plain = to_plain({1: (np.float64(2), np.str_("a"), True, Path("x"))}, "")
    assert plain == {"1": [2.0, "a", True, "x"]}
    assert [type(entry) for entry in plain["1"]] == [float, str, bool, str]
    with pytest.raises(InputError, match="'a.1' is a set"):
        to_plain({"a": [1, {2}]}, "")


def test_keys_are_found_below_free_mappings_only() -> None:
    assert find_key(Whole, "part.rate") is not None
    free = find_key(Whole, "part.names.anything")
    assert free is not None and free.annotation is int
    assert find_key(Whole, "part.nothing") is None and find_key(Whole, "count.x") is None
    assert find_key(Whole, "part.names.") is None
    assert "not a section" in describe_unknown(Whole, "count.x.y")


def test_values_are_tried_and_shown() -> None:
    assert takes_value(int | None, None) and not takes_value(int, "1") and not takes_value(int, {1, 2})
    assert show_value({"a": None}) == '{"a": null}'
    assert len(show_value("x" * 100)) == 60


@pytest.mark.parametrize(
    ("annotation", "value", "sentence"),
    [
        (int, 1.0, "'key' is 1.0, wanted a whole number"),
        (int, "1", "'key' is \"1\", wanted a whole number"),
        (int, None, "'key' is null, wanted a whole number"),
        (int, True, "'key' is true, wanted a whole number"),
        (float, True, "'key' is true, wanted a number"),
        (float, "fast", "'key' is \"fast\", wanted a number"),
        (float | None, "nan", "'key' is \"nan\", wanted a number or null"),
        (bool, 1, "'key' is 1, wanted true or false"),
        (bool, "true", "'key' is \"true\", wanted true or false"),
        (str, 3, "'key' is 3, wanted text"),
        (str, False, "'key' is false, wanted text"),
        (str, "a\ud800", "'key' is 'a\\ud800', which is not Unicode text"),
        (str, object(), "'key' is a object, wanted text"),
        (Path | None, 3, "'key' is 3, wanted a path or null"),
        (int | str | None, 1.5, "'key' is 1.5, wanted a whole number or text or null"),
        (int | str | None, True, "'key' is true, wanted a whole number or text or null"),
        (Literal[1, 2], True, "'key' is true, wanted one of 1, 2"),
        (Literal[1, 2], 3, "'key' is 3, wanted one of 1, 2"),
        (Device, "tpu", "'key' is \"tpu\", wanted one of cpu, cuda"),
        (list[int], [1, "x"], "'key.1' is \"x\", wanted a whole number"),
        (list[int], ["x" * 500], "'key.0' is \"" + "x" * 56 + "..., wanted a whole number"),
        (list[int], 1, "'key' is 1, wanted a list (of a whole number)"),
        (dict[str, float], {"a": True}, "'key.a' is true, wanted a number"),
        (dict[str, float], [1], "'key' is [1], wanted a mapping to a number"),
        (tuple[float, float], [1, 2, 3], "'key' is [1, 2, 3], wanted a list of 2 (a number, a number)"),
        (Part, None, "'key' is null, wanted a section (a mapping of keys)"),
        (Part, 3, "'key' is 3, wanted a section"),
        (list[Part], [{"rate": 1}, {"rate": False}], "'key.1.rate' is false, wanted a number"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_wanted(annotation: Any, value: Any, sentence: str) -> None:
    cls = dataclasses.make_dataclass("Made", [("key", annotation)], frozen=True, kw_only=True)
    with pytest.raises(InputError) as caught:
        validate_values(cls, {"key": value}, lambda name: "here")
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
