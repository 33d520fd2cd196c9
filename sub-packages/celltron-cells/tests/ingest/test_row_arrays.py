from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from celltron.cells.ingest.row_arrays import ChunkedArray, FlatArray, LocalFile
from celltron.core import InputError


def test_a_flat_array_in_a_file(tmp_path: Path) -> None:
    data = np.arange(60, dtype=">i4").reshape(20, 3)
    (tmp_path / "a").write_bytes(b"head" + data.tobytes())
    with closing(LocalFile(tmp_path / "a")) as file:
        array = FlatArray(file, 4, data.dtype, data.shape)
        assert np.array_equal(array[3:7], data[3:7]) and array[3:7].dtype == np.int32
        assert np.array_equal(array[3:7, 1:2], data[3:7, 1:2])
        assert array[20:25].shape == (0, 3) and array[0:20].flags.writeable
        for offset, shape in ((5, (20, 3)), (-1, (1, 3)), (4, (21, 3))):
            with pytest.raises(InputError, match="truncated or damaged .it names bytes"):
                FlatArray(file, offset, data.dtype, shape)


def test_a_chunk_that_cannot_be_loaded_is_asked_for_again() -> None:
    """An error reaches the caller and is not kept."""
    failures = [InputError("no luck")]

    def load(numbers: list[int]) -> list[np.ndarray]:
        if failures:
            raise failures.pop()
        return [np.arange(number * 10, number * 10 + 10) for number in numbers]

    array = ChunkedArray((95,), np.dtype(np.int64), (10,), load)
    with pytest.raises(InputError, match="no luck"):
        array[5:25]
    assert np.array_equal(array[5:25], np.arange(5, 25)) and np.array_equal(array[88:95], np.arange(88, 95))


def test_only_chunks_that_blocks_share_are_kept() -> None:
    asked: list[int] = []

    def load(numbers: list[int]) -> list[np.ndarray]:
        asked.extend(numbers)
        return [np.arange(number * 10, number * 10 + 10) for number in numbers]

    array = ChunkedArray((95,), np.dtype(np.int64), (10,), load)
    for start, stop in ((0, 25), (25, 50), (50, 95), (0, 95)):
        assert np.array_equal(array[start:stop], np.arange(start, stop))
    assert asked == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
