"""Efficiency, tables and plot of `scaling.py`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Run = Mapping[str, Any]
MEGA = 1e6
COLOURS = {
    "one": "black",
    "data": "#e4572e",
    "data_distributed": "#f3a712",
    "tensor": "#1b6ca8",
    "sequence": "#7fb7d6",
    "context": "#7a5195",
    "pipeline": "#6a994e",
}


def compare_rates(runs: Sequence[dict[str, Any]]) -> None:
    """Add to each run its efficiency: the rate a process, over that of the fewest processes in its mode and layout.

    Where the fewest are one process, its run stands for all layouts and modes.
    """
    fewest = min(run["processes"] for run in runs)
    first = {(run["mode"], run["layout"]): run for run in runs if run["processes"] == fewest}
    for run in runs:
        base = runs[0] if fewest == 1 else first.get((run["mode"], run["layout"]))
        run["efficiency"] = None
        if base is not None:
            rates = [some["real_tokens_per_second"] / some["processes"] for some in (run, base)]
            run["efficiency"] = rates[0] / rates[1]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _ratio(counted: float, formula: float) -> str:
    """Counted over formula; a dash where the formula has nothing."""
    return f"{counted / formula:.4f}" if formula else "-"


def _with_bytes(run: Run) -> list[Mapping[str, Any]]:
    """All but what is received, which counts for the sender."""
    return [part for part in run["sent"] if part["counted"] or part["formula"]]


def format_text(runs: Sequence[Run]) -> str:
    """One line a run, then one line a group and kind of collective."""
    lines = [
        f"{'':7}{'layout':18}{'processes':>10}{'tokens/s':>11}{'efficiency':>12}{'s a step':>10}{'sent MB':>10}"
        f"{'formula':>10}{'ratio':>9}"
    ]
    for run in runs:
        lines.append(
            f"{run['mode']:7}{run['layout']:18}{run['processes']:>10}{run['real_tokens_per_second']:>11,.0f}"
            f"{_percent(run['efficiency']):>12}{run['seconds']['median']:>10.3g}{run['sent_bytes'] / MEGA:>10.3f}"
            f"{run['formula_bytes'] / MEGA:>10.3f}{_ratio(run['sent_bytes'], run['formula_bytes']):>9}"
        )
    head = f"{'':7}{'layout':18}{'processes':>10}  {'group':10}{'kind':16}{'calls':>8}{'bytes':>14}{'formula':>14}"
    lines += ["", head]
    for run in runs:
        for part in _with_bytes(run):
            lines.append(
                f"{run['mode']:7}{run['layout']:18}{run['processes']:>10}  {part['group']:10}{part['kind']:16}"
                f"{part['calls']:>8,.0f}{part['counted']:>14,.0f}{part['formula']:>14,.0f}"
            )
    return "\n".join(lines)


def format_markdown(runs: Sequence[Run]) -> str:
    """The tables of the entry for RESULTS.md."""
    lines = [
        "| | layout | processes | real tokens/s | efficiency | s a step (least to most) | sent MB | formula | ratio |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        seconds = run["seconds"]
        lines.append(
            f"| {run['mode']} | {run['layout']} | {run['processes']} | {run['real_tokens_per_second']:,.0f} | "
            f"{_percent(run['efficiency'])} | {seconds['median']:.3g} ({seconds['min']:.3g} to {seconds['max']:.3g}) | "
            f"{run['sent_bytes'] / MEGA:.3f} | {run['formula_bytes'] / MEGA:.3f} | "
            f"{_ratio(run['sent_bytes'], run['formula_bytes'])} |"
        )
    mode = runs[0]["mode"]
    lines += ["", f"Bytes that a process sends, {mode} scaling, by group and kind of collective:", ""]
    lines += ["| layout | processes | group | kind | calls | bytes | by formula |", "|---|---|---|---|---|---|---|"]
    for run in (run for run in runs if run["mode"] == mode):
        for part in _with_bytes(run):
            lines.append(
                f"| {run['layout']} | {run['processes']} | {part['group']} | {part['kind']} | "
                f"{part['calls']:,.0f} | {part['counted']:,.0f} | {part['formula']:,.0f} |"
            )
    return "\n".join(lines) + "\n"


def draw(runs: Sequence[Run], title: str, path: Path) -> None:
    """Rates over processes, beside what is in proportion to the fewest; and bytes against the formula."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    modes = list(dict.fromkeys(run["mode"] for run in runs))
    size = (4 + 3.6 * len(modes), 3.6)
    figure, axes = pyplot.subplots(1, len(modes) + 1, figsize=size, layout="constrained")
    for axis, mode in zip(axes, modes, strict=False):
        _draw_rates(axis, runs, mode)
        axis.set_title(f"{mode} scaling, {title}", loc="left", fontsize=9)
    axes[0].set_ylabel("real tokens a second")
    _draw_bytes(axes[-1], runs, modes[0])
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=max(1, len(labels)), frameon=False, fontsize=8)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _draw_rates(axis: Any, runs: Sequence[Run], mode: str) -> None:
    one = [run for run in runs if run["layout"] == "one"]
    layouts = [layout for layout in COLOURS if any(run["layout"] == layout for run in runs) and layout != "one"]
    numbers = sorted({run["processes"] for run in runs})
    for layout in layouts:
        own = [*one, *(run for run in runs if run["layout"] == layout and run["mode"] == mode)]
        axis.plot(
            [run["processes"] for run in own],
            [run["real_tokens_per_second"] for run in own],
            marker="o",
            color=COLOURS[layout],
            label=layout,
        )
    first = [run for run in runs if run["processes"] == numbers[0] and (run["mode"] == mode or one)]
    if first:
        a_process = max(run["real_tokens_per_second"] for run in first) / numbers[0]
        axis.plot(numbers, [a_process * number for number in numbers], "--", color="grey", label="in proportion")
    axis.set_xscale("log", base=2)
    axis.set_xticks(numbers, [str(number) for number in numbers])
    axis.minorticks_off()
    axis.set_ylim(bottom=0)
    axis.set_xlabel("processes")


def _draw_bytes(axis: Any, runs: Sequence[Run], mode: str) -> None:
    most = max(run["processes"] for run in runs)
    own = [run for run in runs if run["processes"] == most and run["mode"] == mode]
    axis.set_title(f"sent in a step, {mode}, processes: {most}", loc="left", fontsize=9)
    axis.set_xlabel("MB a process; lines: by formula")
    for place, run in enumerate(reversed(own)):
        axis.barh(place, run["sent_bytes"] / MEGA, color=COLOURS[run["layout"]])
        axis.plot([run["formula_bytes"] / MEGA] * 2, [place - 0.4, place + 0.4], color="black", linewidth=1.5)
    axis.set_yticks(range(len(own)), [run["layout"] for run in reversed(own)], fontsize=8)
