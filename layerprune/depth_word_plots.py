"""The figures of words and of answers: the mean first layer with rank k, a panel a model, a line a group of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layerprune.depth_plots import COLOURS
from layerprune.figures import look, new_figure, save

_MARKS = {"len1": "o", "len2": "s", "len3": "^"}


def plot_words(values: Mapping[str, Mapping[str, Any]], folder: str | Path) -> list[Path]:
    """Draw words.json of one or several models: a line a part of speech (dotted: kept for good); returns the files."""
    return _plot(values, Path(folder), "words", lambda group, number: {"color": COLOURS[number % len(COLOURS)]})


def plot_answers(values: Mapping[str, Mapping[str, Any]], folder: str | Path) -> list[Path]:
    """Draw answers.json of one or several models: the place in the answer as colour, its length as marker; returns the files."""

    def style(group: str, number: int) -> dict[str, Any]:
        length, _, place = group.partition("-pos")
        return {"color": COLOURS[int(place) - 1], "marker": _MARKS[length], "ms": 4}

    return _plot(values, Path(folder), "answers", style)


def _plot(values: Mapping[str, Mapping[str, Any]], folder: Path, name: str, style: Any) -> list[Path]:
    columns = min(3, len(values))
    rows = -(-len(values) // columns)
    with look():
        figure = new_figure(max(5.4, 3.4 * columns), 0.8 + 3.0 * rows)
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes, (model, found) in zip(grid.flat, values.items(), strict=False):
            for number, group in enumerate(found["groups"]):
                if found["predicted"][number] == 0:
                    continue
                label = group if len(values) > 1 else f"{group} ({found['predicted'][number]:,})"
                drawn = style(group, number)
                axes.plot(found["ranks"], found["decided"][number], lw=1.5, label=label, **drawn)
                axes.plot(found["ranks"], found["kept"][number], lw=1, ls=":", color=drawn["color"])
            if not any(found["predicted"]):
                told = f"none of {sum(found['marked']):,} tokens\nis predicted by the model"
                axes.text(0.5, 0.5, told, ha="center", va="center", transform=axes.transAxes)
            axes.set_xscale("log")
            axes.set_xlim(0.9 * found["ranks"][0], 1.1 * found["ranks"][-1])
            axes.set_ylim(0, found["layers"])
            axes.set(title=model, xlabel="k")
        for row in grid:
            row[0].set_ylabel("mean first layer with rank <= k")
        for axes in list(grid.flat)[len(values) :]:
            axes.set_visible(False)
        shown: dict[str, Any] = {}
        for axes in grid.flat:
            shown |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        if shown:
            figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=3 if columns < 3 else 6)
        return save(figure, folder, name)
