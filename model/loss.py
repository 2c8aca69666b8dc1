"""Normalised loss: next-token cross-entropy in nats, summed, divided once by tokens and by ln V."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from layerprune.model.data import TokenBatch
from layerprune.model.decoder import Decoder, forward_logits
from layerprune.model.errors import Refused


@dataclass
class LossSum:
    """An accumulator: sums stay sums until one division at the end."""

    nats: float = 0.0
    tokens: int = 0

    def merge(self, other: LossSum) -> None:
        self.nats += other.nats
        self.tokens += other.tokens

    def per_token(self) -> float:
        """Nats per predicted token."""
        return self.nats / self.tokens

    def normalised(self, vocab: int) -> float:
        """Loss / ln V: 0 is certainty, 1 is a uniform guess over the vocabulary (arXiv 2403.17887, App. A.2).

        It can exceed 1: a broken model is surer than a uniform guess, and wrong.
        """
        return self.per_token() / math.log(vocab)


    def summary(self, vocab: int, documents: int) -> dict[str, float | int]:
        """The loss as it is stored: normalised, nats_per_token, tokens, documents."""
        return {
            "normalised": self.normalised(vocab),
            "nats_per_token": self.per_token(),
            "tokens": self.tokens,
            "documents": documents,
        }


@torch.no_grad()
def batch_nats(decoder: Decoder, batch: TokenBatch) -> list[LossSum]:
    """Summed nats over all predicted tokens (every real token but the first) of each row of a batch.

    The log-softmax is taken in float32, in slices of rows so that no second full copy of the logits exists.
    """
    logits_BTV = forward_logits(decoder, batch.ids_BT, batch.mask_BT)
    sums = []
    for b in range(batch.ids_BT.shape[0]):
        real = slice(None) if batch.mask_BT is None else batch.mask_BT[b].bool()
        ids_T = batch.ids_BT[b][real].to(logits_BTV.device)
        rows = logits_BTV[b] if batch.mask_BT is None else logits_BTV[b][batch.mask_BT[b].bool().to(logits_BTV.device)]
        nats = torch.nn.functional.cross_entropy(rows[:-1].float(), ids_T[1:], reduction="none").double().sum().item()
        sums.append(LossSum(nats, len(ids_T) - 1))
    return sums


def total_loss(
    decoder: Decoder, made: Iterable[TokenBatch], progress: Callable[[int], None] = lambda rows: None
) -> LossSum:
    """Sum the loss over batches. Refused when a logit is not a number."""
    total = LossSum()
    for batch in made:
        for one in batch_nats(decoder, batch):
            total.merge(one)
        if not math.isfinite(total.nats):
            raise Refused("the model's loss is not a number: its weights or this dtype overflow (try --dtype float32)")
        progress(len(batch.rows))
    return total
