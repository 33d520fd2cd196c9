"""From what a user names to sources: which files, folders and formats are meant."""

import os
import sys
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any

import anndata
import h5py
import numpy as np
import pytest

from celltron.cells.ingest.anndata_source import AnndataSource
from celltron.cells.ingest.open import expand_sources, open_source
from celltron.cells.ingest.source import SourceOptions
from celltron.core import InputError


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Sources of all kinds beside other files."""
    folder = tmp_path / "data"
    for name in (
        "b.h5ad",
        "a.h5ad",
        "deep/er/c.h5ad",
        "deep/d.h5",
        "deep/e.loom",
        "notes.txt",
        ".hidden/x.h5ad",
        "f.zarr.zip",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"1")
    for name in ("g.zarr/X/x.h5ad", "named_otherwise/.zgroup", "soma/__group/1", "tenx/matrix.mtx.gz"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"1")
    for name in ("barcodes.tsv.gz", "features.tsv.gz", "extra.h5"):
        (folder / "tenx" / name).write_bytes(b"1")
    (folder / "half_tenx").mkdir()
    (folder / "half_tenx" / "matrix.mtx").write_bytes(b"1")
    return folder


SOURCES = ["a.h5ad", "b.h5ad", "deep/d.h5", "deep/e.loom", "deep/er/c.h5ad", "f.zarr.zip", "g.zarr", "named_otherwise"]
SOURCES += ["soma", "tenx"]


def test_a_folder_gives_all_its_sources_sorted(tree: Path) -> None:
    assert expand_sources([tree]) == [f"{tree}/{name}" for name in SOURCES]
    assert expand_sources([f"{tree}/"]) == [f"{tree}/{name}" for name in SOURCES]
    assert expand_sources([tree / "deep", tree / "tenx"]) == [f"{tree}/{name}" for name in (*SOURCES[2:5], "tenx")]


def test_patterns(tree: Path) -> None:
    assert expand_sources([f"{tree}/*.h5ad"]) == [f"{tree}/a.h5ad", f"{tree}/b.h5ad"]
    assert expand_sources([f"{tree}/**/?.h5ad"])[:3] == [
        f"{tree}/{name}" for name in ("a.h5ad", "b.h5ad", "deep/er/c.h5ad")
    ]
    assert expand_sources([f"{tree}/d*"]) == [f"{tree}/{name}" for name in SOURCES[2:5]]
    (tree / "odd[1].h5ad").write_bytes(b"1")
    assert expand_sources([f"{tree}/odd[1].h5ad"]) == [f"{tree}/odd[1].h5ad"]


def test_none_twice(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named twice, by a link, by a relative path; a link that leads back into the folder ends."""
    os.symlink(tree / "a.h5ad", tree / "z.h5ad")
    os.symlink(tree, tree / "deep" / "back")
    monkeypatch.chdir(tree)
    names = expand_sources(["a.h5ad", tree / "a.h5ad", tree / "z.h5ad", f"{tree}/deep/../a.h5ad"])
    assert names == ["a.h5ad"]
    assert len(expand_sources([tree])) == len(SOURCES)


def test_a_file_named_itself_is_taken_whatever_its_name(tree: Path) -> None:
    assert expand_sources([tree / "notes.txt"]) == [f"{tree}/notes.txt"]


def test_addresses_of_services_are_kept(tree: Path) -> None:
    specs = ["soma:///x", "census://2024-07-01?organism=human", "https://host/a.h5ad", "soma+s3://bucket/x"]
    assert expand_sources([*specs, specs[0]]) == sorted(specs)


def test_nothing_there(tree: Path) -> None:
    for spec, pattern in (
        ("none.h5ad", "no file at .*none.h5ad: wanted an .h5ad"),
        ("*.csv", r"no file fits the pattern .*\*.csv: check it, and quote it"),
        ("half_tenx", "half_tenx holds nothing that can be converted: wanted an .h5ad"),
    ):
        with pytest.raises(InputError, match=pattern):
            expand_sources([tree / "a.h5ad", tree / spec])
    with pytest.raises(InputError, match="no source was named"):
        expand_sources([])


def test_unreadable_folders_and_addresses(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown scheme 'nothing'"):
        expand_sources(["nothing://a/b"])
    with pytest.raises(InputError, match="nothing fits the pattern memory://none"):
        expand_sources(["memory://none/*.h5ad"])
    with pytest.raises(InputError, match="there is nothing at memory://none/a.h5ad"):
        open_source("memory://none/a.h5ad", SourceOptions())


def test_h5ad_and_zarr_are_opened(tmp_path: Path, real: anndata.AnnData) -> None:
    data = real[:20, :30].copy()
    data.write_h5ad(tmp_path / "a.h5ad")
    data.write_zarr(tmp_path / "b.zarr")
    (tmp_path / "a.h5ad").rename(tmp_path / "without_suffix")
    (tmp_path / "b.zarr").rename(tmp_path / "folder")
    for name in ("without_suffix", "folder"):
        with closing(open_source(str(tmp_path / name), SourceOptions())) as source:
            assert isinstance(source, AnndataSource) and source.shape == (20, 30)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Stand-ins for the other formats' openers, that note what they are asked."""
    calls: list[tuple[str, str]] = []
    for module, function in (
        ("tenx_h5", "open_tenx_h5"),
        ("tenx_folder", "open_tenx_folder"),
        ("loom", "open_loom"),
        ("soma", "open_soma"),
        ("census", "open_census"),
    ):

        def note(spec: str, options: SourceOptions, name: str = module) -> Any:
            calls.append((name, spec))

        stand_in = ModuleType(f"celltron.cells.ingest.{module}")
        setattr(stand_in, function, note)
        monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    return calls


def test_other_formats_are_told_by_content(tree: Path, opened: list[tuple[str, str]]) -> None:
    with h5py.File(tree / "new.h5", "w") as file:
        file.create_group("matrix")
    with h5py.File(tree / "old.h5", "w") as file:
        for part in ("barcodes", "data", "indices", "indptr"):
            file.create_dataset(f"GRCh38/{part}", data=[0])
    with h5py.File(tree / "loom.h5", "w") as file:
        file["matrix"] = np.zeros((2, 2))
        file.create_group("row_attrs")
    specs = {"new.h5": "tenx_h5", "old.h5": "tenx_h5", "loom.h5": "loom", "tenx": "tenx_folder", "soma": "soma"}
    wanted = [(module, f"{tree}/{name}") for name, module in specs.items()]
    wanted += [("soma", "soma:///x"), ("soma", "soma+s3://b/x"), ("census", "census://stable")]
    for _, spec in wanted:
        open_source(spec, SourceOptions())
    assert opened == wanted


def test_what_is_no_source(tree: Path) -> None:
    for name, pattern in (
        ("notes.txt", "notes.txt is not an .h5ad file"),
        ("deep", "deep is a folder, but none of counts: wanted an .h5ad"),
        ("none", "no file at .*none: wanted"),
    ):
        with pytest.raises(InputError, match=pattern):
            open_source(str(tree / name), SourceOptions())
    with h5py.File(tree / "other.h5", "w") as file:
        file["x"] = [1]
    with pytest.raises(InputError, match="other.h5 is HDF5 but not an .h5ad file"):
        open_source(str(tree / "other.h5"), SourceOptions())
