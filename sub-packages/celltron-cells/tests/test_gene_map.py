from collections.abc import Callable
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from celltron.cells.gene_map import GeneColumn, GeneFinder, GeneList, Species, free_name, join_arrays
from celltron.cells.ingest.anndata_frame import AnndataFrame
from celltron.core import InputError


def find(var: AnndataFrame, column: str | None = None, *, species: Species = "human") -> GeneColumn:
    return GeneFinder(species, column).find(var, "cells.h5ad")


def add(genes: GeneList, var: AnndataFrame, found: GeneColumn | None = None) -> list[int]:
    places, new_columns = genes.add(found or find(var))
    genes.take_columns(var, new_columns)
    return places.tolist()


@pytest.fixture
def var_of(tmp_path: Path):  # type: ignore[no-untyped-def]
    files = []

    def make(frame: pd.DataFrame) -> AnndataFrame:
        files.append(h5py.File(tmp_path / f"{len(files)}.h5", "w"))
        anndata.io.write_elem(files[-1], "var", frame)
        return AnndataFrame(files[-1]["var"], "cells.h5ad")

    yield make
    for file in files:
        file.close()


def test_symbols_and_ids_with_versions(var_of) -> None:  # type: ignore[no-untyped-def]
    var = var_of(pd.DataFrame(index=["CD3E", "ENSG00000153563.16", "no such gene", "MS4A1"]))
    genes = find(var)
    assert genes.column == "var_names"
    assert genes.ids == ["ENSG00000198851", "ENSG00000153563", None, "ENSG00000156738"]
    assert genes.symbols[0] == "CD3E"


def test_the_column_that_maps_most_is_taken(var_of) -> None:  # type: ignore[no-untyped-def]
    frame = pd.DataFrame({"gene_ids": ["ENSG00000198851", "ENSG00000153563"]}, index=["CD3E", "unknown"])
    genes = find(var_of(frame))
    assert genes.column == "gene_ids" and genes.symbols == ["CD3E", "unknown"]
    genes = find(var_of(frame), "var_names")
    assert genes.ids == ["ENSG00000198851", None]


def test_two_symbols_of_one_gene_do_not_win_over_two_ids(var_of) -> None:  # type: ignore[no-untyped-def]
    """Many names that fall on few genes are worth less than ids of different genes."""
    frame = pd.DataFrame({"gene_ids": ["ENSG00000198851", "ENSG00000153563", ""]}, index=["CD3E", "CD3E-1", "CD3E"])
    assert find(var_of(frame)).column == "gene_ids"


def test_a_missing_column_names_those_there_are(var_of) -> None:  # type: ignore[no-untyped-def]
    var = var_of(pd.DataFrame({"symbol": ["CD3E"]}, index=["x"]))
    with pytest.raises(InputError, match="no gene column 'ensembl'.*var_names, symbol"):
        find(var, "ensembl")


def test_nothing_maps_shows_names_and_species(var_of) -> None:  # type: ignore[no-untyped-def]
    var = var_of(pd.DataFrame({"probe": ["a", "b"]}, index=["probe_1", "probe_2"]))
    with pytest.raises(InputError, match="0 of the 2 gene names.*cells.h5ad.*'probe_1'.*human.*gene_id_column.*probe"):
        find(var)


@pytest.mark.parametrize("names", [["ENSMUSG00000032093", "ENSMUSG00000053977"], ["Cd3e", "Cd8a", "Ms4a1", "Actb"]])
def test_mouse_genes_are_not_taken_for_human(var_of, names: list[str]) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match="mouse genes: pass species=mouse"):
        find(var_of(pd.DataFrame(index=names)))
    mouse = find(var_of(pd.DataFrame(index=names)), species="mouse")
    assert all(gene is not None and gene.startswith("ENSMUSG") for gene in mouse.ids)


def test_union_in_first_seen_order(var_of) -> None:  # type: ignore[no-untyped-def]
    first = var_of(pd.DataFrame({"chrom": ["11", "x"]}, index=["CD3E", "junk"]))
    second = var_of(pd.DataFrame({"chrom": [2, 3, 4]}, index=["CD8A", "CD3E", "CD8A.1"]))
    genes = GeneList(species="human")
    assert add(genes, first) == [0, -1]
    found = find(second)
    found.ids[2] = found.ids[0]
    assert add(genes, second, found) == [1, 0, 1]
    assert list(genes.unmapped) == ["junk"] and genes.num_summed == 1
    table = genes.table().to_pydict()
    assert table["gene_name"] == ["CD3E", "CD8A"] and table["species"] == ["human", "human"]
    assert table["chrom"] == ["11", "2"]  # the files disagree about its type


def test_unmapped_genes_can_be_kept(var_of) -> None:  # type: ignore[no-untyped-def]
    var = var_of(pd.DataFrame(index=["CD3E", "HIV-gag", "HIV-gag", "bad\x07name"]))
    genes = GeneList(species="human", keep_unmapped=True)
    assert add(genes, var) == [0, 1, 1, -1]
    assert list(genes.index_of) == ["ENSG00000198851", "HIV-gag"]
    assert np.array_equal(genes.table()["gene_name"].to_pylist(), ["CD3E", "HIV-gag"])


def test_clashing_column_names(var_of) -> None:  # type: ignore[no-untyped-def]
    var = var_of(pd.DataFrame({"gene_id": ["ENSG00000198851"]}, index=["CD3E"]))
    genes = GeneList(species="human")
    add(genes, var)
    assert genes.table().column_names == ["gene_id", "gene_name", "species", "num_cells", "gene_id_in_source"]
    assert free_name("a", ["a", "a_in_source"]) == "a_in_source_in_source"


def test_sources_that_name_genes_alike_are_looked_at_once(var_of, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """The same names under other numbers: one look, one array of places; repeats count for every source."""
    names = ["CD3E", "ENSG00000198851", "junk"]
    first, second = (var_of(pd.DataFrame({"mean": [i, i, i]}, index=names)) for i in (1.0, 2.0))
    third = var_of(pd.DataFrame({"mean": [1.0] * 3}, index=["CD3E", "ENSG0000019885", "1junk"]))
    looks: list[str] = []
    look: Callable[..., GeneColumn] = GeneFinder._look
    monkeypatch.setattr(GeneFinder, "_look", lambda *arguments: (looks.append(arguments[2]), look(*arguments))[1])
    finder = GeneFinder("human")
    genes = GeneList(species="human")
    places = [genes.add(finder.find(var, f"{i}.h5ad")) for i, var in enumerate((first, second, third))]
    assert looks == ["0.h5ad", "2.h5ad"]
    assert places[1][0] is places[0][0] and places[0][1] == [0] and places[1][1] == []
    assert genes.num_summed == 2 and list(genes.unmapped) == ["junk", "ENSG0000019885", "1junk"]


def test_new_genes_come_after_those_of_a_store(var_of) -> None:  # type: ignore[no-untyped-def]
    genes = GeneList(species="human", index_of={"ENSG00000153563": 0, "ENSG00000156738": 1})
    var = var_of(pd.DataFrame({"chrom": pd.Categorical(["11", "2"])}, index=["CD3E", "CD8A"]))
    assert add(genes, var) == [2, 0]
    assert genes.table().to_pydict() == {
        "gene_id": ["ENSG00000198851"],
        "gene_name": ["CD3E"],
        "species": ["human"],
        "num_cells": [0],
        "chrom": ["11"],
    }


def test_columns_that_come_late_or_end_early_are_missing_elsewhere(var_of) -> None:  # type: ignore[no-untyped-def]
    genes = GeneList(species="human")
    add(genes, var_of(pd.DataFrame({"a": [1]}, index=["CD3E"])))
    add(genes, var_of(pd.DataFrame({"b": [True]}, index=["CD8A"])))
    add(genes, var_of(pd.DataFrame({"c": [1]}, index=["CD8A"])))
    add(genes, var_of(pd.DataFrame({"a": [2.5], "b": [False]}, index=["MS4A1"])))
    table = genes.table().to_pydict()
    assert table["a"] == [1.0, None, 2.5] and table["b"] == [None, True, False] and "c" not in table


def test_arrays_are_joined_without_loss() -> None:
    large = pa.array([2**53 + 1])
    assert join_arrays([large, pa.array([0.5])]).to_pylist() == ["9007199254740993", "0.5"]
    assert join_arrays([pa.array([1], pa.int8()), pa.nulls(1), pa.array([2], pa.uint16())]).to_pylist() == [1, None, 2]
    assert join_arrays([pa.nulls(2)]).type == pa.string()
