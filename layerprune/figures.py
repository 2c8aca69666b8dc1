"""What all figures share: the look, the grid of panels with its legend, the axes, and the files.

Each figure is written as PNG and as SVG. Text stays text in the SVG, and the same numbers give the same bytes.
"""

from __future__ import annotations

import contextlib
import math
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# Okabe and Ito's palette, safe for colour-blind readers. Yellow is left out: its lines do not show on white.
BLUE, VERMILLION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
ORANGE, SKY, BLACK, GREY = "#E69F00", "#56B4E9", "#000000", "#595959"
LOSS_TOP = 1.5
"""Normalised loss above which a panel is cut: 1 is a uniform guess, and how much worse a broken model is says little."""
CROWDED = 20
"""Points of a line from which on its markers are small."""
_LEAST_SPAN = 0.4
"""Range of accuracy that a panel shows at least, so that noise does not fill it."""
_PANEL = (4.6, 3.2)
"""Width and height of a panel with its labels, in inches."""
_LEGEND_COLUMN = 2.9
"""Width in inches that a column of the legend takes at least where a figure has several."""
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "layerprune",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "legend.frameon": False,
    "hatch.linewidth": 0.6,
}


@contextlib.contextmanager
def look() -> Iterator[None]:
    """The look of our figures; matplotlib's own settings come back afterwards."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        yield


def new_figure(width: float, height: float) -> Any:
    """An empty figure, in inches. pyplot is not used: it would keep the figure and choose a window system."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Any, folder: Path, name: str) -> list[Path]:
    """Write `name`.png and `name`.svg; no date and no version go into the files. Returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    metadata: dict[str, Any] = {"png": {"Software": None}, "svg": {"Date": None, "Creator": "layerprune"}}
    paths = [folder / f"{name}.{kind}" for kind in metadata]
    for path in paths:
        figure.savefig(path, dpi=160, metadata=metadata[path.suffix[1:]])
    return paths


def number(value: Any) -> float | None:
    """A finite number as float, None for anything else."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def short(count: float) -> str:
    """A count in words of an axis: 500, 20 k, 1.5 M, 2 B."""
    size, unit = next(((s, u) for s, u in ((1e9, " B"), (1e6, " M"), (1e3, " k")) if count >= s), (1, ""))
    return f"{count / size:.4g}{unit}"


def shares(depths: Sequence[int]) -> dict[int, float]:
    """How strong the colour of each depth is among those drawn together: the deepest one's is full."""
    order = sorted(set(depths))
    return {n: 1 - 0.5 * (len(order) - 1 - i) / max(1, len(order) - 1) for i, n in enumerate(order)}


def spread_apart(places: Sequence[float], gap: float) -> list[float]:
    """The places at least `gap` apart, in the same order, that are nearest to those given (in the sum of squares)."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    blocks: list[list[float]] = []  # neighbours that touch, each as where it would have its block begin
    for rank, i in enumerate(order):
        blocks.append([places[i] - rank * gap])
        while len(blocks) > 1 and sum(blocks[-2]) / len(blocks[-2]) > sum(blocks[-1]) / len(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    starts = [sum(block) / len(block) for block in blocks for _ in block]
    return [starts[rank] + rank * gap for rank in (order.index(i) for i in range(len(places)))]


def grid(count: int, title: str) -> tuple[Any, list[Any], Any]:
    """A figure of `count` panels: the figure, its panels, and an empty place for the legend, None where there is none."""
    columns = count if count <= 3 else 2 if count == 4 else 3
    lines = math.ceil(count / columns)
    figure = new_figure(max(6.6, _PANEL[0] * columns), 1.0 + _PANEL[1] * lines)
    panels = [figure.add_subplot(lines, columns, i + 1) for i in range(count)]
    hole = None
    if count < lines * columns:
        hole = figure.add_subplot(lines, columns, count + 1)
        hole.axis("off")
    figure.suptitle(title, fontsize=11)
    return figure, panels, hole


def legend(figure: Any, panels: Sequence[Any], hole: Any, first: Sequence[Any] = ()) -> None:
    """One legend for all panels: the artists `first`, then every label once; in the grid's empty place, else below."""
    found: dict[str, Any] = {artist.get_label(): artist for artist in first}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    labels = [textwrap.fill(label, 46) for label in found]
    rest: dict[str, Any] = {"handles": list(found.values()), "labels": labels, "handlelength": 3.5}
    if hole is not None:
        width, height = _inches(figure, made := hole.legend(loc="center", **rest))
        if width < _PANEL[0] - 0.1 and height < _PANEL[1] - 0.1:
            return
        made.remove()
    for columns in range(max(1, min(len(found), int(figure.get_figwidth() / _LEGEND_COLUMN))), 0, -1):
        width, height = _inches(figure, made := figure.legend(loc="outside lower center", ncols=columns, **rest))
        if width < figure.get_figwidth() - 0.1 or columns == 1:
            figure.set_figheight(figure.get_figheight() + height)
            return
        made.remove()


def _inches(figure: Any, artist: Any) -> tuple[float, float]:
    """Width and height of an artist."""
    box = artist.get_window_extent(figure.canvas.get_renderer())
    return box.width / figure.dpi, box.height / figure.dpi


def task_panel(axes: Any, task: str) -> None:
    """Title and axis of accuracy for a `task/metric`; at least 0.4 of the accuracy is shown. Call it with the data drawn."""
    name, _, metric = task.partition("/")
    low, high = axes.get_ylim()
    if high - low < _LEAST_SPAN:
        low = min(max(0.0, (low + high - _LEAST_SPAN) / 2), low)
        low = min(low, 1.02 - _LEAST_SPAN)
        axes.set_ylim(low, max(high, low + _LEAST_SPAN))
    axes.set_title(textwrap.fill(name, 44))
    axes.set_ylabel({"acc": "accuracy", "acc_norm": "accuracy (normalised)"}.get(metric, metric or "accuracy"))
    axes.grid(axis="y", color="#e5e5e5", lw=0.7)
    axes.set_axisbelow(True)


def chance_lines(axes: Any, chances: Sequence[float]) -> None:
    """A dashed line at each chance level."""
    for chance in dict.fromkeys(chances):
        axes.axhline(chance, color=GREY, ls="--", lw=1.1, zorder=2, label="chance")


def loss_panel(axes: Any, whole: float | None, lines: Sequence[tuple[str, Sequence[tuple[float, float]]]]) -> None:
    """Title and axis of normalised loss, and its line at 1; what lies far above is cut and marked by arrows at the top.

    whole: loss of the whole model. lines: of each series its colour and its points in order (fraction dropped, loss;
    infinity is one far above). The axis ends at LOSS_TOP, or higher for a whole model that is itself near it, unless all
    points lie less than a tenth above that. An arrow stands at the first point of each stretch that is cut off. Call it
    with the data drawn.
    """
    axes.axhline(1, color=GREY, ls=":", lw=1.4, zorder=2, label="uniform guess (loss = 1)")
    axes.set(title="loss", ylabel="normalised loss (nats per token / ln V)")
    axes.grid(axis="y", color="#e5e5e5", lw=0.7)
    axes.set_axisbelow(True)
    top = max(LOSS_TOP, 1.2 * (whole or 0.0))
    values = [y for _, points in lines for _, y in points]
    if max(values, default=0.0) <= 1.1 * top:
        axes.set_ylim(bottom=0)
        return
    axes.set_ylim(0, top)
    shown = "infinity" if math.isinf(max(values)) else f"{max(values):.3g}"
    taken: list[float] = []
    for colour, points in lines:
        before = [0.0, *(y for _, y in points)]
        for (x, y), last in zip(points, before, strict=False):
            if y > top >= last:
                below = sum(abs(x - other) < 0.02 for other in taken) % 5  # those that leave together stand one below the other
                taken.append(x)
                height = top * (0.975 - 0.035 * below)
                axes.plot(x, height, "^", color=colour, mec="black", mew=0.5, ms=6, zorder=7, gid="above")
    axes.plot([], [], "^", color="white", mec="black", mew=0.5, ms=6, label=f"loss goes above {top:.3g} (largest {shown})")


def fraction_axis(axes: Any, most: float, layers: int | None = None) -> None:
    """Fraction of the layers dropped, from 0 to `most`; with `layers`, how many that are stands above."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    axes.set_xlabel("layers dropped" if layers is None else "layers dropped (above: how many)")
    axes.set_xlim(-0.02, max(most, 0.1) + 0.03)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=None, symbol=" %"))
    if layers is None:
        return
    above = axes.secondary_xaxis("top", functions=(lambda x: x * layers, lambda n: n / layers))
    above.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    above.tick_params(labelsize=7.5, length=2, color=GREY, labelcolor=GREY)
    above.spines["top"].set_color("#cccccc")
