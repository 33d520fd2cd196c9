"""A zarr store that is looked at while it is read: no pickled, lost or cut chunks, a sentence for a lost network.

zarr leaves out chunks that hold zeros only, so it reads a lost chunk as zeros; `CheckedStore.require` names the arrays
in which that is refused.
"""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

from zarr.abc.store import ByteRequest, RangeByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import WrapperStore

from celltron.cells.ingest.damage import damaged
from celltron.cells.ingest.remote import ATTEMPTS, FIRST_WAIT_SECONDS, is_address, network
from celltron.core import InputError

METADATA = ("zarr.json", ".zgroup", ".zarray", ".zattrs", ".zmetadata")
BLOSC_HEADER = 16  # bytes; the last four are the length of the chunk


class CheckedStore(WrapperStore[Store]):
    """A read-only zarr store known to the user as ``name``."""

    def __init__(self, store: Store, name: str = "") -> None:
        super().__init__(store)
        self.name = name
        self._required: set[str] = set()
        self._blosc: set[str] = set()

    def require(self, path: str) -> None:
        """Refuse missing chunks of the array at ``path`` from now on."""
        self._required.add(path.strip("/"))

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """The content of a key, None where there is none."""
        found = await self._get(key, prototype, byte_range)
        if key.rsplit("/", 1)[-1] in METADATA:
            if found is not None:
                self._look_at_arrays(key, found.to_bytes())
        elif found is None:
            if self._is_below(key, self._required):
                raise InputError(
                    f"{self.name} lacks its chunk {key}: copy or download it again, or, if all of it is zero, write it "
                    "with zarr.config.set({'array.write_empty_chunks': True})"
                )
        elif self._is_cut(key, found, byte_range):
            raise damaged(self.name, f"{key} ends too early")
        return found

    @staticmethod
    def _is_below(key: str, paths: set[str]) -> bool:
        return any(key.startswith(f"{path}/") for path in paths)

    def _is_cut(self, key: str, found: Buffer, byte_range: ByteRequest | None) -> bool:
        """Whether less was read than should be there; blosc unpacks the beginning of a chunk without complaint."""
        if isinstance(byte_range, RangeByteRequest):
            return len(found) != byte_range.end - byte_range.start
        if byte_range is not None or not self._is_below(key, self._blosc):
            return False
        return len(found) != int.from_bytes(found[:BLOSC_HEADER].to_bytes()[12:], "little")

    async def _get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None) -> Buffer | None:
        if not is_address(self.name):
            return await super().get(key, prototype, byte_range)
        for attempt in range(ATTEMPTS - 1):
            try:
                return await super().get(key, prototype, byte_range)
            except PermissionError:
                break
            except Exception:  # each protocol's library has its own; the last attempt below says what it was
                await asyncio.sleep(FIRST_WAIT_SECONDS * 4**attempt)
        with network(self.name):
            return await super().get(key, prototype, byte_range)

    def _look_at_arrays(self, key: str, content: bytes) -> None:
        """Note how chunks are packed, and refuse those that unpickle: reading them would run code out of the file."""
        try:
            document = json.loads(content)
        except ValueError as error:
            raise InputError(f"{self.name} is damaged: its {key} is no JSON; copy it again") from error
        for path, entry in _arrays(key, document):
            codecs = _codec_names([entry.get(part) for part in ("filters", "compressor", "codecs")])
            if any("pickle" in name for name in codecs):
                raise InputError(f"{self.name} holds pickled chunks ({path}), which could run code: write it anew")
            if any("blosc" in name for name in codecs) and "sharding_indexed" not in codecs:
                self._blosc.add(path)

    def close(self) -> None:
        """Let go of the store."""
        if self._store._is_open:
            super().close()


def _arrays(key: str, document: Any) -> Iterator[tuple[str, Any]]:
    """The path and the description of each array that a metadata document is about."""
    folder, _, name = key.rpartition("/")
    if name == ".zarray":
        yield folder, document
    elif name == ".zmetadata":
        for place, entry in document["metadata"].items():
            if place.rpartition("/")[2] == ".zarray":
                yield f"{folder}/{place.rpartition('/')[0]}".strip("/"), entry
    elif name == "zarr.json":
        inner = (document.get("consolidated_metadata") or {}).get("metadata", {})
        for place, entry in [("", document), *inner.items()]:
            if entry.get("node_type") == "array":
                yield f"{folder}/{place}".strip("/"), entry


def _codec_names(node: Any) -> list[str]:
    """The names of all codecs in a description, those inside shards too."""
    if isinstance(node, list):
        return [name for part in node for name in _codec_names(part)]
    if not isinstance(node, dict):
        return []
    names = [str(node[key]).lower() for key in ("id", "name") if key in node]
    return names + [name for part in node.values() for name in _codec_names(part)]
