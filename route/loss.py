"""The routers' loss: focal, with classes weighted by their effective numbers (arXiv 2510.12773, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

GAMMA, BETA = 2.0, 0.999


def class_weights(counts: Sequence[int], beta: float = BETA) -> torch.Tensor:
    """alpha_c = (1 - beta) / (1 - beta^n_c) of classes with n_c examples each, scaled to sum to their number; float32.

    With beta 0.999 a class counts as scarce below some thousand examples only: above that the weights are almost equal. A
    class without examples has weight 0, and the others share the sum.
    """
    count_C = torch.tensor(counts, dtype=torch.float64)
    raw_C = torch.where(count_C > 0, (1 - beta) / (1 - beta ** count_C.clamp(min=1)), 0.0)
    return (raw_C * len(counts) / raw_C.sum()).float()


def focal_loss(logits: torch.Tensor, labels: torch.Tensor, alpha_C: torch.Tensor, gamma: float = GAMMA) -> torch.Tensor:
    """The mean of -alpha_y (1 - p_y)^gamma ln p_y over all layers and items, in nats.

    logits (..., C), labels (...) in 0 .. C-1. gamma 0 and alpha 1 make it the cross-entropy.
    """
    logp = logits.float().log_softmax(dim=-1).gather(-1, labels[..., None])[..., 0]
    miss = -torch.expm1(logp)
    return (-alpha_C.to(logits.device)[labels] * miss**gamma * logp).mean()
