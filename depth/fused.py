"""One kernel instead of many, on a GPU: what a probe computes of each state is bound by how often the state is read."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


@functools.cache
def fused(plain: Callable[..., torch.Tensor], kind: str) -> Callable[..., torch.Tensor]:
    """`plain` compiled for devices of a kind; itself on a CPU, and where nothing can be compiled.

    plain: a function of tensors (or None) with the same number of rows, which differs from call to call; their other
    dimensions are few, so the kernels are made for each.
    """
    if kind == "cpu":
        return plain
    compiled: Callable[..., torch.Tensor] | None = torch.compile(plain)

    def run(*given: Any) -> torch.Tensor:
        nonlocal compiled
        if compiled is None:
            return plain(*given)
        for tensor in given:
            if tensor is not None:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        try:
            return compiled(*given)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception:  # no compiler, no Triton: whatever the reason, the plain steps are right
            compiled = None
            return plain(*given)

    return run
