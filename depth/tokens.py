"""Which tokens the lens says at which depth: frequent ones first? When is a token decided (arXiv 2510.18871)?"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from layerprune.depth.lens import slices, token_budget
from layerprune.model.data import TokenBatch, batches
from layerprune.model.decoder import Decoder
from layerprune.model.errors import Refused
from layerprune.model.layerwise import Layerwise
from layerprune.model.memory import in_halves

BUCKETS = (10, 100, 1000)
"""Ranks by frequency at which a bucket ends: top 1-10, 11-100, 101-1000, the rest."""
RANKS = (1, 2, 5, 10, 100, 1000)
"""The ranks k at which a token counts as reached."""


def bucket_names() -> list[str]:
    """Names of the buckets, most frequent first."""
    starts = (1, *(end + 1 for end in BUCKETS))
    return [f"top {a}-{b}" for a, b in zip(starts, BUCKETS, strict=False)] + ["rest"]


def count_buckets(sequences: Iterable[Sequence[int]], vocab: int) -> torch.Tensor:
    """The bucket (V,) of every token by its frequency in `sequences`; tokens of equal count by their id, unseen ones last."""
    counts_V = torch.zeros(vocab, dtype=torch.long)
    for ids in sequences:
        counts_V += torch.bincount(torch.tensor(ids, dtype=torch.long), minlength=vocab)
    order_V = torch.sort(counts_V, descending=True, stable=True).indices
    buckets_V = torch.full((vocab,), len(BUCKETS))
    start = 0
    for number, end in enumerate(BUCKETS):
        buckets_V[order_V[start:end]] = number
        start = end
    buckets_V[counts_V == 0] = len(BUCKETS)
    return buckets_V


def add_crossings(rank_LN: torch.Tensor, group_N: torch.Tensor, first_GK: torch.Tensor, last_GK: torch.Tensor) -> None:
    """Add, by the tokens' groups, the first layer at which a token has rank k or better, and the first from which it keeps it.

    rank_LN: ranks by layer, 1 is first; a token that never has it, or has not kept it before the end, counts as L.
    """
    layers = len(rank_LN)
    layer_L1 = torch.arange(layers).unsqueeze(1)
    for k, rank in enumerate(RANKS):
        reached_LN = rank_LN <= rank
        first_GK[:, k].index_add_(0, group_N, torch.where(reached_LN, layer_L1, layers).amin(0))
        last_GK[:, k].index_add_(0, group_N, torch.where(reached_LN, -1, layer_L1).amax(0) + 1)


class TokensSum:
    """Accumulates over real tokens, G buckets of tokens by frequency and K ranks:

    said_LG: the lens's top-1 tokens at layer l, by their bucket, and said_G those of the model; flipped_LG: of these, those
    that are not the model's top-1 token (whether or not they were right). first_GK, last_GK: by the bucket of the model's
    top-1 token, the sum of the first layer at which it has rank k or better, and of the first from which it keeps it; a
    token that never does before the end counts as L.
    """

    def __init__(self, layers: int) -> None:
        groups = len(BUCKETS) + 1
        self.layers = layers
        self.said_LG = torch.zeros(layers, groups, dtype=torch.long)
        self.flipped_LG = torch.zeros(layers, groups, dtype=torch.long)
        self.said_G = torch.zeros(groups, dtype=torch.long)
        self.first_GK = torch.zeros(groups, len(RANKS), dtype=torch.long)
        self.last_GK = torch.zeros(groups, len(RANKS), dtype=torch.long)

    @property
    def tokens(self) -> int:
        return int(self.said_G.sum())

    def update(self, top_LN: torch.Tensor, rank_LN: torch.Tensor, final_N: torch.Tensor, buckets_V: torch.Tensor) -> None:
        """top_LN: the lens's top-1 token; rank_LN: the rank (1 is first) of the model's top-1 token final_N in the lens."""
        groups = len(BUCKETS) + 1
        own_N, said_LN = buckets_V[final_N], buckets_V[top_LN]
        flipped_LN = top_LN != final_N
        for layer in range(self.layers):
            self.said_LG[layer] += torch.bincount(said_LN[layer], minlength=groups)
            self.flipped_LG[layer] += torch.bincount(said_LN[layer][flipped_LN[layer]], minlength=groups)
        self.said_G += torch.bincount(own_N, minlength=groups)
        add_crossings(rank_LN, own_N, self.first_GK, self.last_GK)

    def merge(self, other: TokensSum) -> None:
        for name in ("said_LG", "flipped_LG", "said_G", "first_GK", "last_GK"):
            getattr(self, name).add_(getattr(other, name))

    def result(self) -> dict[str, Any]:
        """share[l][g] of top-1 tokens, share_final[g]; flip_rate[l][g] (None where nothing was said); decided and kept:
        [g][k] mean layers (None where the model never chose from the bucket)."""
        said_LG, said_G = self.said_LG.double(), self.said_G.double()
        return {
            "buckets": bucket_names(),
            "ranks": list(RANKS),
            "share": _known(said_LG / said_LG.sum(1, keepdim=True)),
            "share_final": _known(said_G / said_G.sum()),
            "flip_rate": _known(self.flipped_LG / said_LG),
            "decided": _known(self.first_GK / said_G.unsqueeze(1)),
            "kept": _known(self.last_GK / said_G.unsqueeze(1)),
        }


def _known(values: torch.Tensor) -> Any:
    """As nested lists, with None where nothing was counted."""
    if values.dim() > 1:
        return [_known(row) for row in values]
    return [None if v != v else v for v in values.tolist()]


def tokens_probe(
    decoder: Decoder,
    sequences: list[list[int]],
    buckets_V: torch.Tensor | None = None,
    *,
    max_tokens: int | None = None,
    pad_id: int = 0,
    progress: Callable[[int], None] = lambda rows: None,
) -> TokensSum:
    """First choices by frequency, their flips, and when the final token is decided, by the logit lens over all real tokens.

    buckets_V: from `count_buckets`, by default counted in `sequences`. The decoder must be one that the layerwise pass serves
    exactly. Raises Refused for logits that are no numbers, and where one document does not fit.
    """
    layerwise = Layerwise(decoder)
    total = TokensSum(len(decoder))
    vocab = decoder.model.get_input_embeddings().weight.shape[0]
    buckets_V = count_buckets(sequences, vocab) if buckets_V is None else buckets_V

    def add(part: Any, batch: TokenBatch) -> None:
        if len(part) < len(batch.rows):
            again = [sequences[batch.rows[row]] for row in part]
            (batch,) = batches(again, sum(map(len, again)) * len(again), pad_id)
        total.merge(_one_batch(layerwise, batch, buckets_V))

    for batch in batches(sequences, max_tokens or token_budget(decoder), pad_id):
        in_halves(range(len(batch.rows)), functools.partial(add, batch=batch))
        progress(len(batch.rows))
    return total


@torch.no_grad()
def _one_batch(layerwise: Layerwise, batch: TokenBatch, buckets_V: torch.Tensor) -> TokensSum:
    found = TokensSum(len(layerwise))
    for part in slices(layerwise, batch):
        final_N = part.final_NV.argmax(1)
        tops, ranks, broken = [], [], part.final_NV.isnan().any()
        for lens_NV in part.lenses():
            tops.append(lens_NV.argmax(1))
            own_N1 = lens_NV.gather(1, final_N.to(lens_NV.device).unsqueeze(1))
            ranks.append(1 + (lens_NV > own_N1).sum(1))
            broken = broken | own_N1.isnan().any()
        if broken:
            raise Refused("the logits are not a number: the weights are broken or overflow in this dtype (try --dtype float32)")
        top_LN, rank_LN = torch.stack(tops).cpu(), torch.stack(ranks).cpu()
        found.update(top_LN, rank_LN, final_N.cpu(), buckets_V)
    return found
