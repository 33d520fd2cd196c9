"""What `data_loading.py` measures of celltron; how such functions are called is said in `bench_measure.py`."""

from collections.abc import Generator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp

from celltron.cells import CellStore, EpochOrder, Loader, LoaderState, RankTokenizer, convert
from celltron.cells.token_cache import build_token_cache
from celltron.core import load_published_geneformer

Job = dict[str, Any]
Stream = Generator[tuple[int, int], None, None]
VOCABULARY: Literal["gc95M"] = "gc95M"


def convert_cells(job: Job) -> Stream:
    """.h5ad to CellStore; a file of two cells comes first, so that kernels are loaded."""
    with TemporaryDirectory() as folder:
        small = Path(folder) / "small.h5ad"
        var = pd.DataFrame(index=["CD3E", "MS4A1"])
        anndata.AnnData(sp.csr_matrix(np.array([[1.0, 0.0], [0.0, 2.0]], dtype=np.float32)), var=var).write_h5ad(small)
        yield 0, 0
        convert(small, small.with_suffix(".store"), workers=job["threads"])
    yield 0, 0
    report = convert(job["input"], job["output"], workers=job["threads"])
    yield report.num_cells, 0


def build_cache(job: Job) -> Stream:
    """CellStore to ranked tokens."""
    yield 0, 0
    store, tokenizer = _open(job)
    tokenizer.tokenize(store, [0])
    yield 0, 0
    cache = build_token_cache(store, tokenizer, job["output"], workers=job["threads"])
    yield len(store), cache.num_tokens


def read_rows(job: Job) -> Stream:
    """Raw counts of shuffled cells, copied out of the store."""
    yield 0, 0
    store = CellStore.open(job["input"])
    order = EpochOrder(len(store), job["seed"])
    state = LoaderState(job["seed"])
    store.rows(order.take(state, job["batch"])[0])
    yield 0, 0
    while True:
        cells, _, state = order.take(state, job["batch"])
        store.rows(cells)
        yield len(cells), 0


def read_tokens(job: Job) -> Stream:
    """Batches of masked tokens, made of the counts, or out of the ranked cache."""
    yield 0, 0
    with _open_loader(job) as loader:
        yield 0, 0
        for batch in loader:
            yield len(batch.lengths), len(batch.tokens)


def read_torch(job: Job) -> Stream:
    """The same batches as tensors, through `torch.utils.data.DataLoader`."""
    from torch.utils.data import DataLoader

    from celltron.cells.torch_dataset import CellDataset

    yield 0, 0
    batches = DataLoader(CellDataset(_open_loader(job)), batch_size=None, num_workers=job["settings"]["workers"])
    yield 0, 0
    for batch in batches:
        yield len(batch["lengths"]), len(batch["tokens"])


def _open(job: Job) -> tuple[CellStore, RankTokenizer]:
    """A job's store, and a tokeniser with Geneformer's vocabulary and medians."""
    store = CellStore.open(job["store"])
    vocabulary, medians = load_published_geneformer(VOCABULARY)
    return store, RankTokenizer(vocabulary, medians, store.gene_ids, max_length=job["max_length"])


def _open_loader(job: Job) -> Loader:
    """An endless loader at its beginning, whose kernels are compiled: it has made a batch."""
    store, tokenizer = _open(job)
    loader = Loader(
        store,
        tokenizer,
        cells_per_batch=job["batch"],
        seed=job["seed"],
        epochs=None,
        prefetch=job["threads"],
        cache=job["input"] if Path(job["input"]) != Path(job["store"]) else False,
    )
    next(loader)
    loader.seek(LoaderState(job["seed"]))
    return loader
