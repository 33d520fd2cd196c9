"""Training and validation cells, by cell or by whole groups (donors, datasets), with a manifest to prove the split."""

import difflib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from celltron.cells.store import CellStore
from celltron.core import InputError, KeyedPermutation, key_from, write_atomically

FORMAT = "celltron-split"
VERSION = 1
BY_CELL = "cell"
MISSING = "(missing)"
"""The group of the cells that have no value in the column."""
SPLIT_STREAM = 3
"""First word of the split's keys; order and masks have others."""


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """Rising cell ids, int64, of both sides, and the manifest: rule, groups with their sizes, digests of both lists."""

    train: npt.NDArray[np.int64]
    validation: npt.NDArray[np.int64]
    manifest: dict[str, Any]

    def write(self, path: str | Path) -> None:
        """Write the manifest as JSON, at once or not at all."""
        write_atomically(Path(path), json.dumps(self.manifest, indent=1) + "\n")

    @classmethod
    def read(cls, path: str | Path, store: CellStore) -> "Split":
        """Make the split of a manifest again and compare it with what the manifest says: store, counts and digests."""
        path = Path(path)
        manifest = _read_manifest(path)
        if manifest["store"] != store.fingerprint:
            raise InputError(
                f"{path} belongs to another store than {store.path} (their fingerprints differ): open the store it "
                "was made for"
            )
        rule = manifest["rule"]
        groups = rule["validation_groups"]
        split = split_cells(
            store,
            by=rule["by"],
            validation_fraction=rule["validation_fraction"],
            seed=rule["seed"],
            validation_groups=groups,
        )
        for key in ("groups", "train", "validation"):
            if split.manifest[key] != manifest[key]:
                raise InputError(
                    f"{path} is damaged: its {key} are not what its rule gives for {store.path}; make the split again"
                )
        return split


def split_cells(
    store: CellStore,
    *,
    by: str,
    validation_fraction: float,
    seed: int,
    validation_groups: Sequence[str] | None = None,
) -> Split:
    """Set cells aside for validation; the same store and arguments give the same split everywhere.

    Args:
        store: the cells.
        by: ``cell``, or a column of obs whose groups stay whole.
        validation_fraction: share of the cells, from 0 to 1, both excluded; groups are drawn in keyed order until the
            share is nearest.
        seed: of the draw.
        validation_groups: take exactly these groups instead; the fraction is then not used.
    """
    is_validation, groups = _sides(store, by, validation_fraction, seed, validation_groups)
    train, validation = np.flatnonzero(~is_validation), np.flatnonzero(is_validation)
    if not len(train) or not len(validation):
        empty = "train" if not len(train) else "validation"
        raise InputError(
            f"the split of {store.path} by {by} leaves no {empty} cells: change validation_fraction or "
            "validation_groups"
        )
    rule = {
        "by": by,
        "validation_fraction": float(validation_fraction),
        "seed": int(seed),
        "validation_groups": None if validation_groups is None else [str(name) for name in validation_groups],
    }
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "store": store.fingerprint,
        "rule": rule,
        "groups": groups,
        "train": _summary(train),
        "validation": _summary(validation),
    }
    return Split(train.astype(np.int64), validation.astype(np.int64), manifest)


def _sides(
    store: CellStore, by: str, fraction: float, seed: int, wanted: Sequence[str] | None
) -> tuple[npt.NDArray[np.bool_], dict[str, dict[str, Any]]]:
    """Which cells are for validation, and each group's size and side."""
    if by == BY_CELL:
        if wanted is not None:
            raise InputError(
                f"validation groups {', '.join(map(str, wanted))} were given with by={BY_CELL}: set by to their obs "
                "column"
            )
        return _draw_cells(len(store), fraction, seed, store), {}
    column = store.obs_column(by).astype(object)
    group_of = column.where(column.notna(), MISSING).astype(str).to_numpy().astype(str)
    names, sizes = np.unique(group_of, return_counts=True)
    counts = {str(name): int(size) for name, size in zip(names, sizes, strict=True)}
    chosen = _draw_groups(counts, fraction, seed, by) if wanted is None else _named_groups(counts, wanted, by)
    sides = {name: "validation" if name in chosen else "train" for name in counts}
    return np.isin(group_of, sorted(chosen)), {name: {"cells": counts[name], "side": sides[name]} for name in counts}


def _summary(cells: npt.NDArray[np.int64]) -> dict[str, Any]:
    return {"cells": len(cells), "sha256": hashlib.sha256(cells.astype("<i8").tobytes()).hexdigest()}


def _check_fraction(fraction: float) -> None:
    if not 0.0 < fraction < 1.0:
        raise InputError(f"validation_fraction is {fraction}: wanted a share of the cells above 0 and below 1")


def _draw_cells(num_cells: int, fraction: float, seed: int, store: CellStore) -> npt.NDArray[np.bool_]:
    _check_fraction(fraction)
    if num_cells < 2:
        raise InputError(f"{store.path} has {num_cells} cells: a split needs at least 2")
    num_validation = min(max(1, round(num_cells * fraction)), num_cells - 1)
    is_validation = np.zeros(num_cells, dtype=np.bool_)
    is_validation[KeyedPermutation(num_cells, key_from(SPLIT_STREAM, seed))(np.arange(num_validation))] = True
    return is_validation


def _draw_groups(counts: dict[str, int], fraction: float, seed: int, by: str) -> set[str]:
    """The first groups in keyed order whose share is nearest to the fraction; each side gets at least one group."""
    _check_fraction(fraction)
    if len(counts) < 2:
        raise InputError(
            f"obs column {by!r} has the one group {', '.join(counts)}: a split by it needs at least 2, choose "
            f"another column or by={BY_CELL}"
        )
    names = sorted(counts)
    order = [names[i] for i in KeyedPermutation(len(names), key_from(SPLIT_STREAM, seed))(np.arange(len(names)))]
    shares = np.cumsum([counts[name] for name in order])[:-1] / sum(counts.values())
    return set(order[: int(np.argmin(np.abs(shares - fraction))) + 1])


def _named_groups(counts: dict[str, int], wanted: Sequence[str], by: str) -> set[str]:
    for name in map(str, wanted):
        if name not in counts:
            near = difflib.get_close_matches(name, counts, n=1)
            some = ", ".join(sorted(counts)[:10])
            hint = f"did you mean {near[0]!r}?" if near else f"it has {some}"
            raise InputError(f"obs column {by!r} has no group {name!r}: {hint}; name its groups in validation_groups")
    return {str(name) for name in wanted}


def _read_manifest(path: Path) -> dict[str, Any]:
    """A split manifest is untrusted: check its shape before anything is computed from it."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"no split manifest at {path}: check the name") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged: it is no JSON; make the split again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(f"{path} is no {FORMAT} manifest: name the file that Split.write made")
    if manifest.get("version") != VERSION:
        raise InputError(
            f"{path} has {FORMAT} version {manifest.get('version')!r}, wanted {VERSION}: make the split again"
        )
    rule = manifest.get("rule")
    groups = rule.get("validation_groups") if isinstance(rule, dict) else None
    good = (
        isinstance(rule, dict)
        and isinstance(rule.get("by"), str)
        and type(rule.get("validation_fraction")) in (int, float)
        and type(rule.get("seed")) is int
        and (groups is None or (isinstance(groups, list) and all(isinstance(name, str) for name in groups)))
        and all(isinstance(manifest.get(key), dict) for key in ("groups", "train", "validation"))
        and isinstance(manifest.get("store"), str)
    )
    if not good:
        raise InputError(f"{path} is damaged: its rule, groups or digests are incomplete; make the split again")
    return manifest
