"""Pretrain Geneformer: counts in (a store or files of counts), checkpoints out; on one process or under torchrun."""

import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from celltron.cells import convert, open_cells
from celltron.cells.corpus import Corpus, build_corpus, read_corpus
from celltron.cells.open_cells import is_converted, parse_storage
from celltron.core import (
    InputError,
    ProgressLine,
    config_to_dict,
    config_to_yaml,
    parse_arguments,
    run_command,
    tell,
    write_atomically,
)
from celltron.models.geneformer import (
    MODEL_FILE_NAME,
    ModelShape,
    masked_gene_loss,
)
from celltron.models.layers.choice import LayerChoice
from celltron.recipes.shared.pretrain_batches import TrainStream, validation_batches
from celltron.recipes.shared.pretrain_config import FLAGS as FLAGS
from celltron.recipes.shared.pretrain_config import Config as Config
from celltron.recipes.shared.pretrain_model import build_model, pick_layers
from celltron.recipes.shared.pretrain_resume import check_same_job, claim_folder, note_origin, read_loader_state
from celltron.train.checkpoint import Checkpoints, load_training, read_resumable
from celltron.train.launch import Launch, choose_device, read_launch, start_process_group
from celltron.train.loop import Job, LossFunction, fit
from celltron.train.metrics import MetricsWriter
from celltron.train.optimizer import wrap_model
from celltron.train.parallel import start_model_parallel
from celltron.train.peak import measure_peak
from celltron.train.precision import DTYPES
from celltron.train.report import open_reports
from celltron.train.run_folder import hold_folder, mark_folder
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
        first_step, loader_state = resumed.step + 1, read_loader_state(config, corpus, resumed, resume_from)
        # Not earlier: a checkpoint that is refused leaves the run as it was.
        do_on_main(launch, lambda: write_run_files(config, corpus))
        do_on_main(launch, lambda: note_origin(config, resume_from))
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
            first_step=first_step,
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
            tell(str(report))
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
