"""The pictures: written whole, the same bytes for the same numbers, and what they say is in the SVG as
text."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from layerprune.plots import _heatmap, _split, _task_panel, plot_curves, plot_distances


def ranking(layers: int) -> dict[str, Any]:
    distance = [
        [
            0.02 * math.sqrt(n) * (1.4 - start / layers) + 0.2 * (start + n == layers)
            for start in range(layers - n + 1)
        ]
        for n in range(1, layers)
    ]
    return {
        "layers": layers,
        "distance": distance,
        "best": {str(n): row.index(min(row)) for n, row in enumerate(distance, 1)},
    }


def row(strategy: str, n: int, layers: int, healed: bool, value: float, loss: float | None) -> dict[str, Any]:
    tasks = {"quiz/acc": {"value": value, "stderr": 0.01, "chance": 0.25}}
    where = {"strategy": strategy, "n": n, "fraction": n / layers, "healed": healed, "kept": []}
    return {**where, "loss": loss, "tasks": tasks}


def curve(layers: int) -> dict[str, Any]:
    rows = [
        row(strategy, n, layers, healed, 0.7 - 0.4 * n / layers, 0.3 + 0.5 * n / layers)
        for strategy in ("angular", "last")
        for healed in (False, True)
        for n in range(layers - 2, 0, -1)
    ]
    return {"layers": layers, "rows": [row("angular", 0, layers, False, 0.7, 0.3), *rows]}


def names(paths: list[Path]) -> set[str]:
    return {path.name for path in paths}


@pytest.mark.parametrize("layers", [2, 8, 80])
def test_pictures_are_written(tmp_path: Path, layers: int) -> None:
    written = plot_distances(ranking(layers), tmp_path / "a", "tiny")
    assert names(written) == {
        f"distance-{kind}.{end}" for kind in ("heatmap", "curve") for end in ("png", "svg")
    }
    if layers > 2:
        written += plot_curves(curve(layers), tmp_path / "a", "tiny")
        assert names(written) >= {"accuracy.png", "accuracy.svg", "loss.png", "loss.svg", "curve.png"}
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


def written_words(svg: Path) -> str:
    """What stands in the picture as text elements, not as outlines of letters or comments."""
    found = ElementTree.parse(svg).iter("{http://www.w3.org/2000/svg}text")
    return "\n".join("".join(element.itertext()) for element in found)


def test_svg_is_deterministic_and_its_text_is_text(tmp_path: Path) -> None:
    first = plot_distances(ranking(8), tmp_path / "a", "tiny-model") + plot_curves(
        curve(8), tmp_path / "a", "tiny-model"
    )
    again = plot_distances(ranking(8), tmp_path / "b", "tiny-model") + plot_curves(
        curve(8), tmp_path / "b", "tiny-model"
    )
    for one, other in zip(first, again, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name
    files = [path for path in first if path.suffix == ".svg"]
    assert all("<dc:date>" not in path.read_text() for path in files)
    svg = {path.stem: written_words(path) for path in files}
    assert all("tiny-model" in words for words in svg.values())
    assert "rescaled in each row" in svg["distance-heatmap"]
    assert "uniform guess (loss = 1)" in svg["loss"]
    for text in (
        "chance",
        "angular distance, healed",
        "last n, not healed",
        "blocks by angular distance and last n",
    ):
        assert text in svg["accuracy"]


def test_other_numbers_give_another_picture(tmp_path: Path) -> None:
    one = curve(8)
    other = copy.deepcopy(one)
    other["rows"][3]["loss"] += 0.1
    for name, numbers in (("a", one), ("b", other)):
        plot_curves(numbers, tmp_path / name)
    same = {
        n: (tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes()
        for n in ("loss.svg", "accuracy.svg")
    }
    assert same == {"loss.svg": False, "accuracy.svg": True}


def test_heatmap_rows_are_rescaled_and_the_trace_is_the_best_start() -> None:
    rank = ranking(8)
    rank["distance"][2] = [0.4] * len(
        rank["distance"][2]
    )  # a row without differences must not divide by zero
    axes = _heatmap(rank, "t").axes[0]
    image_NL = axes.images[0].get_array()
    for n in range(1, 8):
        shown = image_NL[n - 1].compressed()
        assert len(shown) == 8 - n + 1
        assert (shown.min(), shown.max()) == ((0, 0) if n == 3 else (0, 1))
    starts, sizes = axes.lines[-1].get_data()
    assert dict(zip(map(str, sizes), starts, strict=True)) == rank["best"]


def test_every_line_begins_with_the_unpruned_model_and_is_in_order() -> None:
    series = _split(curve(8)["rows"])
    assert set(series) == {(s, h) for s in ("angular", "last") for h in (True, False)}
    assert all([r["n"] for r in rows] == list(range(7)) for rows in series.values())


def test_missing_numbers_leave_gaps_not_errors(tmp_path: Path) -> None:
    numbers = curve(8)
    for r in numbers["rows"]:
        r["loss"] = None
        r["tasks"]["quiz/acc"]["stderr"] = r["tasks"]["quiz/acc"]["chance"] = None
    numbers["rows"][2]["tasks"] = {}
    numbers["rows"][3]["tasks"]["quiz/acc"]["value"] = float("nan")
    assert names(plot_curves(numbers, tmp_path)) == {"accuracy.png", "accuracy.svg", "curve.png"}
    assert "chance" not in (tmp_path / "accuracy.svg").read_text()
    for r in numbers["rows"]:
        r["tasks"], r["loss"] = {}, 0.5
    assert names(plot_curves(numbers, tmp_path / "loss")) == {"loss.png", "loss.svg", "curve.png"}
    assert plot_curves({"layers": 8, "rows": []}, tmp_path / "none") == []


def test_healed_and_unhealed_differ_without_colour() -> None:
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    _task_panel(axes, _split(curve(8)["rows"]), "quiz/acc")
    lines = [line for line in axes.lines if line.get_label() != "chance"]
    looks = {
        (line.get_marker(), line.get_markerfacecolor() == "white", str(line.get_linestyle()))
        for line in lines
    }
    assert len(lines) == len(looks) == 4
    hollow = {line.get_label() for line in lines if line.get_markerfacecolor() == "white"}
    assert hollow == {"angular distance, not healed", "last n, not healed"}
    chance = next(line for line in axes.lines if line.get_label() == "chance")
    assert list(chance.get_ydata()) == [0.25, 0.25]
    assert len(axes.collections) == 4, "a band of one standard error for each line"


def test_drawing_leaves_matplotlib_as_it_was(tmp_path: Path) -> None:
    code = (
        "import sys, json, layerprune.plots as p; assert 'matplotlib' not in sys.modules; import matplotlib; "
        "look = lambda: [matplotlib.rcParams[k] for k in p._STYLE]; before = look(); "
        "p.plot_distances(json.loads(sys.argv[1]), sys.argv[2]); "
        "assert look() == before and 'matplotlib.pyplot' not in sys.modules"
    )
    root = Path(__file__).parent.parent
    command = [sys.executable, "-W", "ignore", "-c", code, json.dumps(ranking(4)), str(tmp_path)]
    assert subprocess.run(command, cwd=root, check=False).returncode == 0
