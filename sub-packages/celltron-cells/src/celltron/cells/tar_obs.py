"""One column of obs out of the parquet files beside the tars: only its ranges are fetched, in pieces with checksums."""

import io
import zlib
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from celltron.cells.obs_union import obs_frame
from celltron.cells.tar_files import Bytes, TarFiles
from celltron.cells.tar_format import OBS_PIECE_BYTES, obs_name
from celltron.cells.threads import map_in_order
from celltron.core import InputError


class _CheckedFile(io.RawIOBase):
    """A file read in pieces, each of which is held against its checksum."""

    def __init__(self, files: TarFiles, file: str, length: int, checksums: list[int]) -> None:
        super().__init__()
        self._files, self._file, self._length, self._checksums = files, file, length, checksums
        self._place = 0
        self._pieces: dict[int, Bytes] = {}

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._length}[whence]
        return self._place

    def readinto(self, buffer: Any, /) -> int:
        target = memoryview(buffer).cast("B")
        i, skip = divmod(self._place, OBS_PIECE_BYTES)
        if self._place >= self._length:
            return 0
        piece = self._piece(i)[skip : skip + len(target)]
        target[: len(piece)] = piece.data
        self._place += len(piece)
        return len(piece)

    def _piece(self, i: int) -> Bytes:
        if i not in self._pieces:
            begin = i * OBS_PIECE_BYTES
            data = self._files.read_range(self._file, begin, min(OBS_PIECE_BYTES, self._length - begin))
            if zlib.crc32(data.data) != self._checksums[i]:
                raise InputError(
                    f"{self._files.where(self._file)} does not fit its checksum between bytes {begin} and "
                    f"{begin + len(data)}: copy the file again"
                )
            self._pieces[i] = data
        return self._pieces[i]


def read_obs_column(files: TarFiles, manifest: dict[str, Any], name: str, workers: int) -> "pd.Series[Any]":
    """A column over the cells of all tars."""

    def read(i: int) -> pa.Table:
        shard, file = manifest["shards"][i], obs_name(i)
        stream = io.BufferedReader(
            _CheckedFile(files, file, manifest["files"][file]["bytes"], shard["obs_crc32"]), OBS_PIECE_BYTES
        )
        try:
            table = pq.ParquetFile(pa.PythonFile(stream, mode="r")).read([name], use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{files.where(file)} is no parquet file ({error}): write the shards again") from error
        if name not in table.column_names or table.num_rows != shard["cells"]:
            raise InputError(
                f"{files.where(file)} is damaged: wanted {name} of {shard['cells']} cells; write the shards again"
            )
        return table.select([name])  # arrow takes "a.b" for a part of "a" and reads it too

    tables = list(map_in_order(read, range(len(manifest["shards"])), workers))
    if not tables:
        return pd.Series([], name=name, dtype=object)
    try:
        whole = pa.concat_tables(tables).unify_dictionaries()
    except pa.ArrowException as error:
        raise InputError(
            f"{files.name} is damaged: its obs files have {name} in different types; write the shards again"
        ) from error
    return obs_frame(whole)[name]
