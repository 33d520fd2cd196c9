"""Tables, a plot and a text for RESULTS.md out of the data_loading.json that `data_loading.py` wrote, beside it."""

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from celltron.core import InputError, run_command, write_atomically

Row = dict[str, Any]
COLOURS = {"masked tokens": "#1b6ca8", "raw rows": "#9aa5b1", "raw counts": "#9aa5b1", "tokens": "#1b6ca8"}
CELLTRON_COLOURS = {"masked tokens": "#e4572e", "raw rows": "#f3a712", "raw counts": "#f3a712", "tokens": "#e4572e"}


def main(arguments: Sequence[str]) -> None:
    """Read a results file, write and print."""
    if len(arguments) != 1:
        raise InputError("one file was wanted: the data_loading.json that data_loading.py wrote")
    path = Path(arguments[0])
    results = json.loads(path.read_text(encoding="utf-8"))
    text = describe(results)
    print(text)
    write_atomically(path.with_suffix(".txt"), text + "\n")
    write_atomically(path.with_suffix(".md"), format_markdown(results))
    draw(results, path.with_suffix(".png"))


def describe(results: dict[str, Any]) -> str:
    """Everything as tables of plain text."""
    parts = [headline(results)]
    for data in results["datasets"]:
        parts.append(f"== {describe_data(data)}")
        for kind, table in (("conversion", conversion_table(data)), ("reader, shuffled", reader_table(data))):
            if len(table) > 1:
                parts.append(align([[kind, *table[0][1:]], *table[1:]]))
        parts += [describe_ratio(name, ratio) for name, ratio in data["ratios"].items()]
    return "\n\n".join(parts)


def headline(results: dict[str, Any]) -> str:
    """Where and how it was measured."""
    machine, settings = results["machine"], results["settings"]
    return (
        f"celltron {results['celltron']}, commit {results['commit']}, {results['date']}: {results['command']}\n"
        f"{machine['processor']}, {settings['cores']} of {machine['cores']} cores used, "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB, {machine['system']}, Python {machine['python']}; page cache warm, "
        f"batches of {settings['batch']} cells, at most {settings['max_length']} tokens a cell; medians of up to "
        f"{settings['repeats']} runs (least to most)"
    )


def describe_data(data: dict[str, Any]) -> str:
    """Name and size of a data set."""
    about = data["about"]
    return (
        f"{data['name']}: {about['cells']:,} cells x {about['genes']:,} genes, {about['non_zeros']:,} non-zeros "
        f"(median {about['median_non_zeros_a_cell']:,.0f} a cell), {about['file_bytes'] / 1e6:,.0f} MB .h5ad"
    )


def describe_ratio(name: str, ratio: dict[str, Any]) -> str:
    """One comparison."""
    return f"{name}: {ratio['ratio']:.1f} x (the fastest of them: {ratio['fastest']})"


def conversion_table(data: dict[str, Any]) -> list[list[str]]:
    """Rows of cells of text, the first one the head."""
    table = [["conversion", "cells/s", "least to most", "seconds", "bytes/non-zero", "peak MB", "of it not mapped"]]
    for row in data["conversions"]:
        cells = [row["label"], why_not(row)]
        if row["status"] == "measured":
            cells = [row["label"], *rate(row, "cells_per_second"), f"{row['seconds']['median']:.1f}"]
            cells += [f"{row['bytes_per_non_zero']:.2f}", *memory(row)]
        table.append(cells)
    return table


def reader_table(data: dict[str, Any]) -> list[list[str]]:
    """Rows of cells of text, the first one the head."""
    head = ["reader", "cells/s", "least to most", "M tokens/s", "delivers", "CPU us/cell"]
    table = [[*head, "peak MB", "of it not mapped"]]
    for row in data["readers"]:
        cells = [row["label"], why_not(row)]
        if row["status"] == "measured":
            tokens = f"{row['tokens_per_second']['median'] / 1e6:.1f}" if "tokens_per_second" in row else "-"
            cells = [row["label"], *rate(row, "cells_per_second"), tokens, row["delivers"]]
            cells += [f"{row['cpu_microseconds_per_cell']['median']:.1f}", *memory(row)]
        table.append(cells)
    return table


def why_not(row: Row) -> str:
    """Why a row has no numbers."""
    return f"{row['status']}: {row.get('reason', '')}"


def rate(row: Row, name: str) -> list[str]:
    """Median, and least to most."""
    values = row[name]
    return [f"{values['median']:,.0f}", f"{values['min']:,.0f} to {values['max']:,.0f}"]


def memory(row: Row) -> list[str]:
    """Peak of memory above the interpreter with its imports, and how much of it is no mapped file, in MB."""
    return [f"{row['peak_bytes'] / 1e6:,.0f}", f"{row['private_bytes'] / 1e6:,.0f}"]


def align(table: list[list[str]]) -> str:
    """A table in columns; names to the left, numbers to the right."""
    full = [row for row in table if len(row) == len(table[0])]
    widths = [max(len(row[i]) for row in full) for i in range(len(table[0]))]
    widths[0] = max(len(row[0]) for row in table)
    lines = []
    for row in table:
        short = len(row) != len(table[0])
        cells = [row[0].ljust(widths[0]), *(row[1:] if short else map(str.rjust, row[1:], widths[1:]))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def format_markdown(results: dict[str, Any]) -> str:
    """The entry for RESULTS.md."""
    lines = [f"## {results['date']}: data loading", "", headline(results).replace("\n", "  \n"), ""]
    for data in results["datasets"]:
        lines += [f"**{describe_data(data)}**", ""]
        for table in (conversion_table(data), reader_table(data)):
            if len(table) > 1:
                full = [row + [""] * (len(table[0]) - len(row)) for row in table]
                lines += [f"| {' | '.join(row)} |" for row in full]
                lines.insert(len(lines) - len(full) + 1, "|" + "---|" * len(full[0]))
                lines.append("")
        lines += [f"- {describe_ratio(name, ratio)}" for name, ratio in data["ratios"].items()]
        lines.append("")
    rows = [row for data in results["datasets"] for row in [*data["conversions"], *data["readers"]]]
    versions = {name: version for row in rows for name, version in row.get("versions", {}).items()}
    lines.append("Versions: " + ", ".join(f"{name} {version}" for name, version in sorted(versions.items())) + ".")
    settings = {row["label"]: row["settings"] for row in rows if row["settings"]}
    parts = [f"{label}: {shlex.join(f'{k}={v}' for k, v in values.items())}" for label, values in settings.items()]
    lines.append("Settings: " + "; ".join(parts) + ".")
    return "\n".join(lines) + "\n"


def draw(results: dict[str, Any], path: Path) -> None:
    """Cells a second of the last data set, which is the largest: conversions above, readers below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch
    from matplotlib.ticker import NullFormatter

    data = results["datasets"][-1]
    panels = [
        (title, sorted(rows, key=lambda row: row["cells_per_second"]["median"]))
        for title, rows in (
            ("conversion of the .h5ad file", [row for row in data["conversions"] if row["status"] == "measured"]),
            ("shuffled reading", [row for row in data["readers"] if row["status"] == "measured"]),
        )
        if rows
    ]
    sizes = [len(rows) + 1 for _, rows in panels] or [1]
    figure, axes = pyplot.subplots(
        len(sizes), 1, figsize=(9, 1.6 + 0.32 * sum(sizes)), height_ratios=sizes, squeeze=False, layout="constrained"
    )
    for axis, (title, rows) in zip(axes[:, 0], panels, strict=True):
        draw_bars(axis, rows)
        axis.set_title(title, loc="left")
        axis.xaxis.set_minor_formatter(NullFormatter())
    axes[-1, 0].set_xlabel("cells a second (logarithmic); lines: least to most of the runs")
    named = {"celltron, tokens": "#e4572e", "celltron, counts": "#f3a712", "peers, tokens": "#1b6ca8"}
    named |= {"peers, counts": "#9aa5b1"}
    figure.legend(
        handles=[Patch(color=colour, label=name) for name, colour in named.items()],
        loc="outside lower center",
        ncols=len(named),
        frameon=False,
    )
    figure.suptitle(describe_data(data), fontsize=9)
    figure.savefig(path, dpi=150)


def draw_bars(axis: Any, rows: list[Row]) -> None:
    """One bar a row, the fastest on top, with its number."""
    for place, row in enumerate(rows):
        values = row["cells_per_second"]
        colours = CELLTRON_COLOURS if row["system"].startswith("celltron") else COLOURS
        axis.barh(place, values["median"], color=colours[row["delivers"]])
        axis.plot([values["min"], values["max"]], [place, place], color="black", linewidth=1)
        axis.text(values["max"] * 1.08, place, f"{values['median']:,.0f}", va="center", fontsize=8)
    axis.set_yticks(range(len(rows)), [row["label"] for row in rows], fontsize=8)
    axis.set_xscale("log")
    least = min(row["cells_per_second"]["min"] for row in rows)
    axis.set_xlim(10 ** int(len(str(int(least))) - 1) / 2, 3 * max(row["cells_per_second"]["max"] for row in rows))
    axis.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    sys.exit(run_command(main))
