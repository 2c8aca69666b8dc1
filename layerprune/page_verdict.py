"""The verdict at the top of the page: how many layers can go, what that costs and saves, what would decide more."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from layerprune.eval.collapse import deepest_cliff
from layerprune.figures import number
from layerprune.model.cuts import describe_dropped, drop_count
from layerprune.page_words import NAMES, Facts, Row, count, fixed, percent, size, speed_of


def verdict_of(layers: int, own: Mapping[str, Sequence[Row]], collapse: Mapping[str, Any], evaluation: Row) -> Facts:
    """Headline, points (term and text) and the cut (strategy, n, healed) that they speak of, if any."""
    advice = {name: one["recommendation"] for name, one in collapse.get("series", {}).items() if name in own}
    deepest = max(advice, key=lambda name: (advice[name]["n"], advice[name]["likely"]), default=None)  # as curve.verdict
    keep = f"{100 * collapse.get('keep', 0.95):g} %"
    if deepest is not None and advice[deepest]["n"] > 0:
        found = advice[deepest]
        cut = _pick(own[deepest], found["n"])
        points: list[tuple[str, Any]] = [
            _drop(deepest, cut, layers),
            _cost(found, own[deepest][0], cut),
            _saving(own[deepest][0], cut, layers, evaluation),
        ]
        if found["likely"] > found["n"]:
            points.append(("Perhaps more", f"By the estimates alone, {found['likely']} layers. That promises nothing."))
        head = f"Drop {found['n']} of {layers} layers"
        return {"head": head, "points": [*points, *_left_out(found)], "cut": (deepest, found["n"])}
    spoken = [name for name, found in advice.items() if found["status"] in ("not decided", "no cut")]
    if not spoken:
        return _by_loss(layers, own, collapse, evaluation, advice)
    first = next((name for name in spoken if advice[name]["status"] == "not decided"), None)
    fate = "No measured cut keeps" if first is None else "Not decided: no cut is shown to keep"
    head = f"{fate} {keep} of the accuracy above chance"
    shown = first or spoken[0]
    points = [("Why", (f"{NAMES[shown]}: " if len(spoken) > 1 else "") + advice[shown]["why"])]
    likely = max(spoken, key=lambda name: advice[name]["likely"])
    n = advice[likely]["likely"]
    if first is not None and n > 0:
        cut = _pick(own[likely], n)
        points.append(("By the estimates alone", f"{n} of {layers} layers could go. That promises nothing."))
        points += [_drop(likely, cut, layers), _loss_cost(own[likely][0], cut), _saving(own[likely][0], cut, layers, evaluation)]
    elif first is not None:
        points.append(("By the estimates alone", "No depth measured keeps it either."))
    if first is not None:
        points.append(("To decide", _more_items(collapse["series"][first])))
    return {"head": head, "points": [*points, *_left_out(advice[spoken[0]])], "cut": (likely, n) if n and first else None}


def own_cut(evaluation: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Of a run: the cut that was asked for, before and after healing."""
    if "pruned" not in evaluation:
        return []
    whole, cut = evaluation["whole"], evaluation["pruned"]
    losses = [fixed(evaluation[name]["loss"]["normalised"], 4) for name in ("whole", "pruned", "healed") if name in evaluation]
    steps = ("whole", "cut", "healed")[: len(losses)]
    told = ", ".join(f"{loss} {step}" for loss, step in zip(losses, steps, strict=True))
    dropped = whole["layers"] - cut["layers"]
    less = percent(1 - cut["parameters"] / whole["parameters"], 1)
    return [("The cut of this run", f"{dropped} layers dropped, {less} fewer parameters; normalised loss {told}.")]


def _by_loss(layers: int, own: Mapping[str, Sequence[Row]], collapse: Row, evaluation: Row, advice: Mapping[str, Row]) -> Facts:
    why = next((found["why"] for found in advice.values()), "No task was measured.")
    points: list[tuple[str, Any]] = [("Why the loss", why)]
    rises = {
        name: one for name, one in collapse.get("series", {}).items()
        if name in own and len(own[name]) > 2 and one["loss"] and one["loss"]["to_n"] is not None
    }  # fmt: skip
    if not rises:
        flat = any(number(r["loss"]) is not None for rows in own.values() for r in rows if r["n"])
        head = "Not decided: no task above chance, and no sharpest rise of the loss" if flat else "Nothing to decide yet"
        points.append(("To decide", "Measure more depths, and tasks on which the whole model is above chance (--tasks)."))
        return {"head": head, "points": points, "cut": None}
    decide = ("To decide", "A loss says little of what a model still knows: measure tasks that the whole model can do (--tasks).")
    best = deepest_cliff(rises)
    if best is None:
        return {"head": "Not decided: the loss rises evenly, no cliff", "points": [*points, decide], "cut": None}
    n, beyond = rises[best]["loss"]["from_n"], rises[best]["loss"]["to_n"]
    cut, after = _pick(own[best], n), _pick(own[best], beyond)
    rise = f"From {n} to {beyond} layers dropped: {fixed(cut['loss'], 4)} to {fixed(after['loss'], 4)}."
    points.append(("Sharpest rise", rise))
    if n:
        points += [_drop(best, cut, layers), _loss_cost(own[best][0], cut), _saving(own[best][0], cut, layers, evaluation)]
    points.append(decide)
    head = f"By the loss alone: at most {n} of {layers} layers" if n else "By the loss alone: the first cut costs most"
    return {"head": head, "points": points, "cut": (best, n) if n else None}


def _pick(rows: Iterable[Row], n: int) -> Row:
    return next(r for r in rows if r["n"] == n)


def _drop(name: str, cut: Row, layers: int) -> tuple[str, Any]:
    strategy, _, healed = name.partition(" ")
    text = Markup("layers <code>{}</code> (0-based, the end not included): <code>--drop {} --strategy {}</code>{}")
    block = describe_dropped(tuple(cut["kept"]), layers)
    return "Drop", text.format(block, shortest_drop(cut["n"], layers), strategy, ", then heal" if healed else "")


def _cost(found: Row, whole: Row, cut: Row) -> tuple[str, Any]:
    rest = f" (the limiting one of {len(found['tasks'])} tasks above chance)" if len(found["tasks"]) > 1 else ""
    kept = (
        f"{found['limiting_task']}{rest} keeps {percent(found['retained'], 1)} of its accuracy above chance "
        f"(interval {percent(found['low'], 1)} to {percent(found['high'], 1)}). "
    )
    return "Costs", kept + _loss_cost(whole, cut)[1]


def _loss_cost(whole: Row, cut: Row) -> tuple[str, str]:
    if number(cut["loss"]) is None or number(whole["loss"]) is None:
        return "Costs", ""
    return "Costs", f"Normalised loss {fixed(whole['loss'], 4)} to {fixed(cut['loss'], 4)}."


def _saving(whole: Row, cut: Row, layers: int, evaluation: Row) -> tuple[str, str]:
    """Bytes and speed only where this very cut was written and measured."""
    parts = [f"{cut['n']} of {layers} layers"]
    parts.append(f"{_change(cut['parameters'], whole['parameters'])} parameters ({count(cut['parameters'])} stay)")
    made = evaluation.get("healed" if cut["healed"] else "pruned") or {}
    if made.get("layers") == layers - cut["n"]:
        parts.append(f"{_change(made['bytes'], evaluation['whole']['bytes'])} bytes ({size(made['bytes'])} stay)")
        fast, before = speed_of(made), speed_of(evaluation["whole"])
        if fast and before:
            parts.append(f"{before:.1f} to {fast:.1f} tokens/s when generating")
    return "Saves", "; ".join(parts) + "."


def _left_out(found: Row) -> list[tuple[str, Any]]:
    names = ", ".join(found["left_out"])
    return [("Says nothing of", f"{names}: the whole model is at chance there.")] if names else []


def _more_items(one: Mapping[str, Any]) -> str:
    """How many items would decide the depth that stopped the plateau: its interval narrows as 1 / sqrt(items)."""
    task = one["recommendation"]["limiting_task"]
    plateau = one["tasks"][task]["plateau"]
    text = "Measure more items (a larger --limit, or none)"
    stop = next((d for d in plateau["depths"] if d["n"] == plateau["first_not_kept"]), None)
    if stop is None or None in (stop["retained"], stop["low"], stop["high"]):
        return text + "."
    gap = stop["retained"] - plateau["share"]
    width = stop["retained"] - stop["low"] if gap > 0 else stop["high"] - stop["retained"]
    need = plateau["items"] * (width / gap) ** 2 if gap else math.inf
    if not plateau["items"] < need < 1e5:
        return text + "."
    rounded = float(f"{need:.2g}")
    fate = "show that it is kept" if gap > 0 else "show that it is not kept"
    return (
        f"{text}: if {stop['n']} dropped goes on keeping {percent(stop['retained'], 1)}, about {rounded:,.0f} of {task} instead "
        f"of {plateau['items']:,} would {fate}."
    )


def shortest_drop(n: int, layers: int) -> str:
    """The shortest --drop that gives n."""
    short = (f"{n / layers:.{digits}f}" for digits in range(1, 6))
    return next(text for text in short if 0.5 < float(text) * layers < layers - 0.5 and drop_count(float(text), layers) == n)


def _change(now: float, before: float) -> str:
    return f"{100 * (before - now) / before:.0f} % of the" if before else "–"
