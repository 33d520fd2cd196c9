"""The verbs that deal with cells: convert, append, tokenize, shard, medians."""

import argparse
from pathlib import Path
from typing import Any

from celltron.cells import (
    RankTokenizer,
    append,
    build_token_cache,
    compute_medians,
    convert,
    default_cache_path,
    open_cells,
    shard_store,
)
from celltron.cells.corpus import PUBLISHED
from celltron.cells.open_cells import parse_storage
from celltron.core import MedianTable, ProgressLine, Vocabulary, load_published_geneformer, load_vocabulary_table


def add_verbs(verbs: Any) -> None:
    """Add the verbs to the command line."""
    parser = verbs.add_parser("convert", help="turn files of counts into a store")
    _add_sources(parser)
    parser.add_argument("--out", type=Path, required=True, help="store folder to make")
    parser.add_argument("--shard-cells", type=int, default=65_536, help="cells in a shard")
    parser.add_argument("--replace", action="store_true", help="replace a store at --out once the new one is complete")
    parser.set_defaults(verb=_convert)

    parser = verbs.add_parser("append", help="add the cells of more files to a store")
    parser.add_argument("store", type=Path, help="store folder to add to")
    _add_sources(parser)
    parser.add_argument("--shard-cells", type=int, default=65_536, help="cells in a shard")
    parser.set_defaults(verb=_append)

    parser = verbs.add_parser("medians", help="compute every gene's non-zero median over stores")
    _add_cells(parser)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="folder for what is too much for memory; TMPDIR")
    parser.set_defaults(verb=_medians)

    parser = verbs.add_parser("tokenize", help="keep every cell's ranked tokens beside a store")
    _add_cells(parser)
    parser.add_argument("--out", type=Path, help="folder to make; beside the store, where training finds it, otherwise")
    parser.add_argument(
        "--vocabulary", default="store", help="store (its own genes and medians), gc30M, gc95M, or a table's path"
    )
    parser.add_argument("--medians", type=Path, help="file of celltron medians to take instead of the vocabulary's")
    parser.add_argument("--max-length", type=int, default=2048, help="longest cell in tokens")
    parser.set_defaults(verb=_tokenize)

    parser = verbs.add_parser("shard", help="write tar shards, from which training streams over a network")
    _add_cells(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--block-cells", type=int, default=256, help="cells in a block, the least that is fetched")
    parser.add_argument("--shard-megabytes", type=int, default=256, help="size of a tar file")
    parser.add_argument("--replace", action="store_true", help="replace shards at --out once the new ones are complete")
    parser.set_defaults(verb=_shard)


def _add_sources(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SRC",
        help="files (.h5ad, 10x .h5, .loom, .zarr), folders, globs, or addresses (s3://, https://, soma://, census://)",
    )
    parser.add_argument("--layer", help="layer that holds the counts; X otherwise")
    parser.add_argument("--use-raw", action="store_true", help="read `raw` and its genes")
    parser.add_argument("--species", choices=["human", "mouse"], default="human", help="whose genes the names are")
    parser.add_argument("--gene-id-column", help="column of var with Ensembl ids or symbols; found otherwise")
    parser.add_argument("--obs-columns", metavar="A,B", help="columns of obs to keep, by commas; all otherwise")
    parser.add_argument("--obsm", metavar="A,B", help="arrays of obsm to keep, by commas; none otherwise")
    parser.add_argument("--allow-floats", action="store_true", help="store values that are no whole numbers as float32")
    parser.add_argument("--keep-unmapped", action="store_true", help="keep genes that have no Ensembl id")
    parser.add_argument("--workers", type=int, help="threads; one a processor otherwise")
    _add_storage(parser)


def _add_cells(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", metavar="STORE", help="stores, tar shards or a collection; several as one")
    parser.add_argument("--workers", type=int, help="threads; one a processor otherwise")
    _add_storage(parser)


def _add_storage(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--storage",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="option of fsspec for addresses, such as anon=true; may come again",
    )


def _words(text: str | None) -> list[str] | None:
    """Words between commas; None where nothing was said."""
    return None if text is None else [word for word in text.split(",") if word]


def _source_arguments(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "layer": options.layer,
        "use_raw": options.use_raw,
        "species": options.species,
        "gene_id_column": options.gene_id_column,
        "obs_columns": _words(options.obs_columns),
        "obsm": _words(options.obsm) or (),
        "allow_floats": options.allow_floats,
        "keep_unmapped": options.keep_unmapped,
        "shard_cells": options.shard_cells,
        "workers": options.workers,
        "storage": parse_storage(options.storage),
        "progress": ProgressLine("converting", "cells"),
    }


def _convert(options: argparse.Namespace) -> None:
    print(convert(options.sources, options.out, replace=options.replace, **_source_arguments(options)))


def _append(options: argparse.Namespace) -> None:
    print(append(options.store, options.sources, **_source_arguments(options)))


def _medians(options: argparse.Namespace) -> None:
    cells = open_cells(options.paths, storage=parse_storage(options.storage))
    medians = compute_medians(
        cells, workers=options.workers, scratch=options.scratch, progress=ProgressLine("medians", "cells")
    )
    medians.to_json(options.out)
    print(f"{options.out}: non-zero medians of {len(medians):,} genes over {len(cells):,} cells")


def _tokenize(options: argparse.Namespace) -> None:
    cells = open_cells(options.paths, storage=parse_storage(options.storage))
    medians = MedianTable.from_json(options.medians) if options.medians is not None else None
    vocabulary, published = _vocabulary_of(options.vocabulary)
    tokenizer = RankTokenizer.from_store(
        cells, vocabulary=vocabulary, medians=medians or published, max_length=options.max_length
    )
    out = options.out or default_cache_path(cells, tokenizer)
    progress = ProgressLine("tokenizing", "cells")
    cache = build_token_cache(cells, tokenizer, out, workers=options.workers, progress=progress)
    print(f"{out}: {cache.num_tokens:,} tokens of {len(cells):,} cells ({cache.dtype})")


def _vocabulary_of(name: str) -> tuple[Vocabulary | None, MedianTable | None]:
    """The vocabulary and its medians; neither for the store's own."""
    if name == "store":
        return None, None
    for published in PUBLISHED:
        if name == published:
            return load_published_geneformer(published)
    return load_vocabulary_table(Path(name))


def _shard(options: argparse.Namespace) -> None:
    report = shard_store(
        open_cells(options.paths, storage=parse_storage(options.storage)),
        options.out,
        block_cells=options.block_cells,
        shard_bytes=options.shard_megabytes * 2**20,
        replace=options.replace,
        workers=options.workers,
        progress=ProgressLine("sharding", "cells"),
    )
    print(report)
