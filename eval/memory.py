"""What fits in memory: budgets for a batch, and halves where a GPU says no."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from layerprune.model.errors import Refused
from layerprune.model.source import one_line

Row = TypeVar("Row")


def token_budget(device: str) -> int:
    """Tokens a batch, padding included; beyond it a batch gains no speed."""
    return 2048 if device == "cpu" else 16384


def logit_budget(device: str) -> int:
    """Bytes that a batch's float32 logits may take: 256 MiB on the CPU, 1 GiB on a GPU."""
    return 1 << (28 if device == "cpu" else 30)


def in_halves(rows: Sequence[Row], work: Callable[[Sequence[Row]], None]) -> int:
    """Do the work on all rows at once, or in halves (of halves ...) where a GPU is out of memory.

    Returns the rows of the largest part that fitted. Raises Refused when a single row does not fit.
    """
    import torch

    try:
        work(rows)
        return len(rows)
    except torch.cuda.OutOfMemoryError as error:
        if len(rows) == 1:
            raise Refused(f"not even one sequence at a time fits on the GPU beside the model: {one_line(error)}") from error
    # outside the handler, which would keep the tensors of the failed attempt alive
    torch.cuda.empty_cache()
    half = len(rows) // 2
    return max(in_halves(rows[:half], work), in_halves(rows[half:], work))
