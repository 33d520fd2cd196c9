"""What `data_loading.py` measures of other programs; how such functions are called is said in `bench_measure.py`.

It runs in the peers' own environment (`make bench-env`), where celltron is not installed. Each peer is used as its
authors recommend, or faster where a way was found; the settings are in `data_loading_steps.json`.

B cells of a batch, S places of its longest cell, G genes.
"""

from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

Job = dict[str, Any]
Stream = Generator[tuple[int, int], None, None]
BLOCK_CELLS = 4096
ARROW_NAME = "tokens.arrow"
MASKED_SHARE, SHOWN_AS_MASK, SHOWN_AS_RANDOM = 0.15, 0.8, 0.1
NO_LABEL = -100


def convert_scdl(job: Job) -> Stream:
    """.h5ad to a folder of memory-mapped arrays."""
    from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset

    yield 0, 0
    yield 0, 0
    SingleCellMemMapDataset(
        job["output"], h5ad_path=job["input"], data_dtype=job["settings"]["data_dtype"], use_X_not_raw=True
    )
    yield job["cells"], 0


def read_scdl(job: Job) -> Stream:
    """`get_row` of shuffled cells, the rows of a batch joined."""
    from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset

    yield 0, 0
    data = SingleCellMemMapDataset(job["input"])
    yield 0, 0
    for cells in _shuffled_batches(len(data), job):
        rows = [data.get_row(cell)[0] for cell in cells.tolist()]
        np.concatenate([counts for counts, _ in rows])
        np.concatenate([genes for _, genes in rows])
        yield len(rows), 0


def read_scdl_loader(job: Job) -> Stream:
    """A `DataLoader` with SCDL's own collation to a sparse tensor."""
    from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset
    from bionemo.scdl.util.torch_dataloader_utils import collate_sparse_matrix_batch

    yield 0, 0
    data = SingleCellMemMapDataset(job["input"])
    batches = DataLoader(
        data, batch_size=job["batch"], shuffle=True, collate_fn=collate_sparse_matrix_batch, **_workers(job)
    )
    yield 0, 0
    yield from _endless(batches, lambda batch: (batch.shape[0], 0))


def read_scdl_tokens(job: Job) -> Stream:
    """`get_row` of shuffled cells, ranked with NumPy, padded and masked, as a user of SCDL would have to."""
    from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset

    batch_of, rank = _batcher(job), _ranker(job)
    yield 0, 0
    data = SingleCellMemMapDataset(job["input"])
    yield 0, 0
    for cells in _shuffled_batches(len(data), job):
        tokens = []
        for cell in cells.tolist():
            (counts, genes), _, _ = data.get_row(cell)
            tokens.append(rank(genes, counts))
        lengths = np.array([len(part) for part in tokens])
        batch_of(np.concatenate(tokens), lengths)
        yield len(cells), int(lengths.sum())


def read_scdataset(job: Job) -> Stream:
    """Backed AnnData through scDataset: shuffled blocks of cells, many batches a read."""
    from scdataset import BlockShuffling, scDataset

    yield 0, 0
    adata = anndata.read_h5ad(job["input"], backed="r")
    matrix = adata.X  # made once: it keeps the row pointers, which `adata[cells].X` would read every time
    settings = job["settings"]
    data = scDataset(
        adata,
        BlockShuffling(settings["block_size"]),
        batch_size=job["batch"],
        fetch_factor=settings["fetch_factor"],
        fetch_callback=lambda _, cells: matrix[cells],
        seed=job["seed"],
    )
    workers = _workers(job)
    if workers["num_workers"]:
        workers["prefetch_factor"] = settings["fetch_factor"] + 1  # their advice
    batches = DataLoader(data, batch_size=None, **workers)
    yield 0, 0
    yield from _endless(batches, lambda batch: (batch.shape[0], 0))


def read_anndata(job: Job) -> Stream:
    """Rows of a backed AnnData: each batch is one read of sorted, shuffled cells."""
    yield 0, 0
    matrix = anndata.read_h5ad(job["input"], backed="r").X
    yield 0, 0
    for cells in _shuffled_batches(matrix.shape[0], job):
        yield matrix[np.sort(cells)].shape[0], 0


def convert_soma(job: Job) -> Stream:
    """.h5ad to a SOMA experiment, tiled so that the rows of the file are in TileDB's order and need no sorting."""
    import tiledbsoma.io

    settings = job["settings"]
    filters = [{"_type": "ZstdFilter", "level": settings["zstd_level"]}]
    tiles = {"soma_dim_0": settings["tile_cells"], "soma_dim_1": job["genes"]}
    create = {
        "dims": {name: {"tile": tile, "filters": ["ByteShuffleFilter", *filters]} for name, tile in tiles.items()},
        "attrs": {"soma_data": {"filters": ["ByteShuffleFilter", *filters]}},
        "goal_chunk_nnz": settings["goal_chunk_nnz"],
    }
    how = {"tiledb": {"create": create, "write": {"sort_coords": False}}}
    yield 0, 0
    yield 0, 0
    tiledbsoma.io.from_h5ad(job["output"], job["input"], measurement_name="RNA", platform_config=how)
    yield job["cells"], 0


def read_soma(job: Job) -> Stream:
    """tiledbsoma-ml: chunks of cells shuffled, read many batches at a time, shuffled again."""
    import tiledbsoma
    import tiledbsoma_ml

    yield 0, 0
    with tiledbsoma.Experiment.open(job["input"]) as experiment:

        def batches_of(cells: slice) -> Iterable[Any]:
            query = experiment.axis_query("RNA", obs_query=tiledbsoma.AxisQuery(coords=(cells,)))
            how = {name: value for name, value in job["settings"].items() if name != "workers"}
            data = tiledbsoma_ml.ExperimentDataset(
                query, layer_name="data", batch_size=job["batch"], return_sparse_X=True, seed=job["seed"], **how
            )
            batches: Iterable[Any] = tiledbsoma_ml.experiment_dataloader(data, num_workers=job["settings"]["workers"])
            return batches

        for _ in batches_of(slice(0, job["batch"] - 1)):  # compiles its kernels
            pass
        batches = batches_of(slice(None))
        yield 0, 0
        yield from _endless(batches, lambda batch: (batch[0].shape[0], 0))


def convert_datasets(job: Job) -> Stream:
    """.h5ad to ranked tokens in Arrow, once, as Geneformer's own tokeniser does; in one process, a block at a time."""
    import datasets
    import pyarrow as pa
    from datasets.arrow_writer import ArrowWriter

    rank = _ranker(job)
    yield 0, 0
    matrix = anndata.read_h5ad(job["input"], backed="r").X
    Path(job["output"]).mkdir(parents=True)
    features = datasets.Features({"input_ids": datasets.Sequence(datasets.Value("int16"))})
    yield 0, 0
    num_tokens = 0
    with ArrowWriter(features=features, path=f"{job['output']}/{ARROW_NAME}") as writer:
        for start in range(0, matrix.shape[0], BLOCK_CELLS):
            block = matrix[start : start + BLOCK_CELLS]
            ends = zip(block.indptr[:-1], block.indptr[1:], strict=True)
            tokens = [rank(block.indices[begin:end], block.data[begin:end]) for begin, end in ends]
            offsets = np.cumsum([0, *map(len, tokens)], dtype=np.int32)
            column = pa.ListArray.from_arrays(offsets, np.concatenate(tokens))
            writer.write_table(pa.table({"input_ids": column}))
            num_tokens += int(offsets[-1])
        writer.finalize()
    yield matrix.shape[0], num_tokens


def read_datasets(job: Job) -> Stream:
    """Pre-tokenised cells as the Hugging Face Trainer reads them: lists, padded and masked by its collator."""
    import datasets

    collator = _mlm_collator(job)
    yield 0, 0
    data = datasets.Dataset.from_file(f"{job['input']}/{ARROW_NAME}")
    batches = DataLoader(data, batch_size=job["batch"], shuffle=True, collate_fn=collator, **_workers(job))
    yield 0, 0
    yield from _endless(batches, lambda batch: (len(batch["labels"]), int(batch["attention_mask"].sum())))


def read_datasets_arrow(job: Job) -> Stream:
    """Pre-tokenised cells as fast as `datasets` gives them: a batch is one Arrow table, padded with NumPy."""
    import datasets

    batch_of = _batcher(job)

    def collate(table: Any) -> tuple[int, int, Any]:
        column = table["input_ids"].combine_chunks()
        lengths = column.value_lengths().to_numpy()
        return len(lengths), int(lengths.sum()), batch_of(column.flatten().to_numpy(), lengths)

    yield 0, 0
    data = datasets.Dataset.from_file(f"{job['input']}/{ARROW_NAME}").with_format("arrow")
    places = BatchSampler(RandomSampler(data), job["batch"], drop_last=False)
    batches = DataLoader(data, sampler=places, batch_size=None, collate_fn=collate, **_workers(job))
    yield 0, 0
    yield from _endless(batches, lambda batch: batch[:2])


def _shuffled_batches(num_cells: int, job: Job) -> Iterator[npt.NDArray[np.int64]]:
    """Cells of endless epochs, shuffled, a batch at a time."""
    rng = np.random.default_rng(job["seed"])
    while True:
        order = rng.permutation(num_cells)
        for start in range(0, num_cells, job["batch"]):
            yield order[start : start + job["batch"]]


def _endless(batches: Iterable[Any], sizes_of: Callable[[Any], tuple[int, int]]) -> Stream:
    """Epoch after epoch: cells and tokens of each batch."""
    while True:
        for batch in batches:
            yield sizes_of(batch)


def _workers(job: Job) -> dict[str, Any]:
    """Arguments of `DataLoader` for worker processes, which live through all epochs."""
    num_workers = job["settings"]["workers"]
    return {"num_workers": num_workers, "persistent_workers": num_workers > 0}


def _ranker(job: Job) -> Callable[[npt.NDArray[Any], npt.NDArray[Any]], npt.NDArray[np.int16]]:
    """Geneformer's rank encoding of one cell: genes by falling count / median, between <cls> and <eos>."""
    with np.load(job["tokens"]) as table:
        tokens_G, medians_G, special = table["tokens"], table["medians"], table["special"]
    tokens_G = tokens_G.astype(np.int16)
    inverse_G = np.where(tokens_G >= 0, 1.0 / medians_G, 0.0)
    has_all = bool((tokens_G >= 0).all())
    cls_eos = special[2:].astype(np.int16)
    most = job["max_length"] - 2

    def rank(genes: npt.NDArray[Any], counts: npt.NDArray[Any]) -> npt.NDArray[np.int16]:
        scores = counts * inverse_G[genes]
        tokens = tokens_G[genes]
        if not has_all:
            scores, tokens = scores[tokens >= 0], tokens[tokens >= 0]
        ranked = tokens[np.argsort(-scores)[:most]]
        return np.concatenate([cls_eos[:1], ranked, cls_eos[1:]])

    return rank


def _mlm_collator(job: Job) -> Any:
    """The collator of transformers for masked language models, with a tokenizer that knows the special tokens."""
    from tokenizers import Tokenizer, models
    from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

    with np.load(job["tokens"]) as table:
        names = {f"gene {i}": i for i in range(int(table["vocabulary"]))}
        special = dict(zip(["<pad>", "<mask>", "<cls>", "<eos>"], table["special"].tolist(), strict=True))
    names = {name: i for name, i in names.items() if i not in special.values()} | special
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=Tokenizer(models.WordLevel(names, unk_token="<pad>")),
        pad_token="<pad>",
        mask_token="<mask>",
        cls_token="<cls>",
        eos_token="<eos>",
    )
    return DataCollatorForLanguageModeling(tokenizer, mlm_probability=MASKED_SHARE)


def _batcher(job: Job) -> Callable[[npt.NDArray[np.int16], npt.NDArray[Any]], dict[str, torch.Tensor]]:
    """Makes a padded and masked batch [B, S] of the tokens of cells, one after the other, and their lengths.

    The masks are those of transformers' collator, or with the setting ``masks: NumPy`` faster ones, written here.
    """
    collator = _mlm_collator(job)
    pad, mask = collator.tokenizer.pad_token_id, collator.tokenizer.mask_token_id
    num_special, num_tokens = len(collator.tokenizer.all_special_ids), len(collator.tokenizer)
    rng = np.random.default_rng(job["seed"])

    def pad_and_mask(tokens: npt.NDArray[np.int16], lengths: npt.NDArray[Any]) -> dict[str, torch.Tensor]:
        is_token_BS = np.arange(lengths.max()) < lengths[:, None]
        tokens_BS = np.full(is_token_BS.shape, pad, dtype=np.int64)
        tokens_BS[is_token_BS] = tokens
        is_special_BS = tokens_BS < num_special
        inputs_BS, labels_BS = collator.torch_mask_tokens(
            torch.from_numpy(tokens_BS), special_tokens_mask=torch.from_numpy(is_special_BS)
        )
        return {"input_ids": inputs_BS, "labels": labels_BS, "attention_mask": torch.from_numpy(is_token_BS)}

    def mask_and_pad(tokens: npt.NDArray[np.int16], lengths: npt.NDArray[Any]) -> dict[str, torch.Tensor]:
        shares = rng.random(len(tokens), dtype=np.float32) / MASKED_SHARE
        chosen = np.flatnonzero((shares < 1.0) & (tokens >= num_special))
        shares = shares[chosen]
        seen, labels = tokens.astype(np.int64), np.full(len(tokens), NO_LABEL, dtype=np.int64)
        labels[chosen] = tokens[chosen]
        seen[chosen[shares < SHOWN_AS_MASK]] = mask
        is_random = (shares >= SHOWN_AS_MASK) & (shares < SHOWN_AS_MASK + SHOWN_AS_RANDOM)
        seen[chosen[is_random]] = rng.integers(num_special, num_tokens, size=int(is_random.sum()))
        is_token_BS = np.arange(lengths.max()) < lengths[:, None]
        inputs_BS = np.full(is_token_BS.shape, pad, dtype=np.int64)
        labels_BS = np.full(is_token_BS.shape, NO_LABEL, dtype=np.int64)
        inputs_BS[is_token_BS], labels_BS[is_token_BS] = seen, labels
        arrays = {"input_ids": inputs_BS, "labels": labels_BS, "attention_mask": is_token_BS}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    return mask_and_pad if job["settings"]["masks"] == "NumPy" else pad_and_mask
