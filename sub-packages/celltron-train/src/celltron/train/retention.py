"""Which checkpoints of a run are kept."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from celltron.core import InputError, tell
from celltron.train.checkpoint_folder import list_checkpoints, read_run_state, remove_checkpoint, step_of


@dataclass(frozen=True, kw_only=True, slots=True)
class RetentionConfig:
    """Which checkpoints stay; one that any of these keeps does, and the newest always.

    When a run goes on from an earlier checkpoint than its newest, those after that one are of a run that was given up:
    none of these keeps them, and they are removed once the first new one is complete. Only `keep_last` 0 keeps them.
    """

    keep_last: int = 3
    """Newest checkpoints kept; 0 keeps all."""
    keep_best: int = 0
    """Checkpoints of the lowest validation loss kept, among those written at a step that was validated; 0 is none."""
    keep_every: int = 0
    """Checkpoints of steps that are a multiple of this are kept as long as the run does not go back; 0 is none."""

    def __post_init__(self) -> None:
        for name in ("keep_last", "keep_best", "keep_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"retention.{name} is {getattr(self, name)}, but must not be negative")


def choose_removed(
    config: RetentionConfig,
    steps: Sequence[int],
    losses: Mapping[int, float],
    *,
    current: int,
    given_up: Collection[int] = (),
) -> list[int]:
    """The steps whose checkpoints are to be removed, oldest first.

    Args:
        config: What is kept.
        steps: Of the checkpoints that there are.
        losses: Validation loss by step, of those that have one; a later step is the better one of equals.
        current: The step just written, which stays.
        given_up: Those of the steps that were written before the run went back to an earlier one.

    >>> config = RetentionConfig(keep_last=2, keep_best=1, keep_every=40)
    >>> choose_removed(config, [10, 20, 30, 40, 50, 60, 70], {20: 0.5, 30: 0.4, 60: 0.6}, current=70)
    [10, 20, 50]
    """
    if not config.keep_last:
        return []
    own = set(steps) - set(given_up)
    others = sorted(own - {current})
    last = others[max(0, len(others) + 1 - config.keep_last) :]
    finite = [step for step in losses if step in own and math.isfinite(losses[step])]
    best = sorted(finite, key=lambda step: (losses[step], -step))[: config.keep_best]
    every = [step for step in others if config.keep_every and step % config.keep_every == 0]
    return sorted(set(steps) - {current, *last, *best, *every})


def remove_outdated(config: RetentionConfig, folder: Path, *, written: Sequence[int], first_step: int) -> None:
    """Remove the checkpoints that are kept no longer; one that cannot be removed is said, and tried again next time.

    Args:
        config: What is kept.
        folder: The run's `checkpoints`.
        written: The steps saved since the run started or continued; the last is the one that `latest` names.
        first_step: The step that it started or continued with.
    """
    paths = {step_of(path): path for path in list_checkpoints(folder)}
    losses = _read_losses(paths.values()) if config.keep_last and config.keep_best else {}
    given_up = [step for step in paths if step >= first_step and step not in written]
    outdated = choose_removed(config, list(paths), losses, current=written[-1], given_up=given_up)
    # Those given up go first: after a kill, the next start would take the ones before `latest` for its own.
    outdated.sort(key=lambda step: step not in given_up)
    removed = [step for step in outdated if remove_checkpoint(paths[step])]
    names = [paths[step].name for step in removed if step in given_up]
    if names:
        sentence = f"removed {', '.join(names)}, written before the run went back to an earlier checkpoint"
        tell(sentence)


def _read_losses(paths: Iterable[Path]) -> dict[int, float]:
    """Validation losses by step, from the checkpoints themselves: a resumed run knows them too."""
    losses = {}
    for path in paths:
        try:
            loss = read_run_state(path).validation_loss
        except (InputError, OSError):  # a damaged one is nobody's best
            continue
        if loss is not None:
            losses[step_of(path)] = loss
    return losses
