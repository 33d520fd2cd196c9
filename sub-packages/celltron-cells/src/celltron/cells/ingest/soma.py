"""A SOMA experiment (TileDB-SOMA), a folder or behind an address, as a source of counts."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import numpy as np

from celltron.cells.ingest.matrix_source import MatrixSource, looks_like_counts
from celltron.cells.ingest.remote import is_address
from celltron.cells.ingest.soma_arrays import (
    JOIN_ID,
    Ids,
    SomaFrame,
    SomaRows,
    is_soma_error,
    read_ids,
    soma_matrix,
    soma_reading,
    soma_words,
)
from celltron.cells.ingest.source import ObsmArray, SourceOptions
from celltron.cells.ingest.tree_identity import identity_of_tree
from celltron.core import InputError

RAW = "raw"
"""Where `tiledbsoma.io` puts anndata's raw, as a measurement of its own; in the Census, the layer of counts."""
CELL_NAMES, GENE_NAMES = ("obs_id",), ("var_id", "feature_id")
ORIGINAL_NAME = "soma_dataframe_original_index_name"  # of the row names, kept by tiledbsoma.io
WIDEST_OBSM = 2**14
CONFIG = {"soma.init_buffer_bytes": str(2**24)}
"""TileDB's room for each column that is read; its own default is 2^30 bytes."""
S3_KEYS = {
    "anon": "vfs.s3.no_sign_request",
    "key": "vfs.s3.aws_access_key_id",
    "secret": "vfs.s3.aws_secret_access_key",
    "token": "vfs.s3.aws_session_token",
    "endpoint_url": "vfs.s3.endpoint_override",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What to take from an experiment that the user knows as ``name``."""

    name: str
    measurement: str | None = None
    """None takes the one that there is (raw aside), or RNA."""
    layer: str | None = None
    """None takes the one that there is, or ``raw``, or ``data``."""
    obs_filter: str | None = None
    """TileDB's value filter; None takes all cells."""
    obs_columns: Sequence[str] | None = None
    """None takes all."""


def open_soma(spec: str, options: SourceOptions) -> MatrixSource:
    """Open an experiment: ``soma://PATH``, ``soma+s3://BUCKET/PATH``, or the path of its folder.

    A query names what to take: ``soma://PATH?measurement=RNA&layer=raw``, percent-encoded; ``options.layer`` names the
    layer too, and ``options.use_raw`` the measurement in which `tiledbsoma.io` keeps anndata's raw. Rows are found by
    ``soma_joinid``, which may have gaps. Options for fsspec's S3 are handed on to TileDB, and so are keys like
    ``vfs.s3.region``.

    Source: the SOMA data model, https://github.com/single-cell-data/SOMA
    """
    address, query = split_query(spec, ("measurement", "layer"))
    uri = unquote(address.split("://", 1)[1]) if address.startswith("soma://") else address.removeprefix("soma+")
    view = _view(spec, query, options)
    experiment = open_experiment(spec, uri, options.storage)
    storage = {key: value for key, value in (options.storage or {}).items() if "." not in key}
    try:
        return experiment_source(
            experiment, view, identity=lambda: identity_of_tree(uri, storage), close=experiment.close
        )
    except BaseException:
        experiment.close()
        raise


def split_query(spec: str, known: Sequence[str]) -> tuple[str, dict[str, str]]:
    """An address and its query, ``ADDRESS?key=value&…``, unquoted; a plus sign stays one.

    >>> split_query("census://homo_sapiens?obs=cell_type == 'T%26NK+'", ["obs"])
    ('census://homo_sapiens', {'obs': "cell_type == 'T&NK+'"})
    """
    address, _, text = spec.partition("?")
    query: dict[str, str] = {}
    for part in filter(None, text.split("&")):
        key, sign, value = part.partition("=")
        if not sign or key not in known or key in query:
            raise InputError(
                f"{spec} has the part {part!r}: wanted each of {', '.join(known)} at most once, as key=value, with & "
                "in a value written %26"
            )
        query[key] = unquote(value)
    return address, query


def _view(spec: str, query: Mapping[str, str], options: SourceOptions) -> View:
    if options.use_raw and query.get("measurement", RAW) != RAW:
        raise InputError(f"both --use-raw and measurement={query['measurement']} were asked of {spec}: choose one")
    if options.layer is not None and query.get("layer", options.layer) != options.layer:
        raise InputError(f"both --layer {options.layer} and layer={query['layer']} were asked of {spec}: choose one")
    measurement = RAW if options.use_raw else query.get("measurement")
    return View(name=spec, measurement=measurement, layer=options.layer or query.get("layer"))


def open_experiment(spec: str, uri: str, storage: Mapping[str, Any] | None) -> Any:
    """The open experiment at a path or address."""
    try:
        import tiledbsoma
    except ImportError as error:
        raise InputError(f"{spec} needs tiledbsoma: pip install 'celltron-cells[soma]'") from error
    if not is_address(uri) and not os.path.isdir(uri):
        raise InputError(f"no folder at {uri}: wanted a SOMA experiment, check the name")
    config = tiledb_config(spec, storage if is_address(uri) else None)
    context = tiledbsoma.SOMATileDBContext(tiledb_config=config)
    try:
        with soma_reading(spec):
            found = tiledbsoma.open(uri, context=context)
    except InputError as error:
        if isinstance(error.__cause__, tiledbsoma.DoesNotExistError):
            raise InputError(f"{spec} holds no SOMA experiment: check the name") from error
        raise
    if found.soma_type != "SOMAExperiment":
        there = found.soma_type
        found.close()
        raise InputError(f"{spec} is a {there}: wanted a SOMAExperiment, name one that is in it or that it is in")
    return found


def tiledb_config(spec: str, storage: Mapping[str, Any] | None) -> dict[str, str | float]:
    """TileDB's settings: ours, and fsspec's options for S3 translated."""
    config: dict[str, str | float] = dict(CONFIG)
    for key, value in (storage or {}).items():
        if key not in S3_KEYS and "." not in key:
            raise InputError(
                f"{spec} does not know the storage option {key!r}: wanted {', '.join(S3_KEYS)} or a key of TileDB's "
                "such as vfs.s3.region"
            )
        config[S3_KEYS.get(key, key)] = str(value).lower() if isinstance(value, bool) else str(value)
    endpoint = str(config.get("vfs.s3.endpoint_override", ""))
    if is_address(endpoint):
        scheme, host = endpoint.split("://", 1)
        config["vfs.s3.endpoint_override"] = host.rstrip("/")
        config |= {"vfs.s3.scheme": scheme, "vfs.s3.use_virtual_addressing": "false"}
    return config


def experiment_source(
    experiment: Any, view: View, *, identity: Callable[[], dict[str, Any]], close: Callable[[], None]
) -> MatrixSource:
    """An open experiment as a source; ``identity`` and ``close`` are those of it."""
    with soma_reading(view.name):
        name = _choose("measurement", view.measurement, list(experiment.ms.keys()), ("RNA",), view.name)
        measurement = experiment.ms[name]
        layer = _choose("layer", view.layer, list(measurement.X.keys()), (RAW, "data"), view.name)
        cells = _cells(experiment.obs, view)
        genes = read_ids(measurement.var)

        def matrix(layer: str) -> Any:
            return soma_matrix(measurement.X[layer], cells, genes, view.name)

        def advice() -> str:
            others = (other for other in measurement.X if other != layer)
            return " or ".join(f"--layer {o}" for o in others if looks_like_counts(matrix(o), view.name))

        return MatrixSource(
            name=view.name,
            matrix_name=f"ms/{name}/X/{layer}",
            matrix=matrix(layer),
            obs=_frame(experiment.obs, cells, CELL_NAMES, view),
            var=_frame(measurement.var, genes, GENE_NAMES, View(name=view.name)),
            find_identity=identity,
            obsm=_obsm(measurement, cells, view.name),
            find_advice=advice,
            close_files=close,
        )


def _choose(what: str, wanted: str | None, there: list[str], usual: Sequence[str], name: str) -> str:
    shown = ", ".join(sorted(there)) or "none"
    if wanted is not None:
        if wanted not in there:
            raise InputError(f"{name} has no {what} {wanted!r}: it has {shown}; name one of these")
        return wanted
    first = [key for key in there if what == "layer" or key != RAW] or there
    found = first[0] if len(first) == 1 else next((key for key in usual if key in there), None)
    if found is None:
        raise InputError(f"{name} has the {what}s {shown}: name one, as in soma://PATH?{what}=NAME")
    return found


def _cells(obs: Any, view: View) -> Ids:
    try:
        cells = read_ids(obs, view.obs_filter)
    except Exception as error:
        if view.obs_filter is None or not is_soma_error(error):
            raise
        raise InputError(
            f"the obs filter {view.obs_filter!r} of {view.name} cannot be used ({soma_words(error)}): wanted one like "
            f"\"tissue == 'lung' and is_primary_data == True\" on the columns {', '.join(_columns(obs))}"
        ) from error
    if view.obs_filter is not None and not len(cells):
        raise InputError(f"no cell of {view.name} fits the obs filter {view.obs_filter!r}: check its words")
    return cells


def _columns(table: Any) -> list[str]:
    return [name for name in table.schema.names if name != JOIN_ID]


def _frame(table: Any, ids: Ids, names: Sequence[str], view: View) -> SomaFrame:
    columns = _columns(table)
    for name in view.obs_columns or ():
        if name not in columns:
            raise InputError(f"{view.name} has no obs column {name!r}: it has {', '.join(columns)}; name one of these")
    original = json.loads(table.metadata.get(ORIGINAL_NAME, "null"))
    index = next((name for name in (original, *names) if name in columns), None)
    kept = [name for name in columns if name != index and (view.obs_columns is None or name in view.obs_columns)]
    return SomaFrame(table, ids, index, kept, view.name)


def _obsm(measurement: Any, cells: Ids, name: str) -> dict[str, ObsmArray]:
    arrays = measurement.obsm if "obsm" in measurement else {}
    found: dict[str, ObsmArray] = {}
    for key in arrays:
        shape = arrays[key].shape
        if len(shape) == 2 and 0 < shape[1] <= WIDEST_OBSM:
            found[key] = SomaRows(arrays[key], cells, np.arange(shape[1]), name)
    return found
