"""The pictures: distances of all blocks, and accuracy and loss against the fraction of layers dropped.

Each picture is written as PNG and as SVG. Fonts stay text in the SVG, and the same numbers give the same SVG
bytes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Okabe and Ito's palette, safe for colour-blind readers. In grey print the markers and dashes tell series
# apart.
BLUE, VERMILLION, GREY = "#0072B2", "#D55E00", "#595959"
_SERIES: dict[tuple[str, bool], dict[str, Any]] = {
    ("angular", True): {"color": BLUE, "marker": "o", "ls": "-", "label": "angular distance, healed"},
    ("angular", False): {
        "color": BLUE,
        "marker": "o",
        "ls": (0, (4, 2)),
        "mfc": "white",
        "label": "angular distance, not healed",
    },
    ("last", True): {"color": VERMILLION, "marker": "s", "ls": "-", "label": "last n, healed"},
    ("last", False): {
        "color": VERMILLION,
        "marker": "s",
        "ls": (0, (1, 1.5)),
        "mfc": "white",
        "label": "last n, not healed",
    },
}
_LEAST_SPAN = 0.5
"""Range of accuracy that a panel shows at least."""
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "layerprune",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "legend.frameon": False,
}


def plot_distances(rank: dict[str, Any], folder: str | Path, model: str = "") -> list[Path]:
    """Draw the angular distances of rank.json; returns the files written into `folder`.

    rank: `layers` L, `distance` (row n-1 for n = 1..L-1, d in [0, 1] for start l = 0..L-n), `best` {n:
    start}. distance-heatmap: start against block size, each row rescaled to [0, 1], with the best start of
    every size (arXiv 2403.17887, Fig. 4). distance-curve: one line a block size, unscaled, minima marked
    (Fig. 1c). A model of one layer has no block to draw.
    """
    if not rank["distance"]:
        return []
    of = f" of {model}" if model else ""
    with _style():
        heat = _heatmap(rank, f"Angular distance of every block{of} ({rank['layers']} layers)")
        lines = _distance_lines(rank, f"Angular distance by start of the block{of} ({rank['layers']} layers)")
        return _save(heat, Path(folder), "distance-heatmap") + _save(lines, Path(folder), "distance-curve")


def plot_curves(curve: dict[str, Any], folder: str | Path, model: str = "") -> list[Path]:
    """Draw accuracy of every task and normalised loss against the fraction of layers dropped.

    curve: `layers` L and `rows` of {strategy: angular | last, n, fraction, healed, loss, tasks:
    {"task/metric": {value, stderr, chance}}}; a row with n = 0 is the unpruned model and begins every line.
    Bands are one standard error. Writes accuracy, loss (each where there is one) and curve.png with both;
    returns the files.
    """
    rows = curve["rows"]
    tasks = list(dict.fromkeys(task for row in rows for task in row["tasks"]))
    losses = any(_number(row.get("loss")) is not None for row in rows)
    names = {"angular": "angular distance", "last": "last n"}
    strategies = " and ".join(n for s, n in names.items() if any(r["strategy"] == s and r["n"] for r in rows))
    about = f"{model + ', ' if model else ''}{curve['layers']} layers" + (
        f": blocks by {strategies}" if strategies else ""
    )
    written = []
    with _style():
        if tasks:
            written += _save(
                _panels(curve, tasks, False, f"Accuracy after dropping layers\n{about}"),
                Path(folder),
                "accuracy",
            )
        if losses:
            written += _save(
                _panels(curve, [], True, f"Loss after dropping layers\n{about}"), Path(folder), "loss"
            )
        if tasks or losses:
            both = _panels(curve, tasks, losses, f"What dropping layers costs\n{about}")
            written += _save(both, Path(folder), "curve", ("png",))
    return written


@contextlib.contextmanager
def _style() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        yield


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, folder: Path, name: str, kinds: tuple[str, ...] = ("png", "svg")) -> list[Path]:
    """Write the figure; no date and no version go into the files."""
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"png": {"Software": None}, "svg": {"Date": None, "Creator": "layerprune"}}
    paths = []
    for kind in kinds:
        path = folder / f"{name}.{kind}"
        figure.savefig(path, dpi=160, metadata=metadata[kind])
        paths.append(path)
    return paths


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _heatmap(rank: dict[str, Any], title: str) -> Any:
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    layers, rows = rank["layers"], rank["distance"]
    shown_NL = np.full((layers - 1, layers), np.nan)
    for index, row in enumerate(rows):
        low, high = min(row), max(row)
        shown_NL[index, : len(row)] = [(d - low) / (high - low) if high > low else 0.0 for d in row]
    figure = _figure(6.6, 5.2)
    axes = figure.add_subplot()
    image = axes.imshow(
        shown_NL, origin="lower", aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest",
        extent=(-0.5, layers - 0.5, 0.5, layers - 0.5),
    )  # fmt: skip
    best = sorted((int(n), start) for n, start in rank["best"].items())
    sizes, starts = [n for n, _ in best], [start for _, start in best]
    dot = max(2.0, min(6.0, 160 / layers))
    axes.plot(starts, sizes, color="black", lw=3.2 if layers <= 40 else 2.2, solid_joinstyle="round")
    axes.plot(
        starts,
        sizes,
        color="white",
        lw=1.4 if layers <= 40 else 0.9,
        marker="o",
        ms=dot,
        mec="black",
        mew=0.5,
        label="best start of each size",
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=9))
    axes.set(xlabel="first layer of the block, $\\ell$ (0-based)", ylabel="block size, n", title=title)
    legend = axes.legend(loc="upper right")
    legend.get_frame().set_visible(True)
    legend.get_frame().set(facecolor="#9e9e9e", edgecolor="none")
    bar = figure.colorbar(image, ax=axes, pad=0.02)
    bar.set_label("angular distance, rescaled in each row\n(0 = smallest, 1 = largest of that block size)")
    bar.outline.set_visible(False)
    return figure


def _distance_lines(rank: dict[str, Any], title: str) -> Any:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.ticker import MaxNLocator

    layers, rows = rank["layers"], rank["distance"]
    # The bright end of viridis is left out: yellow lines do not show on white.
    colours = [colormaps["viridis"](0.88 * i / max(1, len(rows) - 1)) for i in range(len(rows))]
    figure = _figure(7.6, 4.8)
    axes = figure.add_subplot()
    thin = layers > 40
    for index, row in enumerate(rows):
        axes.plot(range(len(row)), row, color=colours[index], lw=0.7 if thin else 1.1, zorder=2)
    best = sorted((int(n), start) for n, start in rank["best"].items())
    for n, start in best:
        axes.plot(
            start,
            rows[n - 1][start],
            "D",
            color=colours[n - 1],
            ms=2.8 if thin else 4.5,
            mec="black",
            mew=0.5,
            zorder=3,
        )
    axes.plot([], [], "D", color="white", mec="black", ms=4.5, label="smallest distance of each block size")
    axes.set(
        xlabel="first layer of the block, $\\ell$ (0-based)", ylabel="angular distance (0 to 1)", title=title
    )
    axes.set_ylim(bottom=0)
    axes.set_xlim(-0.02 * layers, layers - 1 + 0.04 * layers)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9))
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.12))
    edges = [n + 0.5 for n in range(layers)]
    mappable = (
        ScalarMappable(BoundaryNorm(edges, len(rows)), ListedColormap(colours)) if len(rows) > 1 else None
    )
    if mappable is not None:
        step = max(1, round((layers - 1) / 8))
        bar = figure.colorbar(
            mappable, ax=axes, pad=0.02, ticks=[n for n in range(1, layers) if n % step == 0 or n == 1]
        )
        bar.set_label("block size, n")
        bar.ax.minorticks_off()
        bar.outline.set_visible(False)
    _label_sizes(axes, rows)
    return figure


def _label_sizes(axes: Any, rows: list[list[float]]) -> None:
    """Write n at the right end of some lines: as many as find room."""
    height = axes.get_ylim()[1]
    width = axes.get_xlim()[1]
    placed: list[tuple[float, float]] = []
    wanted = (
        range(1, len(rows) + 1) if len(rows) <= 12 else [1, *[n for n in range(2, len(rows)) if n % 8 == 0]]
    )
    for n in wanted:
        x, y = len(rows[n - 1]) - 1, rows[n - 1][-1]
        if all(abs(x - a) > 0.035 * width or abs(y - b) > 0.045 * height for a, b in placed):
            text = f"n = {n}" if n == 1 else str(n)
            axes.annotate(
                text, (x, y), xytext=(3, 2), textcoords="offset points", fontsize=7.5, color="#303030"
            )
            placed.append((x, y))


def _panels(curve: dict[str, Any], tasks: list[str], loss: bool, title: str) -> Any:
    """One panel a task, and the loss last; legend and title outside."""
    count = len(tasks) + loss
    columns = count if count <= 3 else 2 if count == 4 else 3
    lines = math.ceil(count / columns)
    figure = _figure(max(6.4, 4.6 * columns), 1.3 + 3.1 * lines)
    axes = [figure.add_subplot(lines, columns, i + 1) for i in range(count)]
    series = _split(curve["rows"])
    for panel, task in zip(axes, tasks, strict=False):
        _task_panel(panel, series, task)
    if loss:
        _loss_panel(axes[-1], series)
    fractions = [row["fraction"] for row in curve["rows"]]
    for panel in axes:
        _fraction_axis(panel, curve["layers"], max(fractions))
    found: dict[str, Any] = {}
    for panel in axes:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.suptitle(title, fontsize=11)
    figure.legend(
        found.values(),
        found.keys(),
        loc="outside lower center",
        ncols=min(len(found), 2 * columns),
        handlelength=3.5,
    )
    return figure


def _split(rows: list[dict[str, Any]]) -> dict[tuple[str, bool], list[dict[str, Any]]]:
    """Rows of each (strategy, healed) by fraction, each series beginning with the unpruned model."""
    whole = [row for row in rows if row["n"] == 0][:1]
    series = {key: [r for r in rows if r["n"] and (r["strategy"], r["healed"]) == key] for key in _SERIES}
    return {key: whole + sorted(found, key=lambda r: r["n"]) for key, found in series.items() if found} or (
        {("angular", False): whole} if whole else {}
    )


def _draw(
    axes: Any, key: tuple[str, bool], points: list[tuple[float, float, float | None]], crowded: bool
) -> None:
    style = dict(_SERIES[key])
    # Where two strategies agree, the thin line lies on the thick one and both are seen.
    front = key[0] == "angular"
    if key[1] and len(points) == 2:  # one depth was healed: a line to it would show what nobody measured
        points, style["ls"] = points[1:], ""
        if points[0][2] is not None:
            axes.errorbar(*points[0], color=style["color"], lw=1.1, capsize=2.5, zorder=3)
    x, y = [p[0] for p in points], [p[1] for p in points]
    axes.plot(
        x,
        y,
        lw=1.3 if front else 2.4,
        ms=(3 if crowded else 4.5) + (not front),
        mew=1,
        zorder=(4 if front else 3) + 2 * key[1],
        **style,
    )
    band = [p for p in points if p[2] is not None]
    if band:
        axes.fill_between(
            [p[0] for p in band], [p[1] - (p[2] or 0) for p in band], [p[1] + (p[2] or 0) for p in band],
            color=style["color"], alpha=0.15, lw=0, zorder=1,
        )  # fmt: skip


def _task_panel(axes: Any, series: dict[tuple[str, bool], list[dict[str, Any]]], task: str) -> None:
    name, _, metric = task.partition("/")
    chance = None
    for key, rows in series.items():
        points = []
        for row in rows:
            result = row["tasks"].get(task) or {}
            value = _number(result.get("value"))
            chance = chance if _number(result.get("chance")) is None else _number(result["chance"])
            if value is not None:
                points.append((row["fraction"], value, _number(result.get("stderr"))))
        _draw(axes, key, points, len(points) > 20)
    if chance is not None:
        axes.axhline(chance, color=GREY, ls="--", lw=1.1, zorder=2, label="chance")
    low, high = axes.get_ylim()
    if high - low < _LEAST_SPAN:  # noise must not fill a panel
        low = min(low, 1.02 - _LEAST_SPAN)
        axes.set_ylim(low, max(high, low + _LEAST_SPAN))
    axes.set(
        title=name,
        ylabel={"acc": "accuracy", "acc_norm": "accuracy (normalised)"}.get(metric, metric or "accuracy"),
    )


def _loss_panel(axes: Any, series: dict[tuple[str, bool], list[dict[str, Any]]]) -> None:
    for key, rows in series.items():
        found = [(row["fraction"], _number(row.get("loss"))) for row in rows]
        _draw(axes, key, [(x, y, None) for x, y in found if y is not None], len(found) > 20)
    axes.axhline(1, color=GREY, ls=":", lw=1.4, zorder=2, label="uniform guess (loss = 1)")
    axes.set(title="loss", ylabel="normalised loss (nats per token / ln V)")
    axes.set_ylim(bottom=0)


def _fraction_axis(axes: Any, layers: int, most: float) -> None:
    """Fraction dropped below, number of layers above."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    axes.set_xlabel("layers dropped (above: how many)")
    axes.set_xlim(-0.02, max(most, 0.1) + 0.03)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    axes.grid(axis="y", color="#e5e5e5", lw=0.7)
    axes.set_axisbelow(True)
    above = axes.secondary_xaxis("top", functions=(lambda x: x * layers, lambda n: n / layers))
    above.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    above.tick_params(labelsize=7.5, length=2, color=GREY, labelcolor=GREY)
    above.spines["top"].set_color("#cccccc")
