"""Which checkpoints of a run are kept."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from celltron.core import InputError
from celltron.train.checkpoint_folder import list_checkpoints, read_run_state, remove_checkpoint, step_of


@dataclass(frozen=True, kw_only=True, slots=True)
class RetentionConfig:
    """Which checkpoints stay; one that any of these keeps does, and the newest always."""

    keep_last: int = 3
    """Newest checkpoints kept; 0 keeps all."""
    keep_best: int = 0
    """Checkpoints of the lowest validation loss kept, among those written at a step that was validated; 0 is none."""
    keep_every: int = 0
    """Checkpoints of steps that are a multiple of this are kept for ever; 0 is none."""

    def __post_init__(self) -> None:
        for name in ("keep_last", "keep_best", "keep_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"retention.{name} is {getattr(self, name)}, but must not be negative")


def choose_removed(
    config: RetentionConfig, steps: Sequence[int], losses: Mapping[int, float], *, current: int
) -> list[int]:
    """The steps whose checkpoints are to be removed, oldest first.

    Args:
        config: What is kept.
        steps: Of the checkpoints that there are.
        losses: Validation loss by step, of those that have one; a later step is the better one of equals.
        current: The step just written, which stays.

    >>> config = RetentionConfig(keep_last=2, keep_best=1, keep_every=40)
    >>> choose_removed(config, [10, 20, 30, 40, 50, 60, 70], {20: 0.5, 30: 0.4, 60: 0.6}, current=70)
    [10, 20, 50]
    """
    if not config.keep_last:
        return []
    others = sorted(set(steps) - {current})
    last = others[max(0, len(others) + 1 - config.keep_last) :]
    finite = [step for step in losses if step in steps and math.isfinite(losses[step])]
    best = sorted(finite, key=lambda step: (losses[step], -step))[: config.keep_best]
    kept = {*last, *best}
    return [step for step in others if step not in kept and not (config.keep_every and step % config.keep_every == 0)]


def remove_outdated(config: RetentionConfig, folder: Path, *, current: int) -> None:
    """Remove the checkpoints that are kept no longer; `current` is the step that `latest` names.

    Raises:
        OSError: one could not be removed.
    """
    paths = {step_of(path): path for path in list_checkpoints(folder)}
    losses = _read_losses(paths.values()) if config.keep_last and config.keep_best else {}
    for step in choose_removed(config, list(paths), losses, current=current):
        remove_checkpoint(paths[step])


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
