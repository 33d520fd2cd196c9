from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest

from celltron.cells.gene_map import GeneList, find_genes, free_name
from celltron.cells.h5ad_frame import H5adFrame
from celltron.core import GeneNames, InputError

HUMAN = GeneNames.for_species("human")
PATH = Path("cells.h5ad")


@pytest.fixture
def var_of(tmp_path: Path):  # type: ignore[no-untyped-def]
    files = []

    def make(frame: pd.DataFrame) -> H5adFrame:
        files.append(h5py.File(tmp_path / f"{len(files)}.h5", "w"))
        anndata.io.write_elem(files[-1], "var", frame)
        return H5adFrame(files[-1]["var"])

    yield make
    for file in files:
        file.close()


def test_symbols_and_ids_with_versions(var_of) -> None:  # type: ignore[no-untyped-def]
    var = var_of(pd.DataFrame(index=["CD3E", "ENSG00000153563.16", "no such gene", "MS4A1"]))
    genes = find_genes(var, PATH, HUMAN, "human", None)
    assert genes.column == "var_names"
    assert genes.ids == ["ENSG00000198851", "ENSG00000153563", None, "ENSG00000156738"]
    assert genes.symbols[0] == "CD3E"


def test_the_column_that_maps_most_is_taken(var_of) -> None:  # type: ignore[no-untyped-def]
    frame = pd.DataFrame({"gene_ids": ["ENSG00000198851", "ENSG00000153563"]}, index=["CD3E", "unknown"])
    genes = find_genes(var_of(frame), PATH, HUMAN, "human", None)
    assert genes.column == "gene_ids" and genes.symbols == ["CD3E", "unknown"]
    genes = find_genes(var_of(frame), PATH, HUMAN, "human", "var_names")
    assert genes.ids == ["ENSG00000198851", None]


def test_two_symbols_of_one_gene_do_not_win_over_two_ids(var_of) -> None:  # type: ignore[no-untyped-def]
    """Many names that fall on few genes are worth less than ids of different genes."""
    frame = pd.DataFrame({"gene_ids": ["ENSG00000198851", "ENSG00000153563", ""]}, index=["CD3E", "CD3E-1", "CD3E"])
    assert find_genes(var_of(frame), PATH, HUMAN, "human", None).column == "gene_ids"


def test_a_missing_column_names_those_there_are(var_of) -> None:  # type: ignore[no-untyped-def]
    var = var_of(pd.DataFrame({"symbol": ["CD3E"]}, index=["x"]))
    with pytest.raises(InputError, match="no gene column 'ensembl'.*var_names, symbol"):
        find_genes(var, PATH, HUMAN, "human", "ensembl")


def test_nothing_maps_shows_names_and_species(var_of) -> None:  # type: ignore[no-untyped-def]
    var = var_of(pd.DataFrame({"probe": ["a", "b"]}, index=["probe_1", "probe_2"]))
    with pytest.raises(InputError, match="0 of the 2 gene names.*cells.h5ad.*'probe_1'.*human.*gene_id_column.*probe"):
        find_genes(var, PATH, HUMAN, "human", None)


@pytest.mark.parametrize("names", [["ENSMUSG00000032093", "ENSMUSG00000053977"], ["Cd3e", "Cd8a", "Ms4a1", "Actb"]])
def test_mouse_genes_are_not_taken_for_human(var_of, names: list[str]) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match="mouse genes: pass species=mouse"):
        find_genes(var_of(pd.DataFrame(index=names)), PATH, HUMAN, "human", None)
    mouse = find_genes(var_of(pd.DataFrame(index=names)), PATH, GeneNames.for_species("mouse"), "mouse", None)
    assert all(gene is not None and gene.startswith("ENSMUSG") for gene in mouse.ids)


def test_union_in_first_seen_order(var_of) -> None:  # type: ignore[no-untyped-def]
    first = var_of(pd.DataFrame({"chrom": ["11", "x"]}, index=["CD3E", "junk"]))
    second = var_of(pd.DataFrame({"chrom": [2, 3, 4]}, index=["CD8A", "CD3E", "CD8A.1"]))
    genes = GeneList(species="human")
    assert genes.add(find_genes(first, PATH, HUMAN, "human", None), first).tolist() == [0, -1]
    found = find_genes(second, PATH, HUMAN, "human", None)
    found.ids[2] = found.ids[0]
    assert genes.add(found, second).tolist() == [1, 0, 1]
    assert list(genes.unmapped) == ["junk"] and genes.num_summed == 1
    table = genes.table().to_pydict()
    assert table["gene_name"] == ["CD3E", "CD8A"] and table["species"] == ["human", "human"]
    assert table["chrom"] == ["11", "2"]  # the files disagree about its type


def test_unmapped_genes_can_be_kept(var_of) -> None:  # type: ignore[no-untyped-def]
    var = var_of(pd.DataFrame(index=["CD3E", "HIV-gag", "HIV-gag", "bad\x07name"]))
    genes = GeneList(species="human", keep_unmapped=True)
    assert genes.add(find_genes(var, PATH, HUMAN, "human", None), var).tolist() == [0, 1, 1, -1]
    assert list(genes.index_of) == ["ENSG00000198851", "HIV-gag"]
    assert np.array_equal(genes.table()["gene_name"].to_pylist(), ["CD3E", "HIV-gag"])


def test_clashing_column_names(var_of) -> None:  # type: ignore[no-untyped-def]
    var = var_of(pd.DataFrame({"gene_id": ["ENSG00000198851"]}, index=["CD3E"]))
    genes = GeneList(species="human")
    genes.add(find_genes(var, PATH, HUMAN, "human", None), var)
    assert genes.table().column_names == ["gene_id", "gene_name", "species", "gene_id_in_source"]
    assert free_name("a", ["a", "a_in_source"]) == "a_in_source_in_source"
