"""The curves of one model: accuracy and loss against the fraction of layers dropped, where they collapse, and its healing."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from layerprune.curve import CONFIDENCE, held_out_losses, series, trained_losses
from layerprune.figures import (
    BLUE,
    CROWDED,
    GREY,
    LOSS_TOP,
    VERMILLION,
    chance_lines,
    fraction_axis,
    grid,
    legend,
    look,
    loss_panel,
    number,
    save,
    shares,
    short,
    spread_apart,
    task_panel,
)

# In grey print the markers, their filling and the dashes tell series apart.
_SERIES: dict[str, dict[str, Any]] = {
    "angular": {"color": BLUE, "marker": "o", "ls": (0, (4, 2)), "mfc": "white", "label": "angular distance, not healed"},
    "last": {"color": VERMILLION, "marker": "s", "ls": (0, (1, 1.5)), "mfc": "white", "label": "last n, not healed"},
    "angular healed": {"color": BLUE, "marker": "o", "ls": "-", "label": "angular distance, healed"},
    "last healed": {"color": VERMILLION, "marker": "s", "ls": "-", "label": "last n, healed"},
}
_BAND = f"{100 * CONFIDENCE:g} % confidence interval"
_STRIP_ROW = 0.055
"""Height of a row of the strip of collapse points, as a share of the panel."""


def plot_curves(
    curve: Mapping[str, Any], folder: str | Path, model: str = "", collapse: Mapping[str, Any] | None = None
) -> list[Path]:
    """Draw accuracy of every task and normalised loss against the fraction of layers dropped.

    curve: that of curve.json (`layers` L and `rows`); a row with n = 0 is the whole model and begins every line. Bands
    reach from `low` to `high` of a score, the 95 % confidence interval, or one standard error up and down where there
    is none. collapse: that of collapse.json; under the accuracy stands a strip with a row for each series that
    collapses: its marker at `first`, the first depth at the lower level, with a line back to `before` and a bar over the
    interval of `first`; in the loss, the sharpest rise is highlighted.

    Writes accuracy and loss, each where there is one, and curve with both, as PNG and SVG; returns the files.
    """
    rows = curve["rows"]
    tasks = list(dict.fromkeys(task for row in rows for task in row["tasks"]))
    losses = any(number(row.get("loss")) is not None for row in rows)
    names = {"angular": "angular distance", "last": "last n"}
    strategies = " and ".join(n for s, n in names.items() if any(r["strategy"] == s and r["n"] for r in rows))
    about = f"{model + ', ' if model else ''}{curve['layers']} layers" + (f": blocks by {strategies}" if strategies else "")
    found = (collapse or {}).get("series") or {}
    written = []
    with look():
        if tasks:
            figure = _panels(curve, found, tasks, False, f"Accuracy after dropping layers\n{about}")
            written += save(figure, Path(folder), "accuracy")
        if losses:
            figure = _panels(curve, found, [], True, f"Loss after dropping layers\n{about}")
            written += save(figure, Path(folder), "loss")
        if tasks or losses:
            figure = _panels(curve, found, tasks, losses, f"What dropping layers costs\n{about}")
            written += save(figure, Path(folder), "curve")
    return written


def _panels(curve: Mapping[str, Any], found: Mapping[str, Any], tasks: Sequence[str], loss: bool, title: str) -> Any:
    """One panel a task, and the loss last."""
    layers, rows = curve["layers"], curve["rows"]
    lines = series(rows) or {"angular": rows[:1]}
    figure, panels, hole = grid(len(tasks) + loss, title)
    for panel in panels:
        fraction_axis(panel, max(row["fraction"] for row in rows), layers)
    for panel, task in zip(panels, tasks, strict=False):
        _task_panel(panel, lines, task)
        _collapse_strip(panel, layers, lines, found, task)
    if loss:
        _loss_panel(panels[-1], lines, found)
    legend(figure, panels, hole)
    return figure


def _task_panel(axes: Any, lines: Mapping[str, Sequence[Mapping[str, Any]]], task: str) -> None:
    chances: list[float] = []
    kinds: list[str] = []
    for name, rows in lines.items():
        points, bands = [], []
        for row in rows:
            score = row["tasks"].get(task) or {}
            value, chance = number(score.get("value")), number(score.get("chance"))
            if chance is not None:
                chances.append(chance)
            if value is not None:
                points.append((row["fraction"], value))
                bands.append(_band(score))
        kinds += [band[2] for band in bands if band is not None]
        _line(axes, name, points, bands)
    for kind in dict.fromkeys(kinds):
        axes.fill_between([], [], color=GREY, alpha=0.25, lw=0, label=kind)
    chance_lines(axes, chances)
    task_panel(axes, task)


def _band(score: Mapping[str, Any]) -> tuple[float, float, str] | None:
    """Low end, high end and name of a score's interval."""
    low, high, stderr = (number(score.get(key)) for key in ("low", "high", "stderr"))
    if low is not None and high is not None:
        return low, high, _BAND
    return None if stderr is None else (score["value"] - stderr, score["value"] + stderr, "one standard error")


def _line(
    axes: Any,
    name: str,
    points: Sequence[tuple[float, float]],
    bands: Sequence[tuple[float, float, str] | None],
) -> None:
    """The line and the bands of one series."""
    style, front, healed = dict(_SERIES[name]), name.startswith("angular"), name.endswith(" healed")
    alone = _alone(name, points)
    if alone:
        points, bands, style["ls"] = points[1:], bands[1:], ""
    # Where two strategies agree, the thin line lies on the thick one and both are seen.
    axes.plot(
        [x for x, _ in points], [y for _, y in points], lw=1.3 if front else 2.4, mew=1, zorder=(4 if front else 3) + 2 * healed,
        ms=(3 if len(points) > CROWDED else 4.5) + (not front), **style,
    )  # fmt: skip
    drawn = [(x, band[0], band[1]) for (x, _), band in zip(points, bands, strict=True) if band is not None]
    if drawn and alone:
        axes.vlines(*drawn[0], color=style["color"], lw=1.4 if front else 3, zorder=3)
    elif drawn:
        axes.fill_between(*zip(*drawn, strict=True), color=style["color"], alpha=0.15, lw=0, zorder=1)


def _alone(name: str, points: Collection[Any]) -> bool:
    """Whether one depth only was healed: it is drawn as a point, for a line to it would show what nobody measured."""
    return name.endswith(" healed") and len(points) == 2


def _collapse_strip(
    axes: Any, layers: int, lines: Mapping[str, Sequence[Mapping[str, Any]]], found: Mapping[str, Any], task: str
) -> None:
    """A strip below the data with the collapse point of each series that has one, and a thin line up to its curve."""
    from matplotlib.patches import Rectangle

    steps = {name: ((found.get(name) or {}).get("tasks", {}).get(task) or {}).get("transition") or {} for name in lines}
    steps = {name: step for name, step in steps.items() if step.get("status") == "collapses"}
    if not steps:
        return
    low, high = axes.get_ylim()
    ticks = [tick for tick in axes.get_yticks() if low <= tick <= high]
    share = _STRIP_ROW * (len(steps) + 0.6)
    bottom = low - (high - low) * share / (1 - share)
    row = (high - bottom) * _STRIP_ROW
    axes.add_patch(Rectangle((0, 0), 1, share, transform=axes.transAxes, facecolor="#f0f0f0", lw=0, zorder=0))
    edge = axes.get_xlim()[1]
    for place, (name, step) in enumerate(steps.items()):
        style, y = _SERIES[name], bottom + row * (len(steps) - place - 0.2)
        first, before = step["first"] / layers, step["before"] / layers
        start = first if step["low"] is None else step["low"] / layers
        end = edge if step["high"] is None else step["high"] / layers
        axes.plot([start, end], [y, y], color=style["color"], lw=5, alpha=0.35, solid_capstyle="butt", zorder=2, gid="interval")
        if step["high"] is None:
            axes.plot(edge, y, ">", color=style["color"], ms=5, alpha=0.8, zorder=3, clip_on=False)
        axes.plot([before, first], [y, y], color=style["color"], lw=1, zorder=3, gid="gap")
        axes.plot(
            first, y, style["marker"], color=style["color"], mfc=style.get("mfc", style["color"]), ms=5, mew=1, zorder=5,
            gid="collapse",
        )  # fmt: skip
        value = next((number((r["tasks"].get(task) or {}).get("value")) for r in lines[name] if r["n"] == step["first"]), None)
        if value is not None:
            axes.plot([first, first], [y, value], color=style["color"], lw=0.8, ls=(0, (1, 2)), zorder=2, gid="stem")
    axes.set_yticks(ticks)
    axes.set_ylim(bottom, high)
    told = "collapse: first depth at the lower level (line: from the depth measured before)"
    axes.plot([], [], "D-", color=GREY, ms=4.5, lw=1, label=told)
    axes.plot([], [], color=GREY, lw=5, alpha=0.35, solid_capstyle="butt", label=f"{100 * CONFIDENCE:g} % interval of that depth")


def _loss_panel(axes: Any, lines: Mapping[str, Sequence[Mapping[str, Any]]], found: Mapping[str, Any]) -> None:
    drawn = []
    rises = False
    for name, rows in lines.items():
        points = {r["n"]: (r["fraction"], float(r["loss"])) for r in rows if isinstance(r.get("loss"), int | float)}
        points = {n: point for n, point in points.items() if not math.isnan(point[1])}
        _line(axes, name, list(points.values()), [None] * len(points))
        drawn.append((_SERIES[name]["color"], list(points.values())))
        rise = (found.get(name) or {}).get("loss") or {}
        if rise.get("from_n") in points and rise.get("to_n") in points and not _alone(name, points):
            x, y = zip(points[rise["from_n"]], points[rise["to_n"]], strict=True)
            axes.plot(x, y, color=_SERIES[name]["color"], lw=9, alpha=0.3, solid_capstyle="round", zorder=2, gid="rise")
            rises = True
    whole = next(iter(lines.values()))[0]
    loss_panel(axes, number(whole.get("loss")) if whole["n"] == 0 else None, drawn)
    if rises:
        axes.plot([], [], color=GREY, lw=9, alpha=0.3, solid_capstyle="butt", label="sharpest rise of the loss")


def plot_healing(found: Sequence[Mapping[str, Any]], folder: str | Path, model: str = "") -> list[Path]:
    """Draw the healings of a model, one line each: the training loss and the held-out loss against the tokens trained.

    found: as `layerprune.curve.healings` gives them. Where the held-out loss was measured it has a panel of its own, with the
    normalised losses of the whole model, and of each cut before and after its healing, as horizontal lines.

    Writes healing as PNG and SVG; returns the files, none where nothing was trained.
    """
    drawn = [one for one in found if trained_losses(one)]
    if not drawn:
        return []
    with look():
        return save(_healing_figure(drawn, f"Healing{', ' + model if model else ''}"), Path(folder), "healing")


def _healing_figure(drawn: Sequence[Mapping[str, Any]], title: str) -> Any:
    held = [one for one in drawn if held_out_losses(one)]
    if any(number(one[key]) is not None for one in held for key in ("whole", "cut", "healed")):
        title += "\npoints: in NF4, on some held-out documents; horizontal lines: as written, on all that losses are measured on"
    figure, panels, hole = grid(1 + bool(held), title)
    _trained_panel(panels[0], drawn)
    if held:
        _held_out_panel(panels[1], drawn, held)
    legend(figure, panels[::-1], hole)  # the held-out lines have markers
    return figure


def _healing_style(one: Mapping[str, Any], among: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The colour and marker of a healing's strategy, the deeper the stronger, and its name."""
    from matplotlib.colors import to_hex, to_rgb

    style, share = _SERIES[one["strategy"] + " healed"], shares([other["n"] for other in among])[one["n"]]
    red, green, blue = (1 - share * (1 - part) for part in to_rgb(style["color"]))
    label = f"{style['label'].removesuffix(', healed')}, n = {one['n']}"
    return {"color": to_hex((red, green, blue)), "marker": style["marker"], "label": label}


def _trained_panel(axes: Any, drawn: Sequence[Mapping[str, Any]]) -> None:
    for one in drawn:
        style = {**_healing_style(one, drawn), "marker": ""}
        axes.plot(*zip(*trained_losses(one), strict=True), lw=0.9, gid="trained", **style)
    axes.set(title="training loss", ylabel="nats per token")
    _token_axis(axes, drawn)


def _held_out_panel(axes: Any, drawn: Sequence[Mapping[str, Any]], held: Sequence[Mapping[str, Any]]) -> None:
    """The held-out loss; what lies above LOSS_TOP is cut off, as in `loss_panel`."""
    ends, seen = [], []
    for one in held:
        style, points = _healing_style(one, drawn), held_out_losses(one)
        axes.plot(*zip(*points, strict=True), lw=1.3, ms=4, gid="held-out", **style)
        ends.append((one["n"], points[-1], _SERIES[one["strategy"] + " healed"]["color"]))
        seen += [y for _, y in points]
        before = number(one["cut"])
        if before is not None:
            axes.axhline(before, color=style["color"], ls=(0, (1, 1.5)), lw=1.1, zorder=1.5, gid="before")
            seen.append(before)
        after = number(one["healed"])
        if after is not None:
            axes.axhline(after, color=style["color"], ls="-.", lw=1.1, zorder=1.5, gid="after")
            seen.append(after)
    if any(number(one["healed"]) is not None for one in held):
        axes.plot([], [], color=GREY, ls="-.", lw=1.1, label="the healed checkpoint")
    if any(number(one["cut"]) is not None for one in held):
        axes.plot([], [], color=GREY, ls=(0, (1, 1.5)), lw=1.1, label="the cut before healing")
    whole = number(held[0]["whole"])
    if whole is not None:
        axes.axhline(whole, color=GREY, ls="--", lw=1.1, zorder=1.5, label="whole model", gid="whole")
        seen.append(whole)
    top = max(LOSS_TOP, 1.2 * (whole or 0.0))
    low, high = min(seen), min(top, max(seen))
    room = max(0.06 * (high - low), 0.005)
    axes.set_ylim(low - room, high + room)
    if max(seen) > top:
        above = f"a loss lies above {top:.3g} (largest {max(seen):.3g})"
        axes.plot(0.03, 0.97, "^", transform=axes.transAxes, color="white", mec="black", mew=0.5, ms=6, label=above, gid="above")
    axes.set(title="held-out loss, while training", ylabel="normalised loss (nats per token / ln V)")
    _token_axis(axes, held)
    if len(ends) > 1:
        most = max(x for _, (x, _), _ in ends)
        axes.set_xlim(right=1.15 * most)
        low, high = axes.get_ylim()
        places = spread_apart([y for _, (_, y), _ in ends], 0.05 * (high - low))
        for (n, (x, _), colour), y in zip(ends, places, strict=True):
            axes.annotate(str(n), (x, y), xytext=(7, 0), textcoords="offset points", va="center", fontsize=8, color=colour, gid="n")


def _token_axis(axes: Any, drawn: Sequence[Mapping[str, Any]]) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_xlabel("tokens trained")
    axes.set_xlim(left=-0.02 * max(one["healing"]["tokens"] for one in drawn))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda count, _: short(count)))
    axes.grid(axis="y", color="#e5e5e5", lw=0.7)
    axes.set_axisbelow(True)
