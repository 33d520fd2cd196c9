"""The genes of several readers as one list, and how cells in one reader's genes become cells in this list.

L different gene lists, G genes of the union, N non-zero counts.
"""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from celltron.cells.compiled import compiled
from celltron.cells.memory import Addresses, address_of, addresses_of, array_at, like
from celltron.cells.reader import CellReader, Located, Rows
from celltron.cells.store import CellStore, read_table
from celltron.cells.threads import map_in_order
from celltron.core import InputError


class GeneUnion(NamedTuple):
    """``gene_ids`` [G], in the order in which the readers first bring them.

    ``places`` holds for each of the L different gene lists the places of its genes in the union, int64; readers with
    equal lists share one. ``lists`` says for each reader which of them each of its own gene maps has become, ``whole``
    which of them is its own ``gene_ids``.
    """

    gene_ids: tuple[str, ...]
    places: tuple[npt.NDArray[np.int64], ...]
    lists: tuple[tuple[int, ...], ...]
    whole: tuple[int, ...]

    @property
    def gene_maps(self) -> tuple[npt.NDArray[np.int64] | None, ...]:
        """``places``, but None where a list is the union itself: the gene maps of a `CellReader`."""
        whole = np.arange(len(self.gene_ids), dtype=np.int64)
        return tuple(None if np.array_equal(places, whole) else places for places in self.places)


def unite_genes(readers: Sequence[CellReader], workers: int) -> GeneUnion:
    """Unite the gene lists of readers, which threads read ahead; of equal lists only the first is gone through."""
    index_of: dict[str, int] = {}
    united: dict[str, npt.NDArray[np.int64]] = {}
    number_of: dict[tuple[str, str], int] = {}
    places: list[npt.NDArray[np.int64]] = []
    lists, whole = [], []
    for reader, (key, ids) in zip(readers, map_in_order(_gene_list, readers, workers), strict=True):
        if key not in united or len(united[key]) != reader.num_genes:
            names = _checked_ids(reader, ids)
            united[key] = np.array([index_of.setdefault(gene, len(index_of)) for gene in names], dtype=np.int64)
        numbers = []
        for own in (None, *reader.gene_maps):
            map_key = (key, "" if own is None else hashlib.sha256(own.tobytes()).hexdigest())
            if map_key not in number_of:
                number_of[map_key] = len(places)
                places.append(united[key] if own is None else united[key][own])
            numbers.append(number_of[map_key])
        whole.append(numbers[0])
        lists.append(tuple(numbers[1:]))
    return GeneUnion(tuple(index_of), tuple(places), tuple(lists), tuple(whole))


def _gene_list(reader: CellReader) -> tuple[str, pa.Array | tuple[str, ...]]:
    """The gene ids of a reader, and a digest that is equal for equal ones only.

    Of a store one column is read and nothing is kept: the tables of a thousand stores would fill the memory.
    """
    if not isinstance(reader, CellStore):
        return reader.genes_fingerprint, reader.gene_ids
    table = read_table(reader.path / reader.manifest["gene_file"], ["gene_id"])
    if table.num_columns != 1 or not _is_text(table.schema.types[0]):
        return "", ()
    ids = pa.concat_arrays(table.column(0).cast(pa.large_string()).chunks or [pa.array([], pa.large_string())])
    digest = hashlib.sha256()
    for buffer in ids.buffers():
        digest.update(b"" if buffer is None else memoryview(buffer))
    return f"{len(ids)} {ids.null_count} {ids.offset} {digest.hexdigest()}", ids


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_dictionary(kind))


def _checked_ids(reader: CellReader, ids: pa.Array | tuple[str, ...]) -> Sequence[str]:
    """The ids as Python's strings: one a gene, none twice."""
    names = list(ids) if isinstance(ids, tuple) else ids.to_pylist()
    if len(names) != reader.num_genes or len(set(names)) != len(names) or None in names:
        raise InputError(
            f"{reader.name} is damaged: wanted {reader.num_genes} different gene ids in its table of genes; convert "
            "the files again"
        )
    return cast(Sequence[str], names)


def unite_gene_tables(readers: Sequence[CellReader], union: GeneUnion) -> pd.DataFrame:
    """One row a gene of the union: ``gene_id``, ``gene_name``, ``species``, ``num_cells``; other columns are left out.

    Name and species are the first reader's that has the gene; ``num_cells`` (cells in which it is not zero) is the sum,
    and left out where a store of an older version does not know it.
    """
    num_genes = len(union.gene_ids)
    columns = {name: np.full(num_genes, None, dtype=object) for name in ("gene_name", "species")}
    num_cells_G: npt.NDArray[np.int64] | None = np.zeros(num_genes, dtype=np.int64)
    is_new_G = np.ones(num_genes, dtype=np.bool_)
    for reader, number in zip(readers, union.whole, strict=True):
        places, table = union.places[number], _gene_table(reader)
        is_new = is_new_G[places]
        for name, column_G in columns.items():
            if name in table:
                column_G[places[is_new]] = table[name].to_numpy(dtype=object)[is_new]
        is_new_G[places] = False
        if "num_cells" not in table:
            num_cells_G = None
        if num_cells_G is not None:
            num_cells_G[places] += table["num_cells"].to_numpy(dtype=np.int64)
    frame = pd.DataFrame({"gene_id": np.array(union.gene_ids, dtype=object), **columns})
    return frame if num_cells_G is None else frame.assign(num_cells=num_cells_G)


def _gene_table(reader: Any) -> pd.DataFrame:
    """The table of genes of a reader; that of a store is read anew and not kept."""
    if isinstance(reader, CellStore):
        return cast(pd.DataFrame, read_table(reader.path / reader.manifest["gene_file"]).to_pandas())
    return cast(pd.DataFrame, reader.genes)


def species_of(reader: CellReader) -> str:
    """The species of a reader's genes, all of them if it has several."""
    if isinstance(reader, CellStore):
        return reader.species
    table = _gene_table(reader)
    return ", ".join(table["species"].dropna().unique()) if "species" in table else "species not given"


@compiled
def _copy_rising(
    rows: Addresses,
    index_like: npt.NDArray[Any],
    count_like: npt.NDArray[Any],
    places: npt.NDArray[np.int64],
    out: Rows,
) -> int:
    """Copy cells with their genes at ``places``, rising; returns the first slot with a gene beyond them, or -1."""
    indptr, all_genes, all_counts = out
    for k in range(rows.slots.shape[0]):
        begin, size = indptr[rows.slots[k]], rows.sizes[k]
        genes, counts = all_genes[begin : begin + size], all_counts[begin : begin + size]
        counts[:] = array_at(rows.counts[k], size, count_like)
        own = array_at(rows.indices[k], size, index_like)
        rises, last = True, np.int64(-1)
        for i in range(size):
            if np.int64(own[i]) >= places.shape[0]:
                return int(rows.slots[k])
            place = places[np.int64(own[i])]
            rises = rises and place > last
            last = place
            genes[i] = place
        if not rises:
            order = np.argsort(genes)
            genes[:] = genes[order]
            counts[:] = counts[order]
    return -1


def locate_copies(rows: Rows, slots: npt.NDArray[np.int64], member: int) -> Located:
    """Rows that were read already, as if they had been found in memory; they have no totals."""
    indptr, gene_index, counts = rows
    begins = indptr[:-1].astype(np.uint64)
    return Located(
        slots=slots,
        index_addresses=np.uint64(address_of(gene_index)) + begins * np.uint64(gene_index.itemsize),
        count_addresses=np.uint64(address_of(counts)) + begins * np.uint64(counts.itemsize),
        sizes=np.diff(indptr),
        totals=np.full(len(slots), np.nan),
        index_dtype=gene_index.dtype.name,
        count_dtype=counts.dtype.name,
        member=member,
        memory=(rows,),
    )


def rows_in_union(
    located: Sequence[Located],
    places: Sequence[npt.NDArray[np.int64]],
    num_cells: int,
    index_dtype: str,
    count_dtype: str,
) -> tuple[Rows, int]:
    """Copy located cells in the order of their slots, genes by their places in the union and rising.

    Returns:
        The rows, and the first slot whose cell names a gene beyond its list (the rows are then of no use), or -1.
    """
    indptr = np.zeros(num_cells + 1, dtype=np.int64)
    for part in located:
        indptr[part.slots + 1] = part.sizes
    np.cumsum(indptr, out=indptr)
    rows = Rows(indptr, np.empty(indptr[-1], dtype=index_dtype), np.empty(indptr[-1], dtype=count_dtype))
    for part in located:
        types = like(part.index_dtype), like(part.count_dtype)
        bad = _copy_rising(addresses_of(part), *types, places[part.member], rows)
        if bad >= 0:
            return rows, bad
    return rows, -1
