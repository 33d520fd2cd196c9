"""A run's metrics in Weights & Biases.

W&B cannot go on with a run that is kept offline: what is uploaded last of several starts with the same id replaces what
was there. So each offline start begins with what `metrics.jsonl` holds, and the newest folder is the whole run.
"""

import netrc
import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from celltron.core import InputError, write_atomically
from celltron.train.metrics import numbers_of

RUN_ID_NAME = "wandb_run_id.txt"
PUBLIC_HOSTS = {"api.wandb.ai", "api.forge.coreweave.com"}
"""Two names of one service: `wandb login` has written either, by its version."""


class WandbReport:
    """Tells W&B what `metrics.jsonl` is told, and goes on with the same run after a restart.

    Curves are drawn over `step`. When a run goes on from a checkpoint older than its last record, an online run holds
    both what was told before the restart and after it, since W&B takes nothing back; an offline one only what counts.

    Args:
        folder: The run's folder; W&B keeps its files in `wandb/` there, and the run's id beside it.
        project: W&B's project.
        name: The run's name.
        mode: `online`, `offline`, or `auto`: online where W&B finds a key.
        settings: Shown as the run's config.
        past: The records written before this start.

    Raises:
        InputError: W&B refuses the run.
    """

    def __init__(
        self,
        folder: Path,
        *,
        project: str,
        name: str,
        mode: Literal["auto", "online", "offline"],
        settings: Mapping[str, Any],
        past: Iterable[Mapping[str, Any]],
    ) -> None:
        # Even of offline runs W&B sends its own errors and timings, unless it is told not to before it starts.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb
        from wandb.errors import AuthenticationError

        is_online = mode == "online" or (mode == "auto" and _is_logged_in(wandb.setup().settings))
        try:
            self.run = wandb.init(
                project=project,
                name=name,
                id=_read_run_id(folder),
                dir=folder,
                mode="online" if is_online else "offline",
                resume="allow" if is_online else None,
                # The terminal is left alone.
                settings=wandb.Settings(console="off"),
            )
        except wandb.Error as error:
            log_in = "log in with `wandb login`, or " if isinstance(error, AuthenticationError) else ""
            advice = f"; {log_in}keep the run in its folder with report.wandb_mode=offline" if is_online else ""
            reason = " ".join(str(error).split()).rstrip(".")
            raise InputError(f"W&B refused the run: {reason}{advice}") from None
        self.run.config.update(dict(settings), allow_val_change=True)  # type: ignore[no-untyped-call]
        self.run.define_metric("*", step_metric="step")
        if not is_online:
            for record in past:
                self.write(record["step"], numbers_of(record))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Hand a record to W&B's own process, which sends or keeps it."""
        self.run.log({"step": step, **values})

    def close(self) -> None:
        """Wait until W&B has everything, and call the run finished."""
        self.run.finish()


def _read_run_id(folder: Path) -> str:
    """The id that this run got when it was first shown, or a new one."""
    path = folder / RUN_ID_NAME
    if not path.exists():
        write_atomically(path, secrets.token_hex(4) + "\n")
    return path.read_text(encoding="utf-8").strip()


def _is_logged_in(settings: Any) -> bool:
    """Whether W&B, by its own settings and those of its environment variables, would send a run without asking."""
    if settings.mode != "online":
        return False
    if settings.api_key or settings.identity_token_file:
        return True
    hosts = {urlsplit(settings.base_url).netloc}
    if hosts & PUBLIC_HOSTS:
        hosts |= PUBLIC_HOSTS
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    try:
        return not hosts.isdisjoint(netrc.netrc(path).hosts)
    except (OSError, netrc.NetrcParseError):
        return False
