"""What `train_step.py` measures: training steps of celltron and of transformers' `BertForMaskedLM`, on the same cells.

A step is everything: the batch is made (celltron's by a thread during the step before, as in its runs), run forward and
backward, and AdamW updates the parameters. The first ones of a process are not counted.

B cells of a batch, S places of its longest cell.
"""

import time
from collections.abc import Iterator
from contextlib import nullcontext

import numpy as np
import torch

from celltron.cells import NO_LABEL, Batch, pad_batch
from celltron.core import build_config
from celltron.models.geneformer import GeneformerConfig
from celltron.recipes.benchmarks.bench_compare import Job, read_cells
from celltron.recipes.benchmarks.bench_embed import describe_torch
from celltron.recipes.benchmarks.bench_fit import fit_steps
from celltron.recipes.geneformer_pretrain import Config
from celltron.train.launch import Launch, choose_device, start_process_group
from celltron.train.parallel import start_model_parallel
from celltron.train.peak import measure_peak
from celltron.train.precision import DTYPES


def answer(job: Job) -> Job:
    """Seconds of each of a job's last `steps` steps; where it asks for the peak, what is reached here after them."""
    torch.set_num_threads(job["threads"])
    function = {"celltron": time_celltron, "transformers": time_transformers}[job["library"]]
    seconds = function(job, read_cells(job["cells"]))
    answered = {"seconds": seconds[-job["steps"] :], **describe_torch(job["device"])}
    if job["wants_peak"]:
        answered["peak_flops"] = measure_peak(torch.device(job["device"]), DTYPES[job["config"]["precision"]])
    return answered


def time_celltron(job: Job, batch: Batch) -> list[float]:
    """Steps of the training loop itself but the first, with its optimizer."""
    config = build_config(Config, job["config"])
    start_process_group(Launch(), choose_device(job["device"], Launch()))
    start_model_parallel(config.parallel, seed=0)
    return fit_steps(config, batch, num_tokens=job["num_tokens"], pad_id=job["pad_id"]).seconds


def time_transformers(job: Job, batch: Batch) -> list[float]:
    """The same model as its users train it: SDPA, autocast for bf16, batches of `batch_size` cells, fused AdamW."""
    from transformers import BertConfig, BertForMaskedLM

    shape = GeneformerConfig(**job["config"]["model"])
    device = torch.device(job["device"])
    model = BertForMaskedLM(
        BertConfig(  # type: ignore[call-arg]
            vocab_size=job["num_tokens"],
            hidden_size=shape.hidden_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_attention_heads,
            intermediate_size=shape.ffn_hidden_size,
            hidden_act="relu",
            hidden_dropout_prob=shape.hidden_dropout,
            attention_probs_dropout_prob=shape.attention_dropout,
            max_position_embeddings=shape.max_positions,
            layer_norm_eps=shape.norm_epsilon,
            pad_token_id=job["pad_id"],
            attn_implementation="sdpa",
        )
    )
    model.to(device)  # type: ignore[arg-type]
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01, fused=True)
    is_half = job["config"]["precision"] == "bf16"
    seconds = []
    for _ in range(job["config"]["loop"]["max_steps"]):
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        for inputs in _transformers_batches(job, batch):
            tensors = {name: torch.from_numpy(array).to(device) for name, array in inputs.items()}
            with torch.autocast(device.type, torch.bfloat16) if is_half else nullcontext():
                loss = model(**tensors).loss
            loss.backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds


def _transformers_batches(job: Job, batch: Batch) -> Iterator[dict[str, np.ndarray]]:
    """Padded to one length, or grouped by length as the Trainer does it, each batch padded to its longest cell."""
    length = job["padded_to"]
    cells = batch if length else batch.sorted_by_length()
    for part in cells.split(job["batch_size"]):
        padded = pad_batch(part, pad_id=job["pad_id"], length=length)
        yield {
            "input_ids": padded.tokens_BS,
            "attention_mask": (~padded.is_padding_BS).astype(np.int64),
            "labels": np.where(padded.is_padding_BS, NO_LABEL, padded.labels_BS),
        }
