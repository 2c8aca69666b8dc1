"""Comparing runs: one figure and one table over the fraction of layers dropped, and what is refused."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from layerprune.comparison import compare, format_compare
from layerprune.figures import look
from layerprune.model.errors import Refused, UsageError
from layerprune.overlay import _figure
from layerprune.results import labels, read_run

Tasks = Mapping[str, float]
QUIZ: Tasks = {"quiz/acc": 0.8}


def rows(layers: int, tasks: Tasks, strategy: str, healed: tuple[int, ...], top: float | None) -> list[dict[str, Any]]:
    """Accuracy falls from the value of `tasks` at n = L / 2 to 0.25, loss rises from 0.2 to `top` in a straight line."""
    made = []
    for n in range(layers):
        for heal in (False, True) if n in healed else (False,):
            scores = {
                task: {"value": value if n < layers / 2 or heal else 0.25, "stderr": 0.01, "n": 400, "chance": 0.25}
                for task, value in tasks.items()
            }
            loss = None if top is None else 0.2 + (top - 0.2) * n / (layers - 1)
            where = {"strategy": strategy, "n": n, "fraction": n / layers, "healed": heal, "kept": []}
            made.append({**where, "loss": loss, "tasks": scores})
    return made


def run(
    folder: Path,
    model: str,
    layers: int = 8,
    tasks: Tasks = QUIZ,
    strategy: str = "angular",
    healed: tuple[int, ...] = (),
    top: float | None = 1.4,
    manifest: Mapping[str, Any] | None = None,
    collapse: bool = True,
) -> Path:
    """A synthetic run folder whose tasks collapse at n = L / 2, with an interval up to the next depth."""
    folder.mkdir(parents=True)
    numbers = {"model": model, "layers": layers, "rows": rows(layers, tasks, strategy, healed, top)}
    (folder / "curve.json").write_text(json.dumps(numbers))
    half = math.ceil(layers / 2)
    step = {"status": "collapses", "level": 0.8, "before": half - 1, "first": half, "low": half, "high": half + 1}
    one = {
        "loss": None,
        "tasks": {task: {"chance": 0.25, "transition": step} for task in tasks},
        "recommendation": {"status": "cut", "n": 2},
    }
    still = {**one, "tasks": {}, "recommendation": {"status": "not decided", "n": 0}}
    found = {"keep": 0.95, "layers": layers, "series": {strategy: one, **({f"{strategy} healed": still} if healed else {})}}
    if collapse:
        (folder / "collapse.json").write_text(json.dumps(found))
    if manifest is not None:
        (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def heal(steps: int, data: str = "c4.jsonl") -> dict[str, Any]:
    settings = {"data": "0123456789", "steps": steps, "learning_rate": 0.0003, "lora_rank": None, "targets": ["up", "down"]}
    return {"given": {"heal_data": f"/somewhere/{data}"}, "inputs": {"kind": "sweep"}, "asked": {"heal_settings": settings}}


def test_runs_of_two_models_in_one_folder(tmp_path: Path) -> None:
    a = run(tmp_path / "a", "small", 8, {"quiz/acc": 0.8, "own/acc": 0.5}, healed=(3,))
    b = run(tmp_path / "b", "large", 80, {"exam/acc_norm": 0.6, "quiz/acc": 0.9}, "last", top=0.9)
    c = run(tmp_path / "c", "other", 8, {"exam/acc_norm": 0.7}, top=None, collapse=False)
    out = tmp_path / "out"
    result = compare([a, b, c], out)
    assert {path.name for path in out.iterdir()} == {"compare.png", "compare.svg", "compare.csv", "compare.json"}
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "compare.json").read_text()) == {k: v for k, v in result.items() if k != "folder"}
    assert (result["folder"], result["tasks"], result["loss"]) == (str(out), ["quiz/acc", "exam/acc_norm"], True)
    assert [(r["label"], r["layers"], r["loss"]) for r in result["runs"]] == [
        ("small", 8, 0.2),
        ("large", 80, 0.2),
        ("other", 8, None),
    ]
    small, healed, large, other = result["series"]
    assert [(s["run"], s["strategy"], s["healed"]) for s in result["series"]] == [
        ("small", "angular", False), ("small", "angular", True), ("large", "last", False), ("other", "angular", False),
    ]  # fmt: skip
    known = {"first": 0.5, "low": 0.5, "high": 0.625, "before": 3 / 8, "between": False}
    assert small["collapse"] == {"quiz/acc": known} and healed["collapse"] == {}
    known = {"first": 0.5, "low": 0.5, "high": 41 / 80, "before": 39 / 80, "between": False}
    assert large["collapse"]["exam/acc_norm"] == known
    assert (small["above_one"], large["above_one"], other["above_one"]) == (5 / 8, None, None)
    assert small["recommended"] == {"status": "cut", "n": 2, "fraction": 0.25} and other["recommended"] is None
    svg = (out / "compare.svg").read_text()
    for text in ("quiz", "exam", "accuracy (normalised)", "small, 8 layers", "large, 80 layers", "last n, not healed", "chance"):
        assert f">{text}" in svg, text
    assert "own" not in svg and "last n, healed" not in svg
    again = compare([a, b, c], tmp_path / "again")
    assert (Path(again["folder"]) / "compare.svg").read_text() == svg


def test_the_table(tmp_path: Path) -> None:
    a = run(tmp_path / "a", "small", 8, healed=(3,))
    b = run(tmp_path / "b", "larger", 80, {"quiz/acc": 0.9, "x/acc": 0.5}, "last", top=0.9, collapse=False)
    text = format_compare(compare([a, b], tmp_path / "out"))
    lines = [re.split(r"  +", line) for line in text.split("\n")]
    assert lines[0] == ["2 runs (collapse, loss and drop as fractions of the layers; loss and accuracy of the whole model)"]
    assert lines[2:6] == [
        ["run", "series", "layers", "loss", "quiz", "quiz collapses", "loss passes 1", "drop"],
        ["small", "angular", "8", "0.2000", "0.800", "0.500 (0.500 to 0.625)", "0.625", "0.250 (n = 2)"],
        ["small", "angular healed", "8", "0.2000", "0.800", "-", "-", "not decided"],
        ["larger", "last", "80", "0.2000", "0.900", "-", "-", "-"],
    ]
    assert len({len(line) for line in text.split("\n")[2:4]}) == 1, "columns are aligned"
    assert lines[-1] == [f"{tmp_path / 'out'}: compare.csv, compare.json, compare.png, compare.svg"]


def test_an_open_interval_is_said(tmp_path: Path) -> None:
    a, b = run(tmp_path / "a", "one"), run(tmp_path / "b", "two")
    found = json.loads((a / "collapse.json").read_text())
    found["series"]["angular"]["tasks"]["quiz/acc"]["transition"]["high"] = None
    (a / "collapse.json").write_text(json.dumps(found))
    assert "0.500 (0.500 to beyond)" in format_compare(compare([a, b], tmp_path / "out"))


def test_csv_is_long(tmp_path: Path) -> None:
    a = run(tmp_path / "a", "small", 4, {"quiz/acc": 0.8, "own/acc": 0.5}, healed=(2,))
    b = run(tmp_path / "b", "large", 5, strategy="last", top=None)
    compare([a, b], tmp_path / "out")
    with open(tmp_path / "out" / "compare.csv", newline="") as file:
        found = list(csv.DictReader(file))
    assert list(found[0]) == ["run", "model", "strategy", "healed", "n", "fraction", "loss", "quiz/acc", "own/acc"]
    assert [(r["run"], r["n"], r["healed"]) for r in found] == [
        *(("small", n, h) for n, h in (("0", "0"), ("1", "0"), ("2", "0"), ("2", "1"), ("3", "0"))),
        *(("large", str(n), "0") for n in range(5)),
    ]
    assert found[3] == {
        "run": "small", "model": "small", "strategy": "angular", "healed": "1", "n": "2", "fraction": "0.5", "loss": "1",
        "quiz/acc": "0.8", "own/acc": "0.5",
    }  # fmt: skip
    assert (found[-1]["loss"], found[-1]["own/acc"], found[-1]["quiz/acc"]) == ("", "", "0.25")


def test_a_name_says_what_differs(tmp_path: Path) -> None:
    cases: dict[str, dict[str, Any]] = {
        "a": {"strategy": "angular", "healed": (3,), "manifest": heal(100)},
        "b": {"strategy": "angular", "healed": (3,), "manifest": heal(200)},
        "c": {"strategy": "last"},
        "d": {"model": "unlike", "layers": 12},
    }
    found = [read_run(run(tmp_path / name, **{"model": "demo", **about})) for name, about in cases.items()]
    assert labels(found) == [
        "demo (angular, healed, steps 100)",
        "demo (angular, healed, steps 200)",
        "demo (last, not healed)",
        "unlike",
    ]
    assert labels(found[:2]) == ["demo (steps 100)", "demo (steps 200)"]
    assert labels(found[1:3]) == ["demo (angular, healed)", "demo (last, not healed)"]
    assert labels(found[2:]) == ["demo", "unlike"]
    other = read_run(run(tmp_path / "e", "demo", healed=(3,), manifest=heal(100, "wiki.jsonl") | {"inputs": {"heal": None}}))
    other["manifest"]["asked"]["heal_settings"]["data"] = "9876"
    assert labels([found[0], other]) == ["demo (data c4.jsonl)", "demo (data wiki.jsonl)"]


def test_the_same_twice_is_told_apart_by_folder(tmp_path: Path) -> None:
    first, second = run(tmp_path / "x" / "try", "demo"), run(tmp_path / "x" / "again", "demo")
    third = run(tmp_path / "y" / "try", "demo")
    assert labels([read_run(path) for path in (first, second)]) == ["demo (try)", "demo (again)"]
    assert labels([read_run(path) for path in (first, second, third)]) == [f"demo ({first})", "demo (again)", f"demo ({third})"]
    with pytest.raises(UsageError, match=r"try is given twice"):
        compare([first, first.parent / "again" / ".." / "try"], tmp_path / "out")


def test_the_default_folder_is_named_after_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = run(tmp_path / "a", "demo", strategy="last"), run(tmp_path / "b", "demo")
    monkeypatch.chdir(tmp_path)
    assert compare([a, b])["folder"] == "runs/compare-demo-last-demo-angular"
    before = (tmp_path / "runs/compare-demo-last-demo-angular/compare.json").read_bytes()
    with pytest.raises(UsageError, match="exists already"):
        compare([a, b])
    assert (tmp_path / "runs/compare-demo-last-demo-angular/compare.json").read_bytes() == before
    long = [run(tmp_path / str(i), f"model-{i}-" + 60 * "x") for i in range(4)]
    assert len(Path(compare(long)["folder"]).name) <= 120


def test_what_was_not_measured_alike_is_noted(tmp_path: Path) -> None:
    def manifest(shots: int, data: str, sweep: bool) -> dict[str, Any]:
        loss = {"data": data, "samples": 8, "length": 512}
        tasks = {"tasks": {"quiz": shots}}
        return {"inputs": {"loss": loss, **({} if sweep else tasks)}, "asked": tasks if sweep else {}}

    a = run(tmp_path / "a", "one", manifest=manifest(0, "abcdefghij", True))
    b = run(tmp_path / "b", "two", manifest=manifest(5, "0123456789", False))
    c = run(tmp_path / "c", "three", manifest=manifest(0, "abcdefghij", False))
    notes = compare([a, b, c], tmp_path / "out")["notes"]
    assert notes == [
        "quiz/acc has other numbers of in-context examples (one: 0, two: 5, three: 0)",
        "loss is over other text (one: abcdefgh, two: 01234567, three: abcdefgh)",
    ]
    result = compare([a, c], tmp_path / "alike")
    assert result["notes"] == [] and "note" not in format_compare(result)


def test_lines_are_on_the_fraction_axis_with_their_rings(tmp_path: Path) -> None:
    paths = [run(tmp_path / "a", "small", 8, healed=(3,)), run(tmp_path / "b", "large", 80, strategy="last", top=4.0)]
    found = [read_run(path) | {"label": path.name} for path in paths]
    with look():
        figure = _figure(found, ["quiz/acc"], True)
    quiz, loss = figure.axes[:2]
    curves = {(line.get_gid(), line.get_color()): line for line in quiz.lines if line.get_gid() and line.get_gid() != "collapse"}
    assert [gid for gid, _ in curves] == ["angular", "angular healed", "last"]
    small, healed, large = curves.values()
    assert list(small.get_xdata()) == [n / 8 for n in range(8)] and list(large.get_xdata()) == [n / 80 for n in range(80)]
    assert list(healed.get_xdata()) == [3 / 8] and healed.get_linestyle() == "None"
    assert small.get_color() == healed.get_color() != large.get_color() and small.get_marker() != large.get_marker()
    assert (small.get_markerfacecolor(), healed.get_markerfacecolor()) == ("white", healed.get_color())
    assert small._dash_pattern != large._dash_pattern
    rings = [line for line in quiz.lines if line.get_gid() == "collapse"]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in rings] == [(0.5, 0.25), (0.5, 0.25)]
    assert next(line for line in quiz.lines if line.get_label() == "chance").get_ydata()[0] == 0.25
    assert loss.get_ylim() == (0, 1.5) and next(line for line in loss.lines if "uniform" in line.get_label()).get_ydata()[0] == 1


@pytest.mark.parametrize("count", [2, 7, 14])
def test_no_text_of_the_figure_lies_on_another(tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    spec = importlib.util.spec_from_file_location("figures_checks", Path(__file__).with_name("test_plots.py"))
    assert spec is not None and spec.loader is not None
    checks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(checks)
    tasks = dict.fromkeys(checks.NAMES[: 4 if count == 7 else 2], 0.8)
    found = []
    for i in range(count):
        path = run(tmp_path / str(i), f"some-family-{i}-7b", 8 * (i + 1), tasks, ("angular", "last")[i % 2], (3,), 3.0)
        found.append(read_run(path) | {"label": f"some-family-{i}-7b (angular and last, healed, steps {i}000)"})
    with look():
        figure = _figure(found, list(tasks), True)
    assert checks.clashes(figure, monkeypatch) == []
    looks = {(line.get_color(), line.get_marker()) for line in figure.axes[0].lines if line.get_gid() in ("angular", "last")}
    assert len(looks) == count
    arrows = [line.get_ydata()[0] for line in figure.axes[len(tasks)].lines if line.get_gid() == "above"]
    assert len(arrows) >= count and 1.2 < min(arrows) <= max(arrows) < 1.5, "arrows stay at the top, however many runs"


def test_bad_input_is_refused_in_one_sentence(tmp_path: Path) -> None:
    good = run(tmp_path / "good", "demo")
    out = tmp_path / "out"

    def refused(kind: type[Exception], words: str, *paths: Path) -> None:
        with pytest.raises(kind) as caught:
            compare(paths, out)
        told = str(caught.value)
        assert words in told and "\n" not in told and not out.exists(), told

    refused(UsageError, "0 run folders given")
    refused(UsageError, "1 run folder given", good)
    refused(UsageError, "nowhere does not exist", good, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    refused(UsageError, "empty holds no curve.json", good, tmp_path / "empty")
    refused(UsageError, "curve.json is a file", good, good / "curve.json")
    refused(UsageError, "no two of the runs share a task or have a loss (demo has quiz/acc; two has exam/acc)",
            good, run(tmp_path / "two", "two", tasks={"exam/acc": 0.5}, top=None))  # fmt: skip
    bad = run(tmp_path / "bad", "bad", manifest={})
    whole = (bad / "curve.json").read_text()
    (bad / "curve.json").write_text(whole[:-20])
    refused(Refused, "is not valid JSON", good, bad)
    for words, mend in {
        "names no model": lambda c: c.pop("model"),
        "layers is '8'": lambda c: c.update(layers="8"),
        "has no rows": lambda c: c.update(rows={}),
        "n is 8 in row 2": lambda c: c["rows"][2].update(n=8),
        "row 2 says 'random'": lambda c: c["rows"][2].update(strategy="random"),
        "loss is 'high' in row 1": lambda c: c["rows"][1].update(loss="high"),
        "loss is None in row 1": lambda c: c["rows"][1].pop("loss"),
        "tasks of row 1": lambda c: c["rows"][1].update(tasks={"quiz/acc": {}}),
        "whole model is missing": lambda c: c["rows"].pop(0),
    }.items():
        numbers = json.loads(whole)
        mend(numbers)
        (bad / "curve.json").write_text(json.dumps(numbers))
        refused(Refused, words, good, bad)
    (bad / "curve.json").write_text("[]")
    refused(Refused, "is not a curve of layerprune", good, bad)
    (bad / "curve.json").write_text(whole)
    for text in ("{}", "[]", '{"series": {"angular": {"tasks": {}}}}', '{"series": 1}'):
        (bad / "collapse.json").write_text(text)
        refused(Refused, "is not a collapse of layerprune", good, bad)
    (bad / "collapse.json").unlink()
    (bad / "manifest.json").write_text("[]")
    refused(Refused, "is not the manifest", good, bad)
    (bad / "manifest.json").unlink()
    compare([good, bad], out)
    assert out.is_dir()


def test_numbers_that_are_none_count_as_not_measured(tmp_path: Path) -> None:
    a, b = run(tmp_path / "a", "one"), run(tmp_path / "b", "two")
    numbers = json.loads((a / "curve.json").read_text())
    numbers["rows"][2]["loss"], numbers["rows"][3]["loss"] = math.nan, math.inf
    numbers["rows"][2]["tasks"]["quiz/acc"]["value"] = math.nan
    (a / "curve.json").write_text(json.dumps(numbers))
    result = compare([a, b], tmp_path / "out")
    assert result["series"][0]["above_one"] == 3 / 8
    line = (tmp_path / "out/compare.csv").read_text().split("\n")[3]
    assert line == "one,one,angular,0,2,0.25,,"
