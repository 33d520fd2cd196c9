"""Training, validation and test cells, by cell or by whole groups (donors, datasets, stores), with a manifest of it."""

import difflib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from celltron.cells.obs_union import groups_of
from celltron.cells.reader import CellReader
from celltron.cells.split_manifest import BY_CELL, FORMAT, SIDES, VERSION, SplitRule, read_split_manifest
from celltron.core import InputError, KeyedPermutation, key_from, write_atomically
from celltron.core.manifest import seal_manifest

SPLIT_STREAM = 3
"""First word of the split's keys; order and masks have others."""
TRAIN, VALIDATION, TEST = np.int8(0), np.int8(1), np.int8(2)
"""The sides, numbered as in ``SIDES``."""
COLUMNS: dict[str, tuple[str, ...]] = {
    "dataset": ("dataset_id", "dataset", "source"),
    "donor": (
        "donor_id",
        "donor",
        "individual_id",
        "individual",
        "patient_id",
        "patient",
        "subject_id",
        "subject",
        "participant_id",
        "participant",
    ),
}
"""For what a split can be asked ``by``, the columns of obs that say it; the first that is there is taken."""


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """Rising cell ids, int64, of the three sides, and the manifest: rule, groups with their sizes, digests of all."""

    train: npt.NDArray[np.int64]
    validation: npt.NDArray[np.int64]
    test: npt.NDArray[np.int64]
    manifest: dict[str, Any]

    def write(self, path: str | Path) -> None:
        """Write the manifest as JSON, at once or not at all."""
        write_atomically(Path(path), json.dumps(self.manifest, indent=1) + "\n")

    @classmethod
    def read(cls, path: str | Path, reader: CellReader) -> "Split":
        """Make the split of a manifest again and compare it with what the manifest says: reader, groups and digests."""
        path = Path(path)
        rule, manifest = read_split_manifest(path)
        if manifest["reader"] != reader.fingerprint:
            raise InputError(
                f"{path} belongs to another store than {reader.name} (their fingerprints differ): open the store it "
                "was made for"
            )
        split = _split(reader, rule)
        for key in ("groups", *SIDES):
            if split.manifest[key] != manifest.get(key, split.manifest[key]):
                raise InputError(
                    f"{path} is damaged: its {key} are not what its rule gives for {reader.name}; make the split again"
                )
        return split


def split_cells(
    reader: CellReader,
    *,
    by: str,
    validation_fraction: float,
    test_fraction: float = 0.0,
    seed: int,
    validation_groups: Sequence[str] | None = None,
    test_groups: Sequence[str] | None = None,
) -> Split:
    """Set cells aside for validation and for a test; the same cells and arguments give the same split everywhere.

    The test cells are drawn from what validation leaves, so that asking for them does not change the validation cells
    (but where there are too few groups for both).

    Args:
        reader: the cells. Groups of two stores of a collection that have the same name are one group.
        by: ``cell``; or ``dataset``, ``donor`` (`COLUMNS` says which columns are tried), ``store`` of a collection, or
            any column of obs, whose groups stay whole; cells without a value are a group.
        validation_fraction: share of the cells, from 0 to 1, both excluded; groups are drawn in keyed order until the
            share is nearest.
        test_fraction: likewise; 0 keeps none for a test.
        seed: of the draw.
        validation_groups: take exactly these groups instead; the fraction is then not used.
        test_groups: likewise.
    """
    rule = SplitRule(
        by=by,
        column=_column(reader, by),
        validation_fraction=float(validation_fraction),
        test_fraction=float(test_fraction),
        seed=int(seed),
        validation_groups=None if validation_groups is None else tuple(map(str, validation_groups)),
        test_groups=None if test_groups is None else tuple(map(str, test_groups)),
    )
    return _split(reader, rule)


def _column(reader: CellReader, by: str) -> str | None:
    """The column of obs that ``by`` means; None for single cells."""
    if by == BY_CELL:
        return None
    if by not in COLUMNS:
        return by
    there = reader.obs_columns
    for name in COLUMNS[by]:
        if name in there:
            return name
    raise InputError(
        f"obs of {reader.name} has no column that says the {by}, such as {', '.join(COLUMNS[by][:3])}: it has "
        f"{', '.join(there)}; set by to one of these, or to {BY_CELL}"
    )


def _split(reader: CellReader, rule: SplitRule) -> Split:
    """Carry out a rule, which may come from a manifest."""
    _check_rule(rule)
    groups: dict[str, dict[str, Any]] = {}
    if rule.column is None:
        side_C = _draw_cells(len(reader), rule, reader.name)
    else:
        side_C, groups = _split_groups(reader, rule.column, rule)
    train, validation, test = (np.flatnonzero(side_C == side).astype(np.int64) for side in (TRAIN, VALIDATION, TEST))
    needed = {"train": train, "validation": validation} | ({"test": test} if _wants_test(rule) else {})
    for side, cells in needed.items():
        if not len(cells):
            raise InputError(
                f"the split of {reader.name} by {rule.by} leaves no {side} cells: change the fractions or the groups "
                "of validation and test"
            )
    digests = {side: _digest(cells) for side, cells in zip(SIDES, (train, validation, test), strict=True)}
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "reader": reader.fingerprint,
        "rule": rule.to_dict(),
        "groups": groups,
        **digests,
    }
    return Split(train, validation, test, seal_manifest(manifest))


def _digest(cells: npt.NDArray[np.int64]) -> dict[str, Any]:
    return {"cells": len(cells), "sha256": hashlib.sha256(cells.astype("<i8", copy=False).data).hexdigest()}


def _wants_test(rule: SplitRule) -> bool:
    return rule.test_groups is not None or rule.test_fraction > 0.0


def _check_rule(rule: SplitRule) -> None:
    if rule.column is None:
        for side, groups in (("validation", rule.validation_groups), ("test", rule.test_groups)):
            if groups is not None:
                raise InputError(
                    f"{side} groups {', '.join(groups)} were given with by={BY_CELL}: set by to their obs column"
                )
    both = set(rule.validation_groups or ()) & set(rule.test_groups or ())
    if both:
        raise InputError(
            f"{sorted(both)[0]!r} is in both validation_groups and test_groups: a group is on one side only, take it "
            "out of one"
        )
    if rule.validation_groups is None and not 0.0 < rule.validation_fraction < 1.0:
        raise InputError(
            f"validation_fraction is {rule.validation_fraction}: wanted a share of the cells above 0 and below 1"
        )
    if rule.test_groups is None and not 0.0 <= rule.test_fraction < 1.0:
        raise InputError(f"test_fraction is {rule.test_fraction}: wanted a share of the cells from 0 on and below 1")
    drawn = [
        fraction
        for fraction, groups in (
            (rule.validation_fraction, rule.validation_groups),
            (rule.test_fraction, rule.test_groups),
        )
        if groups is None
    ]
    if sum(drawn) >= 1.0:
        raise InputError(
            f"validation_fraction {rule.validation_fraction} and test_fraction {rule.test_fraction} leave nothing to "
            "train on: wanted a sum below 1"
        )


def _draw_cells(num_cells: int, rule: SplitRule, name: str) -> npt.NDArray[np.int8]:
    """int8 [C]: validation has the first places of a keyed permutation, the test those after them."""
    num_sides = 3 if _wants_test(rule) else 2
    if num_cells < num_sides:
        raise InputError(f"{name} has {num_cells} cells: a split needs at least {num_sides}")
    num_validation = min(max(1, round(num_cells * rule.validation_fraction)), num_cells - num_sides + 1)
    num_test = min(max(1, round(num_cells * rule.test_fraction)), num_cells - num_validation - 1) * (num_sides - 2)
    side_C = np.full(num_cells, TRAIN, dtype=np.int8)
    order = KeyedPermutation(num_cells, key_from(SPLIT_STREAM, rule.seed))
    side_C[order(np.arange(num_validation))] = VALIDATION
    side_C[order(np.arange(num_validation, num_validation + num_test))] = TEST
    return side_C


def _split_groups(
    reader: CellReader, column: str, rule: SplitRule
) -> tuple[npt.NDArray[np.int8], dict[str, dict[str, Any]]]:
    """int8 [C], the side of each cell, and each group's size and side."""
    group_of_C, names = groups_of(reader.obs_column(column), f"obs column {column!r} of {reader.name}")
    sizes = np.bincount(group_of_C, minlength=len(names)).tolist()
    validation, test = _choose_groups(dict(zip(names, sizes, strict=True)), rule, column)
    sides = [VALIDATION if name in validation else TEST if name in test else TRAIN for name in names]
    groups = {name: {"cells": size, "side": SIDES[side]} for name, size, side in zip(names, sizes, sides, strict=True)}
    return np.array(sides)[group_of_C], groups


def _choose_groups(counts: dict[str, int], rule: SplitRule, column: str) -> tuple[set[str], set[str]]:
    """The groups of validation and test: those that are named, then the others drawn in keyed order."""
    validation = None if rule.validation_groups is None else _named_groups(counts, rule.validation_groups, column)
    test = None if rule.test_groups is None else _named_groups(counts, rule.test_groups, column)
    if test is None and rule.test_fraction == 0.0:
        test = set()
    names = sorted(counts)
    order = KeyedPermutation(len(names), key_from(SPLIT_STREAM, rule.seed))(np.arange(len(names)))
    free = [names[i] for i in order if names[i] not in (validation or set()) | (test or set())]
    num_drawn = (validation is None) + (test is None)
    if num_drawn and len(free) <= num_drawn:
        needed = len(counts) - len(free) + num_drawn + 1
        raise InputError(
            f"obs column {column!r} has {_some(counts)}: a split by it needs at least {needed} here, choose another "
            f"column or by={BY_CELL}"
        )
    if validation is None:
        validation = set(_draw_groups(counts, free, rule.validation_fraction, keep=num_drawn))
        free = [name for name in free if name not in validation]
    if test is None:
        test = set(_draw_groups(counts, free, rule.test_fraction, keep=1))
    return validation, test


def _draw_groups(counts: dict[str, int], order: list[str], fraction: float, *, keep: int) -> list[str]:
    """The first groups in order whose share of all cells is nearest; one at least, and ``keep`` are left for others."""
    shares = np.cumsum([counts[name] for name in order])[:-keep] / sum(counts.values())
    return order[: int(np.argmin(np.abs(shares - fraction))) + 1]


def _some(counts: dict[str, int]) -> str:
    return f"the one group {next(iter(counts))}" if len(counts) == 1 else f"{len(counts)} groups"


def _named_groups(counts: dict[str, int], wanted: Sequence[str], column: str) -> set[str]:
    for name in wanted:
        if name not in counts:
            near = difflib.get_close_matches(name, counts, n=1)
            some = ", ".join(sorted(counts)[:10])
            hint = f"did you mean {near[0]!r}?" if near else f"it has {some}"
            raise InputError(
                f"obs column {column!r} has no group {name!r}: {hint}; name its groups in validation_groups or "
                "test_groups"
            )
    return set(wanted)
