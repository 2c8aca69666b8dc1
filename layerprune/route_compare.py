"""Routing against static cuts of the same mean depth: the same items, and an interval for the difference.

Shapes: N items of a task, R draws. Accuracies of several tasks are averaged with equal weights, and so are their depths.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
_DRAWS, _DRAWN = 2000, 1 << 20


@dataclass(frozen=True)
class Difference:
    """Accuracy along routed paths less that of a static cut as deep: difference, and its interval low .. high.

    depth: mean layers, of both; between: the layers of the two cuts between which the static accuracy lies on a straight line
    (equal where the depth is that of one). deeper: the routed paths are longer than the model, which is compared then.
    winner: "routing", "static", or "not decided" where the interval holds 0.
    """

    difference: float
    low: float
    high: float
    depth: float
    between: tuple[int, int]
    deeper: bool
    winner: str


def depths_around(depth: float, layers: int, margin: int = 0) -> set[int]:
    """The whole numbers of layers, 1 .. L, between which a mean depth lies, and `margin` more on either side."""
    low, high = _neighbours(depth, layers)
    return {n for n in range(low - margin, high + margin + 1) if 1 <= n <= layers}


def _neighbours(depth: float, layers: int) -> tuple[int, int]:
    # a mean of whole numbers that is whole may come out a little beside it
    depth = round(min(max(depth, 1.0), float(layers)), 9)
    return math.floor(depth), math.ceil(depth)


def static_items(by_depth: Mapping[int, Sequence[int]], depth: float, layers: int) -> np.ndarray:
    """Of each item the answer (0 .. 1) at a mean depth, linear between those of the two cuts nearest to it."""
    low, high = _neighbours(depth, layers)
    share = 0.0 if low == high else min(max(depth, low), high) - low
    low_N, high_N = (np.asarray(by_depth[n], dtype=float) for n in (low, high))
    found: np.ndarray = low_N * (1 - share) + high_N * share
    return found


def compare(
    routed: Mapping[str, Sequence[int]], static: Mapping[str, Mapping[int, Sequence[int]]], depth: float, layers: int, seed: int = 0
) -> Difference:
    """Compare at one depth. routed: by task the items that are right; static: by task and by layers that stay.

    The interval is the bootstrap's, by percentiles: within each task whole items are drawn again, an item's answers together.
    """
    gaps = {task: np.asarray(right, dtype=float) - static_items(static[task], depth, layers) for task, right in routed.items()}
    low, high = _interval(list(gaps.values()), seed)
    mean = float(np.mean([gap_N.mean() for gap_N in gaps.values()]))
    winner = "routing" if low > 0 else "static" if high < 0 else "not decided"
    return Difference(mean, low, high, depth, _neighbours(depth, layers), round(depth, 9) > layers, winner)


def _interval(gaps: Sequence[np.ndarray], seed: int) -> tuple[float, float]:
    rng = np.random.default_rng(seed)
    mean_R = np.zeros(_DRAWS)
    for gap_N in gaps:
        step = max(1, _DRAWN // len(gap_N))
        for start in range(0, _DRAWS, step):
            part = slice(start, min(start + step, _DRAWS))
            mean_R[part] += gap_N[rng.integers(len(gap_N), size=(part.stop - start, len(gap_N)))].mean(axis=1) / len(gaps)
    low, high = np.quantile(mean_R, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


_STRATEGIES = {"angular": "cut by angular distance", "last": "cut by last n"}


def sentence(found: Difference, dial: str, strategy: str) -> str:
    """How routing does at this depth beside a static cut, in one sentence."""
    other = f"the model {_STRATEGIES[strategy]}"
    low, high = found.between
    if found.deeper:
        depth = f"with {found.depth:.2f} layers on average, more than the model has,"
        other = "the whole model"
    else:
        depth = f"at {found.depth:.2f} layers" + ("" if low == high else f" (the cut interpolated between {low} and {high})")
    text = f"{depth} routing ({dial}) gives {right_answers(found.difference)} {other} ({interval(found.low, found.high)})."
    return f"Not decided: {text}" if found.winner == "not decided" else text[0].upper() + text[1:]


def right_answers(difference: float) -> str:
    """A difference of accuracies as words: `1.1 points fewer right answers than`."""
    points = round(100 * difference, 1)
    if points == 0:
        return "as many right answers as"
    return f"{abs(points):.1f} points {'more' if points > 0 else 'fewer'} right answers than"


def interval(low: float, high: float) -> str:
    return f"{100 * CONFIDENCE:g} % interval {in_points(low)} to {in_points(high)}"


def in_points(share: float) -> str:
    """A difference of shares in points, with its sign: one digit after the point, more where only these tell it from 0."""
    points = round(100 * share, 3)
    if points == 0:
        return "0.0"
    return f"{points:+.1f}" if abs(points) >= 0.05 else f"{points:+.1g}"
