"""The figures of a routed model: accuracy against depth beside static cuts, and how often each layer runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from layerprune.figures import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    chance_lines,
    grid,
    legend,
    look,
    new_figure,
    save,
    task_panel,
)  # fmt: skip

_STATIC: dict[str, dict[str, Any]] = {
    "angular": {"color": BLUE, "marker": "o", "ls": (0, (4, 2)), "mfc": "white", "label": "static cut, angular distance"},
    "last": {"color": VERMILLION, "marker": "s", "ls": (0, (1, 1.5)), "mfc": "white", "label": "static cut, last n"},
}
_TASKS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK)
_MARKERS = "os^Dv<>"


def plot_routing(result: Mapping[str, Any], folder: str | Path, model: str = "") -> list[Path]:
    """Draw accuracy against the mean layers of a token's way, from eval.json: dials, static cuts and the whole model, a panel
    a task, and one for their mean where there are several. Bars and bands are 95 % intervals. Returns the files."""
    tasks = list(result["items"])
    shown: list[str | None] = [None, *tasks] if len(tasks) > 1 else list(tasks)
    items = sum(task["items"] for task in result["items"].values())
    about = f"{model + ', ' if model else ''}{result['layers']} layers, {items:,} items"
    with look():
        figure, panels, hole = grid(len(shown), f"Routing beside static cuts\n{about}")
        for axes, task in zip(panels, shown, strict=True):
            _panel(axes, result, task)
        legend(figure, panels, hole)
        return save(figure, Path(folder), "routing")


def _panel(axes: Any, result: Mapping[str, Any], task: str | None) -> None:
    nan = float("nan")
    for strategy, cuts in result["static"].items():
        style, front = _STATIC[strategy], strategy == "angular"
        rows: list[tuple[float, float, float, float]] = []
        for cut in sorted(cuts, key=lambda cut: cut["layers"]):
            if rows and cut["layers"] > rows[-1][0] + 1:
                rows.append((rows[-1][0] + 1, nan, nan, nan))  # no line over depths that nobody measured
            ends = (cut["tasks"][task]["low"], cut["tasks"][task]["high"]) if task else (nan, nan)
            rows.append((cut["layers"], _score(cut, task), *ends))
        depth, value, low, high = zip(*rows, strict=True)
        axes.plot(depth, value, lw=1.3 if front else 2.4, ms=4.5 + (not front), mew=1, zorder=3 + front, **style)
        if task:
            axes.fill_between(depth, low, high, color=style["color"], alpha=0.12, lw=0, zorder=1)
    dials = sorted(result["routed"], key=lambda one: _layers(one, task))
    points = [(_layers(one, task), _score(one, task)) for one in dials]
    axes.plot(*zip(*points, strict=True), "D-", color=GREEN, lw=1.6, ms=5.5, zorder=6, label="routed, at each dial")
    if task:
        for one, (x, _) in zip(dials, points, strict=True):
            axes.vlines(x, one["tasks"][task]["low"], one["tasks"][task]["high"], color=GREEN, lw=1, zorder=5)
    axes.plot(result["layers"], _score(result["base"], task), "*", color=BLACK, ms=10, zorder=7, ls="", label="whole model")
    task_panel(axes, "mean of the tasks" if task is None else task)
    chance = None if task is None else result["items"][task]["chance"]
    chance_lines(axes, [] if chance is None else [chance])
    axes.set_xlabel("layers that a token passes through, on average")
    _name_dials(axes, [one["name"] for one in dials], points)


def _name_dials(axes: Any, names: Sequence[str], points: Sequence[tuple[float, float]]) -> None:
    """The dial beside each point; points that lie together, in order of their depth, have one text."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    groups: list[tuple[list[str], tuple[float, float]]] = []
    for name, (x, y) in zip(names, points, strict=True):
        if groups and x - groups[-1][1][0] < 0.12 * (right - left) and abs(y - groups[-1][1][1]) < 0.06 * (top - bottom):
            groups[-1][0].append(name)
        else:
            groups.append(([name], (x, y)))
    for together, point in groups:
        to_left = point[0] > left + 0.25 * (right - left)  # above a line that mostly rises
        axes.annotate(
            ", ".join(together), point, xytext=(-7 if to_left else 7, 7), textcoords="offset points", fontsize=7.5, color=GREEN,
            ha="right" if to_left else "left", zorder=8, gid="dial", bbox={"fc": "white", "ec": "none", "alpha": 0.85, "pad": 0.8},
        )  # fmt: skip


def _layers(one: Mapping[str, Any], task: str | None) -> float:
    return float(one["layers"] if task is None else one["tasks"][task]["layers"])


def _score(one: Mapping[str, Any], task: str | None) -> float:
    return float(one["accuracy"] if task is None else one["tasks"][task]["accuracy"])


def plot_usage(result: Mapping[str, Any], folder: str | Path, model: str = "") -> list[Path]:
    """Draw how often each layer runs on average (0 skipped, 1 executed, 2 repeated) by task, a panel a dial; dials at which
    every layer runs once on every prompt are named instead. Returns the files."""
    dials: Sequence[Mapping[str, Any]] = [one for one in result["routed"] if not _runs_once(one)]
    once = [one["name"] for one in result["routed"] if _runs_once(one)]
    told = f"not drawn, since every layer runs once on every prompt: dial {', '.join(once)}" if once else ""
    with look():
        figure = new_figure(7.6, 1.4 + 1.7 * max(1, len(dials)))
        title = f"How often each layer runs{', ' + model if model else ''}"
        figure.suptitle(f"{title}\n{told}" if told and dials else title, fontsize=11)
        if not dials:
            axes = figure.add_subplot()
            axes.axis("off")
            axes.text(0.5, 0.5, told or "no dial was measured", ha="center", va="center", transform=axes.transAxes)
            return save(figure, Path(folder), "usage")
        panels = figure.subplots(len(dials), 1, squeeze=False, sharex=True)[:, 0]
        for axes, one in zip(panels, dials, strict=True):
            axes.axhline(1, color=GREY, lw=0.9, ls="--", zorder=1)
            for place, (task, mean_L) in enumerate(one["usage"].items()):
                style: Any = {"color": _TASKS[place % len(_TASKS)], "marker": _MARKERS[place % len(_MARKERS)]}
                axes.plot(range(len(mean_L)), mean_L, lw=1.2, ms=4, mew=0.8, mfc="white", zorder=3, label=task, **style)
            axes.set_ylim(-0.06, 2.06)
            axes.set_yticks([0, 1, 2], ["0 (skipped)", "1", "2 (repeated)"])
            axes.set_title(f"dial {one['name']}: {one['layers']:.2f} layers on average")
            axes.grid(axis="y", color="#eeeeee", lw=0.7)
            axes.set_axisbelow(True)
        from matplotlib.ticker import MaxNLocator

        panels[-1].set_xlabel("layer")
        panels[-1].set_xlim(-0.7, result["layers"] - 0.3)
        panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
        figure.supylabel("runs of the layer, mean over items", fontsize=9)
        legend(figure, panels[:1], None)
        return save(figure, Path(folder), "usage")


def _runs_once(dial: Mapping[str, Any]) -> bool:
    return all(mean == 1 for mean_L in dial["usage"].values() for mean in mean_L)
