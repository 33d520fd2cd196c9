"""The names of cells or genes as datasets of an HDF5 file, one a column, read in runs of rows."""

from collections.abc import Callable, Mapping

import h5py
import numpy as np
import pyarrow as pa

from celltron.cells.ingest.anndata_frame import Reader, as_text, element_reader
from celltron.cells.ingest.damage import damaged, reading


class DatasetFrame:
    """A table whose columns are datasets [R] of numbers or text; see `celltron.cells.ingest.source.Frame`.

    Args:
        name: the source's name, for messages.
        num_rows: R.
        index: the dataset of the row names; None numbers the rows.
        columns: the datasets by column name.
        decode: applied to each run of text.
    """

    def __init__(
        self,
        name: str,
        num_rows: int,
        index: h5py.Dataset | None,
        columns: Mapping[str, h5py.Dataset],
        decode: Callable[[pa.Array], pa.Array] | None = None,
    ) -> None:
        self.num_rows = num_rows
        self.notes: dict[str, str] = {}
        self._name, self._decode = name, decode
        with reading(name):
            self._index = self._reader(index) if index is not None else _numbered
            self._readers = {column: self._reader(dataset) for column, dataset in columns.items()}

    def _reader(self, dataset: h5py.Dataset) -> Reader:
        if dataset.shape != (self.num_rows,) or not is_plain(dataset):
            kind = f"{dataset.dtype} of the shape {dataset.shape}"
            raise damaged(self._name, f"{dataset.name} is {kind}, wanted texts or numbers for {self.num_rows} rows")
        return element_reader(dataset)[0]

    @property
    def columns(self) -> list[str]:
        """The column names."""
        return list(self._readers)

    def index(self, start: int = 0, stop: int | None = None) -> pa.Array:
        """The row names as text."""
        return as_text(self._read(self._index, start, stop))

    def column(self, name: str, start: int = 0, stop: int | None = None) -> pa.Array:
        """A run of one column."""
        return self._read(self._readers[name], start, stop)

    def _read(self, read: Reader, start: int, stop: int | None) -> pa.Array:
        with reading(self._name):
            array = read(start, self.num_rows if stop is None else min(stop, self.num_rows))
            return array if self._decode is None or array.type != pa.string() else self._decode(array)


def is_plain(dataset: h5py.Dataset) -> bool:
    """Whether a dataset holds numbers, truth values or texts."""
    return dataset.dtype.kind in "iufb" or h5py.check_string_dtype(dataset.dtype) is not None


def _numbered(start: int, stop: int) -> pa.Array:
    return pa.array(np.arange(start, stop)).cast(pa.string())
