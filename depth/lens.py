"""What the model would say if it ended at layer l: the logit lens (arXiv 2512.14064, P2)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from layerprune.depth.fused import fused
from layerprune.model.data import TokenBatch, batches
from layerprune.model.decoder import Decoder
from layerprune.model.errors import Refused
from layerprune.model.layerwise import Batch, Layerwise, State
from layerprune.model.memory import in_halves

TOP = 5
"""Predictions whose overlap is counted (the paper's K)."""
SLICE = {"cpu": 1 << 22, "cuda": 1 << 28}
"""Logits of a slice of positions. Each slice and depth is a call of the model, in which a GPU waits for the CPU: few of them."""
CACHED = 1 << 17
"""Logits that a CPU compares at a time: what is made of them stays in its cache (4 times quicker)."""
HELD = {"cpu": 1 << 28, "cuda": 1 << 31}
"""Bytes that one batch's states of all depths may take."""


class LensSum:
    """Accumulates over real tokens, by tap l = 0..L-1, x^(l) being the input of layer l (0: the embedding).

    kl: KL(lens || final) in nats, the paper's direction; kl_final: KL(final || lens), the tuned lens's. overlap: share of the
    lens's top 5 that are among the final top 5, in [0, 1]; top1: top-1 agreement, the share of positions at which
    the lens's top-1 token is the model's.
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
    found, waiting = LensSum(len(layerwise)), []
    for part in slices(layerwise, batch):
        compare, final = comparison(part.final_NV.device.type), final_of(part.final_NV)
        sums = [compare(lens_NV, *final) for lens_NV in part.lenses()]
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
    # where the states are: each copy of an index to a GPU would wait for all that the GPU has still to do
    row_P, position_P = (index.to(states[-1].hidden.device) for index in mask_BT.nonzero(as_tuple=True))
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


Final = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""The model's own logits (N, V), their largest (N, 1), the logarithm of the sum of e^(logit - largest) (N, 1), the top 5 (N, 5)."""


def final_of(final_NV: torch.Tensor) -> Final:
    """What is the same for all depths."""
    most_N1 = final_NV.amax(1, keepdim=True).float()
    size_N1 = (final_NV.float() - most_N1).exp_().sum(1, keepdim=True).log_()
    if final_NV.device.type == "cpu":
        return final_NV, most_N1, size_N1, final_NV.topk(TOP).indices
    # one after the other, the lower index of equal ones first, as `_by_rank` counts; half precision has many equal ones
    left_NV, top = final_NV.clone(), []
    for _ in range(TOP):
        top.append(left_NV.argmax(1, keepdim=True))
        left_NV.scatter_(1, top[-1], -torch.inf)
    return final_NV, most_N1, size_N1, torch.cat(top, 1)


def _divergences(lens_NV: torch.Tensor, final_NV: torch.Tensor, most_N1: torch.Tensor, size_N1: torch.Tensor) -> list[torch.Tensor]:
    """Summed KL(lens || final) and KL(final || lens), float64, in nats."""
    # but for the normalisers, as log_q: their difference stays exact where p is large
    log_p = lens_NV.float() - lens_NV.amax(1, keepdim=True)
    p = log_p.exp()
    p_N1 = p.sum(1, keepdim=True)
    log_q = final_NV.float() - most_N1
    apart = log_p.sub_(log_q)
    between_N1 = p_N1.log() - size_N1
    to_final_N1 = p.mul_(apart).sum(1, keepdim=True) / p_N1 - between_N1
    to_lens_N1 = between_N1 - log_q.sub_(size_N1).exp_().mul_(apart).sum(1, keepdim=True)
    return [to_final_N1.sum(dtype=torch.float64), to_lens_N1.sum(dtype=torch.float64)]


def _by_top(
    lens_NV: torch.Tensor, final_NV: torch.Tensor, most_N1: torch.Tensor, size_N1: torch.Tensor, top_NK: torch.Tensor
) -> torch.Tensor:
    """The four sums of `LensSum` (4,), float64; the lens's top 5 by a top k, which a CPU is quick at."""
    total_4 = torch.zeros(len(LensSum.names), dtype=torch.float64)
    rows = max(1, CACHED // lens_NV.shape[1])
    for at in range(0, len(lens_NV), rows):
        lens, final, most, size, top = (x[at : at + rows] for x in (lens_NV, final_NV, most_N1, size_N1, top_NK))
        own = lens.topk(TOP).indices
        both = (own.unsqueeze(2) == top.unsqueeze(1)).sum(dtype=torch.float64) / TOP
        first = (own[:, 0] == top[:, 0]).sum(dtype=torch.float64)
        total_4 += torch.stack([*_divergences(lens, final, most, size), both, first])
    return total_4


def _by_rank(
    lens_NV: torch.Tensor, final_NV: torch.Tensor, most_N1: torch.Tensor, size_N1: torch.Tensor, top_NK: torch.Tensor
) -> torch.Tensor:
    """The same by the ranks that the final top 5 have in the lens: sums over the vocabulary, which a compiler puts into the
    pass that the divergences take anyway. Of equal logits the lower index ranks first."""
    own_NK = lens_NV.gather(1, top_NK)
    index_V = torch.arange(lens_NV.shape[1], device=lens_NV.device)
    before = []
    for k in range(TOP):
        own_N1, at_N1 = own_NK[:, k : k + 1], top_NK[:, k : k + 1]
        before.append(((lens_NV > own_N1) | ((lens_NV == own_N1) & (index_V < at_N1))).sum(1))
    both = sum((count_N < TOP).sum(dtype=torch.float64) for count_N in before) / TOP
    first = (before[0] == 0).sum(dtype=torch.float64)
    return torch.stack([*_divergences(lens_NV, final_NV, most_N1, size_N1), both, first])


def comparison(kind: str) -> Callable[..., torch.Tensor]:
    """The function (lens_NV, *`final_of`(final_NV)) -> the four sums of `LensSum` that devices of a kind are quickest with."""
    return _by_top if kind == "cpu" else fused(_by_rank, kind)
