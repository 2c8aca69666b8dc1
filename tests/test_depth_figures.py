"""Figures of the depth probes: scales that one layer does not decide, and names for what is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from layerprune import depth_maps, depth_plots
from layerprune.depth_maps import plot_gradients
from layerprune.depth_plots import plot_choices, plot_lens, plot_skip, plot_tuned
from layerprune.depths import _notes
from layerprune.figures import save

LAYERS = 8


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are saved."""
    figures: list[Any] = []

    def keep(figure: Any, folder: Path, name: str) -> list[Path]:
        figures.append(figure)
        return save(figure, folder, name)

    for module in (depth_plots, depth_maps):
        monkeypatch.setattr(module, "save", keep)
    return figures


def skip(first: float, others: float = 0.05, output: float = 0.01) -> dict[str, Any]:
    rows = [[None if o <= s else (first if s == 0 else others) for o in range(LAYERS)] for s in range(LAYERS)]
    line = [0.9, *[output] * (LAYERS - 2), 0.0]
    return {v: {"mean": {"contribution": rows, "output": line}} for v in ("future", "all")}


def test_a_layer_that_stands_out_does_not_decide_the_colours(drawn: list[Any], tmp_path: Path) -> None:
    plot_skip({"one": skip(0.9), "two": skip(0.06)}, tmp_path)
    bars = [axes for axes in drawn[0].axes if "contribution" in axes.get_ylabel()]
    maps = [axes.images[0] for axes in drawn[0].axes if axes.images]
    assert [image.get_clim() for image in maps] == [(0, pytest.approx(0.05)), (0, pytest.approx(0.06))]
    assert [image.colorbar.extend for image in maps] == ["max", "neither"]
    assert [axes.get_ylabel() for axes in bars] == [
        "change of its contribution\n(colours end at 0.05, largest 0.9)",
        "change of its contribution",
    ]


def test_the_effects_of_all_layers_are_told_apart_on_one_axis(drawn: list[Any], tmp_path: Path) -> None:
    plot_skip({"one": skip(0.9)}, tmp_path)
    axes = next(axes for axes in drawn[0].axes if axes.lines)
    assert axes.get_yscale() == "log" and "log axis" in axes.get_ylabel()
    shown = np.asarray(axes.lines[0].get_ydata(), dtype=float)
    assert shown[:-1].tolist() == [0.9, *[0.01] * (LAYERS - 2)] and np.isnan(shown[-1])  # 0 has no place there


def test_models_without_an_effect_or_with_two_layers_are_drawn(drawn: list[Any], tmp_path: Path) -> None:
    nothing = {v: {"mean": {"contribution": [[None, 0.0], [None, None]], "output": [0.0, 0.0]}} for v in ("future", "all")}
    alone = {v: {"mean": {"contribution": [[None]], "output": [0.4]}} for v in ("future", "all")}
    two = {v: {"mean": {"contribution": [[None, 0.7], [None, None]], "output": [0.4, 0.1]}} for v in ("future", "all")}
    plot_skip({"nothing": nothing, "one layer": alone, "two": two}, tmp_path)
    tops = [axes.images[0].get_clim()[1] for axes in drawn[0].axes if axes.images]
    assert tops[2] == 0.7 and min(tops) > 0


def gradients(answer: int, probability: float) -> dict[str, Any]:
    tokens = ["a", "b", "c", "d"]
    return {
        "tokens": tokens, "answer_tokens": answer, "probability": probability, "map": [[0.1, -0.2, 0.3, 0.0]] * 2,
        "worst": 0.001, "points": [32, 64], "tolerance": 0.01, "from_data": False,
    }  # fmt: skip


def test_a_sum_of_probabilities_is_not_called_a_probability(drawn: list[Any], tmp_path: Path) -> None:
    plot_gradients({"sum": gradients(2, 1.12), "one": gradients(1, 0.875)}, tmp_path)
    plot_gradients({"one": gradients(1, 0.875)}, tmp_path)
    titles = [axes.get_title() for axes in drawn[0].axes if axes.images]
    assert titles[0] == "sum: answer “cd” (probabilities of 2 tokens, summed: 1.12)"
    assert titles[1] == "one: answer “d” (probability 0.875)"
    bars = [{axes.get_ylabel() for axes in figure.axes if not axes.images} for figure in drawn]
    assert bars == [{"part of the summed probability"}, {"part of the answer's probability"}]
    assert "probabilities of the answer's 2 tokens, summed: 1.12;" in _notes({"gradients": gradients(2, 1.12)})[0]
    assert "probability of the answer 0.875;" in _notes({"gradients": gradients(1, 0.875)})[0]


def test_one_thing_has_one_name(drawn: list[Any], tmp_path: Path) -> None:
    """The vocabulary's most probable token is the top-1, in figures and in notes; of options there is a best one."""
    by_layer = {name: [0.5] * LAYERS for name in ("kl", "kl_final", "overlap", "top1")}
    tuned = {"tuned": by_layer, "logit": by_layer}
    plot_lens({"one": by_layer}, tmp_path)
    plot_tuned({"one": tuned}, tmp_path)
    plot_choices({"one": {"letters": {name: [0.5] * LAYERS for name in ("listed", "mass", "chosen", "right")}}}, tmp_path)
    for figure in drawn[:2]:
        assert "top-1 agreement" in [axes.get_title() for axes in figure.axes]
    assert "top-1 agreement 50.0 % against 50.0 %" in _notes({"tuned": tuned})[0]
    assert [text.get_text() for text in drawn[2].legends[0].get_texts()] == [
        "all n options among the top 2n",
        "probability of all options",
        "best option is the model's",
        "best option is the right one",
    ]
    assert drawn[2].axes[0].get_ylabel() == "share of items, or probability"
