"""The manifest of a CellStore, which is untrusted: every number is checked before an array is mapped by it."""

from pathlib import Path
from typing import Any

import numpy as np

from celltron.core import InputError, read_manifest

FORMAT = "celltron-cellstore"
VERSION = 2
READABLE_VERSIONS = (1, 2)
DTYPES = {
    "indptr": ("uint64",),
    "indices": ("uint16", "uint32"),
    "counts": ("uint8", "uint16", "uint32", "uint64", "float32"),
    "totals": ("float64",),
}
"""Types on disk, each list from the smallest to the widest."""


def read_store_manifest(path: Path) -> dict[str, Any]:
    """Read and check the manifest of a store of any readable version, brought to the form of the newest.

    Version 1 had one pair of types for all shards, no ``totals.bin``, and ``genes.parquet`` under that name alone.
    """
    manifest = read_manifest(path, format=FORMAT, versions=READABLE_VERSIONS)

    def demand(true: bool, what: str) -> None:
        if not true:
            raise InputError(f"{path / 'manifest.json'} is damaged: {what}; convert the files again")

    for key in ("cells", "genes", "nnz", "unmapped_genes"):
        demand(_is_count(manifest.get(key)), f"{key} must be a whole number")
    demand(isinstance(manifest.get("unmapped_fraction"), (int, float)), "unmapped_fraction must be a number")
    demand(isinstance(manifest.get("species"), str), "species must be text")
    names = [name for name in DTYPES if name != "totals" or manifest["version"] > 1]
    dtypes, shards = manifest.get("dtypes"), manifest.get("shards")
    demand(isinstance(dtypes, dict) and set(dtypes) == set(names), f"dtypes must name {', '.join(names)}")
    assert isinstance(dtypes, dict), dtypes
    for name, dtype in dtypes.items():
        demand(dtype in DTYPES[name], f"the type of {name} must be {' or '.join(DTYPES[name])}")
    demand(isinstance(shards, list), "shards must be a list")
    assert isinstance(shards, list), shards
    if manifest["version"] == 1:
        manifest["gene_file"] = "genes.parquet"
        manifest["shards"] = shards = [
            {"indices": dtypes["indices"], "counts": dtypes["counts"]} | shard if isinstance(shard, dict) else shard
            for shard in shards
        ]
    problem = _problem_of_sources(manifest) or _problem_of_shards(manifest)
    demand(not problem, problem)
    for key in ("cells", "nnz"):
        demand(sum(shard[key] for shard in shards) == manifest[key], f"{key} must be the sum over the shards")
    return manifest


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62


def _problem_of_sources(manifest: dict[str, Any]) -> str:
    sources, gene_file = manifest.get("sources"), manifest.get("gene_file")
    if not isinstance(sources, list):
        return "sources must be a list"
    for source in sources:
        if not isinstance(source, dict) or not _is_count(source.get("cells")):
            return "a source is incomplete"
        if not all(isinstance(source.get(key), str) for key in ("name", "matrix", "gene_column")):
            return "a source is incomplete"
    if not isinstance(gene_file, str) or "/" in gene_file or gene_file not in manifest["files"]:
        return f"it lists no {gene_file if isinstance(gene_file, str) else 'genes.parquet'}"
    return ""


def _problem_of_shards(manifest: dict[str, Any]) -> str:
    """What is wrong with the shards' sizes, types and lengths, or nothing."""
    dtypes, files, shards = manifest["dtypes"], manifest["files"], manifest["shards"]
    names = [f"{name}.bin" for name in dtypes] + ["obs.parquet"]
    for i, shard in enumerate(shards):
        if not isinstance(shard, dict) or not (_is_count(shard.get("cells")) and _is_count(shard.get("nnz"))):
            return f"shard {i} must say how many cells and counts it has"
        for name in ("indices", "counts"):
            if shard.get(name) not in DTYPES[name]:
                return f"the type of {name} of shard {i} must be {' or '.join(DTYPES[name])}"
        folder = f"shards/{i:05d}/"
        if not all(folder + name in files for name in names):
            return f"it does not list all files of {folder}"
        lengths = {"indptr": shard["cells"] + 1, "totals": shard["cells"]}
        for name, dtype in dtypes.items():
            wanted = lengths.get(name, shard["nnz"]) * np.dtype(shard.get(name, dtype)).itemsize
            if files[f"{folder}{name}.bin"]["bytes"] != wanted:
                return f"{folder}{name}.bin must have {wanted} bytes"
    for name in ("indices", "counts"):
        widest = max((DTYPES[name].index(shard[name]) for shard in shards), default=DTYPES[name].index(dtypes[name]))
        if dtypes[name] != DTYPES[name][widest]:
            return f"the type of {name} must be the widest over the shards"
    return ""
