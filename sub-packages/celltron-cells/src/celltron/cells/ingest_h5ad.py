"""An .h5ad file as a source of counts: one matrix of it, its genes and its cells, checked when it is opened."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt
import pandas as pd

from celltron.cells.h5ad_frame import H5adFrame
from celltron.cells.h5ad_matrix import Matrix, RowBlock, open_matrix
from celltron.cells.map_rows import BAD_COLUMN, NEGATIVE, NOT_FINITE, NOT_INTEGER, BadValue
from celltron.core import InputError

HEAD_VALUES = 50_000
CHUNK_CACHE_BYTES = 2**25  # a chunk that two blocks share is unpacked once
LARGEST_LOG_VALUE = 20.0  # log1p of a normalised count stays far below; e^20 would be half a billion


@dataclass(frozen=True, slots=True, kw_only=True)
class H5adSource:
    """An open .h5ad file and the matrix in it that holds the counts; ``matrix_name`` says where that is."""

    path: Path
    file: h5py.File
    matrix_name: str
    matrix: Matrix
    obs: H5adFrame
    var: H5adFrame

    def head(self, num_values: int) -> RowBlock:
        """About ``num_values`` stored values from the beginning, as rows."""
        try:
            return self.matrix.head(num_values)
        except (OSError, RuntimeError) as error:
            raise InputError(_damaged(self.path, error)) from error

    def blocks(self, scratch: Path) -> Iterator[RowBlock]:
        """All cells in blocks of rows; a file that cannot be read to its end is an InputError."""
        blocks = self.matrix.blocks(scratch)
        while True:
            try:
                block = next(blocks)
            except StopIteration:
                return
            except (OSError, RuntimeError) as error:
                if getattr(error, "errno", None) is None:  # h5py's own: the file read, not the scratch file written
                    raise InputError(_damaged(self.path, error)) from error
                raise
            yield block


@contextmanager
def open_h5ad(path: Path, *, adata_layer: str | None = None, use_raw: bool = False) -> Iterator[H5adSource]:
    """Open an .h5ad file read-only and find the wanted matrix: ``X``, a layer, or ``raw`` with its own genes."""
    with _open_hdf5(path) as file:
        try:
            source = _find_parts(path, file, adata_layer, use_raw)
        except (OSError, KeyError, RuntimeError) as error:
            raise InputError(_damaged(path, error)) from error
        yield source


@contextmanager
def _open_hdf5(path: Path) -> Iterator[h5py.File]:
    if not path.exists():
        raise InputError(f"no file at {path}: wanted an .h5ad file, check the name")
    if path.is_dir():
        raise InputError(f"{path} is a folder: wanted an .h5ad file, name the files inside it")
    if path.stat().st_size == 0:
        raise InputError(f"{path} is an empty file of 0 bytes: wanted an .h5ad file, copy it again")
    path.open("rb").close()  # a file that may not be read says so
    if not h5py.is_hdf5(path):
        raise InputError(f"{path} is not an .h5ad file (it is not HDF5): write it with anndata's write_h5ad")
    try:
        file = h5py.File(path, "r", rdcc_nbytes=CHUNK_CACHE_BYTES, locking="best-effort")
    except OSError as error:
        raise InputError(_damaged(path, error)) from error
    try:
        yield file
    finally:
        file.close()


def _damaged(path: Path, error: Exception) -> str:
    reason = " ".join(str(error).strip("'\"").split())
    if "filter" in reason:
        return f"{path} is compressed in a way this HDF5 lacks ({reason}): write it again with compression='gzip'"
    return f"{path} is truncated or damaged (HDF5 says: {reason}): copy or download it again"


def _find_parts(path: Path, file: h5py.File, adata_layer: str | None, use_raw: bool) -> H5adSource:
    if "obs" not in file or "var" not in file:
        hint = (
            "a 10x .h5 file: read it with scanpy.read_10x_h5 and write it as .h5ad"
            if "matrix" in file
            else "write it with anndata"
        )
        raise InputError(f"{path} is HDF5 but not an .h5ad file (it has no obs and var): it may be {hint}")
    if adata_layer is not None and use_raw:
        raise InputError(f"both --layer {adata_layer} and --use-raw were asked of {path}: choose one of them")
    matrix_name, var_name = _matrix_name(path, file, adata_layer, use_raw)
    source = H5adSource(
        path=path,
        file=file,
        matrix_name=matrix_name,
        matrix=open_matrix(file[matrix_name]),
        obs=H5adFrame(file["obs"]),
        var=H5adFrame(file[var_name]),
    )
    cells, genes = source.obs.num_rows, source.var.num_rows
    if source.matrix.shape != (cells, genes):
        raise InputError(
            f"{path} is damaged: {matrix_name} is {source.matrix.shape[0]} x {source.matrix.shape[1]}, "
            f"but obs names {cells} cells and {var_name} {genes} genes; write it again with anndata"
        )
    if cells == 0 or genes == 0:
        raise InputError(f"{path} holds {cells} cells and {genes} genes: nothing to convert, leave the file out")
    return source


def _matrix_name(path: Path, file: h5py.File, adata_layer: str | None, use_raw: bool) -> tuple[str, str]:
    layers = _layer_names(file)
    if use_raw:
        for matrix, var in (("raw/X", "raw/var"), ("raw.X", "raw.var")):
            if matrix in file and var in file:
                return matrix, var
        raise InputError(f"{path} has no raw: leave --use-raw out{_or_layers(layers)}")
    if adata_layer is not None:
        if adata_layer not in layers:
            there = f"it has {', '.join(layers)}" if layers else "it has none"
            raise InputError(
                f"{path} has no layer {adata_layer!r}: {there}; name one of these or leave layer out for X"
            )
        return f"layers/{adata_layer}", "var"
    no_x = "X" not in file or (isinstance(file["X"], h5py.Dataset) and file["X"].shape is None)
    if no_x:
        ways = [f"--layer {name}" for name in layers] + ["--use-raw"] * ("raw" in file)
        raise InputError(f"{path} has no X: pass {' or '.join(ways) if ways else 'a file that holds counts'}")
    return "X", "var"


def _layer_names(file: h5py.File) -> list[str]:
    return sorted(file["layers"]) if "layers" in file else []


def _or_layers(layers: list[str]) -> str:
    return f" or pass --layer NAME (it has {', '.join(layers)})" if layers else ""


def describe_bad_value(source: H5adSource, block: RowBlock, bad: BadValue) -> str:
    """One sentence for a value that is no count: which cell and gene, what it looks like and what to do."""
    cell_number = block.start + bad.row
    column = int(block.columns[bad.place])
    if bad.problem == BAD_COLUMN:
        num_genes = source.var.num_rows
        return f"{source.path} is damaged: {source.matrix_name} names gene {column} of {num_genes}; copy it again"
    cell = source.obs.index(cell_number, cell_number + 1)[0].as_py()
    gene = source.var.index(column, column + 1)[0].as_py()
    value = block.values[bad.place]
    where = f"{source.matrix_name} of {source.path} holds {value:.6g} for cell {cell!r}, gene {gene!r}"
    others = matrices_of_counts(source)
    instead = f"pass {' or '.join(others)}, which holds integers" if others else ""
    if bad.problem == NEGATIVE:
        return f"{where}: counts cannot be negative (scaled values?); {instead or 'convert a file with the raw counts'}"
    if bad.problem == NOT_FINITE:
        return f"{where}: counts must be finite; {instead or 'mend or remove this cell'}"
    if bad.problem == NOT_INTEGER:
        advice = instead or "get the raw counts, or pass --allow-floats if these values are meant"
        return f"{where}: wanted raw integer counts, but these values look {_looks_like(block)}; {advice}"
    return f"{where}: counts above 2^53 are not exact; {instead or 'mend or remove this cell'}"


def _looks_like(block: RowBlock) -> str:
    """Log-normalised values undone by exp(x)-1 sum to one constant in every cell; normalised ones do so as they are."""
    num_rows = min(200, len(block.indptr) - 1)
    values = block.values[: block.indptr[num_rows]].astype(np.float64)
    rows = np.repeat(np.arange(num_rows), np.diff(block.indptr[: num_rows + 1]))
    if len(values) and np.isfinite(values).all() and values.max() < LARGEST_LOG_VALUE:
        if _is_constant(_sums(rows, np.expm1(values), num_rows)):
            return "log-normalised (log1p of counts scaled to one total a cell)"
        return "log-transformed or normalised"
    if _is_constant(_sums(rows, values, num_rows)):
        return "normalised to one total a cell"
    return "normalised or corrected"


def _sums(rows: npt.NDArray[np.int64], values: npt.NDArray[np.float64], num_rows: int) -> npt.NDArray[np.float64]:
    return np.bincount(rows, values, minlength=num_rows).astype(np.float64)


def _is_constant(sums: npt.NDArray[np.float64]) -> bool:
    sums = sums[sums > 0]
    return len(sums) > 1 and bool(np.allclose(sums, np.median(sums), rtol=0.02))


def matrices_of_counts(source: H5adSource) -> list[str]:
    """The other matrices of the file whose first values are whole and not negative, as options: ``--layer counts``."""
    names = {"X": "X (leave --layer and --use-raw out)"} | {
        f"layers/{name}": f"--layer {name}" for name in _layer_names(source.file)
    }
    names |= {"raw/X": "--use-raw", "raw.X": "--use-raw"}
    found = []
    for name, option in names.items():
        if name == source.matrix_name or name not in source.file:
            continue
        try:
            values = open_matrix(source.file[name]).head(HEAD_VALUES).values.astype(np.float64)
        except (InputError, OSError, KeyError, RuntimeError):
            continue  # an unreadable matrix is no advice
        if np.isfinite(values).all() and (values >= 0).all() and (values == np.floor(values)).all():
            found.append(option)
    return found


def check_cell_ids(source: H5adSource) -> None:
    """Refuse a file that names two cells alike; holds one 64-bit digest a cell, not the names."""
    digests = np.empty(source.obs.num_rows, dtype=np.uint64)
    for start in range(0, len(digests), 100_000):
        stop = min(start + 100_000, len(digests))
        names = source.obs.index(start, stop).to_numpy(zero_copy_only=False)
        digests[start:stop] = pd.util.hash_array(names, categorize=False)
    order = np.argsort(digests, kind="stable")
    for place in np.flatnonzero(digests[order][1:] == digests[order][:-1]):
        first, second = (int(order[place + k]) for k in (0, 1))
        name, other = (source.obs.index(cell, cell + 1)[0].as_py() for cell in (first, second))
        if name == other:
            raise InputError(
                f"{source.path} names cell {name!r} twice (cells {first} and {second}): make obs_names unique "
                "(adata.obs_names_make_unique())"
            )
