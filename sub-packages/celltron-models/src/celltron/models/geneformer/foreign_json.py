"""JSON files beside foreign checkpoints. They may come from anywhere, so all that is read is checked."""

import json
import sys
from pathlib import Path
from typing import Any, TypeGuard

from celltron.core import InputError, MedianTable

_MAX_BYTES = 256 * 1024 * 1024


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InputError: there is no such file, or none of that kind.
    """
    if not path.is_file():
        raise InputError(f"{path} is missing; check the path, or use a complete folder")
    if path.stat().st_size > _MAX_BYTES:
        raise InputError(f"{path} is larger than {_MAX_BYTES} bytes, which no such file is; use another")
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not readable as JSON ({error}); use an undamaged file") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} holds no JSON object; use an undamaged file")
    return values


def read_medians(path: Path) -> MedianTable:
    """Read a JSON object of gene to median.

    Raises:
        InputError: there is no such file, or a median is no number above 0.
    """
    medians = read_json(path)
    bad = next((gene for gene, value in medians.items() if not is_number(value)), None)
    if bad is not None:
        raise InputError(f"{path}: the median of {bad!r} is {medians[bad]!r:.60}, wanted a number; mend that value")
    try:
        return MedianTable(list(medians), list(medians.values()))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def is_number(value: object) -> TypeGuard[float]:
    """Whether an untrusted value is a number that float64 holds; true, NaN and infinity are none."""
    return isinstance(value, int | float) and type(value) is not bool and abs(value) <= sys.float_info.max
