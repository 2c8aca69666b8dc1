"""Figures of the depth probes with an axis of layers that several things share: prunability, and maps of layers by tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from layerprune.depth_plots import COLOURS
from layerprune.figures import GREY, look, new_figure, save

_LOSS_TOP = 1.05
"""Normalised loss above which a cut is drawn at that height: 1 is a uniform guess."""
_CUTS = {"angular": ("angular", COLOURS[0], "o"), "last": ("last n", COLOURS[1], "s")}


def plot_prunability(values: Mapping[str, Mapping[str, Any]], folder: str | Path) -> list[Path]:
    """Draw prunability.json of one or several models, a column each over one axis of layers: angular distance, skip effect,
    lens, and the loss of cuts, each a bar over the layers that it removes with its mark at the first; returns the files."""
    panels = {
        "angle": "angle between the layer's input and output, over pi",
        "skip": "change of the model's output where the layer is skipped (L2)",
        "kl": "KL(logit lens at the layer's input || final), nats",
    }
    with look():
        figure = new_figure(1.6 + 5.2 * len(values), 8.4)
        grid = figure.subplots(4, len(values), squeeze=False, sharex="col", height_ratios=(1, 1, 1, 1.9))
        for column, (model, found) in enumerate(values.items()):
            layers = range(len(found["kl"]))
            for row, (name, label) in enumerate(panels.items()):
                axes = grid[row][column]
                axes.plot(layers[: len(found[name])], found[name], color=COLOURS[0], lw=1.5, marker="o", ms=2.5)
                top = _top(found[name])
                axes.set_ylim(0, top)
                axes.text(0.5, 0.97, label, ha="center", va="top", transform=axes.transAxes)
                for layer, value in enumerate(found[name]):
                    if value > top:
                        axes.text(layer + 1.2, 0.72 * top, f"layer {layer}: {value:.2g}", fontsize=7.5, color=GREY)
            _cuts(grid[3][column], found)
            grid[0][column].set_title(model)
            for axes in grid[:, column]:
                axes.grid(axis="x", color="#e5e5e5", lw=0.7)
                axes.set_axisbelow(True)
        handles, labels = grid[3][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
        return save(figure, Path(folder), "prunability")


def _cuts(axes: Any, found: Mapping[str, Any]) -> None:
    from matplotlib.ticker import MaxNLocator

    for name, (label, colour, mark) in _CUTS.items():
        known = [cut for cut in found["cuts"][name] if cut["loss"] is not None]
        height = [min(cut["loss"], _LOSS_TOP) for cut in known]
        most = max((cut["n"] for cut in known), default=0)
        ends = [cut["start"] + cut["n"] - 1 for cut in known]
        axes.hlines(height, [cut["start"] for cut in known], ends, color=colour, lw=1, alpha=0.35)
        axes.plot([cut["start"] for cut in known], height, mark, color=colour, ms=3.5, label=f"{label}: first layer (bar: all)")
        for cut, y in zip(known, height, strict=True):
            if cut["n"] in (1, most) or cut["n"] % 4 == 0:
                place: Any = {"xytext": (-4, 2), "textcoords": "offset points", "ha": "right"}
                axes.annotate(str(cut["n"]), (cut["start"], y), fontsize=7, color=colour, **place)
    if found["whole"] is not None:
        axes.axhline(found["whole"], color=GREY, lw=1, ls="--", label="loss of the whole model")
    losses = [cut["loss"] for cuts in found["cuts"].values() for cut in cuts if cut["loss"] is not None]
    losses += [] if found["whole"] is None else [found["whole"]]
    low, high = min([*losses, _LOSS_TOP]), min(_LOSS_TOP, max([*losses, 0.1]))
    room = max(high - low, 0.05)
    if high + 0.15 * room > 1:
        axes.axhline(1, color=GREY, ls=":", lw=1.2, label=f"uniform guess (loss = 1); above {_LOSS_TOP:g} drawn there")
    axes.set_ylim(max(0, low - 0.15 * room), high + 0.15 * room)
    axes.text(0.5, 0.97, "normalised loss of cuts", ha="center", va="top", transform=axes.transAxes)
    axes.set_xlabel("layer (0-based); numbers: how many layers a cut drops")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))


def plot_erasure(values: Mapping[str, Mapping[str, Any]], folder: str | Path) -> list[Path]:
    """Draw erasure.json of one or several models, a map each: row l is the input of layer l, the last one the model's end;
    the last token's column, which is 0, is left out; returns the files."""
    maps = {model: [row[:-1] for row in found["max"]] for model, found in values.items()}
    return _maps(values, maps, folder, "erasure", "change of the answer's distribution (L2)", "erased at depth l (0: embedding)")


def plot_gradients(values: Mapping[str, Mapping[str, Any]], folder: str | Path) -> list[Path]:
    """Draw gradients.json of one or several models, a map each: red adds to the answer's probability, which over
    several tokens is the sum of theirs; returns the files."""
    maps = {model: [row[:-1] for row in found["map"]] for model, found in values.items()}
    summed = any(found["answer_tokens"] > 1 for found in values.values())
    title = "part of the summed probability" if summed else "part of the answer's probability"
    return _maps(values, maps, folder, "gradients", title, "output of layer (0-based)")


def _maps(
    values: Mapping[str, Mapping[str, Any]],
    maps: Mapping[str, Sequence[Sequence[float]]],
    folder: str | Path,
    name: str,
    title: str,
    label: str,
) -> list[Path]:
    from matplotlib.ticker import MaxNLocator

    with look():
        widest = max(len(rows[0]) for rows in maps.values())
        figure = new_figure(max(5.0, 2.2 + 0.26 * widest), 0.4 + 4.3 * len(values))
        grid = figure.subplots(len(values), 1, squeeze=False)
        for (axes,), (model, rows) in zip(grid, maps.items(), strict=True):
            flat = [abs(v) for row in rows for v in row]
            most = max(flat) or 1.0
            signed = name == "gradients"
            image = axes.imshow(
                rows, origin="lower", aspect="auto", interpolation="nearest", cmap="RdBu_r" if signed else "viridis",
                vmin=-most if signed else 0, vmax=most,
            )  # fmt: skip
            bar = figure.colorbar(image, ax=axes, pad=0.02)
            bar.set_label(title)
            bar.outline.set_visible(False)
            found = values[model]
            texts = [token_label(text) for text in found["tokens"][:-1]]
            axes.set_xticks(range(len(texts)), texts, rotation=90, fontsize=8)
            axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
            axes.set_ylabel(label)
            gold = "".join(found["tokens"][len(found["tokens"]) - found["answer_tokens"] :])
            axes.set_title(f"{model}: answer “{token_label(gold)}”{_much(found)}")
            # the answer's own tokens, all but the last, stand behind this line
            start = len(found["tokens"]) - found["answer_tokens"] - 0.5
            if start < len(texts) - 0.5:
                axes.axvline(start, color="white" if not signed else "black", lw=1.2, ls="--")
        return save(figure, Path(folder), name)


def _much(found: Mapping[str, Any]) -> str:
    """What `probability` of gradients.json is: that of one token, or the sum over several, which can be above 1."""
    if "probability" not in found:
        return ""
    count = found["answer_tokens"]
    what = "probability" if count == 1 else f"probabilities of {count} tokens, summed:"
    return f" ({what} {found['probability']:.3g})"


def token_label(text: str) -> str:
    """A token's text as matplotlib can draw it: blanks and line ends shown, what the font lacks as code points."""
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont("DejaVu Sans"))
    shown = text.replace(" ", "␣").replace("\n", "\\n").replace("\t", "\\t")
    shown = "".join(c if font.get_char_index(ord(c)) else f"U+{ord(c):04X}" for c in shown)
    return shown.replace("$", r"\$")


def _top(line: Sequence[float]) -> float:
    """A top that a single early layer, which can be many times the others, does not decide."""
    known = sorted(line)
    if len(known) < 8 or known[-1] < 4 * known[-2]:
        return 1.08 * max([*known, 1e-9])
    return 1.5 * known[-2]
