"""Of a list of features the genes of one genome are taken, and of the matrix their columns."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from celltron.cells.ingest.source import RowBlock
from celltron.cells.ingest.tenx_features import Features, keep_columns, select_genes
from celltron.core import InputError

IDS = ["ENSG1", "CD3", "ENSG2", "guide", "ENSG3"]
TYPES = ["Gene Expression", "Antibody Capture", "Gene Expression", "CRISPR Guide Capture", "Gene Expression"]


def features(ids: list[str], **more: Any) -> Features:
    return Features(ids=ids, names=[f"name {gene}" for gene in ids], **more)


def test_other_types_are_left_out_and_that_is_said() -> None:
    frame, places = select_genes(features(IDS, types=TYPES, genomes=["hg", "", "hg", "", "hg"]), None, "a.h5")
    assert frame.index().to_pylist() == ["ENSG1", "ENSG2", "ENSG3"]
    assert frame.column("feature_name").to_pylist() == ["name ENSG1", "name ENSG2", "name ENSG3"]
    assert frame.column("genome").to_pylist() == ["hg"] * 3
    assert places.tolist() == [0, -1, 1, -1, 2]
    wanted = "left out, as they are no genes: 1 of Antibody Capture, 1 of CRISPR Guide Capture"
    assert frame.notes == {"feature_type": wanted}


def test_without_types_all_are_genes() -> None:
    frame, places = select_genes(features(["ENSG1", "GFP"]), None, "a.h5")
    assert frame.index().to_pylist() == ["ENSG1", "GFP"] and places.tolist() == [0, 1]
    assert frame.columns == ["feature_name"] and frame.notes == {}


@pytest.mark.parametrize("says_genomes", [True, False])
def test_of_several_genomes_one_is_chosen_and_its_prefix_taken_off(says_genomes: bool) -> None:
    ids = ["GRCh38_ENSG1", "GRCh38_ENSG2", "mm10___ENSMUSG1"]
    names = ["GRCh38_A", "GRCh38_A_B", "mm10___Xkr4"]
    genomes = ["GRCh38", "GRCh38", "mm10"] if says_genomes else []
    both = Features(ids=ids, names=names, genomes=genomes)
    with pytest.raises(InputError, match="a.h5 holds counts of several genomes: pass --layer with one of GRCh38, mm10"):
        select_genes(both, None, "a.h5")
    with pytest.raises(InputError, match="a.h5 has no genome 'hg19': it has GRCh38, mm10"):
        select_genes(both, "hg19", "a.h5")
    for genome, wanted_ids, wanted_names in (
        ("GRCh38", ["ENSG1", "ENSG2"], ["A", "A_B"]),
        ("mm10", ["ENSMUSG1"], ["Xkr4"]),
    ):
        frame, places = select_genes(both, genome, "a.h5")
        assert frame.index().to_pylist() == wanted_ids
        assert frame.column("feature_name").to_pylist() == wanted_names
        assert np.flatnonzero(places >= 0).tolist() == [i for i, gene in enumerate(ids) if gene.startswith(genome)]


def test_underscores_that_are_no_genome() -> None:
    ids = ["ENSG1_ENSG2", "ENSG3_PAR_Y", "MY_GENE", "x_ENSG9"]
    assert select_genes(features(ids), None, "a")[0].index().to_pylist() == ids


def test_no_genes_at_all() -> None:
    with pytest.raises(InputError, match="lists no features of type Gene Expression .it has Peaks."):
        select_genes(features(["chr1:1-2"], types=["Peaks"]), None, "a.h5")
    with pytest.raises(InputError, match="it has none at all"):
        select_genes(features([]), None, "a.h5")
    with pytest.raises(InputError, match="has no genome 'GRCh38': it has none by name"):
        select_genes(features(IDS), "GRCh38", "a.h5")


class Blocks:
    """A matrix of two blocks."""

    shape = (3, 4)

    def __init__(self, columns: list[int]) -> None:
        indptr, values = np.array([0, 3, 3, 5]), np.arange(1, 6, dtype=np.int16)
        self.block = RowBlock(start=0, indptr=indptr, columns=np.array(columns), values=values)

    def prepare(self, scratch: Path, identity: dict[str, Any]) -> None: ...

    def blocks(self, start: int, stop: int) -> Iterator[RowBlock]:
        yield self.block

    def head(self, num_values: int) -> RowBlock:
        return self.block

    def close(self) -> None: ...


def test_columns_are_kept() -> None:
    places = np.array([-1, 1, -1, 0], dtype=np.int32)
    matrix = keep_columns(Blocks([3, 0, 1, 2, 3]), places, "a.h5")
    assert matrix.shape == (3, 2)
    for block in (matrix.head(1), *matrix.blocks(0, 3)):
        assert block.indptr.tolist() == [0, 2, 2, 3]
        assert block.columns.tolist() == [0, 1, 0]
        assert block.values.tolist() == [1, 3, 5] and block.values.dtype == np.int16
    whole = Blocks([0, 1, 2, 3, 0])
    assert keep_columns(whole, np.arange(4, dtype=np.int32), "a.h5") is whole


@pytest.mark.parametrize("column", [-1, 4])
def test_columns_beyond_the_matrix(column: int) -> None:
    matrix = keep_columns(Blocks([3, 0, 1, column, 3]), np.array([-1, 1, -1, 0], dtype=np.int32), "a.h5")
    with pytest.raises(InputError, match="a.h5 is truncated or damaged .the matrix names features beyond its 4"):
        matrix.head(1)


def test_another_number_of_features() -> None:
    with pytest.raises(InputError, match="the matrix has 4 features, but 3 are named"):
        keep_columns(Blocks([0] * 5), np.array([-1, 0, 1], dtype=np.int32), "a.h5")
