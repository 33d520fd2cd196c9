"""The manifest of a split: its rule, what it gave, and for which reader; untrusted when it is read.

JSON of format ``celltron-split``. Version 2: ``reader`` (fingerprint), ``rule`` (`SplitRule`), ``groups`` (size and
side of each), and for each of ``train``, ``validation`` and ``test`` the number of cells and the sha256 of their ids as
little-endian int64; ``manifest_sha256`` is the checksum of the rest, as in an artefact. Version 1 had ``store`` for
``reader``, no test side, no checksum of the whole, and a column's name alone as ``by``.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from celltron.core import InputError
from celltron.core.manifest import fits_own_checksum

FORMAT = "celltron-split"
VERSION = 2
READABLE_VERSIONS = (1, 2)
BY_CELL = "cell"
SIDES = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SplitRule:
    """All that decides a split of given cells; see `split_cells`."""

    by: str
    """What was asked for: `cell`, `dataset`, `donor`, `store`, or a column of obs."""
    column: str | None
    """The column of obs that was taken; None splits by cell."""
    validation_fraction: float
    test_fraction: float
    seed: int
    validation_groups: tuple[str, ...] | None
    test_groups: tuple[str, ...] | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        groups = {
            name: None if getattr(self, name) is None else list(getattr(self, name))
            for name in ("validation_groups", "test_groups")
        }
        return dataclasses.asdict(self) | groups


def read_split_manifest(path: Path) -> tuple[SplitRule, dict[str, Any]]:
    """The rule of a manifest, and the manifest brought to the form of the newest version but for its rule."""
    manifest = _load(path)
    if manifest["version"] == 1:
        manifest["reader"] = manifest.pop("store", None)
        rule = manifest.get("rule")
        if isinstance(rule, dict):
            column = None if rule.get("by") == BY_CELL else rule.get("by")
            manifest["rule"] = rule | {"column": column, "test_fraction": 0.0, "test_groups": None}
    if not _is_complete(manifest):
        raise InputError(f"{path} is damaged: its rule, groups or digests are incomplete; make the split again")
    rule = dict(manifest["rule"])
    for name in ("validation_groups", "test_groups"):
        rule[name] = None if rule[name] is None else tuple(rule[name])
    return SplitRule(**rule), manifest


def _load(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"no split manifest at {path}: check the name") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged: it is no JSON; make the split again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(f"{path} is no {FORMAT} manifest: name the file that Split.write made")
    version = manifest.get("version")
    if type(version) is not int or version not in READABLE_VERSIONS:
        wanted = " or ".join(map(str, READABLE_VERSIONS))
        raise InputError(f"{path} has {FORMAT} version {version!r}, wanted {wanted}: make the split again")
    if version > 1 and not fits_own_checksum(manifest):
        raise InputError(f"{path} is damaged: it does not fit its own checksum; make the split again")
    return manifest


def _is_complete(manifest: dict[str, Any]) -> bool:
    rule = manifest.get("rule")
    if not isinstance(rule, dict) or set(rule) != {field.name for field in dataclasses.fields(SplitRule)}:
        return False
    sides = SIDES if manifest["version"] > 1 else SIDES[:2]
    return (
        isinstance(rule["by"], str)
        and (rule["column"] is None or isinstance(rule["column"], str))
        and all(type(rule[name]) in (int, float) for name in ("validation_fraction", "test_fraction"))
        and type(rule["seed"]) is int
        and all(_is_names(rule[name]) for name in ("validation_groups", "test_groups"))
        and all(isinstance(manifest.get(key), dict) for key in ("groups", *sides))
        and isinstance(manifest.get("reader"), str)
    )


def _is_names(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value))
