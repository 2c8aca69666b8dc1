"""Effective depth: how many layers until the prediction stands, by three metrics (arXiv 2512.14064's notebooks)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

KL_SHARE = 0.5
"""The share of the largest KL below which the lens counts as arrived."""
OVERLAP = 0.3
"""The overlap of the top 5 above which it does."""


def by_cosine(residual: Mapping[str, Sequence[float | None]]) -> int | None:
    """The last l at which the mean of the three cosines is below 0 and at l + 1 no longer: erasing ends, amplifying begins.

    Where a layer has no parts the layer's own cosine stands alone. None where the sign never changes so.
    """
    names = ("cos_att", "cos_mlp", "cos_layer")
    mean = []
    for values in zip(*(residual[name] for name in names), strict=True):
        known = [v for v in values if v is not None]
        mean.append(sum(known) / len(known))
    return max((i for i in range(len(mean) - 1) if mean[i] < 0 <= mean[i + 1]), default=None)


def by_kl(kl: Sequence[float], share: float = KL_SHARE, reference: bool = False) -> int | None:
    """The first l from which KL(lens || final) stays below `share` of its largest value. None where it never does.

    reference: the first l at all, as the notebooks have it; a single dip right after the embedding then counts as
    arrival (their 0.07 of one model).
    """
    limit = share * max(kl)
    below = [value < limit for value in kl]
    if reference:
        return next((i for i, low in enumerate(below) if low), None)
    return next((i for i in range(len(kl)) if all(below[i:])), None)


def by_overlap(overlap: Sequence[float], threshold: float = OVERLAP, reference: bool = False) -> int | None:
    """The first l from which the overlap of the top 5 stays above `threshold`; `reference`: the first l at all."""
    above = [value > threshold for value in overlap]
    if reference:
        return next((i for i, high in enumerate(above) if high), None)
    return next((i for i in range(len(overlap)) if all(above[i:])), None)


def effective_depth(
    residual: Mapping[str, Sequence[float | None]], lens: Mapping[str, Sequence[float]], reference: bool = False
) -> dict[str, dict[str, Any]]:
    """`cos`, `kl` and `overlap`: the layer (0-based) and its ratio (l + 1) / L; None where a metric gives no layer."""
    layers = len(lens["kl"])
    found = {
        "cos": by_cosine(residual),
        "kl": by_kl(lens["kl"], reference=reference),
        "overlap": by_overlap(lens["overlap"], reference=reference),
    }
    return {name: {"layer": at, "ratio": None if at is None else (at + 1) / layers} for name, at in found.items()}
