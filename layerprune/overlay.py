"""The curves of several runs in one figure: a panel for each task they share, and the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from layerprune.curve import series
from layerprune.figures import (
    BLACK,
    BLUE,
    CROWDED,
    GREEN,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    chance_lines,
    fraction_axis,
    grid,
    legend,
    look,
    loss_panel,
    number,
    save,
    task_panel,
)

_COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, BLACK, ORANGE, SKY)
_MARKERS = "os^DvPX"
# Dashes and filling tell strategy and healing apart; colour and marker are the run's.
_SERIES: dict[str, tuple[Any, str]] = {
    "angular": ((0, (4, 2)), "angular distance, not healed"),
    "last": ((0, (1, 1.5)), "last n, not healed"),
    "angular healed": ("-", "angular distance, healed"),
    "last healed": ("-.", "last n, healed"),
}


def plot_overlay(runs: Sequence[Mapping[str, Any]], tasks: Sequence[str], loss: bool, folder: str | Path) -> list[Path]:
    """Draw the curves of `runs` over the fraction of layers dropped: compare.png and compare.svg; returns both.

    runs: each with `label`, `layers`, `rows` (those of curve.json) and `collapse` (the series of collapse.json, or {}).
    tasks: those that get a panel, each with the runs that have it; loss: whether the loss gets one. A ring marks the
    collapse point of a series: the first depth at the lower level. Colour and marker are a run's, dashes and filling the
    strategy's and the healing's; one healed depth is a point.
    """
    with look():
        return save(_figure(runs, tasks, loss), Path(folder), "compare")


def _figure(runs: Sequence[Mapping[str, Any]], tasks: Sequence[str], loss: bool) -> Any:
    from matplotlib.lines import Line2D

    figure, panels, hole = grid(len(tasks) + loss, f"What dropping layers costs, {len(runs)} runs")
    for panel in panels:
        fraction_axis(panel, max(row["n"] / run["layers"] for run in runs for row in run["rows"]))
    for panel, task in zip(panels, tasks, strict=False):
        _task_panel(panel, runs, task)
    if loss:
        _loss_panel(panels[-1], runs)
    used = {name for run in runs for name in _lines(run)}
    shown = [Line2D([], [], color=_colour(i), marker=_marker(i), label=_named(run)) for i, run in enumerate(runs)]
    shown += [
        Line2D([], [], color=BLACK, ls=dashes, marker="o", mfc=_filling(name, BLACK), ms=4.5, lw=1.3, label=label)
        for name, (dashes, label) in _SERIES.items()
        if name in used
    ]
    legend(figure, panels, hole, shown)
    return figure


def _named(run: Mapping[str, Any]) -> str:
    layers = f"{run['layers']} layers"
    return str(run["label"]) if layers in run["label"] else f"{run['label']}, {layers}"


def _colour(run: int) -> str:
    return _COLOURS[run % len(_COLOURS)]


def _marker(run: int) -> str:
    """Another pairing with the colours in each round, so that 49 runs differ."""
    return _MARKERS[(run + run // len(_COLOURS)) % len(_MARKERS)]


def _filling(name: str, colour: str) -> str:
    return colour if name.endswith(" healed") else "white"


def _lines(run: Mapping[str, Any]) -> dict[str, Sequence[Mapping[str, Any]]]:
    return dict(series(run["rows"])) or {"angular": run["rows"][:1]}


def _draw(axes: Any, run: int, name: str, points: Sequence[tuple[float, float]]) -> None:
    dashes = _SERIES[name][0]
    if name.endswith(" healed") and len(points) == 2:  # one depth was healed: a line to it would show what nobody measured
        points, dashes = points[1:], ""
    axes.plot(
        [x for x, _ in points], [y for _, y in points], color=_colour(run), ls=dashes, lw=1.4, marker=_marker(run), ms=4.5,
        mfc=_filling(name, _colour(run)), markevery=max(1, len(points) // CROWDED), zorder=3 + name.endswith(" healed"), gid=name,
    )  # fmt: skip


def _task_panel(axes: Any, runs: Sequence[Mapping[str, Any]], task: str) -> None:
    chances: list[float] = []
    rings = []
    for place, run in enumerate(runs):
        for name, rows in _lines(run).items():
            scores = {row["n"]: row["tasks"].get(task) or {} for row in rows}
            found = [(n, number(score.get("value"))) for n, score in scores.items()]
            points = {n: (n / run["layers"], value) for n, value in found if value is not None}
            chances += [chance for score in scores.values() if (chance := number(score.get("chance"))) is not None]
            if points:
                _draw(axes, place, name, list(points.values()))
            step = (run["collapse"].get(name) or {"tasks": {}})["tasks"].get(task, {}).get("transition") or {}
            if step.get("status") == "collapses" and step["first"] in points and step["first"] - step["before"] == 1:
                rings.append((_colour(place), points[step["first"]]))
    for colour, (x, y) in rings:
        axes.plot(x, y, "o", color=colour, mfc="none", ms=11, mew=1.3, zorder=6, gid="collapse")
    if rings:
        axes.plot([], [], "o", color=BLACK, mfc="none", ms=11, mew=1.3, label="collapse: first depth at the lower level")
    chance_lines(axes, chances)
    task_panel(axes, task)


def _loss_panel(axes: Any, runs: Sequence[Mapping[str, Any]]) -> None:
    drawn = []
    whole = 0.0
    for place, run in enumerate(runs):
        for name, rows in _lines(run).items():
            points = [(row["n"] / run["layers"], float(row["loss"])) for row in rows if row["loss"] is not None]
            if points:
                _draw(axes, place, name, points)
                drawn.append((_colour(place), points))
            if rows[0]["n"] == 0:
                whole = max(whole, number(rows[0]["loss"]) or 0.0)
    loss_panel(axes, whole, drawn)
