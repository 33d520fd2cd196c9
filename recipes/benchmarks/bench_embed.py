"""What `embed.py` measures: vectors of cells out of celltron and out of transformers' `BertModel`, of one model.

A pass is everything between tokens on the host and vectors on the host: batches are made, run, and averaged over each
cell's tokens. The first passes of a process are not counted.

B cells of a batch, S places of its longest cell, C cells, D width.
"""

import os
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from celltron.cells import Batch, pad_batch, plan_packs
from celltron.cells.pack import pack_batch
from celltron.core import InputError, build_config, load_published_geneformer
from celltron.models.geneformer import (
    Geneformer,
    GeneformerConfig,
    WholeGeneformer,
    build_geneformer,
    from_huggingface,
    put_parameters,
    take_parameters,
    to_huggingface,
)
from celltron.models.geneformer.embed import embed_cells
from celltron.models.layers.packing import PackedCells
from celltron.recipes.benchmarks.bench_compare import Job, read_cells
from celltron.train.launch import Launch, choose_device, start_process_group
from celltron.train.parallel import ParallelConfig, start_model_parallel
from celltron.train.precision import DTYPES

Embed = Callable[[Batch], np.ndarray]
"""Cells to their vectors, float32 [C, D], in their order."""


def require_transformers() -> None:
    """Import it without its network, for all processes that are forked from this one.

    Raises:
        InputError: it is not installed.
    """
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        from transformers import BertModel  # noqa: F401
    except ImportError as error:
        raise InputError(f"transformers cannot be imported ({error}); install celltron[hf]") from None


def answer(job: Job) -> Job:
    """Seconds of each pass over a job's cells; the vectors are written to `job["vectors"]`."""
    torch.set_num_threads(job["threads"])
    batch = read_cells(job["cells"])
    embed = {"celltron": load_celltron, "transformers": load_transformers}[job["library"]](job)
    seconds: list[float] = []
    for _ in range(job["warm_up"] + job["passes"]):
        start = time.perf_counter()
        vectors_CD = embed(batch)
        seconds.append(time.perf_counter() - start)
    np.save(job["vectors"], vectors_CD)
    return {"seconds": seconds[job["warm_up"] :], **describe_torch(job["device"])}


def describe_torch(device: str) -> Job:
    """What a process ran on, and the most memory that it had there."""
    on_gpu = device == "cuda"
    return {
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "gpu_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }


def export(job: Job) -> Job:
    """Make a model's initial weights and export them to `job["model"]`, from where every system takes them."""
    torch.set_num_threads(job["threads"])
    config = build_config(GeneformerConfig, job["config"])
    model = _build(job | {"layers": "torch"}, config, torch.float32, torch.device("cpu"))
    whole = WholeGeneformer(
        config=config,
        num_tokens=job["num_tokens"],
        parameters=take_parameters(model),
        vocabulary=load_published_geneformer("gc30M")[0],
        max_length=config.max_positions,
    )
    to_huggingface(whole, Path(job["model"]))
    return {"seconds": [0.0], "parameters": sum(tensor.numel() for tensor in whole.parameters.values())}


def load_celltron(job: Job) -> Embed:
    """The exported model in celltron: packs of cells, or padded batches of cells of like length."""
    device = choose_device(job["device"], Launch())
    whole = from_huggingface(Path(job["model"]))
    model = _build(job, whole.config, DTYPES[job["precision"]], device).eval()
    put_parameters(model, whole.parameters)

    def embed_packs(batch: Batch) -> np.ndarray:
        parts = []
        packs = plan_packs(batch.lengths, job["pack_tokens"])
        for rows in packs:
            pack = pack_batch(batch.take(rows), pad_id=job["pad_id"])
            tokens_BS = torch.from_numpy(pack.tokens_T[None]).to(device)
            parts.append(embed_cells(model, tokens_BS, packed=PackedCells.of(pack.lengths.tolist(), device)))
        return _in_order(parts, np.concatenate(packs))

    def embed_padded(batch: Batch) -> np.ndarray:
        parts = []
        rows = np.argsort(batch.lengths, kind="stable")
        for part in batch.take(rows).split(job["batch_size"]):
            padded = pad_batch(part, pad_id=job["pad_id"])
            inputs = (torch.from_numpy(array).to(device) for array in (padded.tokens_BS, padded.is_padding_BS))
            parts.append(embed_cells(model, *inputs))
        return _in_order(parts, rows)

    return embed_packs if job["is_packed"] else embed_padded


def _build(job: Job, config: GeneformerConfig, dtype: torch.dtype, device: torch.device) -> Geneformer:
    start_process_group(Launch(), device)
    start_model_parallel(ParallelConfig(), seed=job["seed"])
    return build_geneformer(
        config,
        num_tokens=job["num_tokens"],
        dtype=dtype,
        sequence_parallel=False,
        seed=job["seed"],
        layers=job["layers"],
    )


def load_transformers(job: Job) -> Embed:
    """The exported model in transformers: SDPA, the precision of the weights, no pooler and no head.

    Batches are padded to `padded_to`; where that is None they are of cells of like length, padded to the longest, as
    Geneformer's own code embeds.
    """
    from transformers import BertModel
    from transformers.utils import logging

    # It reports that the head is left out.
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    device = choose_device(job["device"], Launch())
    dtype = DTYPES[job["precision"]]
    model: Any = BertModel.from_pretrained(
        job["model"], add_pooling_layer=False, dtype=dtype, attn_implementation="sdpa"
    )
    model.to(device).eval()

    @torch.inference_mode()
    def embed(batch: Batch) -> np.ndarray:
        length = job["padded_to"]
        rows = np.arange(len(batch)) if length else np.argsort(batch.lengths, kind="stable")
        parts = []
        for part in batch.take(rows).split(job["batch_size"]):
            padded = pad_batch(part, pad_id=job["pad_id"], length=length)
            tokens_BS = torch.from_numpy(padded.tokens_BS).to(device)
            is_token_BS1 = torch.from_numpy(~padded.is_padding_BS).to(device)[:, :, None]
            hidden_BSD = model(input_ids=tokens_BS, attention_mask=is_token_BS1[:, :, 0].long()).last_hidden_state
            sums_BD = (hidden_BSD * is_token_BS1).sum(dim=1, dtype=torch.float32)
            parts.append(sums_BD / is_token_BS1.sum(dim=1))
        return _in_order(parts, rows)

    return embed


def _in_order(parts: list[torch.Tensor], rows: np.ndarray) -> np.ndarray:
    """Vectors on the host, in the batch's order; `rows` are the places in it of the parts' cells."""
    vectors_CD = torch.cat(parts).float().cpu().numpy()  # syncs the host
    ordered_CD = np.empty_like(vectors_CD)
    ordered_CD[rows] = vectors_CD
    return ordered_CD
