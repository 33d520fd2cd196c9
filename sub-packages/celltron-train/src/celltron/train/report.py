"""Where a run's metrics go besides `metrics.jsonl`."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

from celltron.core import InputError
from celltron.train.metrics import MetricsWriter

EXTRAS = {"wandb": "wandb", "tensorboard": "tensorboard"}
"""The package that each way of reporting needs, which is also the name of celltron's extra."""
# W&B's own rule.
_LONGEST_PROJECT = 128
_NOT_IN_PROJECT = "/\\#?%:"


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportConfig:
    """How a run is measured and where that is shown; `metrics.jsonl` is always written."""

    to: tuple[Literal["wandb", "tensorboard"], ...] = ()
    """Besides `metrics.jsonl`: `wandb` is Weights & Biases, `tensorboard` event files in the run's folder."""
    wandb_mode: Literal["auto", "online", "offline"] = "auto"
    """Whether W&B sends what it is told; `auto` does where a key is found (WANDB_API_KEY, or `wandb login`) and else
    keeps it in the run's folder, for `wandb sync`."""
    wandb_project: str = "celltron"
    """The project in W&B."""
    wandb_name: str = ""
    """The run's name in W&B; empty takes that of its folder."""
    peak_flops: float = 0.0
    """Floating-point operations a second of one process's device, which utilisation is a share of; 0 measures a matrix
    product in the run's precision at the start."""

    def __post_init__(self) -> None:
        if len(self.wandb_project) > _LONGEST_PROJECT or set(_NOT_IN_PROJECT) & set(self.wandb_project):
            raise ValueError(
                f"report.wandb_project is {self.wandb_project!r:.60}, but W&B takes at most {_LONGEST_PROJECT} letters "
                f"and none of {' '.join(_NOT_IN_PROJECT)}; choose another name"
            )
        if self.peak_flops < 0:
            raise ValueError(f"report.peak_flops is {self.peak_flops}, but must not be negative")

    def check_installed(self) -> None:
        """Check, before anything else is done, that the packages for these reports are there.

        Raises:
            InputError: names the extra that is missing.
        """
        for name in self.to:
            if find_spec(EXTRAS[name]) is None:
                raise InputError(
                    f"report.to asks for {name}, which is not installed; install celltron[{EXTRAS[name]}], or take it "
                    "out of report.to"
                )


def open_reports(config: ReportConfig, metrics: MetricsWriter, settings: Mapping[str, Any]) -> None:
    """Have the main process's metrics shown in what the config names, too.

    Args:
        config: What it names.
        metrics: The run's, already cut back to the step before the first one.
        settings: The resolved config, without secrets: it is shown beside the run.

    Raises:
        InputError: a package is missing, or W&B refused the run.
    """
    config.check_installed()
    if "tensorboard" in config.to:
        from celltron.train.report_tensorboard import TensorBoardReport

        metrics.reports.append(TensorBoardReport(metrics.folder, first_step=metrics.first_step))
    if "wandb" in config.to:
        from celltron.train.report_wandb import WandbReport

        metrics.reports.append(
            WandbReport(
                metrics.folder,
                project=config.wandb_project,
                name=config.wandb_name or metrics.folder.resolve().name,
                mode=config.wandb_mode,
                settings=settings,
                past=metrics.read(),
            )
        )
