"""The result of a run as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from layerprune.eval.collapse import deepest_cliff

_NAMES = {"whole": "whole", "pruned": "after cutting", "healed": "after healing"}


def format_run(result: Mapping[str, Any]) -> str:
    """A table with one column for the whole, the cut and the healed model, then where everything is."""
    rows = result["rows"]
    lines: list[tuple[str, ...]] = [("", *(_NAMES[row["model"]] for row in rows))]
    lines.append(("layers", *(str(row["layers"]) for row in rows)))
    lines.append(("parameters", *(_count(row["parameters"]) for row in rows)))
    lines.append(("bytes", *(_size(row["bytes"]) for row in rows)))
    lines.append(("normalised loss", *(f"{row['loss']:.4f}" for row in rows)))
    for name, score in rows[0]["tasks"].items():
        chance = "" if score["chance"] is None else f" (chance {score['chance']:.3g})"
        lines.append((name.removesuffix("/acc") + chance, *(_score(row["tasks"].get(name)) for row in rows)))
    speeds = [row["tokens_per_second"] for row in rows]
    if any(speed is not None for speed in speeds):  # a model that is streamed generates nothing
        lines.append(("tokens/s, generating", *("-" if speed is None else f"{speed:.1f}" for speed in speeds)))
    dropped = len(rows) > 1 and result["layers"] - len(result["kept"])
    head = (
        f"{result['model']}: {dropped} of {result['layers']} layers dropped, {result['dropped']} "
        f"({result['strategy']}, angular distance {result['distance']:.4f})"
    )
    pictures = ", ".join(name for name in result["figures"] if name.endswith(".png"))
    return "\n".join(
        [head, "", *_columns(lines), "", *format_collapse(result["collapse"]), ""]
        + [f"checkpoint  {result['checkpoint']}", f"report      {result['folder']}/report.html"]
        + [f"figures     {result['folder']}: {pictures}"]
    )


def format_sweep(result: Mapping[str, Any]) -> str:
    """A row for each depth measured, then where each series collapses, what to drop, and where everything is."""
    tasks = list(dict.fromkeys(task for row in result["rows"] for task in row["tasks"]))
    head = ("strategy", "n", "fraction", "loss", *(task.removesuffix("/acc") for task in tasks))
    lines: list[tuple[str, ...]] = [head]
    for row in result["rows"]:
        name = ("whole" if row["n"] == 0 else row["strategy"]) + " healed" * row["healed"]
        loss = "-" if row["loss"] is None else f"{row['loss']:.4f}"
        values = (row["tasks"].get(task, {}).get("value") for task in tasks)
        lines.append((name, str(row["n"]), f"{row['fraction']:.3f}", loss, *("-" if v is None else f"{v:.3f}" for v in values)))
    pictures = ", ".join(name for name in result["figures"] if name.endswith(".png"))
    return "\n".join(
        [f"{result['model']}: {result['layers']} layers", "", *_columns(lines), "", *format_collapse(result["collapse"]), ""]
        + [f"report      {result['folder']}/report.html", f"curve       {result['folder']}: curve.csv, curve.json, {pictures}"]
    )


def format_find(result: Mapping[str, Any]) -> str:
    """The answer, what it costs, which depths were healed, and why the search stopped."""
    n, layers = result["n"], result["layers"]
    goal = f"{100 * result['keep']:g} % of the accuracy above chance"
    head = f"{result['model']}: {n} of {layers} layers can go, healed ({result['strategy']}), and {goal} stays"
    if n == 0:
        head = f"{result['model']}: no cut, healed ({result['strategy']}), is shown to keep {goal}"
    lines = [head, "", "healed and measured, in this order:"]
    lines += [f"  n = {depth} {'passes' if passed else 'does not pass'}. {why}" for depth, passed, why in result["tested"]]
    lines += [f"stopped because {result['why']}; assumed: once a depth does not pass, none deeper does"]
    if n == 0:
        lines.append("what is not shown to be kept may only need more items (--limit) to be shown")
    lines += ["", f"report      {result['folder']}/report.html"]
    return "\n".join(lines + ([f"checkpoint  {result['folder']}/{result['checkpoint']}"] if n else []))


def format_collapse(found: Mapping[str, Any]) -> list[str]:
    """Where each series collapses, and the recommendation, as lines."""
    lines = []
    without = not any(one["tasks"] or one.get("not_counted") for one in found["series"].values())
    for name, one in found["series"].items():
        parts = []
        for task, data in one["tasks"].items():
            step = data["transition"]
            if step["status"] == "collapses":
                interval = f" ({step['low']} to {'beyond' if step['high'] is None else step['high']})"
                where = f"at n = {step['first']}{interval if step['low'] else ''}"
                if step["first"] - step["before"] > 1:  # nobody measured between
                    where = f"between n = {step['before']} and {step['first']}"
                parts.append(f"{task.removesuffix('/acc')} collapses {where}")
            else:
                parts.append(f"{task.removesuffix('/acc')}: {step['status']}")
        loss = one["loss"]
        if loss and loss["to_n"] is not None:
            past = f", passes 1 at n = {loss['above_one']}" if loss["above_one"] is not None else ""
            parts.append(f"loss rises most from n = {loss['from_n']} to {loss['to_n']}{past}")
        if parts:
            lines.append(f"{name}: " + "; ".join(parts))
        if not without:  # else it is said once, below
            lines.append(f"  {one['recommendation']['why']}")
        if one.get("not_counted"):
            lines.append(f"  not counted, since no item is right or wrong there: {', '.join(one['not_counted'])}")
    best = found["verdict"]
    if best is not None:
        why = best["why"].removesuffix(".") + "; give --tasks A,B to measure some." if without else best["why"]
        lines += [""] if lines else []
        lines += [_by_loss(why, found) if best["status"] == "no task above chance" else _advice(best, found["keep"])]
    return lines


def _advice(best: Mapping[str, Any], keep: float) -> str:
    goal = f"keep {100 * keep:g} % of the accuracy above chance"
    likely = f"by the estimates alone {best['likely']} layers could go ({best['series']})"
    if best["n"]:
        return f"recommended: drop {best['n']} layers ({best['series']}) to {goal}" + f"; {likely}" * (best["likely"] > best["n"])
    return f"recommended: no cut is shown to {goal}" + f"; {likely}, which more items would show" * (best["likely"] > 0)


def _by_loss(why: str, found: Mapping[str, Any]) -> str:
    """Where no task speaks, what the page says of the loss too."""
    name = deepest_cliff(found["series"])
    if name is not None:
        n = found["series"][name]["loss"]["from_n"]
        return (f"by the loss alone: at most {n} of {found['layers']} layers ({name}). " if n else "no recommendation: ") + why
    rises = any(one["loss"] and one["loss"]["to_n"] is not None for one in found["series"].values())
    return "no recommendation: " + "the loss rises evenly, no cliff. " * rises + why


def _columns(lines: list[tuple[str, ...]]) -> list[str]:
    """Lines of cells as text: the first column left, the others right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return [
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))).rstrip()
        for line in lines
    ]


def _score(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return "-"
    spread = "" if score["stderr"] is None else f" ± {score['stderr']:.3f}"
    return f"{score['value']:.3f}{spread}"


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"


def _size(number: int) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"
