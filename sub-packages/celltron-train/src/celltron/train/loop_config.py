"""Settings of the training loop."""

from dataclasses import dataclass

from celltron.core import InputError
from celltron.train.retention import RetentionConfig

MAX_STOP_SECONDS = 3_600


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopConfig:
    """How long to train, in which portions, and what to do on the way."""

    max_steps: int = 1000
    """Optimizer steps of the whole run."""
    global_batch_size: int = 64
    """Cells an optimizer step, over all processes."""
    micro_batch_size: int = 8
    """Cells of full length that one process computes on at once."""
    packing: bool = True
    """Whether cells follow each other without padding, as many at once as have the tokens of those; false pads
    `micro_batch_size` cells of like length to the longest."""
    seed: int = 0
    """Seed of initial weights, order, masks and dropout."""
    log_every: int = 10
    """Steps between two lines of metrics."""
    validate_every: int = 0
    """Steps between two validations; one is always made at the end, and with 0 only that one."""
    save_every: int = 0
    """Steps between two checkpoints; one is always written at the end, and with 0 only that one."""
    keep_checkpoints: int = 3
    """Newest checkpoints kept; 0 keeps all. When a run goes back to an earlier one, those after it are removed once a
    new one is complete, unless this is 0."""
    keep_best: int = 0
    """Checkpoints of the lowest validation loss kept besides, of those written at a step that was validated."""
    keep_every: int = 0
    """Checkpoints of steps that are a multiple of this are kept as long as the run does not go back; 0 is none."""
    max_skipped_steps: int = 10
    """Steps in a row that may be skipped since their loss or gradient is no finite number; one more ends the run."""
    stop_seconds: float = 100.0
    """Seconds from SIGTERM or SIGINT until a run that has not ended its step and saved it by then ends unsaved; whoever
    would kill it must wait longer, as the launchers under scripts/ do for the default."""

    def __post_init__(self) -> None:
        for name in ("max_steps", "global_batch_size", "micro_batch_size", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"loop.{name} is {getattr(self, name)}, but must be at least 1")
        counts = ("validate_every", "save_every", "keep_checkpoints", "keep_best", "keep_every", "max_skipped_steps")
        for name in (*counts, "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"loop.{name} is {getattr(self, name)}, but must not be negative")
        if not 0.0 < self.stop_seconds <= MAX_STOP_SECONDS:
            raise ValueError(
                f"loop.stop_seconds is {self.stop_seconds}, but must be more than 0 and at most {MAX_STOP_SECONDS}"
            )
        if self.keep_best and (not self.validate_every or self.save_every % self.validate_every):
            raise ValueError(
                f"loop.keep_best is {self.keep_best}, but only checkpoints of validated steps have a loss to compare; "
                "give loop.validate_every, and a loop.save_every that is a multiple of it"
            )

    @property
    def retention(self) -> RetentionConfig:
        """Which checkpoints stay."""
        return RetentionConfig(
            keep_last=self.keep_checkpoints, keep_best=self.keep_best, keep_every=self.keep_every
        )

    def check_batches(self, data_parallel: int) -> None:
        """Check that a global batch can be dealt to processes.

        Raises:
            InputError: there are fewer cells than processes, or padded micro-batches do not divide the global batch.
        """
        if self.global_batch_size < data_parallel:
            raise InputError(
                f"loop.global_batch_size {self.global_batch_size} is less than the {data_parallel} data-parallel "
                "processes, each of which needs a cell; raise it, or start fewer processes"
            )
        portion = self.micro_batch_size * data_parallel
        if not self.packing and self.global_batch_size % portion:
            raise InputError(
                f"loop.global_batch_size {self.global_batch_size} is not micro-batches x loop.micro_batch_size "
                f"{self.micro_batch_size} x {data_parallel} data-parallel processes; choose a multiple of {portion}"
            )

    def check_continues(self, step: int, *, seed: int, where: str) -> None:
        """Check that these settings can go on after a step of a run; `where` names its checkpoint.

        Raises:
            InputError: that step is the last one, or the run had another seed.
        """
        if seed != self.seed:
            raise InputError(f"loop.seed is {self.seed}, but {where} was written with {seed}; continue with that seed")
        self.check_first_step(step + 1)

    def check_first_step(self, first_step: int) -> None:
        """Raise InputError where there is no such step."""
        if first_step > self.max_steps:
            raise InputError(
                f"step {first_step - 1} of loop.max_steps {self.max_steps} is done already; raise loop.max_steps"
            )
