"""A Cell Ranger folder of text gives the counts that scipy and anndata read, whatever its layout."""

import gzip
import io
import os
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import anndata
import fsspec
import numpy as np
import pytest
import scipy.io
import scipy.sparse as sp

from celltron.cells.ingest import mtx
from celltron.cells.ingest.source import SourceOptions
from celltron.cells.ingest.tenx_folder import find_sets, open_tenx_folder
from celltron.core import InputError

NUM_GENES = 800


def write_file(path: Path, text: str | bytes) -> None:
    data = text.encode() if isinstance(text, str) else text
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def write_folder(
    folder: Path, data: anndata.AnnData, *, version: int = 3, packed: bool = True, prefix: str = "", more: int = 0
) -> Path:
    """As Cell Ranger writes; ``more`` antibodies after the genes."""
    folder.mkdir(parents=True, exist_ok=True)
    ending = ".gz" if packed else ""
    counts = sp.hstack([data.X, sp.csr_matrix(np.full((data.n_obs, more), 3))]).T.tocsc().astype(np.int64)
    text = io.BytesIO()
    scipy.io.mmwrite(text, sp.coo_matrix(counts), comment="metadata_json: {}")
    write_file(folder / f"{prefix}matrix.mtx{ending}", text.getvalue())
    write_file(folder / f"{prefix}barcodes.tsv{ending}", "".join(f"{name}\n" for name in data.obs_names))
    lines = [[gene, name] for gene, name in zip(data.var_names, data.var["gene_symbol"], strict=True)]
    lines = [[*line, "Gene Expression"] for line in lines] if version == 3 else lines
    lines += [[f"AB{k}", f"antibody {k}", "Antibody Capture"] for k in range(more)]
    features = "features" if version == 3 else "genes"
    write_file(folder / f"{prefix}{features}.tsv{ending}", "".join("\t".join(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="session")
def cells(real: anndata.AnnData) -> anndata.AnnData:
    """200 measured cells x 800 genes."""
    return real[:200, :NUM_GENES].copy()


def open_folder(path: Path | str, **options: Any) -> Any:
    return closing(open_tenx_folder(str(path), SourceOptions(**options)))


LAYOUTS: dict[str, dict[str, Any]] = {
    "version 3": {},
    "version 3, not packed": {"packed": False},
    "version 2": {"version": 2, "packed": False},
    "version 2, packed, prefix": {"version": 2, "prefix": "GSM1_sample_"},
    "antibodies": {"more": 5, "prefix": "GSM2_"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_counts_are_anndatas(tmp_path: Path, cells, read_source, layout: str, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(mtx, "TEXT_BYTES", 100_000)
    folder = write_folder(tmp_path / "a", cells, **LAYOUTS[layout])
    with open_folder(folder) as source:
        assert source.shape == (200, NUM_GENES)
        assert (read_source(source) != sp.csr_matrix(cells.X)).nnz == 0
        assert source.obs.index().to_pylist() == list(cells.obs_names)
        assert source.obs.index(7, 9).to_pylist() == list(cells.obs_names[7:9]) and source.obs.columns == []
        assert source.var.index().to_pylist() == list(cells.var_names)
        assert source.var.column("feature_name").to_pylist() == list(cells.var["gene_symbol"])
        assert ("5 of Antibody Capture" in source.var.notes.get("feature_type", "")) == (layout == "antibodies")
        assert source.matrix_name.endswith(("matrix.mtx", "matrix.mtx.gz")) and source.advice() == ""


def test_several_sets_are_named_and_one_is_chosen_by_its_matrix(tmp_path: Path, cells, read_source) -> None:  # type: ignore[no-untyped-def]
    for name, part in (("A_", cells[:50]), ("B_", cells[50:])):
        write_folder(tmp_path, part.copy(), prefix=name)
    with pytest.raises(InputError, match="holds 2 matrices: name one of A_matrix.mtx.gz, B_matrix.mtx.gz"):
        open_folder(tmp_path)
    with open_folder(tmp_path / "B_matrix.mtx.gz") as source:
        assert (read_source(source) != sp.csr_matrix(cells[50:].X)).nnz == 0
    assert sorted(find_sets(os.listdir(tmp_path))) == ["A_", "B_"]


def test_a_relative_name(tmp_path: Path, cells, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    write_folder(tmp_path, cells, packed=False)
    monkeypatch.chdir(tmp_path)
    for name in (".", "matrix.mtx"):
        with open_folder(name) as source:
            assert source.shape == (200, NUM_GENES) and source.name == name


def test_behind_an_address(cells, read_source) -> None:  # type: ignore[no-untyped-def]
    fs = fsspec.filesystem("memory")
    for name, content in _files_of(cells).items():
        fs.pipe(f"/tenx/{name}", content)
    try:
        with open_folder("memory://tenx") as source:
            identity = source.identity()
            assert (read_source(source) != sp.csr_matrix(cells.X)).nnz == 0
        fs.pipe("/tenx/barcodes.tsv.gz", gzip.compress(b"cell\n" * 200))
        with open_folder("memory://tenx/matrix.mtx.gz") as source:
            assert source.identity() != identity
        fs.rm("/tenx/features.tsv.gz")
        with pytest.raises(InputError, match="memory://tenx lacks features.tsv beside matrix.mtx.gz"):
            open_folder("memory://tenx")
    finally:
        fs.rm("/tenx", recursive=True)


def _files_of(cells: anndata.AnnData) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder), cells)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_names_are_taken_as_they_stand(tmp_path: Path, cells) -> None:  # type: ignore[no-untyped-def]
    """Quotes, digits, letters beyond ASCII, further columns, ends of lines as on Windows."""
    folder = write_folder(tmp_path, cells[:3, :4].copy(), packed=False)
    write_file(folder / "barcodes.tsv", '001\textra\r\n"a" b\tx\r\nβ\t\n')
    write_file(folder / "features.tsv", "1\tNA\tGene Expression\tchr1\t5\t9\nb\tnull\tGene Expression\nc\nd\n")
    with pytest.raises(InputError, match="features.tsv is truncated or damaged .*columns"):
        open_folder(folder)
    write_file(folder / "features.tsv", "1\tNA\nb\tnull\nc\t\nd\tx\n")
    with open_folder(folder) as source:
        assert source.obs.index().to_pylist() == ["001", '"a" b', "β"]
        assert source.var.index().to_pylist() == ["1", "b", "c", "d"]
        assert source.var.column("feature_name").to_pylist() == ["NA", "null", "", "x"]
    write_file(folder / "features.tsv", "a\nb\nc\nd\n")
    with open_folder(folder) as source:
        assert source.var.column("feature_name").to_pylist() == ["a", "b", "c", "d"]


def test_genomes(tmp_path: Path, cells, read_source) -> None:  # type: ignore[no-untyped-def]
    both = cells[:, :30].copy()
    both.var_names = [f"{'hg19' if i % 3 else 'mm10'}_{gene}" for i, gene in enumerate(both.var_names)]
    folder = write_folder(tmp_path, both)
    with pytest.raises(InputError, match="features.tsv.gz holds counts of several genomes: pass --layer .* hg19, mm10"):
        open_folder(folder)
    with open_folder(folder, layer="mm10") as source:
        assert source.var.index().to_pylist() == list(cells.var_names[:30:3])
        assert (read_source(source) != sp.csr_matrix(cells.X[:, :30:3])).nnz == 0


def test_identity_changes_with_any_file(tmp_path: Path, cells) -> None:  # type: ignore[no-untyped-def]
    folder = write_folder(tmp_path, cells)
    with open_folder(folder) as source:
        first = source.identity()
        assert source.identity() == first
        assert first["bytes"] == sum(path.stat().st_size for path in folder.iterdir())
        for path in folder.iterdir():
            before = source.identity()
            os.utime(path, ns=(0, 0))
            assert source.identity() != before


@pytest.mark.parametrize("name", ["matrix.mtx", "barcodes.tsv", "features.tsv"])
@pytest.mark.parametrize("packed", [True, False])
def test_cut_files(tmp_path: Path, cells, read_source, name: str, packed: bool) -> None:  # type: ignore[no-untyped-def]
    folder = write_folder(tmp_path, cells, packed=packed)
    path = folder / (f"{name}.gz" if packed else name)
    whole = path.read_bytes()
    for kept in (0, 1, 20, len(whole) // 2, len(whole) - 30, len(whole) - 5, len(whole) - 1):
        path.write_bytes(whole[:kept])
        with pytest.raises(InputError) as raised, open_folder(folder) as source:
            read_source(source)
        assert name in str(raised.value) or "genes x" in str(raised.value)


def test_a_flipped_byte_in_a_packed_file(tmp_path: Path, cells, read_source) -> None:  # type: ignore[no-untyped-def]
    folder = write_folder(tmp_path, cells)
    path = folder / "matrix.mtx.gz"
    whole = bytearray(path.read_bytes())
    for place in (len(whole) // 3, len(whole) - 6):
        damaged = whole.copy()
        damaged[place] ^= 4
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="matrix.mtx.gz"), open_folder(folder) as source:
            read_source(source)


def test_what_is_no_folder_of_counts(tmp_path: Path, cells) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match="no folder at .*none: wanted matrix.mtx, barcodes.tsv and features.tsv"):
        open_folder(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty holds no matrix of Cell Ranger: wanted matrix.mtx"):
        open_folder(tmp_path / "empty")
    folder = write_folder(tmp_path / "a", cells)
    with pytest.raises(InputError, match="has no raw, which is anndata's: leave --use-raw out"):
        open_folder(folder, use_raw=True)
    write_file(folder / "genes.tsv", "x\n")
    with pytest.raises(InputError, match="holds features.tsv.gz and genes.tsv, which are one: remove all but one"):
        open_folder(folder)
    (folder / "genes.tsv").unlink()
    (folder / "barcodes.tsv.gz").unlink()
    with pytest.raises(InputError, match="lacks barcodes.tsv beside matrix.mtx.gz"):
        open_folder(folder)
    write_file(folder / "barcodes.tsv", "a\n\nb\n")
    with pytest.raises(InputError, match="barcodes.tsv is truncated or damaged .it has empty lines"):
        open_folder(folder)
    write_file(folder / "barcodes.tsv", "a\nb\n")
    with pytest.raises(
        InputError, match="matrix.mtx.gz is 800 genes x 200 cells, but the files beside it name 800 and 2"
    ):
        open_folder(folder)
    with pytest.raises(InputError, match="holds no notes.txt: wanted matrix.mtx"):
        (folder / "notes.txt").write_text("x")
        open_folder(folder / "notes.txt")
