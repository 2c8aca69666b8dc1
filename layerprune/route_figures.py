"""The figures of routers: how they learn, and which layers are skipped and repeated."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layerprune.figures import BLUE, GREY, VERMILLION, look, new_figure, save

_PARTS = {
    "held_out": ("labels held out", {"color": GREY, "ls": "-", "lw": 1.2, "marker": "o", "ms": 3, "mfc": "white"}),
    "routers": ("routers on them", {"color": BLUE, "ls": "-", "lw": 1.5, "marker": "s", "ms": 3}),
}
_DONE = {"skip": "skipped", "repeat": "repeated"}


def plot_learning(result: Mapping[str, Any], folder: str | Path, model: str = "") -> list[Path]:
    """Draw the routers' loss by epoch, trained on and held out, from train.json; returns the files."""
    from matplotlib.ticker import MaxNLocator

    with look():
        figure = new_figure(5.4, 3.4)
        axes = figure.add_subplot()
        epochs = range(1, len(result["losses"]) + 1)
        axes.plot(epochs, result["losses"], color=BLUE, lw=1.5, label=f"trained on ({result['trained_on']:,} items)")
        out = result["items"] - result["trained_on"]
        style: Any = {"color": VERMILLION, "ls": (0, (4, 2)), "lw": 1.5}
        axes.plot(epochs, result["held_out_losses"], label=f"held out ({out:,} items)", **style)
        axes.set(xlabel="epoch", ylabel="focal loss a layer, nats", title=model)
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", color="#e5e5e5", lw=0.7)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend()
        return save(figure, Path(folder), "learning")


def plot_layers(result: Mapping[str, Any], folder: str | Path, model: str = "") -> list[Path]:
    """Draw by layer the shares of skip and repeat in train.json: all labels as bars, held-out labels and routers as lines.
    A panel with nothing in it says so."""
    by_layer = result["by_layer"]
    with look():
        figure = new_figure(9.2, 3.4)
        panels = figure.subplots(1, 2)
        for axes, action in zip(panels, ("skip", "repeat"), strict=True):
            shown = by_layer["labels"][action]
            axes.set(title=action, xlabel="layer")
            if not any(any(by_layer[part][action]) for part in ("labels", *_PARTS)):
                told = f"no layer is {_DONE[action]},\nneither in the labels nor by the routers"
                axes.text(0.5, 0.5, told, ha="center", va="center", transform=axes.transAxes)
                axes.set(xticks=[], yticks=[])
                continue
            layers = range(len(shown))
            axes.bar(layers, shown, color="#d9d9d9", width=0.8, label=f"labels of all {result['items']:,} items")
            for part, (label, style) in _PARTS.items():
                axes.plot(layers, by_layer[part][action], label=label, **style)
            axes.set_ylim(bottom=0)
        panels[0].set_ylabel("share of the items")
        if model:
            figure.suptitle(model, fontsize=11)
        handles, labels = max((axes.get_legend_handles_labels() for axes in panels), key=lambda found: len(found[1]))
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
        return save(figure, Path(folder), "layers")
