"""The page of a run or a sweep: report.html, one file that needs no network and can be sent around."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from layerprune.curve import healings, scores, series
from layerprune.figures import number
from layerprune.model.cuts import describe_dropped
from layerprune.model.files import read_json, write_text
from layerprune.page_healing import healing_of
from layerprune.page_pictures import depth_panel, heat_map
from layerprune.page_settings import command_of, settings_of
from layerprune.page_verdict import own_cut, verdict_of
from layerprune.page_verdict import shortest_drop as _fraction
from layerprune.page_words import NAMES, Facts, Row, count, fixed, percent, size, speed_of, whole_number


def write_report(folder: Path) -> Path:
    """Write report.html into a run or sweep folder, from the files in it; returns its path.

    curve.json is needed; manifest, collapse, rank and eval.json are used where they are there. The same files give the same
    bytes. Raises Refused for a missing curve.json and for files that are no JSON.
    """
    path = folder / "report.html"
    write_text(path, render(folder))
    return path


def render(folder: Path) -> str:
    """The page as text. Every string in it is escaped; what is not measured is left out or shown as a dash."""
    return fill("report.html.j2", _facts(folder))


def fill(template: str, facts: Facts) -> str:
    """A template of this package, filled in and escaped; StrictUndefined's error where it asks for a fact that is not there."""
    env = Environment(
        loader=PackageLoader("layerprune", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    env.filters |= {"fixed": fixed, "percent": percent, "count": count, "size": size, "whole": whole_number}
    return env.get_template(template).render(**facts) + "\n"


def _facts(folder: Path) -> Facts:
    def read(name: str) -> Any:
        return read_json(folder / name) if (folder / name).exists() else {}

    curve, collapse, manifest, rank, evaluation = (
        read_json(folder / "curve.json"), *map(read, ("collapse.json", "manifest.json", "rank.json", "eval.json"))
    )  # fmt: skip
    layers, rows = curve["layers"], curve["rows"]
    own = series(rows)
    names = list(own)
    tasks = list(dict.fromkeys(task for r in rows for task in r["tasks"]))
    answer = manifest.get("answer", {}).get("series")  # of a search: the page speaks of what it found
    spoken = {answer: own[answer]} if answer in own else own
    verdict = verdict_of(layers, spoken, collapse, evaluation)
    verdict["points"] += own_cut(evaluation)
    panels = [depth_panel(layers, own, task, collapse) for task in tasks] + [depth_panel(layers, own, None, collapse)]
    panels = [panel for panel in panels if panel["lines"]]
    healing = healing_of(healings(folder, curve), manifest)
    heat = heat_map(rank) if rank.get("distance") else None
    given = manifest.get("given", {})
    return {
        "model": str(given.get("model") or curve["model"]),
        "layers": layers,
        "names": NAMES,
        "series": names,
        "verdict": verdict,
        "summary": [_summary(name, own[name], collapse) for name in names if name in collapse.get("series", {})],
        "confidence": collapse.get("confidence", 0.95),
        "steps": _steps(evaluation),
        "panels": panels,
        "healing": healing,
        "heat": heat,
        "tasks": tasks,
        "table": [_line(name, r, layers) for name in names for r in own[name] if r["n"] or name == names[0]],
        "settings": settings_of(manifest),
        "command": command_of(manifest, layers),
        "serve": _serve(folder, given.get("model") or curve["model"], layers, verdict["cut"]),
        "data": {
            "layers": layers,
            "names": [NAMES[name] for name in names],
            "blocks": [{r["n"]: describe_dropped(tuple(r["kept"]), layers) for r in own[name]} for name in names],
            "panels": [panel["data"] for panel in [*panels, *(healing["panels"] if healing else [])]],
            "heat": heat["data"] if heat else None,
        },
    }


def _summary(name: str, rows: Sequence[Row], collapse: Mapping[str, Any]) -> Facts:
    one = collapse["series"][name]
    found, loss = one["recommendation"], one["loss"] or {}
    rises = f"{loss['from_n']} to {loss['to_n']}" if loss.get("to_n") is not None and len(rows) > 2 else None
    counted = found["status"] != "no task above chance"
    return {
        "series": NAMES[name],
        "n": found["n"] if counted else None,
        "likely": found["likely"] if counted else None,
        "limit": found["limiting_task"],
        "kept": f"{percent(found['low'], 1)} to {percent(found['high'], 1)}" if found["n"] else None,
        "rises": rises,
        "above": loss.get("above_one"),
    }


def _steps(evaluation: Mapping[str, Any]) -> list[Facts]:
    """The written checkpoints of a run: one column each."""
    titles = {"whole": "whole", "pruned": "after cutting", "healed": "after healing"}
    return [
        {
            "title": titles[name], "layers": found["layers"], "parameters": found["parameters"], "bytes": found["bytes"],
            "loss": number((found.get("loss") or {}).get("normalised")), "speed": speed_of(found),
            "tasks": scores({"tasks": found.get("tasks")}),
        }
        for name, found in evaluation.items() if name in titles
    ]  # fmt: skip


def _line(name: str, row: Row, layers: int) -> Facts:
    block = describe_dropped(tuple(row["kept"]), layers)
    return {**row, "series": NAMES[name] if row["n"] else "whole model", "block": block if row["n"] else None}


def _serve(folder: Path, model: str, layers: int, cut: tuple[str, int] | None) -> Facts:
    """The checkpoints of the folder, and where they can be served; without any, the commands that make one."""
    found = [name for name in ("healed", "pruned") if (folder / name).is_dir()][:1]
    if not found:
        advised = f"heal/{cut[0].partition(' ')[0]}-{cut[1]}/healed" if cut else ""
        every = sorted(str(p.relative_to(folder)) for p in folder.glob("heal/*/healed"))
        found = sorted(every, key=lambda name: name != advised) if advised in every or not cut else []
    note = None
    if found and (folder / found[0] / "layerprune.json").exists():
        note = read_json(folder / found[0] / "layerprune.json").get("serving")
    if found:
        return {"checkpoint": found[0], "others": found[1:], "make": [], "note": note}
    drop, strategy = (_fraction(cut[1], layers), cut[0].partition(" ")[0]) if cut else ("F", "angular")
    make = [f"layerprune prune --model {shlex.quote(str(model))} --drop {drop} --strategy {strategy} --out cut"]
    return {"checkpoint": "healed", "others": [], "make": [*make, "layerprune heal --model cut --out healed"], "note": None}
