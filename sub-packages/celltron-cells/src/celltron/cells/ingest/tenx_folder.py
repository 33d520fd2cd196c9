"""A Cell Ranger folder of counts as text (matrix.mtx, barcodes.tsv, features.tsv or genes.tsv) as a source."""

import gzip
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.csv as pa_csv

from celltron.cells.ingest.damage import damaged, reading
from celltron.cells.ingest.matrix_source import MatrixSource, refuse_raw
from celltron.cells.ingest.mtx import MtxMatrix, check_end
from celltron.cells.ingest.remote import BlockReader, RemoteFile, is_address, network, open_file_system
from celltron.cells.ingest.source import ArrowFrame, SourceOptions
from celltron.cells.ingest.tenx_features import Features, keep_columns, select_genes
from celltron.core import InputError

ROLES = {"matrix.mtx": "matrix", "barcodes.tsv": "barcodes", "features.tsv": "features", "genes.tsv": "features"}
WANTED = "matrix.mtx, barcodes.tsv and features.tsv (or genes.tsv), each as it is or with .gz, under one prefix"
READ_AHEAD_BYTES = 2**21  # of a file behind an address


def open_tenx_folder(spec: str, options: SourceOptions) -> MatrixSource:
    """Open the three files of a matrix, of Cell Ranger 3 and later or of those before.

    Their names may have a prefix (``SAMPLE_matrix.mtx.gz``); where a folder holds several such sets, the path of one
    matrix names its set. Of several genomes ``options.layer`` names the one to take; features other than genes are left
    out, see `select_genes`. The text is read once, when rows are wanted, into a scratch folder; names stay in memory.

    Args:
        spec: the folder or the matrix in it, a path or an address.
        options: what to take from it.
    """
    refuse_raw(spec, options.use_raw, "")
    files = _Files.find(spec, options.storage)
    barcodes = _read_table(files, "barcodes")
    features = _features(_read_table(files, "features"))
    var, places = select_genes(features, options.layer, files.names["features"])
    matrix = MtxMatrix(files.names["matrix"], lambda: files.open("matrix"), (len(barcodes[0]), len(features.ids)))
    return MatrixSource(
        name=spec,
        matrix_name=os.path.basename(files.names["matrix"]),
        matrix=keep_columns(matrix, places, spec),
        obs=ArrowFrame(barcodes[0], {}),
        var=var,
        find_identity=files.identity,
    )


def find_sets(names: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """The files of 10x matrices among the names in a folder: by prefix, then by role (matrix, barcodes, features).

    >>> find_sets(["a_matrix.mtx.gz", "a_barcodes.tsv.gz", "a_genes.tsv.gz", "notes.txt"])
    {'a_': {'matrix': ['a_matrix.mtx.gz'], 'barcodes': ['a_barcodes.tsv.gz'], 'features': ['a_genes.tsv.gz']}}
    """
    found: dict[str, dict[str, list[str]]] = {}
    for name in names:
        bare = name.removesuffix(".gz")
        for ending, role in ROLES.items():
            if bare.endswith(ending):
                found.setdefault(bare.removesuffix(ending), {}).setdefault(role, []).append(name)
    return {prefix: roles for prefix, roles in found.items() if "matrix" in roles}


def _choose_set(folder: str, names: Sequence[str], matrix: str) -> dict[str, str]:
    """The name of each of the three files; ``matrix`` is the one that was named itself, or empty."""
    sets = find_sets(names)
    if matrix:
        sets = {prefix: roles for prefix, roles in sets.items() if matrix in roles["matrix"]}
        for roles in sets.values():
            roles["matrix"] = [matrix]
    if not sets:
        raise InputError(f"{folder} holds no {matrix or 'matrix of Cell Ranger'}: wanted {WANTED}")
    if len(sets) > 1:
        there = ", ".join(sorted(roles["matrix"][0] for roles in sets.values()))
        raise InputError(f"{folder} holds {len(sets)} matrices: name one of {there}")
    ((prefix, roles),) = sets.items()
    for role in dict.fromkeys(ROLES.values()):
        files = sorted(roles.get(role, []))
        if not files:
            raise InputError(f"{folder} lacks {prefix}{role}.tsv beside {roles['matrix'][0]}: wanted {WANTED}")
        if len(files) > 1:
            raise InputError(f"{folder} holds {' and '.join(files)}, which are one: remove all but one")
    return {role: files[0] for role, files in roles.items()}


@dataclass(frozen=True, slots=True)
class _Files:
    """The paths or addresses of the three files by role, and the options for the file system of addresses."""

    names: dict[str, str]
    storage: Mapping[str, Any] | None

    @classmethod
    def find(cls, spec: str, storage: Mapping[str, Any] | None) -> "_Files":
        """The files of a folder, or the matrix that is named itself and those beside it."""
        if is_address(spec):
            fs, path = open_file_system(spec, storage)
            with network(spec):
                is_folder = fs.isdir(path)
                inside = path if is_folder else path.rpartition("/")[0]
                there = [str(entry["name"]).rsplit("/", 1)[-1] for entry in fs.ls(inside, detail=True)]
            folder = spec.rstrip("/") if is_folder else spec.rpartition("/")[0]
            matrix = "" if is_folder else spec.rpartition("/")[2]
        elif os.path.exists(spec):
            folder, matrix = (spec, "") if os.path.isdir(spec) else os.path.split(spec)
            there = sorted(os.listdir(folder or "."))
        else:
            raise InputError(f"no folder at {spec}: wanted {WANTED}; check the name")
        chosen = _choose_set(folder or ".", there, matrix)
        return cls({role: os.path.join(folder, name) for role, name in chosen.items()}, storage)

    def open(self, role: str) -> BinaryIO:
        """The content of a file, unpacked."""
        name = self.names[role]
        is_packed = name.endswith(".gz")
        if not is_address(name):
            return cast(BinaryIO, gzip.open(name)) if is_packed else Path(name).open("rb")
        raw = io.BufferedReader(BlockReader(RemoteFile(name, self.storage)), READ_AHEAD_BYTES)
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if is_packed else raw

    def identity(self) -> dict[str, Any]:
        """Bytes of the three files, and bytes and time of change (or ETag) of each."""
        found = {role: self._identity(name) for role, name in self.names.items()}
        return {"bytes": sum(entry["bytes"] or 0 for entry in found.values()), "files": found}

    def _identity(self, name: str) -> dict[str, Any]:
        if is_address(name):
            return RemoteFile(name, self.storage).identity
        status = os.stat(name)
        return {"bytes": status.st_size, "changed": str(status.st_mtime_ns)}


def _read_table(files: _Files, role: str) -> list[pa.Array]:
    """The columns of a table without a head, as text."""
    name = files.names[role]
    with reading(name), files.open(role) as stream:
        content = stream.read()
    first = content.split(b"\n", 1)[0]
    if not first.strip():
        raise InputError(f"{name} begins with an empty line or is empty: wanted a name on each line, copy it again")
    check_end(content, name)
    columns = [str(k) for k in range(first.count(b"\t") + 1)]
    with reading(name):
        table = pa_csv.read_csv(
            pa.BufferReader(content),
            read_options=pa_csv.ReadOptions(column_names=columns, use_threads=False),
            parse_options=pa_csv.ParseOptions(delimiter="\t", quote_char=False),
            convert_options=pa_csv.ConvertOptions(column_types=dict.fromkeys(columns, pa.string())),
        )
        if table.num_rows != content.rstrip().count(b"\n") + 1:
            raise damaged(name, "it has empty lines")
    return [column.combine_chunks() for column in table.columns]


def _features(columns: list[pa.Array]) -> Features:
    """Ids, names and, since Cell Ranger 3, types."""
    ids = columns[0].to_pylist()
    names = columns[1].to_pylist() if len(columns) > 1 else ids
    return Features(ids=ids, names=names, types=columns[2].to_pylist() if len(columns) > 2 else [])
