"""`layerprune compare`: run and sweep folders side by side, one figure and one table over the fraction of layers dropped."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from layerprune.curve import series
from layerprune.model.errors import UsageError
from layerprune.model.files import must_not_exist, new_folder, write_json, write_text
from layerprune.report import _columns
from layerprune.results import labels, manifest_part, read_run

_LONGEST_NAME = 120


def compare(runs: Sequence[str | Path], out: str | Path | None = None) -> dict[str, Any]:
    """Lay the curves of several run or sweep folders over one another, in a new folder.

    runs: two or more folders with a curve.json, in the order of the legend; their collapse.json and manifest.json are
    read where they are there. Models may differ in everything: depth is the fraction of their layers, loss is divided by
    ln V. Each `task/metric` that two runs share is compared, and the loss where two have it.

    out: by default runs/compare-<labels>. It gets compare.png, compare.svg, compare.csv (a line for each run, series and
    depth) and compare.json. Returns what compare.json holds, and `folder`: `runs` (label, model, folder, layers, and the
    whole model's loss and tasks), `tasks`, `loss` (whether it is compared), `series` (run, strategy, healed, and as
    fractions of the layers: the collapse of each task with its interval, the first depth with a loss above 1, the
    recommended drop) and `notes` (what was not measured alike). `format_compare` prints it.

    Raises UsageError and Refused.
    """
    from layerprune.overlay import plot_overlay

    if len(runs) < 2:
        raise UsageError(f"{len(runs)} run folder{'s' * (not runs)} given: comparing needs two or more")
    again = [str(folder) for folder, times in Counter(Path(folder).resolve() for folder in runs).items() if times > 1]
    if again:
        raise UsageError(f"{again[0]} is given twice: give each run folder once")
    found = [read_run(Path(folder)) for folder in runs]
    for run, label in zip(found, labels(found), strict=True):
        run["label"] = label
    tasks, loss = _measures(found)
    folder = Path(out) if out is not None else Path("runs") / _folder_name([run["label"] for run in found])
    must_not_exist(folder)
    result = {
        "runs": [_whole(run) for run in found],
        "tasks": tasks,
        "loss": loss,
        "series": [one for run in found for one in _series(run, tasks)],
        "notes": _notes(found, tasks, loss),
        "figures": ["compare.png", "compare.svg"],
    }
    with new_folder(folder) as made:
        plot_overlay(found, tasks, loss, made)
        write_text(made / "compare.csv", _csv(found))
        write_json(made / "compare.json", result)
    return {**result, "folder": str(folder)}


def format_compare(result: Mapping[str, Any]) -> str:
    """A row for each run and series, then what was not measured alike, and where everything is.

    Columns: layers and values of the whole model; for each task the fraction of layers dropped at which it collapses,
    with its interval; the fraction at which the loss passes 1; the recommended drop. `-` where there is none.
    """
    tasks = [(task, task.removesuffix("/acc")) for task in result["tasks"]]
    head = ["run", "series", "layers", *["loss"] * result["loss"], *(name for _, name in tasks)]
    head += [f"{name} collapses" for _, name in tasks] + ["loss passes 1"] * result["loss"] + ["drop"]
    lines = [tuple(head)]
    runs = {run["label"]: run for run in result["runs"]}
    for one in result["series"]:
        run = runs[one["run"]]
        cells = [one["run"], one["strategy"] + " healed" * one["healed"], str(run["layers"])]
        cells += [_value(run["loss"], 4)] * result["loss"] + [_value(run["tasks"].get(task)) for task, _ in tasks]
        cells += [_collapse_cell(one["collapse"].get(task)) for task, _ in tasks]
        cells += [_value(one["above_one"])] * result["loss"] + [_drop_cell(one["recommended"])]
        lines.append(tuple(cells))
    told = "collapse, loss and drop as fractions of the layers; loss and accuracy of the whole model"
    notes = ["", *(f"note: {note}" for note in result["notes"])] if result["notes"] else []
    where = f"{result['folder']}: compare.csv, compare.json, {', '.join(result['figures'])}"
    return "\n".join([f"{len(runs)} runs ({told})", "", *_columns(lines), *notes, "", where])


def _measured(run: Mapping[str, Any]) -> dict[str, None]:
    """The tasks of a run that have a value somewhere, in their order."""
    return {task: None for row in run["rows"] for task, score in row["tasks"].items() if score["value"] is not None}


def _measures(runs: Sequence[Mapping[str, Any]]) -> tuple[list[str], bool]:
    """The tasks that two runs or more share, and whether two have the loss. Raises UsageError where there is neither."""
    times = Counter(task for run in runs for task in _measured(run))
    tasks = [task for task in dict.fromkeys(task for run in runs for task in _measured(run)) if times[task] > 1]
    loss = sum(any(row["loss"] is not None for row in run["rows"]) for run in runs) > 1
    if not tasks and not loss:
        told = "; ".join(f"{run['label']} has {', '.join(list(_measured(run))[:3]) or 'no task'}" for run in runs[:3])
        raise UsageError(f"no two of the runs share a task or have a loss ({told}): measure them with the same --tasks")
    return tasks, loss


def _whole(run: Mapping[str, Any]) -> dict[str, Any]:
    row = next(row for row in run["rows"] if row["n"] == 0)
    values = {task: score["value"] for task, score in row["tasks"].items()}
    about = {"label": run["label"], "model": run["model"], "folder": str(run["folder"]), "layers": run["layers"]}
    return {**about, "loss": row["loss"], "tasks": values}


def _series(run: Mapping[str, Any], tasks: Sequence[str]) -> list[dict[str, Any]]:
    """What the table says of each series of a run; depths as fractions of its layers."""
    layers = run["layers"]
    made = []
    for name, rows in series(run["rows"]).items():
        found = run["collapse"].get(name)
        collapses: dict[str, Any] = {}
        for task in tasks:
            step = found["tasks"].get(task, {}).get("transition") if found else None
            if step and step["status"] == "collapses":
                keys = ("before", "first", "low", "high")
                collapses[task] = {key: None if step[key] is None else step[key] / layers for key in keys}
                collapses[task]["between"] = step["first"] - step["before"] > 1  # nobody measured there
        above = next((row["n"] for row in rows if row["loss"] is not None and row["loss"] > 1), None)
        advice = found["recommendation"] if found else None
        made.append(
            {
                "run": run["label"],
                "strategy": name.removesuffix(" healed"),
                "healed": name.endswith(" healed"),
                "collapse": collapses,
                "above_one": None if above is None else above / layers,
                "recommended": advice and {"status": advice["status"], "n": advice["n"], "fraction": advice["n"] / layers},
            }
        )
    return made


def _notes(runs: Sequence[Mapping[str, Any]], tasks: Sequence[str], loss: bool) -> list[str]:
    """What was not measured alike, as far as rows and manifests tell."""
    notes = []

    def told(what: str, values: Mapping[str, Any]) -> None:
        known = {label: value for label, value in values.items() if value is not None}
        if len({str(value) for value in known.values()}) > 1:
            notes.append(f"{what} ({', '.join(f'{label}: {value}' for label, value in known.items())})")

    for task in tasks:
        having = [run for run in runs if task in _measured(run)]
        first = {run["label"]: next(row["tasks"][task] for row in run["rows"] if task in row["tasks"]) for run in having}
        told(f"{task} is of other numbers of items", {label: score.get("n") for label, score in first.items()})
        shots = {run["label"]: {**manifest_part(run, "inputs"), **manifest_part(run, "asked")}.get("tasks") for run in having}
        known = {label: own.get(task.partition("/")[0]) for label, own in shots.items() if isinstance(own, dict)}
        told(f"{task} has other numbers of in-context examples", known)
    if loss:
        of = {run["label"]: manifest_part(run, "inputs").get("loss") for run in runs}
        for key, what in (("data", "other text"), ("length", "sequences of other lengths")):
            known = {label: own.get(key) for label, own in of.items() if isinstance(own, dict)}
            if key == "data":
                known = {label: str(value)[:8] for label, value in known.items()}
            told(f"loss is over {what}", known)
    parts = ("asked", "inputs")
    places = [(run["label"], part) for run in runs for part in (run["manifest"], *(manifest_part(run, name) for name in parts))]
    told("the cut recommended keeps another share", {label: part["keep"] for label, part in places if "keep" in part})
    notes += [f"{run['label']} is not finished" for run in runs if run["manifest"].get("finished") is False]
    return notes


def _csv(runs: Sequence[Mapping[str, Any]]) -> str:
    """Long format: a line for each row of each run, with every task that some run has; empty where it has not."""
    tasks = list(dict.fromkeys(task for run in runs for task in _measured(run)))
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["run", "model", "strategy", "healed", "n", "fraction", "loss", *tasks])
    for run in runs:
        for row in run["rows"]:
            values = [row["loss"], *((row["tasks"].get(task) or {}).get("value") for task in tasks)]
            head = [run["label"], run["model"], row["strategy"], int(row["healed"]), row["n"], f"{row['n'] / run['layers']:.6g}"]
            writer.writerow([*head, *("" if value is None else f"{value:.8g}" for value in values)])
    return file.getvalue()


def _folder_name(names: Sequence[str]) -> str:
    plain = [re.sub(r"[^A-Za-z0-9._]+", "-", label).strip("-") or "model" for label in names]
    return f"compare-{'-'.join(plain)}"[:_LONGEST_NAME].rstrip("-.")


def _value(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _collapse_cell(found: Mapping[str, Any] | None) -> str:
    if not found:
        return "-"
    if found["between"]:
        return f"{_value(found['before'])} to {_value(found['first'])}"
    if found["low"] is None:
        return _value(found["first"])
    return f"{_value(found['first'])} ({_value(found['low'])} to {'beyond' if found['high'] is None else _value(found['high'])})"


def _drop_cell(advice: Mapping[str, Any] | None) -> str:
    if not advice or advice["status"] not in ("cut", "no cut"):
        return "-" if not advice else advice["status"]
    return f"{advice['fraction']:.3f} (n = {advice['n']})" if advice["n"] else "0"
