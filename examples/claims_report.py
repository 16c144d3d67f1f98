"""Tables and plots of what `claims.py` measured: `{"runs": {arm: {seed: {row: figures}}}}`."""

from collections.abc import Callable
from pathlib import Path
from statistics import mean

import matplotlib
from matplotlib.figure import Figure
from tiny_world import language


matplotlib.use("Agg")
COLOURS = ("#0969da", "#bf8700", "#8250df")
TEXT = tuple(language.SKILLS)

Runs = dict[str, dict[str, dict[str, dict]]]  # arm, seed, row, figures


def tables(report: dict, panels: list[list[str]]) -> str:
    """Markdown, one table for each panel of arms to compare, or two where replies have a length."""
    runs = report["runs"]
    if "words" in _figures(runs, panels[0][0])[0]:
        return "\n\n".join(_table(runs, panel, cell) for panel in panels for cell in (_words, _right))
    return "\n\n".join(f"{_table(runs, panel, _right)}\n{_means(runs, panel)}" for panel in panels)


def _figures(runs: Runs, arm: str, row: str | None = None) -> list[dict]:
    """The figures of a row, the first if None, one dictionary for each seed."""
    return [rows[row or next(iter(rows))] for rows in runs[arm].values()]


def _right(runs: Runs, arm: str, row: str) -> str:
    """Mean over the seeds, and from the lowest lower to the highest upper end of their Wilson intervals."""
    figures = _figures(runs, arm, row)
    low, high = min(f["low"] for f in figures), max(f["high"] for f in figures)
    return f"{100 * mean(f['accuracy'] for f in figures):.1f} ({100 * low:.0f} - {100 * high:.0f})"


def _words(runs: Runs, arm: str, row: str) -> str:
    """Mean over the seeds, least and most."""
    words = [f["words"] for f in _figures(runs, arm, row)]
    return f"{mean(words):.1f} ({min(words):.1f} - {max(words):.1f})"


def _table(runs: Runs, panel: list[str], cell: Callable[[Runs, str, str], str]) -> str:
    rows = next(iter(runs[panel[0]].values()))
    lines = [["", *panel], ["---"] * (1 + len(panel))]
    lines += [[row.replace("_", " "), *(cell(runs, arm, row) for arm in panel)] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _means(runs: Runs, panel: list[str]) -> str:
    """Two more lines: the mean over the skills with and without pictures, of each seed."""
    lines = []
    for name, is_text in (("with pictures", False), ("text alone", True)):
        cells = [
            " / ".join(
                f"{100 * mean(f['accuracy'] for row, f in rows.items() if (row in TEXT) == is_text):.1f}"
                for rows in runs[arm].values()
            )
            for arm in panel
        ]
        lines.append(f"| **mean, {name}** | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(report: dict, panels: list[list[str]], path: Path) -> None:
    """Save the figure of a claim as PNG: a dot for each seed."""
    runs = report["runs"]
    if "words" in _figures(runs, panels[0][0])[0]:
        figure = _draw_lengths(runs, panels[0])
    else:
        figure = Figure(figsize=(2 + 5 * len(panels), 6.5), layout="constrained")
        for axes, panel in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False).flat, panels, strict=True):
            _draw_skills(axes, runs, panel)
    figure.savefig(path, dpi=110)


def _draw_skills(axes, runs: Runs, panel: list[str]) -> None:
    """Skills downwards, what is right to the right, with the Wilson interval of each seed."""
    names = list(next(iter(runs[panel[0]].values())))
    for k, (arm, colour) in enumerate(zip(panel, COLOURS, strict=False)):
        for seed, rows in enumerate(runs[arm].values()):
            height = [y + 0.26 * (k - 1) + 0.06 * (seed - 1) for y in range(len(names))]
            right = [100 * rows[name]["accuracy"] for name in names]
            axes.hlines(
                height, *([100 * rows[name][end] for name in names] for end in ("low", "high")), colour, lw=0.7
            )
            axes.plot(right, height, "o", ms=3, color=colour, label=None if seed else arm)
    axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axes.set(xlabel="right, %", xlim=(-2, 102), ylim=(len(names) - 0.4, -0.6))
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.07), ncols=len(panel), frameon=False, fontsize=8)


def _draw_lengths(runs: Runs, panel: list[str]) -> Figure:
    """Words of a reply, and what is right, over the arms."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    kinds = list(next(iter(runs[panel[0]].values())))
    for axes, key, scale, label in zip(
        figure.subplots(1, 2), ("words", "accuracy"), (1, 100), ("words in a reply", "right, %"), strict=True
    ):
        for k, kind in enumerate(kinds):
            seeds = [[scale * f[key] for f in _figures(runs, arm, kind)] for arm in panel]
            axes.plot(range(len(panel)), [mean(s) for s in seeds], color=f"C{k}", label=kind)
            for x, values in enumerate(seeds):
                axes.plot([x] * len(values), values, "o", ms=3, color=f"C{k}")
        axes.set_xticks(range(len(panel)), [arm.removesuffix(" short") for arm in panel])
        axes.set(xlabel="data answered in a word", ylabel=label, ylim=(0, None))
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=len(kinds), frameon=False)
    return figure
