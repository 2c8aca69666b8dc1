"""Budgets for a batch."""

from __future__ import annotations


def token_budget(device: str) -> int:
    """Tokens a batch, padding included; beyond it a batch gains no speed."""
    return 2048 if device == "cpu" else 16384


def logit_budget(device: str) -> int:
    """Bytes that a batch's float32 logits may take: 256 MiB on the CPU, 1 GiB on a GPU."""
    return 1 << (28 if device == "cpu" else 30)


def state_budget(device: str) -> int:
    """Bytes that the hidden states of all branches may take at once: 1 GiB on the CPU, 4 GiB on a GPU."""
    return 1 << (30 if device == "cpu" else 32)
