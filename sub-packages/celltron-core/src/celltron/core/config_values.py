"""Plain values against a config class: the types are checked by pydantic, the sentences are written here."""

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from celltron.core.config_schema import (
    ConfigKey,
    annotation_at,
    describe_type,
    list_keys,
    nearest_name,
    refuses_bool,
    section_class,
)
from celltron.core.errors import InputError

T = TypeVar("T")

_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?")


def validate_values(cls: type[T], values: Mapping[str, Any], origin: Callable[[str], str]) -> T:
    """Validate plain values against the class; `origin` says where the value of a dotted key came from."""
    plain = to_plain(values, "")
    if not isinstance(plain, dict):
        raise InputError(f"{origin('')}: wanted a mapping of keys, found {show_value(plain)}")
    for key in list_keys(cls).values():
        steps = key.name.split(".")
        section = _get(plain, steps[:-1])
        if key.is_inherited and isinstance(section, dict):
            section.setdefault(steps[-1], to_plain(key.default, key.name))
        value = _get(plain, steps)
        if isinstance(value, bool) and refuses_bool(key.annotation):
            raise _wrong_type(key.name, value, key.annotation, origin(key.name))
    while True:
        try:
            # Strict JSON is the mode that takes a list for a tuple and text for a path, but never true for 1.
            config: T = _adapter(cls).validate_json(json.dumps(plain), strict=True, extra="forbid")
            return config
        except ValidationError as error:
            problems = error.errors(include_url=False)
        num_mended = sum(_mend_number(cls, plain, problem) for problem in problems)
        if not num_mended:
            raise _translate(cls, problems, plain, origin) from None


def _mend_number(cls: type, plain: dict[str, Any], problem: ErrorDetails) -> bool:
    """Replace text such as "1e-4" by its number where a number was wanted; whether it did."""
    text = problem["input"]
    if problem["type"] != "float_type" or not isinstance(text, str) or not _NUMBER.fullmatch(text.strip()):
        return False
    place, _ = annotation_at(cls, problem["loc"])
    holder = _get(plain, place[:-1])
    if not place or _get(plain, place) != text:
        return False
    holder[place[-1]] = float(text)
    return True


def _get(values: Any, place: Sequence[str | int]) -> Any:
    """Follow a place through mappings and lists; None when it leads nowhere."""
    for step in place:
        if isinstance(values, dict):
            values = values.get(step)
        elif isinstance(values, list) and isinstance(step, int) and step < len(values):
            values = values[step]
        else:
            return None
    return values


def _translate(
    cls: type, problems: Sequence[ErrorDetails], plain: dict[str, Any], origin: Callable[[str], str]
) -> InputError:
    """Make one sentence of what the validator found; a mistyped key first, for a missing one may follow from it."""
    problem = min(problems, key=lambda problem: problem["type"] != "unexpected_keyword_argument")
    loc = problem["loc"]
    if problem["type"] == "unexpected_keyword_argument":
        name = ".".join(str(step) for step in loc)
        holder, annotation = annotation_at(cls, loc[:-1])
        section = section_class(annotation)
        prefix = "".join(f"{step}." for step in holder)
        inside = [] if section is None else [f"{prefix}{key}" for key in list_keys(section)]
        return InputError(f"{origin(name)}: {_unknown_among(dict.fromkeys([*list_keys(cls), *inside]), name)}")
    place, annotation = annotation_at(cls, loc)
    name = ".".join(str(step) for step in place)
    if problem["type"] in ("value_error", "assertion_error"):
        cause = problem["ctx"]["error"]
        return InputError(f"{origin(name)}: {f'{name}: ' if name else ''}{cause}")
    if problem["type"].startswith("missing"):
        return InputError(f"{origin(name)}: {name!r} is missing; give {describe_type(annotation)}")
    return _wrong_type(name, _get(plain, place), annotation, origin(name))


def _wrong_type(name: str, value: Any, annotation: Any, where: str) -> InputError:
    return InputError(f"{where}: {name!r} is {show_value(value)}, wanted {describe_type(annotation)}")


def show_value(value: Any) -> str:
    """Show a value as YAML would, in few letters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def to_plain(value: Any, name: str) -> Any:
    """Reduce dataclasses, paths, enums and sequences to what JSON and YAML hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field.name for field in dataclasses.fields(value) if field.init]
        return {field: to_plain(getattr(value, field), f"{name}.{field}" if name else field) for field in fields}
    if isinstance(value, Enum):
        return to_plain(value.value, name)
    if isinstance(value, Path):
        return str(value)
    if value is None:
        return None
    if isinstance(value, str) and not _is_unicode(value):
        raise InputError(f"config: {name!r} is {value!r}, which is not Unicode text; use other letters")
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            # A subclass, such as numpy's float64, is written as what it holds.
            return kind(value)
    if isinstance(value, Mapping):
        return {str(key): to_plain(entry, f"{name}.{key}" if name else str(key)) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(entry, f"{name}.{place}") for place, entry in enumerate(value)]
    raise InputError(
        f"config: {name!r} is a {type(value).__name__}, wanted text, a number, true, false, null or a list"
    )


def _is_unicode(text: str) -> bool:
    """Whether text can be written as UTF-8; a file name of other bytes reaches Python as lone surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def takes_value(annotation: Any, value: Any) -> bool:
    """Whether a plain value is of a type."""
    try:
        _adapter(annotation).validate_json(json.dumps(value), strict=True, extra="forbid")
    except (ValidationError, ValueError, TypeError):
        return False
    return True


def _adapter(annotation: Any) -> TypeAdapter[Any]:
    return _cached_adapter(annotation)


@functools.cache
def _cached_adapter(annotation: Any) -> TypeAdapter[Any]:
    return TypeAdapter(annotation)


def find_key(cls: type, name: str) -> ConfigKey | None:
    """Find a key by dotted name; below a mapping of free keys every name is one."""
    keys = list_keys(cls)
    if name in keys:
        return keys[name]
    steps = name.split(".")
    found, annotation = annotation_at(cls, steps)
    if len(found) == len(steps) and all(steps):
        return ConfigKey(name=name, annotation=annotation, default=None, doc="", section=None)
    return None


def describe_unknown(cls: type, name: str) -> str:
    """Say that a key is unknown, which one is nearest, or that its section is no section."""
    keys = list_keys(cls)
    parent = name
    while "." in parent:
        parent = parent.rpartition(".")[0]
        if parent in keys and keys[parent].section is None:
            return f"{parent!r} is {describe_type(keys[parent].annotation)}, not a section; set {parent!r} itself"
    return _unknown_among(keys, name)


def _unknown_among(keys: Collection[str], name: str) -> str:
    if name in keys:
        return f"the key {name!r} is written in one piece; in a file, write it nested, a section on each line"
    nearest = nearest_name(name, keys)
    advice = f"did you mean {nearest!r}?" if nearest else f"the keys here are {', '.join(_siblings(keys, name))}"
    return f"unknown key {name!r}; {advice}"


def _siblings(keys: Collection[str], name: str) -> list[str]:
    section = name.rpartition(".")[0]
    inside = [key for key in keys if key.rpartition(".")[0] == section]
    return inside or [key for key in keys if "." not in key]
