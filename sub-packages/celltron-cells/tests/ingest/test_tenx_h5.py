"""Cell Ranger's .h5 files, old and new, give the counts that anndata holds; broken ones a sentence."""

from contextlib import closing
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pytest
import scipy.sparse as sp

from celltron.cells.ingest.source import SourceOptions
from celltron.cells.ingest.tenx_h5 import open_tenx_h5
from celltron.core import InputError

PACKED: dict[str, Any] = {"compression": "gzip", "shuffle": True, "chunks": (5000,), "maxshape": (None,)}


def write_matrix(group: h5py.Group, matrix: sp.csr_matrix, barcodes: list[str], **storage: Any) -> None:
    """Cells x features as Cell Ranger stores them: features x cells by columns."""
    arrays = {"data": matrix.data.astype(np.int32), "indices": matrix.indices.astype(np.int64), "indptr": matrix.indptr}
    for name, array in arrays.items():
        group.create_dataset(name, data=array, **(storage if name != "indptr" else {}))
    group["shape"] = np.array(matrix.shape[::-1], dtype=np.int32)
    group["barcodes"] = np.array(barcodes, dtype="S")


def write_new(path: Path, data: anndata.AnnData, *, more: int = 0, genomes: list[str] | None = None) -> Path:
    """Version 3 and later; ``more`` antibodies, put before the genes."""
    matrix = sp.hstack([np.full((data.n_obs, more), 9), data.X]).tocsr()
    ids = [*(f"AB{k}" for k in range(more)), *data.var_names]
    columns = {
        "id": ids,
        "name": [*ids[:more], *data.var["gene_symbol"]],
        "feature_type": ["Antibody Capture"] * more + ["Gene Expression"] * data.n_vars,
        "genome": [""] * more + (genomes or ["GRCh38"] * data.n_vars),
    }
    with h5py.File(path, "w") as file:
        write_matrix(file.create_group("matrix"), matrix, list(data.obs_names), **PACKED)
        for name, texts in columns.items():
            file[f"matrix/features/{name}"] = np.array(texts, dtype="S")
        file["matrix/features/_all_tag_keys"] = np.array(["genome"], dtype="S")
    return path


def write_old(path: Path, genomes: dict[str, anndata.AnnData]) -> Path:
    """Before version 3."""
    with h5py.File(path, "w") as file:
        for genome, data in genomes.items():
            group = file.create_group(genome)
            write_matrix(group, sp.csr_matrix(data.X), list(data.obs_names))
            group["genes"] = np.array(list(data.var_names), dtype="S")
            group["gene_names"] = np.array(list(data.var["gene_symbol"]), dtype="S")
    return path


def open_h5(path: Path, **options: Any) -> Any:
    return closing(open_tenx_h5(str(path), SourceOptions(**options)))


@pytest.mark.parametrize("more", [0, 7])
def test_counts_are_anndatas(tmp_path: Path, real, read_source, more: int) -> None:  # type: ignore[no-untyped-def]
    with open_h5(write_new(tmp_path / "a.h5", real, more=more)) as source:
        assert source.shape == real.shape and source.matrix_name == "matrix"
        assert (read_source(source) != sp.csr_matrix(real.X)).nnz == 0
        assert source.obs.index().to_pylist() == list(real.obs_names)
        assert source.obs.index(5, 8).to_pylist() == list(real.obs_names[5:8]) and source.obs.columns == []
        assert source.var.index().to_pylist() == list(real.var_names)
        assert source.var.column("feature_name").to_pylist() == list(real.var["gene_symbol"])
        assert source.var.notes == (
            {"feature_type": "left out, as they are no genes: 7 of Antibody Capture"} if more else {}
        )


def test_files_of_before_version_3(tmp_path: Path, real, read_source) -> None:  # type: ignore[no-untyped-def]
    parts = {"GRCh38": real[:, :300].copy(), "mm10": real[:, 300:500].copy()}
    with open_h5(write_old(tmp_path / "one.h5", {"GRCh38": parts["GRCh38"]})) as source:
        assert source.matrix_name == "GRCh38"
        assert (read_source(source) != sp.csr_matrix(parts["GRCh38"].X)).nnz == 0
    path = write_old(tmp_path / "two.h5", parts)
    with pytest.raises(
        InputError, match="two.h5 holds counts of several genomes: pass --layer with one of GRCh38, mm10"
    ):
        open_h5(path)
    with pytest.raises(InputError, match="two.h5 has no genome 'hg19': it has GRCh38, mm10"):
        open_h5(path, layer="hg19")
    with open_h5(path, layer="mm10") as source:
        assert (read_source(source) != sp.csr_matrix(parts["mm10"].X)).nnz == 0
        assert source.var.column("feature_name").to_pylist() == list(parts["mm10"].var["gene_symbol"])


def test_several_genomes(tmp_path: Path, real, read_source) -> None:  # type: ignore[no-untyped-def]
    both = real[:, :40].copy()
    genomes = ["mm10" if i % 4 == 0 else "GRCh38" for i in range(40)]
    both.var_names = [f"{genome}_{gene}" for genome, gene in zip(genomes, both.var_names, strict=True)]
    path = write_new(tmp_path / "a.h5", both, genomes=genomes, more=2)
    with pytest.raises(InputError, match="a.h5 holds counts of several genomes"):
        open_h5(path)
    with open_h5(path, layer="mm10") as source:
        assert source.var.index().to_pylist() == list(real.var_names[:40:4])
        assert source.var.column("genome").to_pylist() == ["mm10"] * 10
        assert (read_source(source) != sp.csr_matrix(real.X[:, :40:4])).nnz == 0


def test_what_is_no_matrix(tmp_path: Path, real) -> None:  # type: ignore[no-untyped-def]
    with h5py.File(tmp_path / "molecules.h5", "w") as file:
        file["barcode_idx"] = [1]
    with pytest.raises(
        InputError, match="molecules.h5 is HDF5 but holds no matrix of Cell Ranger.*not a list of molec"
    ):
        open_h5(tmp_path / "molecules.h5")
    path = write_new(tmp_path / "a.h5", real[:5, :9].copy())
    with pytest.raises(InputError, match="a.h5 has no raw"):
        open_h5(path, use_raw=True)
    with pytest.raises(InputError, match="a.h5 has no genome 'counts': it has GRCh38"):
        open_h5(path, layer="counts")


@pytest.mark.parametrize(
    ("name", "array", "sentence"),
    [
        ("matrix/shape", np.array([9, 6]), "a.h5 is .*damaged"),
        ("matrix/shape", np.array([8, 5]), "a.h5 is .*damaged"),
        ("matrix/shape", np.array([9]), "a.h5 is truncated or damaged"),
        (
            "matrix/barcodes",
            np.array(["a"], dtype="S"),
            "barcodes is .* of the shape .1,., wanted texts or numbers for 5 rows",
        ),
        ("matrix/features/name", np.array(["a"], dtype="S"), r"lists of features have the lengths \[1, 9\]"),
        ("matrix/data", np.array([b"x"]), "data does not hold numbers"),
        ("matrix/indices", np.array([1]), "do not fit together"),
        ("matrix/features/feature_type", np.array([b"Peaks"] * 9), "lists no features of type Gene Expression"),
    ],
)
def test_parts_that_do_not_fit(tmp_path: Path, real, name: str, array: Any, sentence: str) -> None:  # type: ignore[no-untyped-def]
    path = write_new(tmp_path / "a.h5", real[:5, :9].copy())
    with h5py.File(path, "r+") as file:
        del file[name]
        file[name] = array
    with pytest.raises(InputError, match=sentence):
        open_h5(path)


def test_cut_and_damaged_files(tmp_path: Path, real, read_source) -> None:  # type: ignore[no-untyped-def]
    path = write_new(tmp_path / "a.h5", real[:, :500].copy(), more=3)
    whole = path.read_bytes()
    for kept in (0, 10, len(whole) // 2, len(whole) - 10):
        path.write_bytes(whole[:kept])
        with pytest.raises(InputError, match="a.h5"):
            open_h5(path)
    path.write_bytes(whole)
    with h5py.File(path) as file:
        place = file["matrix/data"].id.get_chunk_info(1).byte_offset
    damaged = bytearray(whole)
    damaged[place + 10] ^= 255
    path.write_bytes(damaged)
    with pytest.raises(InputError, match="a.h5 is truncated or damaged"), open_h5(path) as source:
        read_source(source)


def test_a_column_beyond_the_features(tmp_path: Path, real, read_source) -> None:  # type: ignore[no-untyped-def]
    for more in (0, 2):
        path = write_new(tmp_path / f"{more}.h5", real[:, :9].copy(), more=more)
        with h5py.File(path, "r+") as file:
            file["matrix/indices"][3] = 9 + more
        with pytest.raises(InputError, match="damaged"), open_h5(path) as source:
            read_source(source)


def test_identity(tmp_path: Path, real) -> None:  # type: ignore[no-untyped-def]
    path = write_new(tmp_path / "a.h5", real[:5, :9].copy())
    with open_h5(path) as source:
        assert source.identity() == {"bytes": path.stat().st_size, "changed": str(path.stat().st_mtime_ns)}
