"""Values read around HDF5 are h5py's, whatever the form in the file; broken files are refused."""

import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from celltron.cells.ingest import hdf5_arrays, row_arrays
from celltron.cells.ingest.hdf5_arrays import LockedArray, ScatteredArray, open_array
from celltron.cells.ingest.row_arrays import ChunkedArray, FlatArray, LocalFile
from celltron.core import InputError

LENGTH = 1000
DTYPES = ("i1 u1 <i2 >i2 <u2 <i4 >i4 <u4 <i8 >i8 <u8 >u8 <f2 <f4 >f4 >f8 ?").split()
FORMS: dict[str, dict[str, Any]] = {
    "flat": {},
    "chunked": {"chunks": (64,)},
    "one chunk": {"chunks": (LENGTH,)},
    "larger chunk": {"chunks": (LENGTH + 11,), "maxshape": (None,), "compression": "gzip"},
    "gzip 1": {"chunks": (37,), "compression": "gzip", "compression_opts": 1},
    "gzip 9": {"chunks": (64,), "compression": "gzip", "compression_opts": 9},
    "gzip shuffle": {"chunks": (37,), "compression": "gzip", "shuffle": True},
    "shuffle": {"chunks": (128,), "shuffle": True},
    "lzf": {"chunks": (64,), "compression": "lzf"},
    "fletcher32": {"chunks": (64,), "compression": "gzip", "fletcher32": True},
}
READ_BY_H5PY = {"lzf", "fletcher32"}
SLICES = ((0, LENGTH), (0, 1), (36, 38), (63, 65), (500, 500), (999, 1000), (7, 993))


def numbers(dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    random = np.random.default_rng(0)
    return random.integers(0, 2 if dtype == "?" else 100, shape).astype(dtype)


def write(path: Path, data: np.ndarray, **form: Any) -> Path:
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=data, dtype=data.dtype, **form)
    return path


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_values_are_those_of_h5py(tmp_path: Path, form: str, dtype: str) -> None:
    data = numbers(dtype, (LENGTH,))
    write(tmp_path / "x.h5", data, **FORMS[form])
    with h5py.File(tmp_path / "x.h5") as file, closing(LocalFile(tmp_path / "x.h5")) as local:
        array = open_array(file["x"], local)
        kinds = dict.fromkeys(READ_BY_H5PY, LockedArray) | {"flat": FlatArray}
        kinds |= dict.fromkeys(("chunked", "one chunk"), ScatteredArray)
        assert type(array) is kinds.get(form, ChunkedArray) and array.shape == (LENGTH,) and array.dtype.isnative
        for start, stop in SLICES:
            read = array[start:stop]
            assert np.array_equal(read, file["x"][start:stop]) and read.dtype == data.dtype.newbyteorder("=")
            assert read.flags.writeable


@pytest.mark.parametrize("dtype", ["<f4", ">i2", "?"])
@pytest.mark.parametrize("chunks", [None, (5, 7), (1, 30), (40, 30), (7, 31)])
def test_dense_rows_and_columns(tmp_path: Path, dtype: str, chunks: Any) -> None:
    data = numbers(dtype, (40, 30))
    more = {"compression": "gzip", "shuffle": True, "maxshape": (None, None)} if chunks else {}
    write(tmp_path / "x.h5", data, chunks=chunks, **more)
    with h5py.File(tmp_path / "x.h5") as file, closing(LocalFile(tmp_path / "x.h5")) as local:
        array = open_array(file["x"], local)
        assert not isinstance(array, LockedArray)
        for rows in (slice(0, 40), slice(3, 4), slice(4, 11), slice(39, 40), slice(5, 5)):
            assert np.array_equal(array[rows], data[rows])
            for columns in (slice(0, 30), slice(6, 8), slice(29, 30), slice(3, 3)):
                assert np.array_equal(array[rows, columns], data[rows, columns])


def test_empty_compact_and_virtual_datasets_go_through_h5py(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("empty", shape=(0,), dtype="f4", chunks=(8,), maxshape=(None,), compression="gzip")
        layout = h5py.VirtualLayout((4,), dtype="i4")
        file["source"] = np.arange(4, dtype="i4")
        layout[:] = h5py.VirtualSource(file["source"])
        file.create_virtual_dataset("virtual", layout)
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_layout(h5py.h5d.COMPACT)
        space = h5py.h5s.create_simple((3,))
        h5py.h5d.create(file.id, b"compact", h5py.h5t.STD_I32LE, space, plist).write(
            h5py.h5s.ALL, h5py.h5s.ALL, np.array([4, 5, 6], dtype="i4")
        )
    with h5py.File(tmp_path / "x.h5") as file, closing(LocalFile(tmp_path / "x.h5")) as local:
        for name, values in (("empty", []), ("virtual", [0, 1, 2, 3]), ("compact", [4, 5, 6])):
            array = open_array(file[name], local)
            assert isinstance(array, LockedArray) and array[0:10].tolist() == values


def test_chunks_that_were_never_written_hold_the_fill_value(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as file:
        dataset = file.create_dataset("x", shape=(100,), dtype=">i4", chunks=(10,), fillvalue=7, compression="gzip")
        dataset[35:42] = 1
    with h5py.File(tmp_path / "x.h5") as file, closing(LocalFile(tmp_path / "x.h5")) as local:
        array = open_array(file["x"], local)
        assert isinstance(array, ChunkedArray) and np.array_equal(array[0:100], file["x"][:])
    with h5py.File(tmp_path / "y.h5", "w") as file:
        file.create_dataset("x", shape=(100,), dtype="i4", chunks=(10,), fillvalue=3)
    with h5py.File(tmp_path / "y.h5") as file, closing(LocalFile(tmp_path / "y.h5")) as local:
        assert open_array(file["x"], local)[5:95].tolist() == [3] * 90


def test_chunks_stored_without_their_filter(tmp_path: Path) -> None:
    """HDF5 may leave a filter out for a chunk that it does not shrink, and says so in the chunk's mask."""
    data = numbers("<u2", (128,))
    write(tmp_path / "x.h5", data, chunks=(64,), compression="gzip", shuffle=True)
    with h5py.File(tmp_path / "x.h5", "r+") as file:
        file["x"].id.write_direct_chunk((0,), zlib.compress(data[:64].tobytes()), filter_mask=0b01)
        file["x"].id.write_direct_chunk((64,), data[64:].tobytes(), filter_mask=0b11)
    with h5py.File(tmp_path / "x.h5") as file, closing(LocalFile(tmp_path / "x.h5")) as local:
        assert np.array_equal(file["x"][:], data)
        assert np.array_equal(open_array(file["x"], local)[0:128], data)


def test_a_user_block_and_newest_layouts(tmp_path: Path) -> None:
    data = numbers("<i4", (LENGTH,))
    for version in ("earliest", "latest"):
        for block in (0, 512):
            with h5py.File(tmp_path / "x.h5", "w", libver=version, userblock_size=block) as file:
                file["flat"] = data
                file.create_dataset("fixed", data=data, chunks=(64,), compression="gzip")
                file.create_dataset("growing", data=data, chunks=(64,), maxshape=(None,), compression="gzip")
                file.create_dataset("single", data=data, chunks=(LENGTH,), compression="gzip")
            with h5py.File(tmp_path / "x.h5") as file, closing(LocalFile(tmp_path / "x.h5")) as local:
                for name in file:
                    assert np.array_equal(open_array(file[name], local)[0:LENGTH], data), (version, block, name)


def test_values_kept_in_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(bytes(40))
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("x", shape=(10,), dtype="i4", external=[(str(tmp_path / "other"), 0, 40)])
    with h5py.File(tmp_path / "x.h5") as file, closing(LocalFile(tmp_path / "x.h5")) as local:
        with pytest.raises(InputError, match="keeps its values in other files"):
            open_array(file["x"], local)


def test_a_chunk_that_blocks_share_is_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four threads read runs of rows that share chunks; the beginning is read without the table of all chunks."""
    monkeypatch.setattr(hdf5_arrays, "FIRST_CHUNKS", 3)
    data = numbers("<i4", (LENGTH,))
    write(tmp_path / "x.h5", data, chunks=(100,), compression="gzip")
    unpacked, lock = [], threading.Lock()
    inflate = hdf5_arrays._Chunks._inflate

    def counted(self: Any, packed: Any) -> Any:
        with lock:
            unpacked.append(len(packed))
        return inflate(self, packed)

    monkeypatch.setattr(hdf5_arrays._Chunks, "_inflate", counted)
    with h5py.File(tmp_path / "x.h5") as file, closing(LocalFile(tmp_path / "x.h5")) as local:
        array = open_array(file["x"], local)
        assert np.array_equal(array[0:150], data[:150]) and len(unpacked) == 2
        with ThreadPoolExecutor(4) as pool:
            parts = list(pool.map(lambda start: array[start : start + 30], range(100, LENGTH, 30)))
    parts.insert(0, data[:100])
    assert np.array_equal(np.concatenate(parts), data) and len(unpacked) == 10


def test_unpacked_chunks_are_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_arrays, "CACHE_BYTES", 5 * 400)
    data = numbers("<i4", (LENGTH * 10,))
    write(tmp_path / "x.h5", data, chunks=(100,), compression="gzip")
    with h5py.File(tmp_path / "x.h5") as file, closing(LocalFile(tmp_path / "x.h5")) as local:
        array = open_array(file["x"], local)
        read = [array[start : start + 30] for start in range(0, LENGTH * 10, 30)]
        assert np.array_equal(np.concatenate(read), data)
        assert len(array._cache._chunks) == 5  # type: ignore[attr-defined]


@pytest.mark.parametrize("form", ["flat", "chunked", "gzip 9", "gzip shuffle", "one chunk"])
def test_a_file_cut_short_while_it_is_open_is_refused(tmp_path: Path, form: str) -> None:
    path = write(tmp_path / "x.h5", np.random.default_rng(0).normal(size=LENGTH), **FORMS[form])
    with h5py.File(path) as file, closing(LocalFile(path)) as local:
        array = open_array(file["x"], local)
        with path.open("r+b") as damaged:
            damaged.truncate(path.stat().st_size - 3000)
        with pytest.raises(InputError, match="x.h5 is truncated or damaged"):
            array[0:LENGTH]


@pytest.mark.parametrize("seed", range(20))
def test_overwritten_compressed_bytes_are_refused(tmp_path: Path, seed: int) -> None:
    data = numbers("<i4", (LENGTH,))
    path = write(tmp_path / "x.h5", data, chunks=(100,), compression="gzip", shuffle=True)
    with h5py.File(path) as file:
        chunk = file["x"].id.get_chunk_info(seed % 10)
    with path.open("r+b") as damaged:
        damaged.seek(chunk.byte_offset + seed)
        byte = damaged.read(1)[0]
        damaged.seek(chunk.byte_offset + seed)
        damaged.write(bytes([byte ^ (1 << seed % 8)]))
    with h5py.File(path) as file, closing(LocalFile(path)) as local:
        try:
            read = open_array(file["x"], local)[0:LENGTH]
        except InputError as error:
            assert "x.h5 is truncated or damaged" in str(error)
        else:  # a bit of the stream's header that says nothing about the values
            assert np.array_equal(read, data)


def test_a_stream_that_holds_more_than_the_chunk_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.h5", np.zeros(100, dtype="u1"), chunks=(100,), compression="gzip")
    with h5py.File(path, "r+") as file:
        file["x"].id.write_direct_chunk((0,), zlib.compress(bytes(10**7)))
    with h5py.File(path) as file, closing(LocalFile(path)) as local:
        with pytest.raises(InputError, match="truncated or damaged"):
            open_array(file["x"], local)[0:100]
