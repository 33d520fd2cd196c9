"""Where a pretraining run goes on, and whether it may go on from there."""

from pathlib import Path

from celltron.cells import LoaderState
from celltron.cells.corpus import Corpus
from celltron.cells.sampler import digest_next_cells
from celltron.core import InputError, config_to_dict, load_config, tell, write_atomically
from celltron.recipes.shared.pretrain_config import Config
from celltron.train.checkpoint import Checkpoints, find_checkpoint, read_resumable, verify_checkpoint
from celltron.train.checkpoint_folder import LATEST_NAME, RunState
from celltron.train.launch import Launch
from celltron.train.run_folder import check_folder
from celltron.train.together import do_on_main

ORIGIN_NAME = "resumed_from"
"""A file in a run's folder with the path of the checkpoint that it was last told to go on from."""


def claim_folder(config: Config, launch: Launch) -> Path | None:
    """Make sure that the run's folder is ours, and find the checkpoint to continue from, if any.

    A launcher that starts lost processes again gives them the same words as before, `--resume CHECKPOINT` perhaps; what
    the run has saved since is then the place to go on.
    """
    out = Path(config.out)
    checkpoints = out / "checkpoints"
    given = find_checkpoint(Path(config.resume)) if config.resume not in ("", "auto") else None
    origin = read_origin(out)
    is_again = launch.is_restart and given is not None and given.resolve() == origin
    if config.resume == "auto" or is_again:
        newest = Checkpoints(checkpoints, launch=launch).newest()
        if newest is not None:
            return newest
        if origin is not None:
            if launch.is_main:
                tell(f"{out} has no checkpoint of its own yet, so it begins again with {origin}")
            given = origin
    if given is not None:
        do_on_main(launch, lambda: verify_checkpoint(given))
        read_resumable(given)  # an imported model is refused before anything is converted
    is_of_this_run = given is not None and given.resolve().parent == checkpoints.resolve()
    may_hold_more = config.resume == "auto" or is_again or is_of_this_run
    if not may_hold_more and checkpoints.exists() and any(checkpoints.iterdir()):
        raise InputError(f"{out} holds a run already; continue it with --resume auto, or choose another --out")
    do_on_main(launch, lambda: check_folder(out))
    return given


def read_origin(out: Path) -> Path | None:
    """The checkpoint that the run of a folder was told to go on from, if any.

    Raises:
        InputError: the file that says it does not.
    """
    try:
        text = (out / ORIGIN_NAME).read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return None
    if not Path(text).is_absolute():
        raise InputError(f"{out / ORIGIN_NAME} holds {text[:60]!r}, no checkpoint's path; remove it")
    return Path(text)


def note_origin(config: Config, resume_from: Path) -> None:
    """Have a run that is started again, before it has saved anything, go on from where it began."""
    if config.resume == "auto":
        return
    checkpoints = Path(config.out) / "checkpoints"
    if resume_from.resolve().parent == checkpoints.resolve():
        write_atomically(checkpoints / LATEST_NAME, f"{resume_from.name}\n")
    write_atomically(Path(config.out) / ORIGIN_NAME, f"{resume_from.resolve()}\n")


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


def read_loader_state(config: Config, corpus: Corpus, resumed: RunState, where: Path) -> LoaderState:
    """The place among the training cells where a checkpoint stands.

    Raises:
        InputError: other cells follow it now than when it was written.
    """
    place = dict(resumed.loader)
    next_cells = place.pop("next_cells", None)
    state = LoaderState(**place)
    order = corpus.order(cells_per_batch=config.loop.global_batch_size, seed=resumed.seed)
    if next_cells not in (None, digest_next_cells(order, state)):
        raise InputError(
            f"{where} would go on with other cells than those that came next when it was written; give the same kind "
            f"of --data (a store, or its tar shards) and, with data.order.length_window, the same "
            "loop.global_batch_size, or start a new run"
        )
    return state
