"""Tab-separated tables, plain or gzip: those shipped with the package and those of the same layout given by a user."""

import gzip
import importlib.resources
import io
import zlib
from collections.abc import Sequence

from celltron.core.errors import InputError

_MAX_TABLE_BYTES = 256 * 1024 * 1024


def read_shipped_table(name: str) -> str:
    """Read one of the tables in the package as text."""
    data = importlib.resources.files("celltron.core").joinpath("tables", name).read_bytes()
    return decode_table(data, name, compressed=True)


def read_columns(text: str, columns: Sequence[str], where: str) -> list[list[str]]:
    """Pick the named columns out of tab-separated text with a header: one list of values a column."""
    lines = text.splitlines()
    header = lines[0].split("\t") if lines else []
    missing = [column for column in columns if column not in header]
    if missing:
        raise InputError(f"{where}: no column {missing[0]!r} in the header; wanted {', '.join(columns)}, tab-separated")
    places = [header.index(column) for column in columns]
    picked: list[list[str]] = [[] for _ in columns]
    for number, line in enumerate(lines[1:], start=2):
        values = line.split("\t")
        if len(values) != len(header):
            raise InputError(
                f"{where}: line {number} has {len(values)} columns where the header has {len(header)}; mend that line"
            )
        for column, place in zip(picked, places, strict=True):
            column.append(values[place])
    return picked


def decode_table(data: bytes, where: str, *, compressed: bool) -> str:
    """Decompress a table, up to a limit that no honest one reaches, and decode it as UTF-8."""
    try:
        if compressed:
            with gzip.GzipFile(fileobj=io.BytesIO(data)) as stream:
                data = stream.read(_MAX_TABLE_BYTES + 1)
        text = data.decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        advice = "give tab-separated text, with .gz in its name if compressed"
        raise InputError(f"{where}: not a readable table ({error}); {advice}") from error
    if len(data) > _MAX_TABLE_BYTES:
        raise InputError(f"{where}: larger than {_MAX_TABLE_BYTES} bytes, no vocabulary is; check the file")
    return text
