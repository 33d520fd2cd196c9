"""A table (obs or var) as anndata stores it in HDF5 or zarr, read column by column in runs of rows, as arrow arrays."""

from collections.abc import Callable
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pyarrow as pa

from celltron.cells.ingest.damage import damaged, reading
from celltron.core import InputError

Reader = Callable[[int, int], pa.Array]
CATEGORY = pa.dictionary(pa.int32(), pa.string())


class AnndataFrame:
    """A table of an open file or store.

    ``readers`` maps a column's name to a function (start, stop) -> arrow array; categories come as dictionaries of
    text, whatever is not a number, a truth value, text or a category comes as text. ``notes`` says which columns were
    turned into text, by name.

    Args:
        node: the group that holds the table, of h5py or zarr; for files of old releases also an HDF5 table.
        name: the source's name, for messages.
    """

    def __init__(self, node: Any, name: str) -> None:
        self.notes: dict[str, str] = {}
        self.readers: dict[str, Reader] = {}
        self._name = name
        version = None if is_array(node) else node.attrs.get("encoding-version")
        if version == "0.2.0":
            index = str(node.attrs["_index"])
            self._index = element_reader(node[index])[0]
            for column in (str(column) for column in node.attrs["column-order"]):
                if column != index:
                    self._add(column, *element_reader(node[column]))
            self.num_rows = _length(node[index])
            for column in self.readers:
                if _length(node[column]) != self.num_rows:
                    raise damaged(name, f"column {column!r} has {_length(node[column])} of {self.num_rows} rows")
        else:  # files of anndata before 0.7.2: anndata knows how to read them, whole
            frame = _read_old_frame(node, name)
            self._index = _series_reader(frame.index.to_series())[0]
            for column in frame.columns:
                self._add(str(column), *_series_reader(frame[column]))
            self.num_rows = len(frame)

    def _add(self, name: str, reader: Reader, note: str) -> None:
        self.readers[name] = reader
        if note:
            self.notes[name] = note

    @property
    def columns(self) -> list[str]:
        """The column names, the index left out."""
        return list(self.readers)

    def index(self, start: int = 0, stop: int | None = None) -> pa.Array:
        """The row names as text."""
        with reading(self._name):
            return as_text(self._index(start, self.num_rows if stop is None else stop))

    def column(self, name: str, start: int = 0, stop: int | None = None) -> pa.Array:
        """A run of one column."""
        with reading(self._name):
            return self.readers[name](start, self.num_rows if stop is None else stop)


def as_text(array: pa.Array) -> pa.Array:
    """Any arrow array as text; whole numbers without a decimal point, missing values stay missing."""
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    return array if array.type == pa.string() else array.cast(pa.string())


def is_array(node: Any) -> bool:
    """Whether a node of h5py or zarr is an array and not a group."""
    return hasattr(node, "dtype")


def _length(node: Any) -> int:
    if not is_array(node):
        node = node["codes" if "codes" in node else "values"]
    return int(node.shape[0])


def _is_text(node: Any) -> bool:
    if isinstance(node, h5py.Dataset):
        return h5py.check_string_dtype(node.dtype) is not None or node.dtype.kind == "S"
    return node.dtype.kind in "TU" or node.attrs.get("encoding-type") == "string-array"


def element_reader(node: Any) -> tuple[Reader, str]:
    """The reader for one column, by its anndata encoding, and what was done to it, if anything."""
    if is_array(node):
        if _is_text(node):
            return lambda start, stop: _text_array(node[start:stop]), ""
        if node.dtype.kind in "iufb" and node.ndim == 1 and "categories" not in node.attrs:
            return lambda start, stop: pa.array(_plain(node[start:stop])), ""
    else:
        encoding = str(node.attrs.get("encoding-type", ""))
        if encoding == "categorical":
            words, note = _words(pd.Index(anndata.io.read_elem(node["categories"])))
            codes = node["codes"]
            return lambda start, stop: _dictionary(codes[start:stop], words), note
        if encoding.startswith("nullable-"):
            values, mask = node["values"], node["mask"]
            if encoding in ("nullable-integer", "nullable-boolean"):
                return lambda start, stop: pa.array(_plain(values[start:stop]), mask=mask[start:stop]), ""
            if encoding == "nullable-string-array":
                return lambda start, stop: _text_array(values[start:stop], mask[start:stop]), ""
    return _series_reader(pd.Series(anndata.io.read_elem(node)))


def _words(categories: "pd.Index[Any]") -> tuple[pa.Array, str]:
    note = "" if all(isinstance(word, str) for word in categories) else "categories that are not text"
    return pa.array([str(word) for word in categories], type=pa.string()), note


def _plain(values: Any) -> Any:
    return values.astype(np.float32) if values.dtype == np.float16 else values.astype(values.dtype.newbyteorder("="))


def _text_array(values: Any, mask: Any = None) -> pa.Array:
    if values.dtype.kind in "TU":  # zarr's text
        return pa.array(values.tolist(), type=pa.string(), mask=mask)
    try:
        return pa.array(values, type=pa.binary(), mask=mask).cast(pa.string())
    except (pa.ArrowInvalid, pa.ArrowTypeError):  # broken UTF-8, or more than text
        words = [word.decode("utf-8", "replace") if isinstance(word, bytes) else str(word) for word in values]
        return pa.array(words, type=pa.string(), mask=mask)


def _dictionary(codes: Any, words: pa.Array) -> pa.Array:
    codes = codes.astype(np.int64)
    missing = (codes < 0) | (codes >= len(words))
    indices = pa.array(np.where(missing, 0, codes).astype(np.int32), mask=missing)
    return pa.DictionaryArray.from_arrays(indices, words)


def _series_reader(series: "pd.Series[Any]") -> tuple[Reader, str]:
    """A column held in memory; what arrow has no one type for becomes text."""
    if isinstance(series.dtype, pd.CategoricalDtype):
        words, note = _words(series.cat.categories)
        codes = series.cat.codes.to_numpy()
        return lambda start, stop: _dictionary(codes[start:stop], words), note
    if series.dtype.kind in "iufb":
        return lambda start, stop: pa.array(_plain(series.to_numpy()[start:stop])), ""
    missing = series.isna().to_numpy()
    values = series.to_numpy(dtype=object)
    is_text = all(isinstance(value, str) for value in values[~missing])
    note = "" if is_text else "values of several kinds"
    return lambda start, stop: _text_array(values[start:stop], missing[start:stop]), note


def _read_old_frame(node: Any, source: str) -> pd.DataFrame:
    if not is_array(node) and "encoding-type" in node.attrs:
        return pd.DataFrame(anndata.io.read_elem(node))
    if not isinstance(node, h5py.Dataset | h5py.Group) or node.file.driver == "fileobj":
        raise InputError(
            f"{source} has tables of anndata before 0.7.2: read a copy here with anndata and write it again"
        )
    whole = anndata.read_h5ad(node.file.filename, backed="r")
    try:
        raw = node.name.startswith(("/raw/", "/raw."))
        holder: Any = whole.raw if raw else whole
        return pd.DataFrame(holder.obs if node.name.endswith("obs") else holder.var)
    finally:
        whole.file.close()
