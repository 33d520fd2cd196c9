"""What a config class says of itself: its dotted keys with type, default and doc sentence."""

import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import textwrap
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union

_SECTION_WEIGHT = 0.1
_SMALLEST_LIKENESS = 0.6


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ConfigKey:
    """One key of a config."""

    name: str
    """Dotted name, such as `optimizer.learning_rate`."""
    annotation: Any
    """The type of the field."""
    default: Any
    """The default; `dataclasses.MISSING` when the key must be given."""
    doc: str
    """The sentence under the field, empty without one."""
    section: type | None
    """The config class of a section, None for a value."""
    is_inherited: bool = False
    """Whether the default comes from the object that the enclosing class gives its section, not from the section."""


def list_keys(cls: Any) -> Mapping[str, ConfigKey]:
    """List every key of a config class by dotted name, each section before its keys."""
    return _list_keys(cls)


@functools.cache
def _list_keys(cls: type) -> Mapping[str, ConfigKey]:
    keys: dict[str, ConfigKey] = {}
    _add_keys(cls, "", (), None, keys)
    return types.MappingProxyType(keys)


def _add_keys(cls: type, prefix: str, parents: tuple[type, ...], given: Any, keys: dict[str, ConfigKey]) -> None:
    """Add the keys of one section; `given` is the object that the enclosing class has as its default, or None."""
    if not dataclasses.is_dataclass(cls):
        raise TypeError(f"a config class must be a dataclass, got {cls!r}")
    annotations = typing.get_type_hints(cls)
    docs = field_docs(cls)
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        section = section_class(annotations[field.name])
        name = f"{prefix}{field.name}"
        default = _default_of(field, section) if given is None else getattr(given, field.name)
        keys[name] = ConfigKey(
            name=name,
            annotation=annotations[field.name],
            default=default,
            doc=docs.get(field.name, ""),
            section=section,
            is_inherited=given is not None,
        )
        if section is not None and section not in parents:
            inner = default if isinstance(default, section) else None
            _add_keys(section, f"{name}.", (*parents, cls), inner, keys)


def _default_of(field: dataclasses.Field[Any], section: type | None) -> Any:
    """The default of a field; `MISSING` also where a section is made by its own class, whose defaults hold anyway."""
    factory: Any = field.default_factory
    return field.default if factory in (dataclasses.MISSING, section) else factory()


def section_class(annotation: Any) -> type | None:
    """Return the config class of `Section` or `Section | None`, None for any other type."""
    options = [option for option in _options(annotation) if option is not types.NoneType]
    if len(options) == 1 and isinstance(options[0], type) and dataclasses.is_dataclass(options[0]):
        return options[0]
    return None


def annotation_at(cls: type, place: Sequence[str | int]) -> tuple[tuple[str | int, ...], Any]:
    """Follow a place in nested values down the types.

    Args:
        cls: the config class.
        place: names of keys and indices of lists; it may end with marks of the validator that name no value.

    Returns:
        The part of the place that names a value, and its type.
    """
    annotation: Any = cls
    for depth, step in enumerate(place):
        below = _step_down(annotation, step)
        if below is None:
            return tuple(place[:depth]), annotation
        annotation = below[0]
    return tuple(place), annotation


def _step_down(annotation: Any, step: str | int) -> tuple[Any] | None:
    """The type of one entry of a section, list or mapping, None when there is no such entry."""
    options = [option for option in _options(annotation) if option is not types.NoneType]
    if len(options) != 1:
        return None
    origin, arguments = typing.get_origin(options[0]) or options[0], typing.get_args(options[0])
    if isinstance(step, int):
        if origin is tuple and Ellipsis not in arguments:
            return (arguments[step],) if step < len(arguments) else None
        return (arguments[0],) if arguments and isinstance(origin, type) and issubclass(origin, Iterable) else None
    if dataclasses.is_dataclass(origin) and isinstance(origin, type):
        annotations = typing.get_type_hints(origin)
        return (annotations[step],) if step in annotations else None
    if isinstance(origin, type) and issubclass(origin, Mapping) and len(arguments) == 2:
        return (arguments[1],)
    return None


def _options(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the type alone."""
    if typing.get_origin(annotation) is typing.Annotated:
        return _options(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def describe_type(annotation: Any) -> str:
    """Say in words what values a type takes."""
    options = _options(annotation)
    if len(options) > 1:
        return " or ".join(describe_type(option) for option in options)
    kind = options[0]
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}
    words |= {types.NoneType: "null", Any: "anything"}
    if kind in words:
        return words[kind]
    origin, arguments = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin is Literal:
        return f"one of {', '.join(str(argument) for argument in arguments)}"
    if not isinstance(origin, type):
        return str(kind)
    if issubclass(origin, Enum):
        return f"one of {', '.join(str(member.value) for member in origin)}"
    if dataclasses.is_dataclass(origin):
        return "a section (a mapping of keys)"
    if issubclass(origin, Mapping):
        return f"a mapping to {describe_type(arguments[1])}" if len(arguments) == 2 else "a mapping"
    if origin is tuple and arguments and Ellipsis not in arguments:
        return f"a list of {len(arguments)} ({', '.join(describe_type(argument) for argument in arguments)})"
    if issubclass(origin, Iterable):
        return f"a list (of {describe_type(arguments[0])})" if arguments else "a list"
    return origin.__name__


def is_bool(annotation: Any) -> bool:
    """Whether a type is true or false, perhaps null, and nothing else."""
    return {option for option in _options(annotation) if option is not types.NoneType} == {bool}


def refuses_bool(annotation: Any) -> bool:
    """Whether a type of single values leaves out true and false: `True == 1`, so `Literal[1]` would take it."""
    literals = [option for option in _options(annotation) if typing.get_origin(option) is Literal]
    allowed = [value for option in literals for value in typing.get_args(option)]
    others = [option for option in _options(annotation) if typing.get_origin(option) is not Literal]
    return bool(literals) and not any(isinstance(value, bool) for value in allowed) and bool not in others


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """Find the known dotted name that a mistyped one most likely means, in its own section or in another.

    >>> nearest_name("optimizer.learning_rat", ["seed", "optimizer.learning_rate"])
    'optimizer.learning_rate'
    >>> nearest_name("learning_rate", ["seed", "optimizer.learning_rate"])
    'optimizer.learning_rate'
    """
    section, _, last = name.rpartition(".")
    best, best_likeness = None, _SMALLEST_LIKENESS
    for candidate in known:
        other_section, _, other_last = candidate.rpartition(".")
        by_section = difflib.SequenceMatcher(None, section, other_section).ratio()
        by_last = difflib.SequenceMatcher(None, last, other_last).ratio()
        likeness = by_last * (1 - _SECTION_WEIGHT + _SECTION_WEIGHT * by_section)
        if likeness > best_likeness:
            best, best_likeness = candidate, likeness
    return best


@functools.cache
def field_docs(cls: type) -> Mapping[str, str]:
    """Collect the string under each field of a dataclass, folded to one line; empty where the source cannot be had."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):
            continue
        body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
        for statement, following in itertools.pairwise(body):
            if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)):
                continue
            text = following.value if isinstance(following, ast.Expr) else None
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                docs[statement.target.id] = " ".join(text.value.split())
    return docs
