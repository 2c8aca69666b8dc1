"""Ridge regression in constant memory: moments summed token by token, solved and judged afterwards."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch


class Moments:
    """What a linear map from features f (K numbers) to residuals e (D numbers) is fitted and judged by, in float64.

    Holds sum f f^T (K x K), sum e f^T (D x K), sum |e|^2 and the count of tokens: 8 K (K + D) bytes, whatever the
    number of tokens. Order and grouping of updates change nothing but rounding.
    """

    def __init__(self) -> None:
        self.gram_KK: Any = None
        self.cross_DK: Any = None
        self.energy = 0.0
        self.tokens = 0

    def update(self, features_NK: torch.Tensor, residuals_ND: torch.Tensor) -> None:
        """Add N tokens, of any floating type; computed where the features are (on the CPU for a device without float64)."""
        device = "cpu" if features_NK.device.type == "mps" else features_NK.device
        f_NK, e_ND = features_NK.to(device).double(), residuals_ND.to(device).double()
        if self.gram_KK is None:
            k, d = f_NK.shape[1], e_ND.shape[1]
            self.gram_KK = torch.zeros((k, k), dtype=torch.float64, device=device)
            self.cross_DK = torch.zeros((d, k), dtype=torch.float64, device=device)
        self.gram_KK.addmm_(f_NK.T, f_NK)
        self.cross_DK.addmm_(e_ND.T, f_NK)
        self.energy += e_ND.square().sum().item()
        self.tokens += len(f_NK)

    def solve(self, strength: float) -> torch.Tensor | None:
        """The D x K matrix A that minimises sum |A f - e|^2 + lambda |A|^2, lambda = strength x the mean of gram's diagonal.

        None where features are all zero, or so nearly dependent that this strength does not make them solvable.
        """
        penalty = strength * self.gram_KK.diagonal().mean()
        damped = self.gram_KK.clone()
        damped.diagonal().add_(penalty)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if int(failed):
            return None
        return torch.cholesky_solve(self.cross_DK.T, factor).T

    def error(self, map_DK: torch.Tensor) -> float:
        """sum |A f - e|^2 over the tokens seen, up to rounding of the order of 1e-16 of its terms."""
        fitted = (map_DK @ self.gram_KK * map_DK).sum() - 2 * (map_DK * self.cross_DK).sum()
        return self.energy + fitted.item()


@dataclass(frozen=True)
class Choice:
    """The map chosen on held-out tokens: None where none of them is better than no map at all (A = 0).

    error, before: held-out sum |A f - e|^2 with the map and without it.
    """

    map_DK: Any
    strength: float | None
    error: float
    before: float


def choose_ridge(fit: Moments, held: Moments, strengths: Iterable[float]) -> Choice:
    """Solve on `fit` with each strength, and take the one with the smallest error on `held`; never worse than no map."""
    best = Choice(None, None, held.energy, held.energy)
    for strength in strengths:
        solved = fit.solve(strength)
        if solved is not None:
            error = held.error(solved)
            if error < best.error:
                best = Choice(solved, strength, max(error, 0.0), held.energy)
    return best
