"""What the model would say if it ended at layer l: the logit lens (arXiv 2512.14064, P2)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from layerprune.model.data import TokenBatch, batches
from layerprune.model.decoder import Decoder
from layerprune.model.errors import Refused
from layerprune.model.layerwise import Batch, Layerwise, State
from layerprune.model.memory import in_halves

TOP = 5
"""Predictions whose overlap is counted (the paper's K)."""
SLICE = {"cpu": 1 << 22, "cuda": 1 << 26}
"""Logits of a slice of positions."""
HELD = {"cpu": 1 << 28, "cuda": 1 << 31}
"""Bytes that one batch's states of all depths may take."""


class LensSum:
    """Accumulates over real tokens, by tap l = 0..L-1, x^(l) being the input of layer l (0: the embedding).

    kl: KL(lens || final) in nats, the paper's direction; kl_final: KL(final || lens), the tuned lens's. overlap: share of the
    lens's top 5 that are among the final top 5, in [0, 1]; top1: share of tokens whose first choice is the final one.
    """

    names = ("kl", "kl_final", "overlap", "top1")

    def __init__(self, layers: int) -> None:
        self.total_4L = torch.zeros(len(self.names), layers, dtype=torch.float64)
        self.tokens = 0

    def update(self, sums_4L: torch.Tensor, tokens: int) -> None:
        self.total_4L += sums_4L.double().cpu()
        self.tokens += tokens

    def merge(self, other: LensSum) -> None:
        self.total_4L += other.total_4L
        self.tokens += other.tokens

    def result(self) -> dict[str, list[float]]:
        """Each value's mean over tokens, by layer."""
        mean_4L = self.total_4L / self.tokens
        return {name: mean_4L[i].tolist() for i, name in enumerate(self.names)}


def lens_probe(
    decoder: Decoder,
    sequences: list[list[int]],
    *,
    max_tokens: int | None = None,
    pad_id: int = 0,
    progress: Callable[[int], None] = lambda rows: None,
) -> LensSum:
    """The logit lens at every depth over tokenised documents; every real token counts.

    One pass through the layers; at each depth the model's own end (final norm, head, scaling, soft-capping) on the state.
    The decoder must be one that the layerwise pass serves exactly (`exact_branches`). Raises Refused for logits that are not
    finite, and where one document does not fit.
    """
    layerwise = Layerwise(decoder)
    total = LensSum(len(decoder))
    def add(part: Any, batch: TokenBatch) -> None:
        if len(part) < len(batch.rows):
            again = [sequences[batch.rows[row]] for row in part]
            (batch,) = batches(again, sum(map(len, again)) * len(again), pad_id)
        total.merge(_one_batch(layerwise, batch))

    for batch in batches(sequences, max_tokens or token_budget(decoder), pad_id):
        in_halves(range(len(batch.rows)), functools.partial(add, batch=batch))
        progress(len(batch.rows))
    if not torch.isfinite(total.total_4L).all():
        raise Refused("the logits are not a number: the weights are broken or overflow in this dtype (try --dtype float32)")
    return total


@torch.no_grad()
def _one_batch(layerwise: Layerwise, batch: TokenBatch) -> LensSum:
    compare: Any = None
    found, waiting = LensSum(len(layerwise)), []
    for part in slices(layerwise, batch):
        compare = compare or _fused(part.final_NV.device.type)
        top_NK = part.final_NV.topk(TOP).indices
        sums = []
        for lens_NV in part.lenses():
            own_NK = lens_NV.topk(TOP).indices
            both = (own_NK.unsqueeze(2) == top_NK.unsqueeze(1)).sum(dtype=torch.float64) / TOP
            first = (own_NK[:, 0] == top_NK[:, 0]).sum(dtype=torch.float64)
            sums.append(torch.stack([*compare(lens_NV, part.final_NV), both, first]))
        waiting.append((torch.stack(sums, dim=1), len(part.row_N)))
    for sums_4L, tokens in waiting:  # the device is waited for once a batch
        found.update(sums_4L, tokens)
    return found


@dataclass(frozen=True)
class Slice:
    """Some real positions of a batch: their final logits, and those of the lens, one depth after another.

    row_N, position_N: where the N positions lie in the batch. final_NV: the model's logits there.
    """

    row_N: torch.Tensor
    position_N: torch.Tensor
    final_NV: torch.Tensor
    _batch: Batch
    _states: list[State]

    def lenses(self) -> Iterator[torch.Tensor]:
        """The lens's logits (N, V) of x^(0), ..., x^(L-1)."""
        for state in self._states[:-1]:
            yield self._batch.logits(state, self.row_N, self.position_N)


@torch.no_grad()
def slices(layerwise: Layerwise, batch: TokenBatch) -> Iterator[Slice]:
    """All real positions of a batch, as many at a time as `SLICE` logits hold; the batch's states of all depths are held."""
    made = layerwise.begin(batch.ids_BT, batch.mask_BT)
    states: list[State] = [made.start()]
    for index in range(len(layerwise)):
        states.append(made.step(index, states[-1]))
    kind = "cpu" if states[-1].hidden.device.type == "cpu" else "cuda"
    mask_BT = torch.ones_like(batch.ids_BT) if batch.mask_BT is None else batch.mask_BT
    row_P, position_P = mask_BT.nonzero(as_tuple=True)
    vocab = layerwise.decoder.model.get_input_embeddings().weight.shape[0]
    width = batch.ids_BT.shape[1]
    # whole rows of positions at a time, as `Batch.logits` hands them over
    each = max(1, SLICE[kind] // vocab // width) * width
    for at in range(0, len(row_P), each):
        row_N, position_N = row_P[at : at + each], position_P[at : at + each]
        yield Slice(row_N, position_N, made.logits(states[-1], row_N, position_N), made, states)


def token_budget(decoder: Decoder) -> int:
    """Tokens of a batch whose states of all depths stay within `HELD` bytes."""
    kind = "cpu" if decoder.device.type == "cpu" else "cuda"
    features = decoder.model.get_input_embeddings().weight.shape[-1]
    most = HELD[kind] // ((len(decoder) + 1) * features * (4 if kind == "cpu" else 2))
    return max(1, min(most, 2048 if kind == "cpu" else 16384))


def _divergences(lens_NV: torch.Tensor, final_NV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed KL(lens || final) and KL(final || lens), float64, in nats."""
    a, b = lens_NV.float(), final_NV.float()
    log_p = a - torch.logsumexp(a, 1, keepdim=True)
    log_q = b - torch.logsumexp(b, 1, keepdim=True)
    apart = log_p - log_q
    return (log_p.exp() * apart).sum(dtype=torch.float64), (log_q.exp() * -apart).sum(dtype=torch.float64)


@functools.cache
def _fused(kind: str) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """As few kernels as a compiler makes of it on a GPU; the plain steps elsewhere, and where nothing can be compiled."""
    if kind != "cuda":
        return _divergences
    try:
        compiled = torch.compile(_divergences, dynamic=True)
        compiled(*[torch.zeros((3, 7), device=kind, dtype=torch.bfloat16)] * 2)
        return compiled
    except Exception:  # no compiler, no Triton: whatever the reason, the plain steps are right
        return _divergences


