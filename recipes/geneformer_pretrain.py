"""Pretrain Geneformer: counts in (a store or files of counts), checkpoints out; on one process or under torchrun."""

import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from celltron.cells import NO_LABEL, Batch, Loader, LoaderState, convert, cut_into_packs, open_cells, pad_batch
from celltron.cells.corpus import Corpus, build_corpus, read_corpus
from celltron.cells.open_cells import is_converted, parse_storage
from celltron.core import (
    InputError,
    ProgressLine,
    config_to_dict,
    config_to_yaml,
    load_config,
    parse_arguments,
    run_command,
    write_atomically,
)
from celltron.models.geneformer import (
    MODEL_FILE_NAME,
    ModelShape,
    masked_gene_loss,
)
from celltron.models.geneformer.flops import flops_per_step
from celltron.models.layers.choice import LayerChoice
from celltron.models.layers.packing import PackedCells
from celltron.recipes.shared.pretrain_config import FLAGS as FLAGS
from celltron.recipes.shared.pretrain_config import Config as Config
from celltron.recipes.shared.pretrain_model import build_model, pick_layers
from celltron.train.checkpoint import Checkpoints, find_checkpoint, load_training, read_resumable, verify_checkpoint
from celltron.train.fully_sharded import most_micro_batches
from celltron.train.launch import Launch, choose_device, read_launch, start_process_group
from celltron.train.loop import Job, LossFunction, StepBatch, fit
from celltron.train.metrics import MetricsWriter
from celltron.train.optimizer import wrap_model
from celltron.train.parallel import context_parallel_place, cut_row, data_parallel_place, start_model_parallel
from celltron.train.peak import measure_peak
from celltron.train.precision import DTYPES
from celltron.train.report import open_reports
from celltron.train.run_folder import check_folder, hold_folder, mark_folder
from celltron.train.step_timer import start_timer
from celltron.train.together import blame_lost_process, do_on_main, do_together

if TYPE_CHECKING:
    from megatron.core.optimizer import MegatronOptimizer

    from celltron.train.fully_sharded import DataParallel


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the job that the command line describes."""
    config = parse_arguments(Config, sys.argv[1:] if arguments is None else arguments, flags=FLAGS).config
    launch = read_launch()
    device = choose_device(config.device, launch)
    config.loop.check_batches(config.parallel.data(launch.world_size))
    config.report.check_installed()
    if config.precision == "fp64" and device.type != "cpu":
        raise InputError("precision is fp64, which is for proofs on a CPU; give --device cpu, or another --precision")
    pick_layers(config, device)  # what cannot be is refused before anything is done
    with blame_lost_process():
        start_process_group(launch, device)
        start_model_parallel(config.parallel, seed=config.loop.seed)
        with hold_folder(Path(config.out), launch):
            pretrain(config, launch, device)
        torch.distributed.destroy_process_group()


def pretrain(config: Config, launch: Launch, device: torch.device) -> float:
    """Train and return the validation loss at the end; every process calls this.

    Raises:
        SystemExit: after SIGTERM or SIGINT, once the last step is saved.
    """
    out = Path(config.out)
    resume_from = claim_folder(config, launch)
    corpus = prepare_corpus(config, launch, resume_from)
    wrapped, optimizer = make_model(config, num_tokens=len(corpus.tokenizer.vocabulary))
    resumed, first_step, loader_state = None, 1, None
    if resume_from is not None:
        resumed = read_resumable(resume_from)
        config.loop.check_continues(resumed.step, seed=resumed.seed, where=str(resume_from))
        load_training(resume_from, wrapped, optimizer)
        first_step, loader_state = resumed.step + 1, LoaderState(**resumed.loader)
        # Not earlier: a checkpoint that is refused leaves the run as it was.
        do_on_main(launch, lambda: write_run_files(config, corpus))
    metrics = MetricsWriter(out, is_main=launch.is_main, first_step=first_step)
    settings = config_to_dict(config)
    del settings["data"]["storage"]  # it may hold keys
    do_on_main(launch, lambda: open_reports(config.report, metrics, settings))
    peak_flops = config.report.peak_flops or measure_peak(device, DTYPES[config.precision])
    unigram_loss = measure_unigram(config, corpus, launch)
    layers = pick_layers(config, device)
    metrics.say(
        describe(config, corpus, launch, layers=layers, unigram_loss=unigram_loss, first_step=first_step)
    )
    job = Job(
        model=wrapped,
        optimizer=optimizer,
        weight_decay=config.optimizer.weight_decay,
        schedule=config.schedule,
        forward_step=forward_step,
        train=TrainStream(config, corpus, device, loader_state),
        validation=partial(validation_batches, config, corpus, device),
        checkpoints=Checkpoints(
            out / "checkpoints",
            launch=launch,
            retention=config.loop.retention,
            files=travelling_files(config, corpus, out),
        ),
        metrics=metrics,
        timer=start_timer(device),
        peak_flops=peak_flops * launch.world_size,
        spikes=config.spike,
        validation_facts={"unigram_loss": unigram_loss},
    )
    try:
        return fit(config.loop, job, resumed=resumed)
    finally:
        metrics.close()


def make_model(config: Config, *, num_tokens: int) -> "tuple[DataParallel, MegatronOptimizer]":
    """This process's part of the model with its initial weights, and its optimizer."""
    return wrap_model(
        build_model(config, num_tokens=num_tokens),
        config.optimizer,
        dtype=DTYPES[config.precision],
        distributed_optimizer=config.parallel.distributed_optimizer,
        overlap=config.engine.overlap,
        fsdp=config.parallel.fsdp,
    )


def forward_step(micro_batch: dict[str, Any], model: torch.nn.Module) -> tuple[torch.Tensor, LossFunction]:
    """Join a micro-batch and the model: this stage's output, and what makes (sum, count) of the last stage's."""
    inputs = {name: value for name, value in micro_batch.items() if name != "labels_M"}
    return model(**inputs), partial(masked_gene_loss, labels_M=micro_batch["labels_M"])


def claim_folder(config: Config, launch: Launch) -> Path | None:
    """Make sure that the run's folder is ours, and find the checkpoint to continue from, if any."""
    checkpoints = Path(config.out) / "checkpoints"
    if config.resume == "auto":
        newest = Checkpoints(checkpoints, launch=launch).newest()
        if newest is None:
            do_on_main(launch, lambda: check_folder(Path(config.out)))
        return newest
    resume_from = find_checkpoint(Path(config.resume)) if config.resume else None
    if resume_from is not None:
        do_on_main(launch, lambda: verify_checkpoint(resume_from))
        read_resumable(resume_from)  # an imported model is refused before anything is converted
    is_of_this_run = resume_from is not None and resume_from.resolve().parent == checkpoints.resolve()
    if not is_of_this_run and checkpoints.exists() and any(checkpoints.iterdir()):
        raise InputError(f"{config.out} holds a run already; continue it with --resume auto, or choose another --out")
    do_on_main(launch, lambda: check_folder(Path(config.out)))
    return resume_from


def check_same_job(config: Config, resume_from: Path) -> None:
    """Refuse to continue with other cells, tokens or another model than the checkpoint was trained with.

    Raises:
        InputError: names the first setting that differs.
    """
    saved = load_config(Config, resume_from / "config.yaml")
    # Where the cells lie, and how a baseline and a loss are measured, does not change what is trained.
    free = {"paths", "storage", "convert", "cache", "unigram_cells", "validation_cells"}
    for section in ("data", "model"):
        before, now = config_to_dict(getattr(saved, section)), config_to_dict(getattr(config, section))
        for key in now:
            if before[key] != now[key] and not (section == "data" and key in free):
                raise InputError(
                    f"{section}.{key} is {now[key]!r}, but {resume_from} was trained with {before[key]!r}; continue "
                    "with that, or start a new run"
                )


def prepare_corpus(config: Config, launch: Launch, resume_from: Path | None) -> Corpus:
    """Convert where needed, split, and make the tokeniser; a resumed run takes both from its checkpoint."""
    out = Path(config.out)
    sources = config.data.sources
    is_store = all(is_converted(source) for source in sources)
    paths = sources if is_store else (str(out / "cells.store"),)
    storage = parse_storage(config.data.storage)

    def prepare() -> None:
        is_fresh = not out.exists() or not any(out.iterdir())
        try:
            out.mkdir(parents=True, exist_ok=True)
            mark_folder(out)
            prepare_store()
        except BaseException:
            if is_fresh:
                shutil.rmtree(out)
            raise

    def prepare_store() -> None:
        is_new = not is_store and (resume_from is None or not Path(paths[0]).exists())
        if is_new:
            options = config_to_dict(config.data.convert)
            progress = ProgressLine("converting", "cells")
            report = convert(sources, paths[0], replace=True, storage=storage, progress=progress, **options)
            print(report, file=sys.stderr)
        store = open_cells(paths, storage=storage)
        if resume_from is None:
            write_run_files(config, build_corpus(config.data, store, seed=config.loop.seed))
            return
        try:
            check_same_job(config, resume_from)
            read_corpus(config.data, store, resume_from)
        except InputError:
            if is_new:
                shutil.rmtree(paths[0])
            raise

    do_on_main(launch, prepare)
    found: list[Corpus] = []
    folder = out if resume_from is None else resume_from
    do_together(lambda: found.append(read_corpus(config.data, open_cells(paths, storage=storage), folder)))
    return found[0]


def write_run_files(config: Config, corpus: Corpus) -> None:
    """Write the resolved config, vocabulary, medians and split manifest into the run's folder."""
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    corpus.write(out)
    write_atomically(out / "config.yaml", config_to_yaml(config))


def travelling_files(config: Config, corpus: Corpus, out: Path) -> dict[str, str]:
    """What explains a checkpoint: resolved config, model shape, vocabulary, medians, split manifest."""
    names = ("config.yaml", "vocabulary.json", "medians.json", "split.json")
    shape = ModelShape(
        config=config.model, num_tokens=len(corpus.tokenizer.vocabulary), max_length=config.data.max_length
    )
    return {name: (out / name).read_text(encoding="utf-8") for name in names} | {MODEL_FILE_NAME: shape.to_json()}


def measure_unigram(config: Config, corpus: Corpus, launch: Launch) -> float:
    """The baseline that the validation loss must beat; 0 on processes other than the main one, which print nothing."""
    losses = [0.0]
    do_on_main(launch, lambda: losses.append(corpus.unigram_loss(config.data.masking, seed=config.loop.seed)))
    return losses[-1]


class TrainStream:
    """Endless training batches as tensors: a `celltron.train.loop.BatchStream`."""

    def __init__(self, config: Config, corpus: Corpus, device: torch.device, state: LoaderState | None) -> None:
        self.config = config
        self.corpus = corpus
        self.device = device
        rank, world_size = data_parallel_place()
        self.loader = corpus.train_loader(
            config.data.masking,
            cells_per_batch=config.loop.global_batch_size,
            seed=config.loop.seed,
            rank=rank,
            world_size=world_size,
            state=state,
        )
        self.before = self.loader.state

    def __next__(self) -> StepBatch:
        self.before = self.loader.state
        batch = next(self.loader)
        step_batch = make_step_batch(self.config, self.corpus, batch, self.device)
        lengths = batch.lengths.astype(np.float64)
        flops = flops_per_step(
            self.config.model,
            len(self.corpus.tokenizer.vocabulary),
            lengths_sum=lengths.sum(),
            lengths_square_sum=np.square(lengths).sum(),
            num_predicted=int(np.count_nonzero(batch.labels != NO_LABEL)),
        )
        return replace(step_batch, flops=flops)

    def state(self) -> dict[str, int]:
        """The loader's three numbers."""
        state = self.loader.state
        return {"seed": state.seed, "epoch": state.epoch, "position": state.position}

    def cells(self) -> list[int]:
        """Ids of the last global batch's cells, as the store numbers them."""
        cells, *_ = self.loader.order.take(self.before, self.config.loop.global_batch_size, epochs=None)
        ids: list[int] = cells.tolist()
        return ids


def validation_batches(config: Config, corpus: Corpus, device: torch.device) -> Iterator[StepBatch]:
    """One pass over this process's part of the validation cells, masked alike every time."""
    rank, world_size = data_parallel_place()
    loader: Loader = corpus.validation_loader(
        config.data.masking,
        cells_per_batch=config.loop.global_batch_size,
        seed=config.loop.seed,
        rank=rank,
        world_size=world_size,
    )
    with loader:
        for batch in loader:
            yield make_step_batch(config, corpus, batch, device)


def make_step_batch(config: Config, corpus: Corpus, batch: Batch, device: torch.device) -> StepBatch:
    """Cut a batch into micro-batches; under FSDP, into as many as other processes, with blank ones at the end."""
    micro_batches = cut_into_micro_batches(config, corpus, batch, device)
    if config.parallel.fsdp:
        blank = cut_into_micro_batches(config, corpus, blank_batch(corpus.tokenizer.vocabulary.pad_id), device)
        micro_batches += blank * (most_micro_batches(len(micro_batches)) - len(micro_batches))
    return StepBatch(
        micro_batches=micro_batches,
        num_cells=len(batch),
        num_tokens=int(batch.lengths.sum()),
        num_places=config.parallel.context * sum(micro_batch["tokens_BS"].numel() for micro_batch in micro_batches),
    )


def blank_batch(pad_id: int) -> Batch:
    """One cell of one token of padding, which is not predicted."""
    one, number = np.ones(1, dtype=np.int32), np.zeros(1, dtype=np.int64)
    return Batch(tokens=pad_id * one, labels=NO_LABEL * one, lengths=one, cells=number, epochs=number)


def cut_into_micro_batches(config: Config, corpus: Corpus, batch: Batch, device: torch.device) -> list[dict[str, Any]]:
    """Micro-batches of cells packed without gaps, or of padded ones of like length as the reference.

    Of their rows, those that it shares with context-parallel processes, this process takes its part.
    """
    place = context_parallel_place()
    how = {"pad_id": corpus.tokenizer.vocabulary.pad_id, "multiple_of": config.padding_multiple}
    micro_batches: list[dict[str, Any]] = []
    if config.loop.packing:
        for pack in cut_into_packs(batch, config.loop.micro_batch_size * config.data.max_length, **how):
            part = cut_row(len(pack.tokens_T), *place)
            tensors = to_tensors({"tokens_BS": pack.tokens_T[None, part]}, pack.labels_T[part], device)
            micro_batches.append(tensors | {"packed": PackedCells.of(pack.lengths.tolist(), device, part=part)})
    else:
        for cells in batch.sorted_by_length().split(config.loop.micro_batch_size):
            padded = pad_batch(cells, **how)
            part = cut_row(padded.tokens_BS.shape[1], *place)
            inputs = {"tokens_BS": padded.tokens_BS[:, part], "is_padding_BS": padded.is_padding_BS}
            micro_batches.append(to_tensors(inputs, padded.labels_BS[:, part].ravel(), device))
    return micro_batches


def to_tensors(inputs: dict[str, np.ndarray], labels: np.ndarray, device: torch.device) -> dict[str, torch.Tensor]:
    """The inputs, and of the labels those that there are and where: all that the head works on."""
    places_M = np.flatnonzero(labels != NO_LABEL)
    arrays = inputs | {"places_M": places_M, "labels_M": labels[places_M]}
    return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}


def describe(
    config: Config, corpus: Corpus, launch: Launch, *, layers: LayerChoice, unigram_loss: float, first_step: int
) -> str:
    """What is about to run, and what it must beat."""
    data_parallel = config.parallel.data(launch.world_size)
    lines = [
        f"{len(corpus.split.train):,} training and {len(corpus.split.validation):,} validation cells, "
        f"split by {config.data.validation_by}; vocabulary of {len(corpus.tokenizer.vocabulary):,} tokens",
        f"{config.model.num_layers} {config.model.variant.replace('_', '-')} layers x {config.model.hidden_size} wide, "
        f"world size {launch.world_size} "
        f"(tensor {config.parallel.tensor} x pipeline {config.parallel.pipeline} x context {config.parallel.context} x "
        f"data {data_parallel}), "
        f"{config.precision}, {layers.layers} layers ({layers.reason})",
        f"to beat: {unigram_loss:.4f} nats, the cross-entropy of the training cells' gene frequencies (unigram)",
    ]
    if first_step > 1:
        lines.append(f"continuing with step {first_step:,} of {config.loop.max_steps:,}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_command(main))
