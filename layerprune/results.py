"""Finished run folders read back: curve, collapse and manifest, checked, and a distinct name for each run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from layerprune.model.errors import Refused, UsageError
from layerprune.model.files import read_json


def read_run(folder: Path) -> dict[str, Any]:
    """A finished run or sweep: `folder`, `model`, `layers` and `rows` of its curve.json; `collapse`, the series of its
    collapse.json, and `manifest`, each {} where there is none.

    Numbers that are not a number become None: not measured. Raises UsageError for a folder that is no run, Refused for a
    file that is broken.
    """
    if not (folder / "curve.json").is_file():
        what = "holds no curve.json" if folder.is_dir() else "is a file" if folder.exists() else "does not exist"
        raise UsageError(f"{folder} {what}: give the folder of a finished `layerprune run` or `layerprune sweep`")
    curve = read_json(folder / "curve.json")
    fault = _curve_fault(curve)
    if fault:
        raise Refused(f"{folder / 'curve.json'} is not a curve of layerprune ({fault}): make the run again")
    collapse = read_json(folder / "collapse.json") if (folder / "collapse.json").exists() else {"series": {}}
    if not _is_collapse(collapse):
        raise Refused(f"{folder / 'collapse.json'} is not a collapse of layerprune: make the run again or remove the file")
    manifest = read_json(folder / "manifest.json") if (folder / "manifest.json").exists() else {}
    if not isinstance(manifest, dict):
        raise Refused(f"{folder / 'manifest.json'} is not the manifest of a run: make the run again or remove the file")
    return {
        "folder": folder,
        "model": curve["model"],
        "layers": curve["layers"],
        "rows": [_cleaned(row) for row in curve["rows"]],
        "collapse": collapse["series"],
        "manifest": manifest,
    }


def _curve_fault(curve: Any) -> str | None:
    """What is wrong with the content of a curve.json, None where nothing is."""
    if not isinstance(curve, dict) or not isinstance(curve.get("model"), str) or not curve["model"]:
        return "it names no model"
    layers, rows = curve.get("layers"), curve.get("rows")
    if not _is_count(layers) or layers == 0:
        return f"layers is {layers!r}"
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        return "it has no rows"
    for at, row in enumerate(rows):
        n, tasks = row.get("n"), row.get("tasks")
        if not _is_count(n) or n >= layers:
            return f"n is {n!r} in row {at}"
        if row.get("strategy") not in ("angular", "last") or not isinstance(row.get("healed"), bool):
            return f"row {at} says {row.get('strategy')!r} and {row.get('healed')!r} for strategy and healed"
        if "loss" not in row or not _is_value(row["loss"]):
            return f"loss is {row.get('loss')!r} in row {at}"
        if not isinstance(tasks, dict) or not all(isinstance(s, dict) and _is_value(s.get("value", "")) for s in tasks.values()):
            return f"tasks of row {at} have no values"
    return None if any(row["n"] == 0 for row in rows) else "the whole model is missing"


def _cleaned(row: Mapping[str, Any]) -> dict[str, Any]:
    scores = {task: {**score, "value": _known(score["value"])} for task, score in row["tasks"].items()}
    return {**row, "loss": _known(row["loss"]), "tasks": scores}


def _known(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_value(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _is_collapse(found: Any) -> bool:
    """Whether all that is used of a collapse.json is there."""
    try:
        for one in found["series"].values():
            one["recommendation"]["status"], one["recommendation"]["n"] + 0
            for task in one["tasks"].values():
                step = task["transition"]
                if step["status"] == "collapses":
                    step["first"] + 0, (step["low"] or 0) + 0, (step["high"] or 0) + 0
    except (KeyError, TypeError, AttributeError):
        return False
    return True


def labels(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """A distinct name for each run: its model, with what differs among the runs of that model, else with its folder."""
    made: list[str] = []
    for run in runs:
        same = [_facts(other) for other in runs if other["model"] == run["model"]]
        own = _facts(run)
        differ = [key for key in own if len({facts[key] for facts in same if key in facts}) > 1]
        made.append(_joined(run["model"], [own[key] for key in differ]))
    for name in (_last_part, str):
        times = Counter(made)
        made = [
            label if times[label] == 1 else _joined(run["model"], [name(run["folder"])])
            for label, run in zip(made, runs, strict=True)
        ]
    return made


def _last_part(folder: Path) -> str:
    return folder.resolve().name


def _joined(model: str, parts: Sequence[str]) -> str:
    return f"{model} ({', '.join(parts)})" if parts else model


def _facts(run: Mapping[str, Any]) -> dict[str, str]:
    """What may tell two runs of a model apart, in words."""
    rows = [row for row in run["rows"] if row["n"]]
    facts = {
        "layers": f"{run['layers']} layers",
        "strategy": " and ".join(s for s in ("angular", "last") if any(row["strategy"] == s for row in rows)) or "not cut",
        "healed": "healed" if any(row["healed"] for row in rows) else "not healed",
    }
    heal = manifest_part(run, "inputs").get("heal") or manifest_part(run, "asked").get("heal_settings")
    data = manifest_part(run, "given").get("heal_data")
    for key, value in heal.items() if isinstance(heal, dict) and facts["healed"] == "healed" else []:
        if key == "data":  # a fingerprint; the file's name says more
            facts[key] = f"data {Path(data).name}" if isinstance(data, str) else f"data {str(value)[:8]}"
        elif value is not None:
            facts[key] = f"{key.replace('_', ' ')} {'+'.join(map(str, value)) if isinstance(value, list) else value}"
    return facts


def manifest_part(run: Mapping[str, Any], name: str) -> dict[str, Any]:
    part = run["manifest"].get(name)
    return part if isinstance(part, dict) else {}
