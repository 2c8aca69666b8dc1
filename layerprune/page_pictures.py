"""The pictures of the page: lines, marks and cells in the units of a picture's viewBox."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from layerprune.curve import held_out_losses, trained_losses
from layerprune.figures import LOSS_TOP, number, short, spread_apart
from layerprune.page_words import Facts, Row

_METRICS = {"acc": "accuracy", "acc_norm": "accuracy (normalised)"}
_VIRIDIS = "440154 482878 3e4989 31688e 26828e 1f9e89 35b779 6ece58 b5de2b fde725".split()
_SHADES = 32


WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM, STRIP = 440, 290, 44, 14, 42, 11


def depth_panel(layers: int, own: Mapping[str, Sequence[Row]], task: str | None, collapse: Mapping[str, Any]) -> Facts:
    """One picture against the fraction dropped: a task, or the loss (None). `data` is what the tooltip says."""
    points: dict[str, list[tuple[int, list[float | None]]]] = {}
    for name, rows in own.items():
        values = [(r["n"], r["tasks"].get(task, {}) if task else {"value": r["loss"]}) for r in rows]
        numbers = [(n, [number(v.get(key)) for key in ("value", "low", "high")]) for n, v in values]
        points[name] = [(n, v) for n, v in numbers if v[0] is not None]
        if len(rows) == 2:  # one depth: a line to it would show what nobody measured
            points[name] = [p for p in points[name] if p[0]] if name.endswith("healed") else points[name]
    about: Mapping[str, Any] = next((r["tasks"][task] for rows in own.values() for r in rows if task in r["tasks"]), {})
    depths = sorted({n for found in points.values() for n, _ in found})
    top, most = 10 + STRIP * len(own), max([*depths, 1])
    seen = [v for found in points.values() for _, value in found for v in value if v is not None] or [1.0]
    chance = number(about.get("chance"))
    unit = task is not None and min(seen) >= 0 and max(seen) <= 1
    ticks = [0, 0.25, 0.5, 0.75, 1] if unit else _ticks(min(0.0, *seen), max(*seen, 0.1))
    low, high = ticks[0], ticks[-1]

    def x(n: float) -> float:
        return round(LEFT + 6 + (WIDTH - LEFT - RIGHT - 12) * n / most, 1)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - (HEIGHT - BOTTOM - top) * (value - low) / (high - low), 1)

    every = max(1, math.ceil(7 * len(depths) / (WIDTH - LEFT - RIGHT)))
    lines = []
    for at, (name, found) in enumerate(points.items()):
        if not found:
            continue
        band = [(x(n), y(b), y(c)) for n, (_, b, c) in found if b is not None and c is not None]
        place = [(x(n), y(value[0] or 0.0)) for n, value in found]
        edge = [(a, c) for a, _, c in band] + [(a, b) for a, b, _ in reversed(band)]
        lines.append(
            {
                "style": name.replace(" ", "-"),
                "line": _path(place),
                "marks": _path(place[::every]),
                "band": _path(edge) if len(band) > 1 else "",
                "bars": "".join(f"M{_n(a)} {_n(b)}V{_n(c)}" for a, b, c in band) if len(band) == 1 else "",
                "strip": _strip(collapse, name, task, x, 8 + STRIP * at) if len(own[name]) > 2 else None,
            }
        )
    step = _step(most, 7, whole=True)
    title, _, metric = (task or "normalised loss").partition("/")
    sub = _METRICS.get(metric, metric) if task else "nats a token / ln V; 1 is a uniform guess"
    if task and about.get("n"):
        sub += f", {about['n']:,} items"
    if chance is not None:
        sub += f"; chance {chance:.3g}" + (f" ({about['chance_from']})" if about.get("chance_from") == "majority class" else "")
    line = chance if task else 1 if low <= 1 <= high else None
    return {
        "title": title,
        "sub": sub,
        "label": f"{title} against the fraction of layers dropped",
        "axis": ("drop", "layers"),
        "top": top,
        "lines": lines,
        "level": y(line) if line is not None and low <= line <= high else None,
        "yticks": [(y(v), f"{v:g}") for v in ticks],
        "xticks": [(x(n), n, f"{100 * n / layers:.0f} %") for n in range(0, most + 1, step)],
        "data": {
            "n": depths,
            "x": [x(n) for n in depths],
            "v": [[_rounded(dict(found).get(n)) for n in depths] for found in points.values()],
        },
    }


def healing_panel(found: Sequence[Facts], held_out: bool) -> Facts:
    """One picture against the tokens trained: the training loss, or the held-out loss with those of the written checkpoints."""
    points = [(held_out_losses if held_out else trained_losses)(one) for one in found]
    drawn = [(one, own) for one, own in zip(found, points, strict=True) if own]
    known = {key: [number(one[key]) if held_out else None for one, _ in drawn] for key in ("whole", "cut", "healed")}
    whole = next((v for v in known["whole"] if v is not None), None)
    seen = [v for _, own in drawn for _, v in own] + [v for values in known.values() for v in values if v is not None]
    top = max(LOSS_TOP, 1.2 * (whole or 0)) if held_out else math.inf
    ticks = _ticks(min(seen), max(min(max(seen), top), min(seen) + 0.01))
    low, high = ticks[0], ticks[-1]
    most = max(one["healing"]["tokens"] for one, _ in drawn)
    room = 30 if held_out and len(drawn) > 1 else 0  # for the depth at each line's end

    def x(tokens: float) -> float:
        return round(LEFT + 6 + (WIDTH - LEFT - RIGHT - 12 - room) * tokens / most, 1)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - (HEIGHT - BOTTOM - 10) * (value - low) / (high - low), 1)

    ends = spread_apart([-y(own[-1][1]) for _, own in drawn], 13)
    lines = []
    for (one, own), before, after, end in zip(drawn, known["cut"], known["healed"], ends, strict=True):
        place = [(x(t), y(v)) for t, v in own]
        lines.append(
            {
                "style": one["style"], "colour": one["colour"], "line": _path(place),
                "dots": "".join(f"M{_n(a)} {_n(b)}h0" for a, b in place) if held_out else "",
                "before": None if before is None or before > high else y(before),
                "after": None if after is None or after > high else y(after),
                "end": (place[-1][0] + 8, round(4 - end, 1), one["n"]) if room else None,
            }
        )  # fmt: skip
    steps = sorted({t for _, own in drawn for t, _ in own})
    above = []
    for key, name in (("cut", "the cut"), ("healed", "the healed checkpoint")):
        far = [(one["n"], v) for (one, _), v in zip(drawn, known[key], strict=True) if v is not None and v > high]
        above += [f"{name}, " + " and ".join(f"{v:.2f} with n\u00a0=\u00a0{n}" for n, v in far)] * bool(far)
    title, sub = ("held-out loss", "while training, nats a token / ln V") if held_out else ("training loss", "nats a token")
    if not held_out and any((one["healing"].get("settings") or {}).get("distil") for one, _ in drawn):
        sub += ", the distillation's part included"
    return {
        "title": title,
        "sub": sub + (f"; above the picture: {'; '.join(above)}" if above else ""),
        "label": f"{title} against the tokens trained",
        "axis": ("tokens", ""),
        "top": 10,
        "lines": lines,
        "level": None if whole is None else y(whole),
        "yticks": [(y(v), f"{v:g}") for v in ticks],
        "xticks": [(x(t), t, short(t)) for t in _ticks(0, most) if t <= most],
        "data": {
            "x": [x(t) for t in steps],
            "heads": [f"{t:,.0f} tokens trained" for t in steps],
            "names": [one["name"] for one, _ in drawn],
            "v": [[[round(v, 5), None, None] if (v := dict(own).get(t)) is not None else None for t in steps] for _, own in drawn],
        },
    }


def _strip(collapse: Mapping[str, Any], name: str, task: str | None, x: Any, y: int) -> Facts | None:
    """Above the picture: the collapse point and its interval, or where the loss rises most."""
    one = collapse.get("series", {}).get(name)
    if one is None:
        return None
    if task is None:
        loss = one["loss"] or {}
        if loss.get("to_n") is None:
            return None
        return {"path": f"M{_n(x(loss['from_n']))} {y - 3}v6m0-3H{_n(x(loss['to_n']))}m0-3v6", "at": None, "y": y}
    step = one["tasks"].get(task, {}).get("transition", {})
    if step.get("low") is None:
        return None
    end = WIDTH - 4
    path = f"M{_n(x(step['low']))} {y - 3}v6m0-3H"
    path += f"{end}l-5-3m5 3l-5 3" if step["high"] is None else f"{_n(x(step['high']))}m0-3v6"
    return {"path": path, "at": None if step["first"] is None else _n(x(step["first"])), "y": y}


def heat_map(rank: Mapping[str, Any]) -> Facts:
    """Distances as cells, a path for each shade; each row rescaled, as in figures/distance-heatmap."""
    layers, distance = rank["layers"], rank["distance"]
    top = 10
    cell = (WIDTH - LEFT - RIGHT) / max(1, layers)
    tall = (HEIGHT + 40 - BOTTOM - top) / max(1, len(distance))
    shades: dict[int, list[str]] = {}
    for n, row in enumerate(distance, 1):
        known = [d for d in map(number, row) if d is not None]
        # the embedding is so far from everything that it would leave one colour for all the rest
        low, high = (min(known), max(known[1:] or known)) if known else (0, 0)
        for start, d in enumerate(map(number, row)):
            if d is None:
                continue
            shade = min(_SHADES - 1, round((_SHADES - 1) * (d - low) / (high - low))) if high > low else 0
            shades.setdefault(shade, []).append(f"M{start} {len(distance) - n}h1v1h-1z")
    best = {int(n): start for n, start in rank.get("best", {}).items()}
    trace = [(LEFT + (best[n] + 0.5) * cell, top + (len(distance) - n + 0.5) * tall) for n in sorted(best)]
    step = _step(layers, 8, whole=True)
    return {
        "height": HEIGHT + 40,
        "top": top,
        "cell": cell,
        "tall": tall,
        "shades": [(_shade(s / (_SHADES - 1)), "".join(shades[s])) for s in sorted(shades)],
        "trace": _path(trace),
        "dot": max(0.9, min(3.0, cell / 3)),
        "dots": [(_n(a), _n(b)) for a, b in trace],
        "xticks": [(_n(LEFT + (n + 0.5) * cell), n) for n in range(0, layers, step)],
        "yticks": [(_n(top + (len(distance) - n + 0.5) * tall + 4), n) for n in range(step, len(distance) + 1, step)],
        "ramp": ",".join(f"#{c}" for c in _VIRIDIS),
        "data": {
            "d": [_rounded([number(d) for d in row]) for row in distance],
            "best": best,
            "box": [LEFT, top, cell, tall],
        },
    }


def _shade(t: float) -> str:
    """Viridis at t in [0, 1], straight between its tenths."""
    place = t * (len(_VIRIDIS) - 1)
    at = min(int(place), len(_VIRIDIS) - 2)
    a, b = (bytes.fromhex(_VIRIDIS[i]) for i in (at, at + 1))
    return "#" + bytes(round(p + (q - p) * (place - at)) for p, q in zip(a, b, strict=True)).hex()


def _path(points: Iterable[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{_n(a)} {_n(b)}" for a, b in points)


def _step(span: float, most: int, whole: bool = False) -> Any:
    """The smallest step 1, 2, 5, 10, ... (or a tenth, ...) that takes at most so many to cover the span."""
    ten = 10.0 ** math.floor(math.log10(span / most))
    step = next(ten * k for k in (1, 2, 5, 10) if ten * k * most >= span * (1 - 1e-9))
    return max(1, round(step)) if whole else step


def _ticks(low: float, high: float) -> list[float]:
    step = _step(high - low, 5)
    return [round(k * step, 10) for k in range(math.floor(low / step), math.ceil(high / step - 1e-9) + 1)]


def _rounded(values: Sequence[float | None] | None) -> list[float | None] | None:
    return None if values is None else [None if v is None else round(v, 5) for v in values]


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
