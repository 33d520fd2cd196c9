"""More sources added to a store as whole new shards: until its manifest is replaced, the store is the old one.

New shards are made in the folder ``.append`` of the store and moved to their numbers at the end. What an append that
broke off left there is gone on with by the same command, and no reader looks at it.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from celltron.cells.convert import (
    ConversionReport,
    describe,
    make_report,
    open_pool,
    set_num_cells,
    tell_how_to_go_on,
    with_how_to_go_on,
)
from celltron.cells.convert_plan import Base, ConvertOptions, Plan, make_plan
from celltron.cells.convert_work import WORK, Progress, Workplace, Written, write_shards
from celltron.cells.gene_map import join_arrays, set_unmapped_names, unmapped_names
from celltron.cells.ingest.remote import UnreachableError
from celltron.cells.map_rows import Types, widest
from celltron.cells.obs_schema import OWN_COLUMNS
from celltron.cells.shard import shard_folder
from celltron.cells.store import CellStore, read_table
from celltron.cells.store_manifest import FORMAT, VERSION
from celltron.cells.store_writer import write_tables
from celltron.cells.threads import num_workers
from celltron.core import MANIFEST_NAME, InputError, write_atomically
from celltron.core.artefact import new_manifest, write_manifest
from celltron.core.durable import lock_folder, name_file_in_errors, sync_folder, sync_tree

FOLDER = ".append"
DONE = "done.json"
_SHARD = re.compile(r"\d{5,}")
_GENES = re.compile(r"genes(?:\.(\d{5,}))?\.parquet")
_STRAY_MANIFEST = re.compile(r"\.manifest\.json\.[0-9a-f]+\.tmp")


def append(
    store: str | Path,
    sources: str | Path | Sequence[str | Path],
    *,
    workers: int | None = None,
    storage: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> ConversionReport:
    """Add sources of counts to a store, as shards of their own after those that are there.

    Genes that the store lacks come after its own, so that gene indices stay what they are. The store stays readable as
    it was until it is the new one, in one step; readers that opened it before go on with what they opened. A run that
    is stopped or killed changes nothing, and the same call goes on from the shards that are complete.

    Args:
        store: a store of the newest version.
        sources: files, folders, patterns or addresses, as `convert` takes them.
        workers: shards written at once; None takes one a processor. The store does not depend on it.
        storage: options for fsspec's file systems of addresses.
        progress: called with (cells done, cells in all of the new ones) after each block, in this thread.
        **options: how counts are read: the fields of `ConvertOptions`. The species must be the store's and need not be
            named; values that are not whole numbers need ``allow_floats``, whatever the store holds.
    """
    began = time.monotonic()
    path = Path(store)
    workers = num_workers(workers)
    _open(path)  # tells what is wrong with the path better than a lock would
    with tell_how_to_go_on(path), _lock(path):
        old = _open(path)
        checked = _check_options(old, options)
        place = Workplace(path / FOLDER)
        with open_pool(sources, checked, place, storage, workers) as pool:
            plan = make_plan(pool, checked, _base_of(old), workers)
            report = _report_of_done(old, plan, place)
            if report is None:
                _check_new(old, plan, pool.specs)
                with _clear_on_error(old, place):
                    _gather_strays(old, place)
                    is_dropped = place.adopt(plan)
                    try:
                        written = write_shards(plan, pool, place, workers=workers, progress=progress)
                    except UnreachableError as error:
                        raise with_how_to_go_on(error, path) from error
                    report = _commit(old, plan, written, place, is_dropped=is_dropped, began=began)
        _clear(place)
    return report


def _open(path: Path) -> CellStore:
    store = CellStore.open(path)
    if store.manifest["version"] != VERSION:
        raise InputError(
            f"{path} is a store of version {store.manifest['version']}, to which nothing can be added: convert its "
            "sources again"
        )
    for key in ("total_counts", "summed_columns"):
        if not isinstance(store.manifest.get(key), int | float):
            raise InputError(f"{path / MANIFEST_NAME} is damaged: {key} must be a number; convert the files again")
    return store


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    lock = lock_folder(path)
    if lock is False:
        raise InputError(f"{path} is being added to by another process: wait for it")
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


def _check_options(store: CellStore, options: Mapping[str, Any]) -> ConvertOptions:
    checked = ConvertOptions(**({"species": store.species} | dict(options)))
    if checked.species != store.species:
        raise InputError(
            f"species is {checked.species!r}, but {store.path} holds {store.species} genes: leave species out, or "
            "convert to a store of its own and open both together"
        )
    return checked


def _base_of(store: CellStore) -> Base:
    types: dict[str, pa.DataType] = {}
    for i in range(store.num_shards):
        path = shard_folder(store.path, i) / "obs.parquet"
        try:
            schema = pq.read_schema(path)
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{path} is damaged: it is no parquet file; convert the files again") from error
        types |= {name: schema.field(name).type for name in schema.names if name not in OWN_COLUMNS}
    return Base(
        gene_ids=store.gene_ids,
        obs_types=types,
        source_names=[str(source["name"]) for source in store.manifest["sources"]],
        num_shards=store.num_shards,
        fingerprint=str(store.manifest["manifest_sha256"]),
    )


def _request_of(plan: Plan) -> dict[str, Any]:
    """What was asked for, whatever the store already held."""
    description = plan.description()
    sources = [{name: source[name] for name in ("cells", "matrix", "identity")} for source in description["sources"]]
    return {"options": description["options"], "sources": sources}


def _report_of_done(store: CellStore, plan: Plan, place: Workplace) -> ConversionReport | None:
    """The report of the same append, if it had come to its end but for tidying up when it broke off."""
    try:
        done = json.loads((place.folder / DONE).read_text(encoding="utf-8"))
        if done["manifest_sha256"] == store.manifest["manifest_sha256"] and done["request"] == _request_of(plan):
            return ConversionReport(**done["report"])
    except (OSError, ValueError, TypeError, LookupError):
        pass
    return None


def _check_new(store: CellStore, plan: Plan, specs: Sequence[str]) -> None:
    """Refuse a source that the store holds already: the same cells would be in it twice."""
    keys = ("cells", "bytes", "matrix")
    before = [source for source in store.manifest["sources"] if "bytes" in source]
    there = {(Path(source["name"]).name, *(source[key] for key in keys)) for source in before}
    for spec, source in zip(specs, plan.sources, strict=True):
        if (Path(spec).name, *(source.get(key) for key in keys)) in there:
            raise InputError(
                f"{spec} is in {store.path} already ({source['cells']:,} cells, {source['bytes']:,} bytes): leave it "
                "out, or rename it if its cells are others"
            )


def _gather_strays(store: CellStore, place: Workplace) -> None:
    """Put back what a broken-off append had moved into the store, and remove what nothing lists any more."""
    place.folder.mkdir(exist_ok=True)
    (place.folder / DONE).unlink(missing_ok=True)
    (place.folder / "shards").mkdir(exist_ok=True)
    listed = {f"{i:05d}" for i in range(store.num_shards)}
    for folder in (store.path / "shards").iterdir():
        if folder.name not in listed and _SHARD.fullmatch(folder.name):
            target = place.folder / "shards" / folder.name
            shutil.rmtree(target, ignore_errors=True)
            folder.rename(target)
    for file in store.path.iterdir():
        is_old_table = _GENES.fullmatch(file.name) and file.name != store.manifest["gene_file"]
        if is_old_table or _STRAY_MANIFEST.fullmatch(file.name):
            file.unlink()


@contextlib.contextmanager
def _clear_on_error(store: CellStore, place: Workplace) -> Iterator[None]:
    """What is wrong with the sources or the disk leaves the store as it was.

    Ctrl-C and a lost network leave the shards that are complete, too.
    """
    try:
        with name_file_in_errors(store.path, only=(errno.ENOSPC, errno.EDQUOT)):
            yield
    except UnreachableError:
        raise
    except Exception as error:
        if _is_unchanged(store):
            _gather_strays(store, place)
        elif not (place.folder / DONE).exists():  # written right before the manifest is replaced
            raise _replaced(store) from error
        _clear(place)
        raise


def _replaced(store: CellStore) -> InputError:
    return InputError(f"{store.path} was replaced meanwhile: add the sources to the store that is there now")


def _is_unchanged(store: CellStore) -> bool:
    """Whether the manifest is still the one that was opened."""
    try:
        manifest = json.loads((store.path / MANIFEST_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(manifest.get("manifest_sha256") == store.manifest["manifest_sha256"])


def _commit(
    store: CellStore, plan: Plan, written: Written, place: Workplace, *, is_dropped: bool, began: float
) -> ConversionReport:
    """Move the new shards to their numbers and replace the manifest."""
    gene_file = _next_gene_file(store.manifest["gene_file"])
    genes, num_unmapped = _all_genes(store, plan)
    new_files = written.files(store.num_shards)
    new_files |= {gene_file: write_tables([set_num_cells(genes, written)], place.folder / gene_file)}
    report = make_report(
        store.path,
        plan,
        written,
        num_bytes=sum(entry["bytes"] for entry in new_files.values()),
        seconds=time.monotonic() - began,
        is_dropped=is_dropped,
        cells_before=len(store),
    )
    sync_tree(place.folder, leave_out=(WORK,))
    if not _is_unchanged(store):
        raise _replaced(store)
    for shard in plan.shards:
        shard_folder(place.folder, shard).rename(shard_folder(store.path, shard))
    (place.folder / gene_file).rename(store.path / gene_file)
    sync_folder(store.path / "shards")
    done = {"request": _request_of(plan), "report": asdict(report)}
    manifest = new_manifest(
        format=FORMAT,
        version=VERSION,
        meta=_merge(store.manifest, describe(plan, written)) | {"gene_file": gene_file, "unmapped_genes": num_unmapped},
        files={name: file for name, file in store.manifest["files"].items() if name != store.manifest["gene_file"]}
        | new_files,
    )
    done["manifest_sha256"] = manifest["manifest_sha256"]
    write_atomically(place.folder / DONE, json.dumps(done))
    write_manifest(store.path, manifest)
    return report


def _next_gene_file(name: str) -> str:
    match = _GENES.fullmatch(name)
    number = int(match[1]) if match and match[1] else 0
    return f"genes.{number + 1:05d}.parquet"


def _all_genes(store: CellStore, plan: Plan) -> tuple[pa.Table, int]:
    """The store's table of genes with the new ones below it, and how many names of all sources have no Ensembl id."""
    path = store.path / store.manifest["gene_file"]
    old, new = read_table(path), plan.genes.table()
    if "num_cells" not in old.column_names or old["num_cells"].type != pa.int64() or old["num_cells"].null_count:
        raise InputError(f"{path} is damaged: it has no whole numbers num_cells; convert the files again")
    unmapped, num_unmapped = unmapped_names(old) or [], store.manifest["unmapped_genes"]
    if len(unmapped) != num_unmapped:
        raise InputError(
            f"{path} does not name its {num_unmapped} genes without an Ensembl id: convert the files again"
        )
    unmapped = list(dict.fromkeys([*unmapped, *plan.genes.unmapped]))
    names = dict.fromkeys([*old.column_names, *new.column_names])

    def column(table: pa.Table, name: str) -> pa.Array:
        return table[name].combine_chunks() if name in table.column_names else pa.nulls(table.num_rows)

    table = pa.table({name: join_arrays([column(old, name), column(new, name)]) for name in names})
    return set_unmapped_names(table, unmapped), len(unmapped)


def _merge(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """What the manifest says of old and new shards together."""
    summed = ("cells", "nnz", "total_counts", "summed_columns")
    types = widest(*(Types(meta["dtypes"]["indices"], meta["dtypes"]["counts"]) for meta in (old, new)))
    merged = {**new, **{name: old[name] + new[name] for name in summed}}
    unmapped = sum(meta["unmapped_fraction"] * meta["total_counts"] for meta in (old, new))
    merged["unmapped_fraction"] = unmapped / merged["total_counts"] if merged["total_counts"] else 0.0
    merged["sources"] = [*old["sources"], *new["sources"]]
    merged["dtypes"] = new["dtypes"] | types._asdict()
    merged["shards"] = [*old["shards"], *new["shards"]]
    return merged


def _clear(place: Workplace) -> None:
    """Remove the folder of an append; what says that it is done goes last."""
    for name in (WORK, "shards"):
        shutil.rmtree(place.folder / name, ignore_errors=True)
    shutil.rmtree(place.folder, ignore_errors=True)
