"""The loss over the vocabulary, a slice of positions at a time: full logits never exist.

The head is frozen, so all that the backward pass needs is the loss's gradient by x^(L). It is found in the forward pass,
slice by slice, and takes as much memory as x^(L) itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from layerprune.heal.packing import NO_LABEL

IGNORED = NO_LABEL
"""The label of a position that predicts nothing."""
SLICE_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 26}
"""Logits of a slice. On a CPU a small one stays in the allocator's reach; on a GPU a large one has fewer waits."""

Finish = Callable[[torch.Tensor, int, int], torch.Tensor]
"""Logits (rows, tokens, vocabulary) of a slice of x^(L), of that many rows and tokens."""


@dataclass(frozen=True)
class Pieces:
    """Rows and tokens of each slice of a batch; `streams`: x^(L) is (streams, batch, tokens, features)."""

    bounds: tuple[tuple[int, int, int, int], ...]
    streams: bool

    @staticmethod
    def cut(hidden: torch.Tensor, rows: int, tokens: int, vocab: int) -> Pieces:
        """Whole rows while they are short enough, else parts of one row."""
        most = max(1, SLICE_ELEMENTS["cpu" if hidden.device.type == "cpu" else "cuda"] // vocab)
        streams = hidden.dim() == 4 and tuple(hidden.shape[1:3]) == (rows, tokens)
        deep, wide = max(1, most // tokens), min(tokens, most)
        wide = -(-tokens // -(-tokens // wide))  # parts of equal size
        bounds = tuple(
            (b, min(b + deep, rows), t, min(t + wide, tokens)) for b in range(0, rows, deep) for t in range(0, tokens, wide)
        )
        return Pieces(bounds, streams)

    def take(self, tensor: torch.Tensor, at: tuple[int, int, int, int], state: bool = True) -> torch.Tensor:
        """One slice of a state, or of labels (batch, tokens)."""
        rows, tokens = slice(at[0], at[1]), slice(at[2], at[3])
        return tensor[:, rows, tokens] if state and self.streams else tensor[rows, tokens]


def next_token_loss(
    hidden: torch.Tensor,
    labels_BT: torch.Tensor,
    finish: Finish,
    vocab: int,
    teacher: torch.Tensor | None = None,
    kl_weight: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed loss in nats (with a gradient by `hidden`), and the summed next-token part of it alone (without).

    hidden: x^(L) before the final norm. labels_BT: int64, position t being predicted at t - 1; -100 is passed over.
    finish: the model's end, whose parameters are frozen. teacher: another model's x^(L) for the same end; then
    kl_weight * KL(teacher || student) over the vocabulary, in nats, is added at every position that predicts something.
    """
    shifted_BT = torch.full_like(labels_BT, IGNORED)
    shifted_BT[:, :-1] = labels_BT[:, 1:]
    return _NextToken.apply(hidden, shifted_BT, finish, vocab, teacher, kl_weight)


class _NextToken(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, labels_BT: torch.Tensor, finish: Finish, vocab: int, teacher: torch.Tensor | None,
        kl_weight: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        pieces = Pieces.cut(hidden, labels_BT.shape[0], labels_BT.shape[1], vocab)
        wanted = ctx.needs_input_grad[0]
        grad = torch.zeros_like(hidden) if wanted else None
        total = torch.zeros(2, dtype=torch.float64, device=hidden.device)
        for at in pieces.bounds:
            part = pieces.take(hidden, at).detach().requires_grad_(wanted)
            labels_N = pieces.take(labels_BT, at, state=False).flatten()
            shape = at[1] - at[0], at[3] - at[2]
            with torch.set_grad_enabled(wanted):
                logits = finish(part, *shape)
            rows_NV = logits.detach().flatten(0, 1)
            if teacher is None:
                nats, slope_NV = _fused(rows_NV.device.type)(rows_NV, labels_N, wanted)
                total += nats
            else:
                with torch.no_grad():
                    aim_NV = finish(pieces.take(teacher, at), *shape).flatten(0, 1)
                nats, slope_NV = _fused_kl(rows_NV.device.type)(rows_NV, labels_N, aim_NV, kl_weight, wanted)
                total += nats
            if grad is not None:
                (found,) = torch.autograd.grad(logits, part, slope_NV.view_as(logits).to(logits.dtype))
                pieces.take(grad, at).copy_(found)
        ctx.save_for_backward(grad)
        loss, nats = total[0].float(), total[1].float()
        ctx.mark_non_differentiable(nats)
        return loss, nats

    @staticmethod
    def backward(ctx: Any, by_loss: torch.Tensor, by_nats: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        (grad,) = ctx.saved_tensors
        return grad.mul_(by_loss), None, None, None, None, None


def _plain(rows_NV: torch.Tensor, labels_N: torch.Tensor, wanted: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, next-token part) in float64, and the gradient of the sum by the logits, in the logits' dtype."""
    counts_N = labels_N != IGNORED
    at_N = labels_N.clamp(min=0).unsqueeze(1)
    logits_NV = rows_NV.float()
    log_sum_N = torch.logsumexp(logits_NV, 1)
    nats = ((log_sum_N - logits_NV.gather(1, at_N).squeeze(1)) * counts_N).sum(dtype=torch.float64)
    if not wanted:
        return torch.stack([nats, nats]), rows_NV
    columns_V = torch.arange(rows_NV.shape[1], device=rows_NV.device)
    slope_NV = (logits_NV - log_sum_N.unsqueeze(1)).exp() - (columns_V == at_N).float()
    return torch.stack([nats, nats]), (slope_NV * counts_N.unsqueeze(1)).to(rows_NV.dtype)


def _with_kl(
    rows_NV: torch.Tensor, labels_N: torch.Tensor, aim_NV: torch.Tensor, weight: float, wanted: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `_plain`, with weight * KL(aim || rows) in the loss."""
    counts_N = labels_N != IGNORED
    at_N = labels_N.clamp(min=0).unsqueeze(1)
    log_p_NV = torch.log_softmax(rows_NV.float(), 1)
    log_q_NV = torch.log_softmax(aim_NV.float(), 1)
    q_NV = log_q_NV.exp()
    nats = (-log_p_NV.gather(1, at_N).squeeze(1) * counts_N).sum(dtype=torch.float64)
    apart = ((q_NV * (log_q_NV - log_p_NV)).sum(1) * counts_N).sum(dtype=torch.float64)
    sums = torch.stack([nats + weight * apart, nats])
    if not wanted:
        return sums, rows_NV
    columns_V = torch.arange(rows_NV.shape[1], device=rows_NV.device)
    slope_NV = log_p_NV.exp() * (1 + weight) - (columns_V == at_N).float() - weight * q_NV
    return sums, (slope_NV * counts_N.unsqueeze(1)).to(rows_NV.dtype)


@functools.cache
def _fused(kind: str) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    return _compiled(_plain, kind, lambda some, at: (some, at, True))


@functools.cache
def _fused_kl(kind: str) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    return _compiled(_with_kl, kind, lambda some, at: (some, at, some, 1.0, True))


def _compiled(plain: Callable[..., Any], kind: str, some: Callable[..., tuple[Any, ...]]) -> Callable[..., Any]:
    """As few kernels as a compiler makes of it on a GPU; in plain steps elsewhere, and where nothing can be compiled."""
    if kind != "cuda":
        return plain
    try:
        compiled = torch.compile(plain, dynamic=True)
        compiled(*some(torch.zeros((3, 5), device=kind, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.long, device=kind)))
        return compiled
    except Exception:  # no compiler, no Triton: whatever the reason, the plain steps are right
        return plain
