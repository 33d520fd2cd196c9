"""Cells of the CZ CELLxGENE Census as a source of counts."""

import os
from collections.abc import Mapping
from typing import Any

from celltron.cells.ingest.matrix_source import MatrixSource, no_files, refuse_raw
from celltron.cells.ingest.remote import is_address, network
from celltron.cells.ingest.soma import RAW, View, experiment_source, split_query, tiledb_config
from celltron.cells.ingest.soma_arrays import soma_reading
from celltron.cells.ingest.source import SourceOptions
from celltron.cells.ingest.tree_identity import identity_of_tree
from celltron.core import InputError

KEYS = ("version", "obs", "columns", "uri")
EXAMPLE = "census://homo_sapiens?version=2025-01-30&obs=tissue_general == 'lung' and is_primary_data == True"
DATA, DATASET, DEFAULT = "census_data", "dataset_id", "stable"


def open_census(spec: str, options: SourceOptions, *, census: Any = None) -> MatrixSource:
    """Open the cells that an address names, such as `EXAMPLE`.

    Keys of the query, percent-encoded where a value holds ``&`` or ``%``:

    - ``version``: a release by date, ``stable`` (the default) or ``latest``; what these stand for when the source is
      opened is part of its identity. A date makes the same data come again next year.
    - ``obs``: TileDB's value filter on columns of obs. Put ``is_primary_data == True`` into it: the Census holds many
      cells more than once, in several datasets, and counts of cells would be wrong and splits would leak.
    - ``columns``: columns of obs to keep, with commas between, all without this key; ``dataset_id`` is always kept, so
      that cells can be split by dataset.
    - ``uri``: a copy of a release, a path or an address, in place of ``version``.

    Counts are the layer ``raw`` of the measurement RNA unless ``options.layer`` names another; cells are named by their
    ``soma_joinid``, which is theirs in one release only.

    Args:
        spec: the address.
        options: what to take from it.
        census: the Census, open already; it is not closed with the source.
    """
    address, query = split_query(spec, KEYS)
    organism = address.split("://", 1)[1].strip("/")
    refuse_raw(spec, options.use_raw, "; counts are in its layer raw")
    if "uri" in query and "version" in query:
        raise InputError(f"{spec} names both a version and a uri: name one of them")
    identity = {"organism": organism, "obs": query.get("obs", "")}
    columns = [name.strip() for name in query["columns"].split(",")] + [DATASET] if "columns" in query else None
    view = View(
        name=spec,
        measurement="RNA",
        layer=options.layer or RAW,
        obs_filter=query.get("obs"),
        obs_columns=columns,
    )
    if census is not None:
        identity["version"] = query.get("version", DEFAULT)
        return experiment_source(_experiment(spec, census, organism), view, identity=lambda: identity, close=no_files)
    if "uri" in query:
        opened = _open_copy(spec, query["uri"], options.storage)
    else:
        opened, identity["version"] = _open_release(spec, query.get("version", DEFAULT), options.storage)
    try:
        return experiment_source(
            _experiment(spec, opened, organism),
            view,
            identity=lambda: identity | (identity_of_tree(query["uri"], options.storage) if "uri" in query else {}),
            close=opened.close,
        )
    except BaseException:
        opened.close()
        raise


def _client(spec: str) -> Any:
    try:
        import cellxgene_census
    except ImportError as error:
        raise InputError(f"{spec} needs cellxgene-census: pip install 'celltron-cells[census]'") from error
    return cellxgene_census


def _open_release(spec: str, version: str, storage: Mapping[str, Any] | None) -> tuple[Any, str]:
    """A release and its date."""
    client = _client(spec)
    with network(spec):
        try:
            build = str(client.get_census_version_description(version)["release_build"])
        except ValueError as error:
            raise InputError(
                f"{spec} asks for the Census release {version!r}, which is none or was retracted: wanted stable, "
                "latest or a date that cellxgene_census.get_census_version_directory() lists"
            ) from error
        return client.open_soma(census_version=build, tiledb_config=tiledb_config(spec, storage)), build


def _open_copy(spec: str, uri: str, storage: Mapping[str, Any] | None) -> Any:
    client = _client(spec)
    if not is_address(uri) and not os.path.isdir(uri):
        raise InputError(f"no folder at {uri}: wanted a copy of the Census, check the uri of {spec}")
    with network(uri):
        return client.open_soma(uri=uri, tiledb_config=tiledb_config(spec, storage))


def _experiment(spec: str, census: Any, organism: str) -> Any:
    """The experiment of one organism."""
    with soma_reading(spec):
        if DATA not in census:
            raise InputError(f"{spec} leads to no Census (it has no {DATA}): check the uri")
        organisms = sorted(census[DATA].keys())
        if organism not in organisms:
            raise InputError(f"{spec} names no organism of the Census: wanted {', '.join(organisms)}, as in {EXAMPLE}")
        return census[DATA][organism]
