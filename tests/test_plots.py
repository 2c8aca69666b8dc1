"""The figures: written whole, the same bytes for the same numbers, every mark where its number is, no text over another."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from layerprune.curve import series
from layerprune.distances import _distance_lines, _heatmap, _rescaled, plot_distances
from layerprune.figures import look
from layerprune.plots import _panels, plot_curves

NAMES = ("arc_challenge/acc_norm", "boolq/acc", "mmlu/acc", "hellaswag/acc_norm", "winogrande/acc", "piqa/acc", "openbookqa/acc")
LABELS = {
    "angular": "angular distance, not healed",
    "last": "last n, not healed",
    "angular healed": "angular distance, healed",
    "last healed": "last n, healed",
}


def ranking(layers: int) -> dict[str, Any]:
    distance = [
        [
            0.02 * math.sqrt(n) * (1.4 - start / layers) + 0.2 * (start + n == layers) + (start == 0)
            for start in range(layers - n + 1)
        ]
        for n in range(1, layers)
    ]
    return {
        "layers": layers,
        "distance": distance,
        "best": {str(n): row.index(min(row)) for n, row in enumerate(distance, 1)},
    }


def row(strategy: str, n: int, layers: int, healed: bool, value: float, loss: float | None, tasks: int = 1) -> dict[str, Any]:
    score = {"value": value, "stderr": 0.01, "n": 400, "chance": 0.25, "low": value - 0.04, "high": value + 0.03}
    where = {"strategy": strategy, "n": n, "fraction": n / layers, "healed": healed, "kept": []}
    return {**where, "loss": loss, "tasks": {task: dict(score) for task in NAMES[:tasks]}}


def curve(layers: int, tasks: int = 1, healed: range | tuple[int, ...] | None = None, top: float = 0.8) -> dict[str, Any]:
    """Accuracy falls from 0.7 to 0.3, loss rises from 0.3 to `top`; strategies and healing differ a little."""
    rows = []
    for strategy in ("angular", "last"):
        for n in range(layers - 1, 0, -1):
            for heal in (False, True) if n in (range(1, layers) if healed is None else healed) else (False,):
                share = n / layers * (1 - 0.2 * heal - 0.1 * (strategy == "angular"))
                rows.append(row(strategy, n, layers, heal, 0.7 - 0.4 * share, 0.3 + (top - 0.3) * share, tasks))
    return {"layers": layers, "rows": [row("angular", 0, layers, False, 0.7, 0.3, tasks), *rows]}


def collapse(numbers: dict[str, Any], **steps: tuple[int, int, int, int | None]) -> dict[str, Any]:
    """A collapse of each series (spaces as underscores) at before, first, low, high, the same for all tasks."""
    found = {}
    for name, rows in series(numbers["rows"]).items():
        step = steps.get(name.replace(" ", "_"))
        told: dict[str, Any] = {"status": "no collapse in range", "before": None, "first": None, "low": None, "high": None}
        if step:
            told = {"status": "collapses", **dict(zip(("before", "first", "low", "high"), step, strict=True))}
        loss = {"from_n": rows[1]["n"], "to_n": rows[2]["n"]} if len(rows) > 2 else {"from_n": 0, "to_n": rows[-1]["n"]}
        found[name] = {"loss": loss, "tasks": {task: {"transition": told} for task in rows[0]["tasks"]}}
    return {"keep": 0.95, "confidence": 0.95, "layers": numbers["layers"], "series": found}


def everywhere(numbers: dict[str, Any]) -> dict[str, Any]:
    """A collapse in each series, in the middle, one of them with an open interval."""
    middle = numbers["layers"] // 2
    step = (middle - 1, middle, middle - 1, middle + 1)
    return collapse(numbers, angular=step, last=(*step[:3], None), angular_healed=step, last_healed=step)


def panels(numbers: dict[str, Any], found: dict[str, Any] | None = None, loss: bool = True) -> Any:
    with look():
        return _panels(numbers, (found or {"series": {}})["series"], list(numbers["rows"][0]["tasks"]), loss, "title\nsecond line")


def named(axes: Any, gid: str) -> list[Any]:
    return [line for line in axes.lines if line.get_gid() == gid]


def lines(axes: Any) -> dict[str, Any]:
    return {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}


def names(paths: list[Path]) -> set[str]:
    return {path.name for path in paths}


def both(*stems: str) -> set[str]:
    return {f"{stem}.{end}" for stem in stems for end in ("png", "svg")}


def drawn_texts(figure: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Every text that a drawing of the figure really draws, with its box in pixels."""
    from matplotlib.text import Text

    seen: list[Any] = []
    draw = Text.draw

    def noted(self: Any, renderer: Any, *args: Any, **rest: Any) -> Any:
        if self.get_visible() and self.get_text().strip():
            seen.append(self)
        return draw(self, renderer, *args, **rest)

    figure.canvas.draw()  # places everything
    with monkeypatch.context() as patched:
        patched.setattr(Text, "draw", noted)
        figure.canvas.draw()
    return [(text.get_text(), text.get_window_extent()) for text in dict.fromkeys(seen)]


def clashes(figure: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Pairs of texts that overlap, texts that leave the figure, legends that lie on a panel."""
    found = drawn_texts(figure, monkeypatch)
    assert len(found) > 8
    width, height = figure.bbox.width, figure.bbox.height
    told = [f"{text!r} leaves the figure" for text, b in found if b.x0 < -1 or b.y0 < -1 or b.x1 > width + 1 or b.y1 > height + 1]
    for (one, a), (other, b) in combinations(found, 2):
        if min(a.x1, b.x1) - max(a.x0, b.x0) > 0.5 and min(a.y1, b.y1) - max(a.y0, b.y0) > 0.5:
            told.append(f"{one!r} lies on {other!r}")
    shown = [axes for axes in figure.axes if axes.axison]
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]
    assert len(legends) == 1
    told += ["the legend lies on a panel" for axes in shown if legends[0].get_window_extent().overlaps(axes.get_window_extent())]
    return told


@pytest.mark.parametrize("layers", [2, 8, 80])
def test_figures_are_written(tmp_path: Path, layers: int) -> None:
    written = plot_distances(ranking(layers), tmp_path / "a", "tiny")
    assert names(written) == both("distance-heatmap", "distance-curve")
    written += plot_curves(curve(layers), tmp_path / "a", "tiny", everywhere(curve(layers)) if layers > 2 else None)
    assert names(written) == both("distance-heatmap", "distance-curve", "accuracy", "loss", "curve")
    for path in written:
        data = path.read_bytes()
        assert len(data) > 3000
        if path.suffix == ".png":
            assert data.startswith(b"\x89PNG") and data.rstrip().endswith(b"IEND\xaeB`\x82")
        else:
            ElementTree.fromstring(data)
    assert set(written) == set((tmp_path / "a").iterdir())


def test_a_single_layer_has_no_blocks(tmp_path: Path) -> None:
    assert plot_distances({"layers": 1, "distance": [], "best": {}}, tmp_path) == []


@pytest.mark.parametrize("layers", [8, 80])
@pytest.mark.parametrize(("tasks", "healed"), [(1, ()), (1, None), (2, (4,)), (4, (4,)), (6, ()), (7, None)])
def test_no_text_lies_on_another(layers: int, tasks: int, healed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = curve(layers, tasks, healed, top=4)
    assert clashes(panels(numbers, everywhere(numbers)), monkeypatch) == []


@pytest.mark.parametrize("layers", [3, 8, 16, 24, 80, 126])
def test_no_text_of_the_distances_lies_on_another(layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for draw in (_heatmap, _distance_lines):
        with look():
            figure = draw(ranking(layers), f"Angular distance of every block of some-model ({layers} layers)")
        assert clashes(figure, monkeypatch) == []


def test_the_text_check_sees_clashes(monkeypatch: pytest.MonkeyPatch) -> None:
    figure = panels(curve(8))
    figure.axes[0].set_xticks([0.5, 0.51], ["one", "other"])
    figure.text(0.99, 0.5, "beyond the edge")
    found = clashes(figure, monkeypatch)
    assert "'one' lies on 'other'" in found and "'beyond the edge' leaves the figure" in found
    figure = panels(curve(8))
    figure.legends[0].set_loc("center")
    assert "the legend lies on a panel" in clashes(figure, monkeypatch)


def written_words(svg: Path) -> str:
    """What stands in the figure as text elements, not as outlines of letters or comments."""
    found = ElementTree.parse(svg).iter("{http://www.w3.org/2000/svg}text")
    return "\n".join("".join(element.itertext()) for element in found)


def test_svg_is_deterministic_and_its_text_is_text(tmp_path: Path) -> None:
    numbers = curve(8)
    first, again = (
        plot_distances(ranking(8), tmp_path / where, "tiny-model")
        + plot_curves(numbers, tmp_path / where, "tiny-model", everywhere(numbers))
        for where in ("a", "b")
    )
    for one, other in zip(first, again, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name
    files = [path for path in first if path.suffix == ".svg"]
    assert all("<dc:date>" not in path.read_text() for path in files)
    svg = {path.stem: written_words(path) for path in files}
    assert len(svg) == 5 and all("tiny-model" in words for words in svg.values())
    assert "rescaled in each row" in svg["distance-heatmap"] and "above the colour scale" in svg["distance-heatmap"]
    for name in ("loss", "curve"):
        assert "uniform guess (loss = 1)" in svg[name] and "sharpest rise of the loss" in svg[name]
    for name in ("accuracy", "curve"):
        for text in (
            "chance",
            "95 % confidence interval",
            "collapse: first depth",
            *LABELS.values(),
            "angular distance and last n",
        ):
            assert text in svg[name], text


def test_other_numbers_give_another_figure(tmp_path: Path) -> None:
    one = curve(8)
    other = copy.deepcopy(one)
    other["rows"][3]["loss"] += 0.1
    for name, numbers in (("a", one), ("b", other)):
        plot_curves(numbers, tmp_path / name)
    same = {n: (tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in ("loss.svg", "accuracy.svg")}
    assert same == {"loss.svg": False, "accuracy.svg": True}


def test_every_line_begins_with_the_whole_model_and_has_its_band() -> None:
    axes = panels(curve(8)).axes[0]
    found = lines(axes)
    for name, label in LABELS.items():
        rows = series(curve(8)["rows"])[name]
        assert list(found[label].get_xdata()) == [r["n"] / 8 for r in rows] and len(rows) == 8
        assert list(found[label].get_ydata()) == [r["tasks"][NAMES[0]]["value"] for r in rows]
    assert list(found["chance"].get_ydata()) == [0.25, 0.25]
    bands = [band.get_paths()[0].get_extents() for band in axes.collections if band.get_label() != "95 % confidence interval"]
    assert len(bands) == 4
    lowest = min(r["tasks"][NAMES[0]]["low"] for r in curve(8)["rows"])
    assert all(band.y1 == pytest.approx(0.73) and (band.x0, band.x1) == (0, 7 / 8) for band in bands)
    assert min(band.y0 for band in bands) == pytest.approx(lowest)


def test_without_an_interval_the_band_is_one_standard_error() -> None:
    numbers = curve(8, healed=())
    for r in numbers["rows"]:
        del r["tasks"][NAMES[0]]["low"]
    axes = panels(numbers).axes[0]
    assert {band.get_label() for band in axes.collections} >= {"one standard error"}
    assert max(band.get_paths()[0].get_extents().y1 for band in axes.collections if band.get_paths()) == pytest.approx(0.71)


def test_collapse_points_stand_at_their_depths_below_the_data() -> None:
    numbers = curve(8)
    axes = panels(numbers, collapse(numbers, angular=(2, 4, 3, 5), last=(1, 2, 2, None), last_healed=(4, 5, 4, 6))).axes[0]
    marks, gaps, bars, stems = (named(axes, gid) for gid in ("collapse", "gap", "interval", "stem"))
    assert [line.get_xdata()[0] * 8 for line in marks] == [4, 2, 5]
    assert [list(line.get_xdata() * 8) for line in gaps] == [[2, 4], [1, 2], [4, 5]]
    edge = axes.get_xlim()[1]
    assert [list(line.get_xdata()) for line in bars] == [[3 / 8, 5 / 8], [2 / 8, edge], [4 / 8, 6 / 8]]
    looks = [(line.get_marker(), line.get_markerfacecolor() == "white") for line in marks]
    assert looks == [("o", True), ("s", True), ("s", False)]
    values = [next(r for r in numbers["rows"] if (r["strategy"], r["n"], r["healed"]) == key) for key in
              (("angular", 4, False), ("last", 2, False), ("last", 5, True))]  # fmt: skip
    assert [line.get_ydata()[1] for line in stems] == [r["tasks"][NAMES[0]]["value"] for r in values]
    low = min(r["tasks"][NAMES[0]]["low"] for r in numbers["rows"])
    heights = [line.get_ydata()[0] for line in marks]
    assert axes.get_ylim()[0] < heights[2] < heights[1] < heights[0] < min(low, 0.25)
    assert min(axes.get_yticks()) > heights[0], "no accuracy is written beside the strip"
    assert named(panels(numbers, collapse(numbers)).axes[0], "collapse") == []


def test_the_sharpest_rise_is_where_it_is_said_to_be() -> None:
    numbers = curve(8, healed=(4,))
    axes = panels(numbers, collapse(numbers)).axes[-1]
    axes = next(a for a in axes.figure.axes if a.get_title() == "loss")
    rises = named(axes, "rise")
    assert [list(line.get_xdata() * 8) for line in rises] == [[1, 2], [1, 2]], "a single healed depth has no slope"
    rows = series(numbers["rows"])
    assert [list(line.get_ydata()) for line in rises] == [[r["loss"] for r in rows[name][1:3]] for name in ("angular", "last")]


def test_a_loss_far_above_one_leaves_the_rest_readable() -> None:
    numbers = curve(8, healed=(), top=1.5)
    axes = panels(numbers).axes[1]
    assert axes.get_ylim()[1] > max(r["loss"] for r in numbers["rows"]) and named(axes, "above") == []
    numbers = curve(8, healed=(), top=9)
    numbers["rows"][1]["loss"] = math.inf  # angular, n = 7
    axes = panels(numbers).axes[1]
    assert axes.get_ylim() == (0, 1.5)
    first = [min(r["n"] for r in rows if r["loss"] > 1.5) for rows in series(numbers["rows"]).values()]
    assert [list(line.get_xdata() * 8) for line in named(axes, "above")] == [[n] for n in first]
    assert all(1.2 < y < 1.5 for line in named(axes, "above") for y in line.get_ydata())
    assert "loss goes above 1.5 (largest infinity)" in lines(axes)
    for r in numbers["rows"]:
        r["loss"] = 2.5 + r["n"]
    assert panels(numbers).axes[1].get_ylim() == (0, 3.0), "a whole model that is near the top itself stays in sight"


def grey(colour: str) -> float:
    from matplotlib.colors import to_rgb

    return sum(weight * part for weight, part in zip((0.299, 0.587, 0.114), to_rgb(colour), strict=True))


def test_series_differ_in_grey_and_by_more_than_colour() -> None:
    found = lines(panels(curve(8)).axes[0])
    drawn = [found[label] for label in LABELS.values()]
    for one, other in combinations(drawn, 2):
        marks = [(line.get_marker(), line.get_markerfacecolor() == "white") for line in (one, other)]
        assert marks[0] != marks[1]
        if one.get_color() != other.get_color():
            assert abs(grey(one.get_color()) - grey(other.get_color())) > 0.1
            assert one.get_linewidth() != other.get_linewidth()
        else:
            assert one._dash_pattern != other._dash_pattern
    assert all(grey(line.get_color()) < 0.6 for line in drawn), "too light for white paper"


def test_one_healed_depth_is_a_point_and_many_are_a_line() -> None:
    for healed, depths in (((4,), [4]), ((2, 4, 6), [0, 2, 4, 6])):
        axes = panels(curve(8, healed=healed)).axes[0]
        for label in ("angular distance, healed", "last n, healed"):
            line = lines(axes)[label]
            assert list(line.get_xdata() * 8) == depths
            assert line.get_linestyle() == ("None" if len(depths) == 1 else "-")


def test_heatmap_rescales_each_row_without_its_first_start() -> None:
    rank = ranking(8)
    rank["distance"][2] = [0.4] * 6  # a row without differences must not divide by zero
    rank["distance"][3][0] = 0.0  # a first start that is the best one
    rank["best"] = {str(n): row.index(min(row)) for n, row in enumerate(rank["distance"], 1)}
    with look():
        figure = _heatmap(rank, "t")
    axes = figure.axes[0]
    image_NL = axes.images[0].get_array()
    for n in range(1, 8):
        shown = image_NL[n - 1].compressed()
        low, high = min(rank["distance"][n - 1]), max(rank["distance"][n - 1][1:])
        if n == 7:  # one start with l >= 1: the other one is infinitely far above
            assert list(shown) == [0]
            continue
        assert len(shown) == 8 - n + 1 and shown[1:].max() == (0 if n == 3 else 1)
        if high > low:
            assert list(shown) == pytest.approx([(d - low) / (high - low) for d in rank["distance"][n - 1]])
    assert set(image_NL[2].compressed()) == {0}
    hatched = {patch.get_y() + 0.5 for patch in axes.patches}
    assert all(patch.get_x() == -0.5 for patch in axes.patches)
    assert hatched == {1, 2, 5, 6, 7}, "rows in which l = 0 is above the scale"
    starts, sizes = axes.lines[-1].get_data()
    assert dict(zip(map(str, sizes), starts, strict=True)) == rank["best"]
    assert "above the colour scale" in figure.legends[0].get_texts()[1].get_text()


def test_rescaling_keeps_order_and_puts_only_the_first_start_above() -> None:
    assert _rescaled([5.0, 1.0, 2.0, 3.0]) == [2.0, 0.0, 0.5, 1.0]
    assert _rescaled([2.0, 1.0, 3.0]) == [0.5, 0.0, 1.0]
    assert _rescaled([0.1, 0.5, 0.3]) == pytest.approx([0.0, 1.0, 0.5])
    assert _rescaled([0.4, 0.2]) == [math.inf, 0.0] and _rescaled([0.2, 0.4]) == [0.0, 1.0] and _rescaled([0.2, 0.2]) == [0.0, 0.0]


def test_missing_numbers_leave_gaps_not_errors(tmp_path: Path) -> None:
    numbers = curve(8)
    task = NAMES[0]
    for r in numbers["rows"]:
        r["loss"] = None
        for key in ("stderr", "low", "high", "chance"):
            r["tasks"][task][key] = None
    numbers["rows"][2]["tasks"] = {}
    numbers["rows"][3]["tasks"][task]["value"] = float("nan")
    assert names(plot_curves(numbers, tmp_path, collapse=everywhere(numbers))) == both("accuracy", "curve")
    assert "chance" not in (tmp_path / "accuracy.svg").read_text()
    for r in numbers["rows"]:
        r["tasks"], r["loss"] = {}, 0.5
    assert names(plot_curves(numbers, tmp_path / "loss")) == both("loss", "curve")
    assert plot_curves({"layers": 8, "rows": []}, tmp_path / "none") == []
    only = {"layers": 8, "rows": [row("angular", 0, 8, False, 0.7, 0.3)]}
    assert names(plot_curves(only, tmp_path / "whole", collapse={"series": {}})) == both("accuracy", "loss", "curve")


def test_drawing_leaves_matplotlib_as_it_was(tmp_path: Path) -> None:
    code = (
        "import sys, json, layerprune.plots, layerprune.distances as d, layerprune.figures as f; "
        "assert not {'matplotlib', 'torch'} & set(sys.modules); import matplotlib; "
        "look = lambda: [matplotlib.rcParams[k] for k in f.STYLE]; before = look(); "
        "d.plot_distances(json.loads(sys.argv[1]), sys.argv[2]); "
        "assert look() == before and 'matplotlib.pyplot' not in sys.modules"
    )
    root = Path(__file__).parent.parent
    command = [sys.executable, "-W", "ignore", "-c", code, json.dumps(ranking(4)), str(tmp_path)]
    assert subprocess.run(command, cwd=root, check=False).returncode == 0
