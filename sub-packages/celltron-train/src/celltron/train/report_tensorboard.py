"""A run's metrics as TensorBoard's event files."""

from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

FOLDER_NAME = "tensorboard"


class TensorBoardReport:
    """Writes numbers to event files in the run's folder; `tensorboard --logdir RUNS` shows them.

    Every start of a run begins a file of its own, which tells TensorBoard to hide what earlier ones hold from its first
    step on.

    Args:
        folder: The run's folder.
        first_step: The step that the run starts or continues with.
    """

    def __init__(self, folder: Path, *, first_step: int) -> None:
        self.writer = SummaryWriter(folder / FOLDER_NAME, purge_step=first_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point to each curve."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        # A killed process writes no more.
        self.writer.flush()

    def close(self) -> None:
        """Close the file."""
        self.writer.close()
