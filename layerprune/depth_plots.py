"""The figures of the depth probes: values by layer, a panel a quantity, a line a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from layerprune.figures import look, new_figure, save

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7f7f7f", "#000000")
_DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)), "-.")

Values = Mapping[str, Mapping[str, Sequence[float | None]]]
"""model -> name of a value -> that value by layer, None where a layer has none."""


def plot_residual(values: Values, folder: str | Path) -> list[Path]:
    """Draw residual.json of one or several models: cosines above, relative sizes below; returns the files."""
    names = {"att": "attention", "mlp": "MLP", "layer": "layer"}
    with look():
        figure = new_figure(9.2, 5.2)
        panels = figure.subplots(2, 3, sharex="col")
        for column, (part, title) in enumerate(names.items()):
            for row, (kind, label) in enumerate((("cos", "cosine with the stream"), ("rc", "size / stream's size"))):
                axes = panels[row][column]
                _lines(axes, {model: found[f"{kind}_{part}"] for model, found in values.items()})
                if kind == "cos":
                    axes.axhline(0, color="#7f7f7f", lw=0.8)
                    axes.set_title(title)
                else:
                    axes.set_ylim(0, _most([found[f"{kind}_{part}"] for found in values.values()]))
                    _layer_axis(axes, values)
                if column == 0:
                    axes.set_ylabel(label)
        _names(figure, panels[0][0], values)
        return save(figure, Path(folder), "residual")


def plot_lens(values: Values, folder: str | Path) -> list[Path]:
    """Draw lens.json of one or several models: divergence, overlap of the top 5, top-1 agreement; returns the files."""
    shown = {
        "kl": "KL(lens || final), nats",
        "overlap": "overlap of the top 5",
        "top1": "top-1 agreement",
    }
    with look():
        figure = new_figure(9.2, 3.4)
        panels = figure.subplots(1, 3)
        for axes, (name, title) in zip(panels, shown.items(), strict=True):
            _lines(axes, {model: found[name] for model, found in values.items()})
            axes.set_title(title)
            axes.set_ylim(0, None if name == "kl" else 1)
            _layer_axis(axes, values)
        _names(figure, panels[0], values)
        return save(figure, Path(folder), "lens")


def plot_tokens(values: Mapping[str, Mapping[str, Any]], folder: str | Path) -> list[Path]:
    """Draw tokens.json of one or several models, a row each: top-1 tokens and their flips by frequency, and the mean first
    layer at which the final token has rank k or better (dotted: from which it keeps it); returns the files."""
    with look():
        figure = new_figure(9.2, 0.6 + 2.7 * len(values))
        grid = figure.subplots(len(values), 3, squeeze=False)
        for row, (model, found) in zip(grid, values.items(), strict=True):
            layers = range(len(found["share"]))
            for g, name in enumerate(found["buckets"]):
                style: Any = {"color": COLOURS[g], "lw": 1.5}
                row[0].plot(layers, [line[g] for line in found["share"]], label=name, **style)
                row[0].plot([len(found["share"]) - 0.4], [found["share_final"][g]], "o", color=COLOURS[g], ms=4)
                row[1].plot(layers, [_nan(line[g]) for line in found["flip_rate"]], **style)
                row[2].plot(found["ranks"], [_nan(v) for v in found["decided"][g]], **style)
                row[2].plot(found["ranks"], [_nan(v) for v in found["kept"][g]], color=COLOURS[g], lw=1, ls=":")
            row[0].set_ylim(0, 1)
            row[0].set_ylabel(model)
            row[1].set_ylim(0, 1.02)
            row[2].set_ylim(0, len(found["share"]))
            row[2].set_xscale("log")
        titles = ("share of top-1 tokens\n(dots: the model's own)", "changed until the end", "mean first layer with rank <= k")
        for axes, title in zip(grid[0], titles, strict=True):
            axes.set_title(title)
        for axes, label in zip(grid[-1], ("layer (0-based)", "layer (0-based)", "k"), strict=True):
            axes.set_xlabel(label)
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4)
        return save(figure, Path(folder), "tokens")


def plot_choices(values: Mapping[str, Mapping[str, Any]], folder: str | Path) -> list[Path]:
    """Draw choices.json of one or several models, a panel a task and model: options listed, the best one; returns the files."""
    panels = [(model, task, found) for model, tasks in values.items() for task, found in tasks.items() if task != "asked"]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    lines = {
        "listed": "all n options among the top 2n",
        "mass": "probability of all options",
        "chosen": "best option is the model's",
        "right": "best option is the right one",
    }
    with look():
        figure = new_figure(0.6 + 3.1 * max(2, columns), 0.7 + 2.6 * rows)
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes, (model, task, found) in zip(grid.flat, panels, strict=False):
            for colour, (name, label) in zip(COLOURS, lines.items(), strict=False):
                if found[name] is not None:
                    axes.plot(range(len(found[name])), found[name], color=colour, lw=1.5, label=label)
            axes.set_ylim(0, 1.02)
            axes.set_title(f"{model}: {task}")
            axes.set_xlabel("tap: input of layer l (last: the model's end)")
        for row in grid:
            row[0].set_ylabel("share of items, or probability")
        for axes in list(grid.flat)[len(panels) :]:
            axes.set_visible(False)
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2 if columns < 3 else 4)
        return save(figure, Path(folder), "choices")


def plot_skip(values: Mapping[str, Mapping[str, Any]], folder: str | Path) -> list[Path]:
    """Draw skip.json of one or several models, a row each: the map of mean effects on later layers for future tokens, its
    colours by the layers whose skip does not stand out, and the effect on the output by layer, for future and for all tokens,
    on a logarithmic axis where an effect of 0 has no place; returns the files."""
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    with look():
        figure = new_figure(9.2, 0.6 + 3.2 * len(values))
        grid = figure.subplots(len(values), 2, squeeze=False)
        for row, (model, found) in zip(grid, values.items(), strict=True):
            shown_SL = np.array([[_nan(v) for v in line] for line in found["future"]["mean"]["contribution"]], dtype=float)
            top, most = _colour_top(shown_SL), float(np.nanmax(shown_SL, initial=0))
            clipped = most > top
            image = row[0].imshow(shown_SL.T, origin="lower", cmap="viridis", vmin=0, vmax=top, interpolation="nearest")
            bar = figure.colorbar(image, ax=row[0], pad=0.02, extend="max" if clipped else "neither")
            bar.set_label("change of its contribution" + f"\n(colours end at {top:.2g}, largest {most:.2g})" * clipped)
            bar.outline.set_visible(False)
            row[0].set(xlabel="layer skipped (0-based)", ylabel="layer observed", title=f"{model}: future tokens")
            for variant, colour in (("future", COLOURS[0]), ("all", COLOURS[1])):
                line = [v if v > 0 else float("nan") for v in found[variant]["mean"]["output"]]
                row[1].plot(line, color=colour, lw=1.5, marker="o", ms=2.5, label=f"{variant} tokens")
            row[1].set_yscale("log")
            row[1].set(xlabel="layer skipped (0-based)", ylabel="change of the output (L2, log axis)", title=f"{model}: output")
            for axis in (row[0].xaxis, row[0].yaxis, row[1].xaxis):
                axis.set_major_locator(MaxNLocator(integer=True, nbins=8))
            row[1].legend()
        return save(figure, Path(folder), "skip")


def _colour_top(shown_SL: Any) -> float:
    """Where the colours of a skip map end: the 98th percentile of the cells of all skipped layers but the strongest one, which
    is mostly layer 0 and can be many times the others; the largest cell where that is less than half as much again."""
    import numpy as np

    known_SL = np.nan_to_num(shown_SL, nan=-1.0)
    rest_N = np.delete(known_SL, known_SL.max(axis=1).argmax(), axis=0)
    rest_N, most = rest_N[rest_N >= 0], max(float(known_SL.max()), 1e-9)
    top = float(np.quantile(rest_N, 0.98)) if rest_N.size else most
    return top if 0 < 1.5 * top < most else most


def plot_tuned(values: Mapping[str, Mapping[str, Any]], folder: str | Path) -> list[Path]:
    """Draw tuned.json of one or several models: divergence and top-1 agreement, the logit lens dashed; returns the files."""
    shown = {"kl_final": "KL(final || lens), nats", "top1": "top-1 agreement"}
    with look():
        figure = new_figure(7.4, 3.5)
        panels = figure.subplots(1, 2)
        for axes, (name, title) in zip(panels, shown.items(), strict=True):
            for lens, dash in (("tuned", "-"), ("logit", "--")):
                for number, (model, found) in enumerate(values.items()):
                    line = found[lens][name]
                    x = [i / max(1, len(line) - 1) if len(values) > 1 else i for i in range(len(line))]
                    label = f"{lens} lens" if len(values) == 1 else f"{model}, {lens} lens"
                    axes.plot(x, line, color=COLOURS[number % len(COLOURS)], ls=dash, lw=1.5, label=label)
            axes.set_title(title)
            lines = [found[lens][name] for found in values.values() for lens in ("tuned", "logit")]
            axes.set_ylim(0, 1 if name == "top1" else _most(lines))
            _layer_axis(axes, values)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
        return save(figure, Path(folder), "tuned")


def _nan(value: float | None) -> float:
    return float("nan") if value is None else value


def _lines(axes: Any, lines: Mapping[str, Sequence[float | None]]) -> None:
    """One line a model against relative depth, so that models of different depths lie on one another."""
    for number, (model, values) in enumerate(lines.items()):
        x = [i / max(1, len(values) - 1) if len(lines) > 1 else i for i in range(len(values))]
        axes.plot(
            x, [float("nan") if v is None else v for v in values], color=COLOURS[number % len(COLOURS)],
            ls=_DASHES[number // len(COLOURS) % len(_DASHES)], lw=1.5, label=model,
        )  # fmt: skip


def _layer_axis(axes: Any, values: Values) -> None:
    from matplotlib.ticker import MaxNLocator

    if len(values) > 1:
        axes.set_xlabel("layer / (layers - 1)")
    else:
        axes.set_xlabel("layer (0-based)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))


def _most(lines: Sequence[Sequence[float | None]]) -> float:
    """A top that a single early layer, which can be tens of times the others, does not decide."""
    known = sorted(v for line in lines for v in line[1:] if v is not None)
    if not known:
        return 1.0
    return max(1.2 * known[int(0.98 * (len(known) - 1))], 1e-3)


def _names(figure: Any, axes: Any, values: Values) -> None:
    if len(values) > 1:
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)))
