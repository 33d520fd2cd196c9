"""The features of a 10x matrix: which are genes of the wanted genome, and the matrix without the others.

K features (columns of the matrix as stored), N stored values of a block.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from celltron.cells.compiled import compiled
from celltron.cells.ingest.anndata_matrix import Matrix
from celltron.cells.ingest.damage import damaged
from celltron.cells.ingest.source import ArrowFrame, RowBlock
from celltron.core import InputError

GENES = "Gene Expression"
ENSEMBL = "ENS"


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """The features as a file lists them, one entry each; ``types`` and ``genomes`` are empty where it does not say."""

    ids: Sequence[str]
    names: Sequence[str]
    types: Sequence[str] = ()
    genomes: Sequence[str] = ()


def choose_genome(genomes: Sequence[str], wanted: str | None, where: str) -> str:
    """The one genome, or the wanted one of several; ``wanted`` is the layer that was asked for, if any."""
    there = ", ".join(filter(None, genomes)) or "none by name"
    if wanted is None:
        if len(genomes) > 1:
            raise InputError(f"{where} holds counts of several genomes: pass --layer with one of {there}")
        return genomes[0]
    if wanted not in genomes:
        raise InputError(f"{where} has no genome {wanted!r}: it has {there}; name one of these or leave --layer out")
    return wanted


def select_genes(features: Features, wanted: str | None, where: str) -> tuple[ArrowFrame, npt.NDArray[np.int32]]:
    """The table of the genes of one genome, and for each feature the place in it or -1, int32 [K].

    Features of other types than Gene Expression (antibodies, guides, peaks) are left out; the table's ``notes`` say so
    under ``feature_type``. Ids and names of a reference of several genomes begin with the genome, which is taken off.

    Args:
        features: what the file lists.
        wanted: the genome to take; None where there is one.
        where: the file, for messages.
    """
    is_gene = np.array([kind == GENES for kind in features.types or [GENES] * len(features.ids)], dtype=bool)
    others = Counter(kind for kind in features.types if kind != GENES)
    if not is_gene.any():
        there = ", ".join(sorted(others)) or "none at all"
        raise InputError(f"{where} lists no features of type {GENES} (it has {there}): wanted a gene expression matrix")
    genomes = np.array(features.genomes or _prefixes(features.ids), dtype=object)
    found = sorted(set(genomes[is_gene]))
    genome = choose_genome(found, wanted, where)
    is_kept = is_gene & (genomes == genome)
    ids, names = (_kept(texts, is_kept, genome) for texts in (features.ids, features.names))
    columns = {"feature_name": pa.array(names, type=pa.string())}
    if genome:
        columns["genome"] = pa.array([genome] * len(ids), type=pa.string())
    places = np.where(is_kept, np.cumsum(is_kept, dtype=np.int32) - 1, -1).astype(np.int32)
    frame = ArrowFrame(pa.array(ids, type=pa.string()), columns)
    if others:
        left_out = ", ".join(f"{count} of {kind or 'no type'}" for kind, count in sorted(others.items()))
        frame.notes["feature_type"] = f"left out, as they are no genes: {left_out}"
    return frame, places


def _prefixes(ids: Sequence[str]) -> list[str]:
    """The genome that stands before each Ensembl id, as in ``GRCh38_ENSG00000243485``; empty where most have none."""
    parts = [gene.partition(f"_{ENSEMBL}") for gene in ids]
    found = ["" if not rest or genome.startswith(ENSEMBL) else genome.rstrip("_") for genome, _, rest in parts]
    return found if 2 * sum(map(bool, found)) > len(found) else [""] * len(found)


def _kept(texts: Sequence[str], is_kept: npt.NDArray[np.bool_], genome: str) -> list[str]:
    kept = [text for text, keep in zip(texts, is_kept, strict=True) if keep]
    if genome and all(text.startswith(f"{genome}_") for text in kept):
        kept = [text.removeprefix(genome).lstrip("_") for text in kept]
    return kept


def keep_columns(matrix: Matrix, places: npt.NDArray[np.int32], name: str) -> Matrix:
    """The matrix with the columns that have a place, int32 [K]; -1 for those that have none."""
    return matrix if np.array_equal(places, np.arange(len(places))) else _KeptColumns(matrix, places, name)


@compiled
def _keep(
    indptr: npt.NDArray[np.int64],
    columns: npt.NDArray[Any],
    values: npt.NDArray[Any],
    places: npt.NDArray[np.int32],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[Any], bool]:
    """Rows without the columns that have no place, and whether every column is one of the matrix."""
    new_indptr = np.zeros(indptr.shape[0], dtype=np.int64)
    new_columns = np.empty(columns.shape[0], dtype=np.int32)
    new_values = np.empty(values.shape[0], dtype=values.dtype)
    end = np.int64(0)
    for row in range(indptr.shape[0] - 1):
        for i in range(indptr[row], indptr[row + 1]):
            column = np.int64(columns[i])
            if column < 0 or column >= places.shape[0]:
                return new_indptr, new_columns, new_values, False
            if places[column] >= 0:
                new_columns[end] = places[column]
                new_values[end] = values[i]
                end += 1
        new_indptr[row + 1] = end
    return new_indptr, new_columns[:end], new_values[:end], True


class _KeptColumns:
    """A matrix without some of its columns."""

    def __init__(self, matrix: Matrix, places: npt.NDArray[np.int32], name: str) -> None:
        if matrix.shape[1] != len(places):
            raise damaged(name, f"the matrix has {matrix.shape[1]} features, but {len(places)} are named")
        self.shape = (matrix.shape[0], int(np.count_nonzero(places >= 0)))
        self._matrix, self._places, self._name = matrix, places, name

    def prepare(self, scratch: Path, identity: dict[str, Any]) -> None:
        """Prepare the whole matrix."""
        self._matrix.prepare(scratch, identity)

    def blocks(self, start: int, stop: int) -> Iterator[RowBlock]:
        """The rows ``start .. stop`` in order."""
        for block in self._matrix.blocks(start, stop):
            yield self._without(block)

    def head(self, num_values: int) -> RowBlock:
        """The first rows."""
        return self._without(self._matrix.head(num_values))

    def close(self) -> None:
        """Let go of the whole matrix."""
        self._matrix.close()

    def _without(self, block: RowBlock) -> RowBlock:
        indptr, columns, values, fits = _keep(block.indptr, block.columns, block.values, self._places)
        if not fits:
            raise damaged(self._name, f"the matrix names features beyond its {len(self._places)}")
        return RowBlock(start=block.start, indptr=indptr, columns=columns, values=values)
