"""Configs: frozen dataclasses filled from YAML, `section.key=value` and `--flags`, every key and type checked."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from celltron.core.config_help import format_help
from celltron.core.config_schema import is_bool, list_keys, nearest_name
from celltron.core.config_values import (
    describe_unknown,
    find_key,
    show_value,
    takes_value,
    to_plain,
    validate_values,
)
from celltron.core.errors import InputError
from celltron.core.strict_yaml import MAX_YAML_BYTES, dump_yaml, parse_yaml

T = TypeVar("T")


def build_config(cls: type[T], values: Mapping[str, Any], *, where: str = "config") -> T:
    """Fill a config class from nested plain values.

    Args:
        cls: a dataclass, whose fields may be dataclasses again (sections).
        values: nested mappings, lists, strings, numbers, true, false, null; a section may be given as an object.
        where: what the values came from, for the errors.

    Raises:
        InputError: an unknown or missing key, a value of another type, or what a `__post_init__` refuses. Text such as
            "1e-4", which YAML does not read as a number, is taken where a number is wanted; true and false never are.
    """
    return validate_values(cls, values, lambda name: where)


def load_config(cls: type[T], path: Path | None = None, overrides: Sequence[str] = ()) -> T:
    """Load a config from a YAML file and overrides.

    Args:
        cls: a config class.
        path: the YAML file; None starts from the defaults.
        overrides: `section.key=value` each, put in one after the other; the value is YAML.
    """
    settings = [_parse_override(cls, override) for override in overrides]
    return _load(cls, path, settings)


@dataclasses.dataclass(frozen=True, slots=True)
class _Setting:
    """One value given on the command line."""

    name: str
    """Dotted key."""
    value: Any
    """The value, parsed."""
    source: str
    """How it was written, for the errors."""


@dataclasses.dataclass(frozen=True, slots=True)
class ParsedArguments(Generic[T]):
    """A command line, understood."""

    config: T
    """The config, complete and checked."""
    values: dict[str, Any]
    """What the command line gave explicitly, by dotted key, as it stands in the config; the file's is not among it."""
    positionals: tuple[str, ...] = ()
    """The words that are neither flags nor overrides."""
    config_path: Path | None = None
    """The file after `--config`."""


def parse_arguments(
    cls: type[T], arguments: Sequence[str], *, flags: Mapping[str, str], positional_ok: bool = False
) -> ParsedArguments[T]:
    """Understand a command line: `--config FILE`, `section.key=value`, `--section.key value`, and short flags.

    What stands later wins, and the command line wins over the file. `--flag value` and `--flag=value` mean the same; a
    flag for a bool may stand alone. `--help` prints every flag and key, then exits with 0. After `--` every word is
    positional.

    Args:
        cls: a config class.
        arguments: the words.
        flags: short flags and the dotted keys they set, such as {"--lr": "optimizer.learning_rate"}.
        positional_ok: whether other words are allowed.
    """
    keys = list_keys(cls)
    strangers = sorted(target for target in flags.values() if target not in keys)
    if strangers:
        raise ValueError(f"flags name keys that {cls.__name__} does not have: {', '.join(strangers)}")
    words = list(arguments)
    only_words = words[words.index("--") + 1 :] if "--" in words else []
    words = words[: words.index("--")] if "--" in words else words
    path: Path | None = None
    settings: list[_Setting] = []
    positionals: list[str] = []
    while words:
        word = words.pop(0)
        if word in ("--help", "-h"):
            print(format_help(cls, flags, positional_ok=positional_ok))
            raise SystemExit(0)
        if word == "--config" or word.startswith("--config="):
            path = Path(_take_value(word, words))
        elif word.startswith("-") and len(word) > 1:
            settings.append(_parse_flag(cls, word, words, flags))
        elif _is_override(word, positional_ok):
            settings.append(_parse_override(cls, word))
        else:
            positionals.append(word)
    positionals += only_words
    if positionals and not positional_ok:
        raise InputError(f"command line: {positionals[0]!r} is neither a flag nor section.key=value; see --help")
    config = _load(cls, path, settings)
    values = {setting.name: _value_at(config, setting.name) for setting in settings}
    return ParsedArguments(config=config, values=values, positionals=tuple(positionals), config_path=path)


def config_to_dict(config: Any) -> dict[str, Any]:
    """Turn a config into nested plain values: mappings, lists, text, numbers, true, false, null."""
    values = to_plain(config, "")
    if not isinstance(values, dict):
        raise TypeError(f"a config is a dataclass, got {type(config).__name__}")
    return values


def config_to_yaml(config: Any) -> str:
    """Write a config as YAML; `load_config` makes the same config of it."""
    return dump_yaml(config_to_dict(config))


def _load(cls: type[T], path: Path | None, settings: Sequence[_Setting]) -> T:
    """Read the file, put the settings in, and build."""
    where = "the defaults" if path is None else str(path)
    values = {} if path is None else _read_file(Path(path))
    for setting in settings:
        _put(cls, values, setting, where)

    def origin(name: str) -> str:
        for setting in reversed(settings):
            if name == setting.name or name.startswith(f"{setting.name}."):
                return setting.source
        inside = [setting.source for setting in settings if not name or setting.name.startswith(f"{name}.")]
        return f"{where} with {', '.join(inside)}" if inside else where

    return validate_values(cls, values, origin)


def _value_at(config: Any, name: str) -> Any:
    """Follow a dotted key down a config."""
    for step in name.split("."):
        config = config[step] if isinstance(config, Mapping) else getattr(config, step)
    return config


def _read_file(path: Path) -> dict[str, Any]:
    """Read a YAML file that must hold a mapping; an empty one holds nothing."""
    try:
        with path.open("rb") as stream:
            text = stream.read(MAX_YAML_BYTES + 1).decode("utf-8-sig")
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path}: there is no such config file; check the path") from None
    except IsADirectoryError:
        raise InputError(f"{path}: this is a folder, wanted a YAML file; check the path") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); check the path") from None
    values = parse_yaml(text, where=str(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InputError(f"{path}: wanted a mapping of keys, found {show_value(values)}; write `key: value` lines")
    return values


def _put(cls: type, values: dict[str, Any], setting: _Setting, where: str) -> None:
    """Set a dotted key in nested mappings, making the sections on the way."""
    *sections, last = setting.name.split(".")
    for depth, section in enumerate(sections, start=1):
        name = ".".join(sections[:depth])
        if values.get(section) is None:
            key = list_keys(cls).get(name)
            default = None if key is None else key.default
            values[section] = to_plain(default, name) if isinstance(default, Mapping) else {}
        if not isinstance(values[section], dict):
            raise InputError(
                f"{setting.source}: {name!r} in {where} holds {show_value(values[section])}, which is no section; "
                f"mend {name!r} or leave out the override"
            )
        values = values[section]
    values[last] = setting.value


def _is_override(word: str, positional_ok: bool) -> bool:
    """Whether a word is meant as `section.key=value`; a file name may hold an equals sign too."""
    name, equals, _ = word.partition("=")
    if not equals:
        return False
    is_key = re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", name) is not None
    return is_key and (not positional_ok or not Path(word).exists())


def _parse_override(cls: type, text: str) -> _Setting:
    name, equals, value = text.partition("=")
    source = f"override {text!r}"
    if not equals or not name.strip():
        raise InputError(f"{source}: wanted section.key=value; write the key, an equals sign and the value")
    return _setting(cls, name.strip(), value, source)


def _parse_flag(cls: type, word: str, words: list[str], flags: Mapping[str, str]) -> _Setting:
    """Understand a word that begins with `-`, taking its value from the words that follow when it holds none."""
    flag, equals, _ = word.partition("=")
    keys = list_keys(cls)
    name = flags.get(flag) or flag.removeprefix("--").replace("-", "_")
    key = find_key(cls, name) if flag in flags or flag.startswith("--") else None
    if key is None:
        known = [*flags, "--config", "--help", *(f"--{key}" for key in keys)]
        nearest = nearest_name(flag, known)
        advice = f"did you mean {nearest}?" if nearest else "see --help"
        raise InputError(f"command line: unknown flag {flag}; {advice}")
    stands_alone = not equals and (not words or words[0].lower() not in ("true", "false"))
    if is_bool(key.annotation) and stands_alone:
        return _Setting(name, True, flag)
    setting = _setting(cls, name, _take_value(word, words), flag)
    more = [] if equals or not takes_value(key.annotation, ["several", "words"]) else _take_more(words)
    return _Setting(name, [setting.value, *more], flag) if more else setting


def _take_more(words: list[str]) -> list[str]:
    """The further values of a flag that takes several: the words up to the next flag or override."""
    taken = []
    while words and not words[0].startswith("-") and not _is_override(words[0], positional_ok=True):
        taken.append(words.pop(0))
    return taken


def _take_value(word: str, words: list[str]) -> str:
    """The value of `--flag=value` or `--flag value`."""
    flag, equals, value = word.partition("=")
    if equals:
        return value
    if not words or words[0].startswith("--"):
        raise InputError(f"command line: {flag} wants a value; write {flag} VALUE")
    return words.pop(0)


def _setting(cls: type, name: str, text: str, source: str) -> _Setting:
    """Check that a key exists and parse its value: YAML, or the bare text where only that is what the key takes."""
    key = find_key(cls, name)
    if key is None:
        raise InputError(f"{source}: {describe_unknown(cls, name)}")
    try:
        value = parse_yaml(text, where=source)
    except InputError:
        if not takes_value(key.annotation, text):
            raise
        value = text
    if not isinstance(value, str) and not takes_value(key.annotation, value) and takes_value(key.annotation, text):
        # `--out 2024` and `--name no` are text where text is wanted.
        value = text
    return _Setting(name, value, source)
