"""Reading all of a store: every checksum, then what the counts must be whatever their checksums say.

C cells of a shard, G genes, N non-zero counts.
"""

import itertools
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from celltron.cells.compiled import compiled
from celltron.cells.shard import Shard, open_shard, shard_folder
from celltron.cells.store import CellStore
from celltron.cells.threads import Progress, SharedProgress, map_in_order, num_workers
from celltron.core import MANIFEST_NAME, InputError
from celltron.core.manifest import file_entries, fits_own_checksum, hash_with_progress, length_problem, load_manifest

WRONG_GENE, WRONG_COUNT = 1, 2
SUM_TOLERANCE = 1e-9
"""A total may fall short of the sum of a cell's counts by this part of it: sums of fractions depend on their order."""
SHOWN_FILES = 5
Problems = dict[str, str]
"""What is wrong with files, by their names in the manifest."""


class DamageError(InputError):
    """Files of a store are bad; ``bad`` holds the path of each and what is wrong with it.

    Args:
        folder: the store.
        problems: of each bad file.
        num_files: how many files the store has.
    """

    def __init__(self, folder: Path, problems: Problems, num_files: int) -> None:
        self.bad = [(folder / name, problem) for name, problem in problems.items()]
        first, *others = problems
        more = ", ".join(others[: SHOWN_FILES - 1]) + ", …" * (len(others) >= SHOWN_FILES)
        also = f" (also {more})" if others else ""
        super().__init__(
            f"{folder / first}: {problems[first]}; {len(problems)} of {num_files} files are bad{also}, copy the store "
            "or convert its files again"
        )


def verify_store(
    store: CellStore | str | Path, *, workers: int | None = None, progress: Progress | None = None
) -> None:
    """Check every file of a store.

    Lengths and checksums, the manifest's own among them; that rows follow each other, gene indices rise and stay below
    G, counts are above zero and finite, totals are finite and not below the sum of a cell's counts; that obs has a row
    for each cell and these totals; that there are G different genes, each in as many cells as the gene file says.

    Args:
        store: the store, or its folder, which need not open.
        workers: threads, each with a shard at a time; None takes one a processor.
        progress: called with (bytes read, bytes in all).

    Raises:
        DamageError: it names the first bad file, and ``bad`` holds them all.
        InputError: there is no manifest that could be read.
    """
    folder = store.path if isinstance(store, CellStore) else Path(store)
    manifest = load_manifest(folder)
    entries = file_entries(manifest, folder / MANIFEST_NAME)
    problems: Problems = {}
    if not fits_own_checksum(manifest):
        problems[MANIFEST_NAME] = "it does not fit its own checksum"
    lengths = {name: length_problem(folder, name, entry["bytes"]) for name, entry in entries.items()}
    problems |= {name: problem for name, problem in lengths.items() if problem}
    opened: CellStore | None = None
    if not any(lengths.values()):
        try:
            opened = CellStore.open(folder)
        except InputError as error:
            problems.setdefault(MANIFEST_NAME, _without_path(folder / MANIFEST_NAME, error))
    read = SharedProgress(progress, sum(entry["bytes"] for entry in entries.values()))
    hashes = {name: entry["sha256"] for name, entry in entries.items() if name not in problems}

    def check_group(names: list[str]) -> tuple[Problems, npt.NDArray[np.int64] | None]:
        found = {name: problem for name in names if (problem := _hash_problem(folder / name, hashes[name], read))}
        i = _shard_of(names[0], opened)
        return (found, None) if found or opened is None or i is None else _check_shard(opened, i)

    by_folder = itertools.groupby(sorted(hashes), key=lambda name: PurePosixPath(name).parent)
    groups = [list(names) for _, names in by_folder]
    num_cells = np.zeros(0 if opened is None else opened.num_genes, dtype=np.int64)
    for found, in_cells in map_in_order(check_group, groups, num_workers(workers)):
        problems |= found
        if in_cells is not None:
            num_cells += in_cells
    if opened is not None and not problems:
        problems |= _check_tables(opened, num_cells)
    if len(entries) > 1 and problems.keys() >= entries.keys():
        problems[MANIFEST_NAME] = "no file fits it, as if it were the manifest of another store"
    if problems:
        names = [name for name in (MANIFEST_NAME, *entries) if name in problems]
        raise DamageError(folder, {name: problems[name] for name in names}, len(entries) + 1)


def _without_path(path: Path, error: InputError) -> str:
    """What a sentence says of a file, without the file's name at its head."""
    return str(error).removeprefix(f"{path}").removeprefix(":").strip().removeprefix("is damaged:").strip()


def _hash_problem(path: Path, sha256: str, read: Callable[[int], None]) -> str | None:
    try:
        fits = hash_with_progress(path, read) == sha256
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    return None if fits else "its content does not fit its checksum"


def _shard_of(name: str, store: CellStore | None) -> int | None:
    """The shard whose file has this name."""
    parts = PurePosixPath(name).parts
    if store is None or len(parts) != 3 or not (parts[1].isascii() and parts[1].isdigit()):
        return None
    i = int(parts[1])
    return i if i < store.num_shards and store.path / name == shard_folder(store.path, i) / parts[2] else None


@compiled
def _check_rows(
    indptr: npt.NDArray[np.uint64],
    indices: npt.NDArray[Any],
    counts: npt.NDArray[Any],
    num_cells: npt.NDArray[np.int64],
    sums: npt.NDArray[np.float64],
) -> tuple[int, int]:
    """Fill ``num_cells`` [G], of genes, and ``sums`` [C], of counts; returns the first wrong row and what is wrong."""
    for row in range(sums.shape[0]):
        last, total = np.int64(-1), 0.0
        for place in range(indptr[row], indptr[row + 1]):
            gene = np.int64(indices[place])
            if gene <= last or gene >= num_cells.shape[0]:
                return row, WRONG_GENE
            if not (counts[place] > 0 and counts[place] < np.inf):
                return row, WRONG_COUNT
            num_cells[gene] += 1
            total += np.float64(counts[place])
            last = gene
        sums[row] = total
    return 0, 0


def _check_shard(store: CellStore, i: int) -> tuple[Problems, npt.NDArray[np.int64] | None]:
    """What is wrong with the content of a shard; in how many of its cells each gene is, int64 [G], if nothing is."""
    shard = open_shard(store.path, i, store.manifest["shards"][i], has_totals="totals" in store.dtypes)

    def bad(name: str, problem: str) -> tuple[Problems, None]:
        return {f"shards/{shard.folder.name}/{name}": problem}, None

    first, ends = int(store.disk_runs[i]), shard.indptr
    if ends[0] != 0 or ends[-1] != len(shard.indices) or np.any(ends[1:] < ends[:-1]):
        return bad("indptr.bin", "its rows do not follow each other")
    num_cells, sums = np.zeros(store.num_genes, dtype=np.int64), np.zeros(len(ends) - 1)
    row, what = _check_rows(ends, shard.indices, shard.counts, num_cells, sums)
    if what == WRONG_GENE:
        return bad("indices.bin", f"the genes of cell {first + row} do not rise, or go beyond {store.num_genes}")
    if what == WRONG_COUNT:
        return bad("counts.bin", f"cell {first + row} has a count that is not above zero and finite")
    totals = _obs_totals(shard, len(sums))
    if isinstance(totals, str):
        return bad("obs.parquet", totals)
    stored = totals if shard.totals is None else shard.totals
    wrong = np.flatnonzero(~np.isfinite(stored) | (stored < sums * (1 - SUM_TOLERANCE)))
    if len(wrong):
        name = "obs.parquet" if shard.totals is None else "totals.bin"
        return bad(name, f"the total of cell {first + wrong[0]} is less than the sum of its counts, or not finite")
    wrong = np.flatnonzero(totals != stored)
    if len(wrong):
        return bad("obs.parquet", f"total_counts of cell {first + wrong[0]} is not its total in totals.bin")
    return {}, num_cells


def _obs_totals(shard: Shard, num_cells: int) -> npt.NDArray[np.float64] | str:
    """``total_counts`` of a shard's obs, float64 [C], or what is wrong with obs."""
    try:
        with pq.ParquetFile(shard.folder / "obs.parquet") as file:
            if not {"cell_id", "source", "total_counts"} <= set(file.schema_arrow.names):
                return "it lacks cell_id, source or total_counts"
            if file.metadata.num_rows != num_cells:
                return f"it has {file.metadata.num_rows} rows, wanted one for each of {num_cells} cells"
            totals = file.read(["total_counts"])["total_counts"]
    except (pa.ArrowException, OSError) as error:
        return f"parquet says: {error}"
    if not pa.types.is_float64(totals.type) or totals.null_count:
        return "its total_counts must be float64 numbers, none missing"
    return np.asarray(totals.to_numpy(), dtype=np.float64)


def _check_tables(store: CellStore, num_cells: npt.NDArray[np.int64]) -> Problems:
    """What is wrong with the gene file, or with obs across shards."""
    name = str(store.manifest["gene_file"])
    try:
        genes = store.genes
    except InputError as error:
        return {name: _without_path(store.path / name, error)}
    if store.manifest["version"] > 1:
        if "num_cells" not in genes.columns:
            return {name: "it lacks num_cells"}
        wrong = np.flatnonzero(genes["num_cells"].to_numpy() != num_cells)
        if len(wrong):
            gene = genes.iloc[wrong[0]]
            return {name: f"num_cells of {gene['gene_id']} is {gene['num_cells']}, counted {num_cells[wrong[0]]}"}
    schema: pa.Schema | None = None
    for i in range(store.num_shards):
        path = shard_folder(store.path, i) / "obs.parquet"
        try:
            own = pq.read_schema(path).remove_metadata()
            schema = own if schema is None else pa.unify_schemas([schema, own], promote_options="default")
        except pa.ArrowException:
            return {f"shards/{path.parent.name}/obs.parquet": "its columns have other types than in the shards before"}
    return {}
