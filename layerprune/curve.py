"""The curve of a model: a row for each depth, its files (curve.json, curve.csv, items.json, collapse.json), its verdict."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from layerprune.eval.collapse import accuracy_interval, analyse
from layerprune.model.cuts import Kept, runs
from layerprune.model.files import read_json, write_json, write_text
from layerprune.model.plan import find_stack, split_name
from layerprune.model.tensors import read_checkpoint

CONFIDENCE = 0.95


def scores(measured: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Each `task/metric` of one model: value, stderr, n, chance with where it comes from, and its 95 % interval.

    The interval is Wilson's over the items, None where the value is no mean of right and wrong answers.
    """
    found = {}
    for row in measured["tasks"]["table"] if measured["tasks"] else []:
        name = f"{row['task']}/{row['metric']}"
        items = (measured["tasks"].get("items") or {}).get(name)
        low, high = accuracy_interval(items, CONFIDENCE) if items else (None, None)
        chance, source = row["chance"], "choices"
        if row["majority"] is not None and (chance is None or row["majority"] > chance):
            chance, source = row["majority"], "majority class"
        found[name] = {
            "value": row["value"], "stderr": row["stderr"], "n": row["n"], "chance": chance,
            "chance_from": None if chance is None else source, "low": low, "high": high,
        }  # fmt: skip
    return found


def items(measured: Mapping[str, Any]) -> dict[str, str]:
    """Which items of each `task/metric` are right: a character 1 or 0 an item."""
    found = (measured["tasks"] or {}).get("items") or {}
    return {name: "".join(map(str, correct)) for name, correct in found.items()}


def row(layers: int, strategy: str, kept: Kept, healed: bool, measured: Mapping[str, Any], parameters: int) -> dict[str, Any]:
    """One row of the curve, with its items under `items` (they go into a file of their own)."""
    n = layers - len(kept)
    return {
        "strategy": strategy,
        "n": n,
        "fraction": n / layers,
        "healed": healed,
        "kept": list(kept),
        "parameters": parameters,
        "loss": None if measured["loss"] is None else measured["loss"]["normalised"],
        "tasks": scores(measured),
        "items": items(measured),
    }


def layer_parameters(folder: Path, layers: int) -> tuple[int, list[int]]:
    """Parameters of a stored checkpoint, all and those of each layer."""
    stored = read_checkpoint(folder)
    stack = find_stack(stored, layers)
    each = [0] * layers
    for name, tensor in stored.items():
        parts = split_name(name)
        if parts is not None and parts[0] == stack and parts[1] < layers:
            each[parts[1]] += tensor.numel
    return sum(tensor.numel for tensor in stored.values()), each


def series(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Rows by `angular`, `last`, `angular healed`, `last healed`, by depth; each begins with the whole model."""
    rows = list(rows)
    whole = [r for r in rows if r["n"] == 0][:1]
    found: dict[str, list[Mapping[str, Any]]] = {}
    for healed in (False, True):
        for strategy in ("angular", "last"):
            own = [r for r in rows if r["n"] and r["strategy"] == strategy and r["healed"] == healed]
            if own:
                found[strategy + " healed" * healed] = whole + sorted(own, key=lambda r: r["n"])
    return found


def collapse(layers: int, rows: Sequence[Mapping[str, Any]], keep: float) -> dict[str, Any]:
    """Where each series collapses, and what to drop: `layerprune.eval.collapse.analyse`, with a verdict over the series.

    rows: with their items. Only tasks count whose items are known at every depth of a series; the others (perplexities, graded
    answers) are listed under `not_counted`.
    """
    data, left, by_name = {}, {}, series(rows)
    for name, own in by_name.items():
        tasks = {}
        for task in own[0]["items"]:
            if all(task in r["items"] and len(r["items"][task]) == len(own[0]["items"][task]) for r in own):
                score = own[0]["tasks"][task]
                tasks[task] = {
                    "correct": [[int(c) for c in r["items"][task]] for r in own],
                    "chance": score["chance"] or 0.0,
                    "chance_from": score["chance_from"] or "no choices",
                }
        left[name] = sorted({task for r in own for task in r["tasks"]} - set(tasks))
        losses = [r["loss"] for r in own]
        data[name] = {"drops": [r["n"] for r in own], "losses": None if None in losses[:1] else losses, "tasks": tasks}
    found = analyse(layers, data, keep, CONFIDENCE)
    for name, one in found["series"].items():
        one["not_counted"] = left[name]
        _only_writable(one["recommendation"], by_name[name])
    found["verdict"] = verdict(found)
    return found


def _only_writable(advice: dict[str, Any], own: Sequence[Mapping[str, Any]]) -> None:
    """Take a recommendation back to the deepest cut that can be written as a checkpoint."""
    possible = [r["n"] for r in own if r.get("writable", True)]
    for key in ("n", "likely"):
        back = max(n for n in possible if n <= advice[key])
        if key == "n" and back < advice["n"]:
            advice["why"] += f" That depth cannot be had as a checkpoint; {back} is the deepest before it that can."
        advice[key] = back


def verdict(found: Mapping[str, Any]) -> dict[str, Any] | None:
    """The series whose recommendation drops most layers, of equals the one whose estimates go deepest; None without any.

    Each series is tested by itself: the best of k series is too deep up to k times as often as one alone.
    """
    best = None
    for name, one in found["series"].items():
        advice = one["recommendation"]
        if best is None or (advice["n"], advice["likely"]) > (best["n"], best["likely"]):
            best = {"series": name, **advice, "fraction": advice["n"] / found["layers"]}
    return best


def write_curve(folder: Path, model: str, layers: int, rows: Sequence[Mapping[str, Any]], keep: float) -> dict[str, Any]:
    """Write curve.json, curve.csv, items.json and collapse.json; returns what curve.json holds."""
    plain = [{key: value for key, value in r.items() if key != "items"} for r in rows]
    curve = {"model": model, "layers": layers, "rows": plain}
    write_json(folder / "items.json", [{k: r[k] for k in ("strategy", "n", "healed", "items")} for r in rows])
    write_json(folder / "collapse.json", collapse(layers, rows, keep))
    write_text(folder / "curve.csv", to_csv(plain))
    write_json(folder / "curve.json", curve)
    return curve


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of a folder's curve, with their items."""
    known = {(r["strategy"], r["n"], r["healed"]): r["items"] for r in read_json(folder / "items.json")}
    rows = read_json(folder / "curve.json")["rows"]
    return [{**r, "items": known[r["strategy"], r["n"], r["healed"]]} for r in rows]


def healings(folder: Path, curve: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The healed checkpoints that lie in a folder of a run, sweep or search, by strategy and depth.

    Each has what its layerprune.json says of the cut and its healing (`strategy`, `n`, `kept`, `healing`, `bridge`; the last
    two {} where there is none), and the normalised losses of the `whole` model, its `cut` before and after (`healed`), None
    where the curve does not know them.
    """
    losses = {(r["strategy"] if r["n"] else "", r["n"], r["healed"]): r["loss"] for r in curve["rows"]}
    found = []
    for path in [folder / "healed", *folder.glob("heal/*/healed")]:
        record = read_json(path / "layerprune.json") if (path / "layerprune.json").exists() else {}
        about = {key: record.get(key) or {} for key in ("healing", "bridge")}
        if "kept" not in record or not any(about.values()):
            continue
        n, strategy = curve["layers"] - len(record["kept"]), record["strategy"]
        known = {"whole": ("", 0, False), "cut": (strategy, n, False), "healed": (strategy, n, True)}
        measured = {key: losses.get(place) for key, place in known.items()}
        found.append({"strategy": strategy, "n": n, "kept": record["kept"], **about, **measured})
    return sorted(found, key=lambda one: (one["strategy"], one["n"]))


def trained_losses(one: Mapping[str, Any]) -> list[tuple[float, float]]:
    """(tokens trained, training loss in nats per token) of one of `healings`."""
    return _against_tokens(one["healing"], (one["healing"].get("losses") or {}).get("curve"))


def held_out_losses(one: Mapping[str, Any]) -> list[tuple[float, float]]:
    """(tokens trained, normalised loss on held-out documents) of one of `healings`, as it was measured during training."""
    return _against_tokens(one["healing"], one["healing"].get("held_out"))


def _against_tokens(healing: Mapping[str, Any], entries: Sequence[Sequence[Any]] | None) -> list[tuple[float, float]]:
    known = [(step, value) for step, value in entries or [] if isinstance(value, int | float) and math.isfinite(value)]
    return [(step * healing["tokens"] / max(1, healing["steps"]), value) for step, value in known]


def draw_curve(folder: Path, curve: Mapping[str, Any], ranking: dict[str, Any] | None) -> list[str]:
    """Draw a folder's curve with its collapse, its ranking and its healings; returns the files' names in the folder."""
    from layerprune.distances import plot_distances
    from layerprune.plots import plot_curves, plot_healing

    files = plot_curves(dict(curve), folder / "figures", curve["model"], read_json(folder / "collapse.json"))
    files += plot_healing(healings(folder, curve), folder / "figures", curve["model"])
    if ranking is not None:
        files += plot_distances(ranking, folder / "figures", curve["model"])
    return [str(file.relative_to(folder)) for file in files]


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each row; `kept` as ranges such as 0-11 20-31 (both ends included), a column for each task/metric."""
    tasks = list(dict.fromkeys(task for r in rows for task in r["tasks"]))
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["strategy", "n", "healed", "kept", "fraction", "loss", *tasks])
    for r in rows:
        values = [r["tasks"].get(task, {}).get("value") for task in tasks]
        head = [r["strategy"], r["n"], int(r["healed"]), ranges(r["kept"]), f"{r['fraction']:.6g}"]
        writer.writerow([*head, *("" if v is None else f"{v:.8g}" for v in (r["loss"], *values))])
    return file.getvalue()


def ranges(kept: Sequence[int]) -> str:
    """Layers as ranges with both ends: 0-11 20-31."""
    return " ".join(f"{a}-{b - 1}" if b - a > 1 else str(a) for a, b in runs(kept))
