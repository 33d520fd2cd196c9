"""The text of `--help`: every short flag and every key of a config with type, default and doc sentence."""

import dataclasses
import inspect
import json
import textwrap
from collections.abc import Mapping
from typing import Any

from celltron.core.config_schema import ConfigKey, describe_type, list_keys

_WIDTH = 118


def format_help(cls: type, flags: Mapping[str, str], *, positional_ok: bool = False) -> str:
    """Write the help of a command that is configured by `cls`."""
    lines = _about(cls)
    words = " [WORD ...]" if positional_ok else ""
    lines += [f"usage: [--config FILE] [--flag value ...] [section.key=value ...]{words}", "", "flags"]
    table = {"--config FILE": "read the YAML file first", "--help": "print this and exit"}
    table |= {flag: f"sets {target}" for flag, target in flags.items()}
    width = max(len(flag) for flag in table)
    lines += [f"  {flag:<{width}}  {text}" for flag, text in table.items()]
    lines += ["", "config keys, each also as --key value or key=value"]
    for key in list_keys(cls).values():
        lines += _describe_key(key)
    return "\n".join(lines)


def _about(cls: type) -> list[str]:
    """The first paragraph of the class's docstring, unless `dataclass` wrote it."""
    doc = inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0]
    if not doc or doc.startswith(f"{cls.__name__}("):
        return []
    return [*textwrap.wrap(doc, _WIDTH), ""]


def _describe_key(key: ConfigKey) -> list[str]:
    if key.section is not None:
        head = f"  {key.name}:" if key.default is not None else f"  {key.name}: a section or null; default null"
    elif key.default is dataclasses.MISSING:
        head = f"  {key.name}  {describe_type(key.annotation)}; must be given"
    else:
        head = f"  {key.name}  {describe_type(key.annotation)}; default {_show(key.default)}"
    return [head, *textwrap.wrap(key.doc, _WIDTH, initial_indent="      ", subsequent_indent="      ")]


def _show(value: Any) -> str:
    return json.dumps(value, default=lambda other: str(getattr(other, "value", other)))
