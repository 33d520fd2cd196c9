import dataclasses
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, Optional

import pytest

from celltron.core.config_schema import (
    annotation_at,
    describe_type,
    field_docs,
    is_bool,
    list_keys,
    nearest_name,
    refuses_bool,
    section_class,
)


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    first: int = 1
    """From the base."""
    second: int = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Derived(Base):
    second: int = 3
    """Written anew."""
    third: int = field(default=4, init=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    value: int = 0
    below: Optional["Tree"] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    base: Base = field(default_factory=Base)
    given: Base = Base(first=7)
    bases: list[Base] = field(default_factory=list)
    pair: tuple[int, str] = (1, "a")
    table: dict[str, Base] = field(default_factory=dict)


def test_keys_come_in_order_with_sections_first() -> None:
    keys = list_keys(Holder)
    assert list(keys) == [
        "base", "base.first", "base.second", "given", "given.first", "given.second", "bases", "pair", "table",
    ]  # fmt: skip
    assert keys["base"].section is Base and keys["base.first"].section is None
    assert (keys["base.first"].default, keys["base.first"].is_inherited) == (1, False)
    assert (keys["given.first"].default, keys["given.first"].is_inherited) == (7, True)
    assert keys["base.first"].doc == "From the base."
    assert keys["bases"].default == []


def test_inherited_fields_keep_their_sentence_and_those_not_given_are_left_out() -> None:
    assert list(list_keys(Derived)) == ["first", "second"]
    assert field_docs(Derived) == {"first": "From the base.", "second": "Written anew."}
    made = dataclasses.make_dataclass("Made", [("x", int, 1)])
    assert field_docs(made) == {} and list(list_keys(made)) == ["x"]


def test_a_class_that_holds_itself_ends() -> None:
    assert list(list_keys(Tree)) == ["value", "below", "below.value", "below.below"]


def test_sections() -> None:
    assert section_class(Base) is Base and section_class(Base | None) is Base
    assert section_class(Annotated[Base, "x"]) is Base
    assert section_class(Base | Tree) is None and section_class(int) is None
    with pytest.raises(TypeError, match="dataclass"):
        list_keys(int)


@pytest.mark.parametrize(
    ("place", "found", "annotation"),
    [
        (("base", "first"), ("base", "first"), int),
        (("bases", 3, "second"), ("bases", 3, "second"), int),
        (("pair", 1), ("pair", 1), str),
        (("pair", 5), ("pair",), tuple[int, str]),
        (("table", "x", "first"), ("table", "x", "first"), int),
        (("base", "nothing"), ("base",), Base),
        ((), (), Holder),
    ],
)
def test_a_place_is_followed_down_the_types(place: tuple[Any, ...], found: tuple[Any, ...], annotation: Any) -> None:
    assert annotation_at(Holder, place) == (found, annotation)


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (int, "a whole number"),
        (bool | None, "true or false or null"),
        (Path, "a path"),
        (Any, "anything"),
        (Literal["a", 2], "one of a, 2"),
        (Colour, "one of red, blue"),
        (list[int], "a list (of a whole number)"),
        (list, "a list"),
        (tuple[int, ...], "a list (of a whole number)"),
        (tuple[int, str], "a list of 2 (a whole number, text)"),
        (dict[str, float], "a mapping to a number"),
        (dict, "a mapping"),
        (Base, "a section (a mapping of keys)"),
        (Annotated[int, "x"], "a whole number"),
        (complex, "complex"),
    ],
)
def test_types_in_words(annotation: Any, words: str) -> None:
    assert describe_type(annotation) == words


def test_what_takes_true_and_false() -> None:
    assert is_bool(bool) and is_bool(bool | None)
    assert not is_bool(bool | str) and not is_bool(int) and not is_bool(Literal[True])
    assert refuses_bool(Literal[1, 2]) and refuses_bool(Literal[1] | None)
    assert not refuses_bool(Literal[True, 2]) and not refuses_bool(Literal[1] | bool) and not refuses_bool(int)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("optimizer.learning_rat", "optimizer.learning_rate"),
        ("optimzer", "optimizer"),
        ("optimzer.learning_rate", "optimizer.learning_rate"),
        ("learning_rate", "optimizer.learning_rate"),
        ("model.learning_rate", "optimizer.learning_rate"),
        ("model.dropuot", "model.dropout"),
        ("dropout", "model.dropout"),
        ("optimizer.zzzz", None),
        ("data.dropuot", "data.dropout"),
        ("zzzz", None),
        ("", None),
    ],
)
def test_nearest_names_also_from_other_sections(name: str, nearest: str | None) -> None:
    known = ["optimizer", "optimizer.learning_rate", "model", "model.dropout", "data.dropout", "seed"]
    assert nearest_name(name, known) == nearest
