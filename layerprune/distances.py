"""The figures of a ranking: the angular distance of all blocks, as a heat map and as curves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layerprune.figures import look, new_figure, save

_START = "first layer of the block, ℓ (0-based)"


def plot_distances(rank: Mapping[str, Any], folder: str | Path, model: str = "") -> list[Path]:
    """Draw the angular distances of rank.json; returns the files written into `folder`.

    rank: `layers` L, `distance` (row n-1 for n = 1..L-1, d in [0, 1] for start l = 0..L-n), `best` {n: start}.

    distance-heatmap: start against block size with the best start of every size (arXiv 2403.17887, Fig. 4), each row
    rescaled: 0 is the row's smallest distance, 1 its largest among the starts l >= 1. A block that begins at the
    embedding (l = 0) is often so far off that it would take most of the colours; where it is above 1 it is hatched.
    distance-curve: one line a block size, not rescaled, minima marked (Fig. 1c).

    A model of one layer has no block to draw.
    """
    if not rank["distance"]:
        return []
    of = f" of {model}" if model else ""
    with look():
        heat = _heatmap(rank, f"Angular distance of every block{of} ({rank['layers']} layers)")
        lines = _distance_lines(rank, f"Angular distance by start of the block{of} ({rank['layers']} layers)")
        return save(heat, Path(folder), "distance-heatmap") + save(lines, Path(folder), "distance-curve")


def _rescaled(row: list[float]) -> list[float]:
    """Distances of one block size with 0 the smallest and 1 the largest of the starts l >= 1; only l = 0 can be above."""
    low, high = min(row), max(row[1:])
    if high > low:
        return [(d - low) / (high - low) for d in row]
    return [0.0 if d == low else float("inf") for d in row]  # all but l = 0 are the same


def _heatmap(rank: Mapping[str, Any], title: str) -> Any:
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.patches import Patch, Rectangle
    from matplotlib.patheffects import withStroke
    from matplotlib.ticker import MaxNLocator

    layers = rank["layers"]
    shown_NL = np.full((layers - 1, layers), np.nan)
    for index, row in enumerate(rank["distance"]):
        shown_NL[index, : len(row)] = _rescaled(row)
    figure = new_figure(6.6, 5.6)
    axes = figure.add_subplot()
    image = axes.imshow(
        shown_NL, origin="lower", aspect="auto", cmap=colormaps["viridis"].with_extremes(over="#e6e6e6"), vmin=0, vmax=1,
        interpolation="nearest", extent=(-0.5, layers - 0.5, 0.5, layers - 0.5),
    )  # fmt: skip
    above: dict[str, Any] = {"facecolor": "#e6e6e6", "edgecolor": "#7f7f7f", "hatch": "////", "lw": 0}
    for index in np.flatnonzero(shown_NL[:, 0] > 1).tolist():
        axes.add_patch(Rectangle((-0.5, index + 0.5), 1, 1, **above))
    best = sorted((int(n), start) for n, start in rank["best"].items())
    thin = layers > 40
    axes.plot(
        [start for _, start in best], [n for n, _ in best], color="white", lw=0.9 if thin else 1.4, marker="o",
        ms=max(2.0, min(6.0, 160 / layers)), mec="black", mew=0.5, label="smallest distance of each block size",
        path_effects=[withStroke(linewidth=2.2 if thin else 3.2, foreground="black")],
    )  # fmt: skip
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=9, min_n_ticks=1))
    axes.set(xlabel=_START, ylabel="block size, n", title=title)
    handles, beyond = axes.get_legend_handles_labels()[0], bool((shown_NL[:, 0] > 1).any())
    if beyond:
        handles.append(Patch(**above, label="ℓ = 0, above the colour scale"))
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    bar = figure.colorbar(image, ax=axes, pad=0.02)
    bar.set_label("angular distance, rescaled in each row\n(0 = smallest, 1 = largest with ℓ ≥ 1)")
    bar.outline.set_visible(False)
    return figure


def _distance_lines(rank: Mapping[str, Any], title: str) -> Any:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.ticker import MaxNLocator

    layers, rows = rank["layers"], rank["distance"]
    # The bright end of viridis is left out: yellow lines do not show on white.
    colours = [colormaps["viridis"](0.88 * i / max(1, len(rows) - 1)) for i in range(len(rows))]
    figure = new_figure(7.6, 5.0)
    axes = figure.add_subplot()
    thin = layers > 40
    for index, row in enumerate(rows):
        axes.plot(range(len(row)), row, color=colours[index], lw=0.7 if thin else 1.1, zorder=2)
    for n, start in sorted((int(n), start) for n, start in rank["best"].items()):
        axes.plot(
            start, rows[n - 1][start], "D", color=colours[n - 1], ms=2.8 if thin else 4.5, mec="black", mew=0.5, zorder=3
        )  # fmt: skip
    axes.plot([], [], "D", color="white", mec="black", ms=4.5, label="smallest distance of each block size")
    axes.set(xlabel=_START, ylabel="angular distance (0 to 1)", title=title)
    axes.set_ylim(bottom=0)
    axes.set_xlim(-0.02 * layers, layers - 1 + 0.06 * layers)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9, min_n_ticks=1))
    figure.legend(loc="outside lower center")
    if len(rows) > 1:
        edges = [n + 0.5 for n in range(layers)]
        step = max(1, round((layers - 1) / 8))
        ticks = [1, *(n for n in range(step, layers) if n % step == 0 and n > max(1, step / 2))]
        mappable = ScalarMappable(BoundaryNorm(edges, len(rows)), ListedColormap(colours))
        bar = figure.colorbar(mappable, ax=axes, pad=0.02, ticks=ticks)
        bar.set_label("block size, n")
        bar.ax.minorticks_off()
        bar.outline.set_visible(False)
    _label_sizes(axes, rows)
    return figure


def _label_sizes(axes: Any, rows: list[list[float]]) -> None:
    """Write n at the right end of some lines: as many as find room."""
    height, width = axes.get_ylim()[1], axes.get_xlim()[1]
    placed: list[tuple[float, float]] = []
    wanted = range(1, len(rows) + 1) if len(rows) <= 12 else [1, *(n for n in range(2, len(rows)) if n % 8 == 0)]
    for n in wanted:
        x, y = len(rows[n - 1]) - 1, rows[n - 1][-1]
        if all(abs(x - a) > 0.05 * width or abs(y - b) > 0.05 * height for a, b in placed):
            text = f"n = {n}" if n == 1 else str(n)
            axes.annotate(text, (x, y), xytext=(3, 2), textcoords="offset points", fontsize=7.5, color="#303030")
            placed.append((x, y))
