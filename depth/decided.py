"""When chosen tokens are decided: the layers at which they first rank k in the logit lens, and keep it.

N tokens of a batch, G groups of tokens, K ranks, L layers, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from layerprune.depth.lens import SLICE, token_budget
from layerprune.depth.tokens import RANKS, add_crossings
from layerprune.model.data import TokenBatch, batches, check_token_id
from layerprune.model.decoder import Decoder
from layerprune.model.errors import Refused
from layerprune.model.layerwise import Layerwise, State
from layerprune.model.memory import in_halves


@dataclass(frozen=True)
class Marked:
    """Token ids, and the tokens among them to look at: (position, group). The token before predicts one, so position > 0."""

    ids: list[int]
    marks: list[tuple[int, int]]


class DecidedSum:
    """Accumulates over marked tokens, by group:

    marked_G: how many there were; predicted_G: those that the model itself ranks first, the only ones that count below.
    first_GK, last_GK: sums of the first layer at which the token has rank k or better, and of the first from which it keeps it;
    one that never does before the end counts as L. Layer l is the lens on x^(l), the input of layer l (0: the embedding).
    left_out: texts in which there was nothing to look at.
    """

    def __init__(self, layers: int, groups: Sequence[str], left_out: int = 0) -> None:
        self.layers, self.groups, self.left_out = layers, list(groups), left_out
        self.marked_G = torch.zeros(len(groups), dtype=torch.long)
        self.predicted_G = torch.zeros(len(groups), dtype=torch.long)
        self.first_GK = torch.zeros(len(groups), len(RANKS), dtype=torch.long)
        self.last_GK = torch.zeros(len(groups), len(RANKS), dtype=torch.long)

    @property
    def tokens(self) -> int:
        return int(self.predicted_G.sum())

    def mark(self, group_N: torch.Tensor) -> None:
        """Count marked tokens, by their groups, whether or not the model predicts them."""
        self.marked_G += torch.bincount(group_N, minlength=len(self.groups))

    def update(self, rank_LN: torch.Tensor, group_N: torch.Tensor) -> None:
        """rank_LN: the ranks (1 is first), by layer, of N tokens that the model predicts."""
        self.predicted_G += torch.bincount(group_N, minlength=len(self.groups))
        add_crossings(rank_LN, group_N, self.first_GK, self.last_GK)

    def merge(self, other: DecidedSum) -> None:
        for name in ("marked_G", "predicted_G", "first_GK", "last_GK"):
            getattr(self, name).add_(getattr(other, name))
        self.left_out += other.left_out

    def result(self) -> dict[str, Any]:
        """By group: marked and predicted, counts; decided and kept, [g][k] mean layers in [0, L], None where none was predicted."""
        counts = self.predicted_G.tolist()
        means = {
            name: [[total / count if count else None for total in row] for row, count in zip(sums.tolist(), counts, strict=True)]
            for name, sums in (("decided", self.first_GK), ("kept", self.last_GK))
        }
        about = {"groups": self.groups, "ranks": list(RANKS), "layers": self.layers, "left_out": self.left_out}
        return {**about, "marked": self.marked_G.tolist(), "predicted": counts, **means}


def decided_probe(
    decoder: Decoder,
    texts: Sequence[Marked],
    groups: Sequence[str],
    *,
    max_tokens: int | None = None,
    pad_id: int = 0,
    progress: Callable[[int], None] = lambda rows: None,
) -> DecidedSum:
    """The logit lens on the marked tokens of `texts`, which have at least one each; first crossings as in arXiv 2510.18871.

    One pass through the layers; the end of the model sees marked tokens only, and at the depths only those that it predicts.
    The decoder must be one that the layerwise pass serves exactly. max_tokens: tokens of a batch, padding included. Raises
    Refused for ids that the model does not know, for logits that are no numbers, and where one text does not fit.
    """
    rows = decoder.model.get_input_embeddings().weight.shape[0]
    check_token_id(max((max(text.ids) for text in texts), default=0), rows)
    layerwise = Layerwise(decoder)
    total = DecidedSum(len(decoder), groups)
    sequences = [text.ids for text in texts]

    def add(part: Any, batch: TokenBatch) -> None:
        chosen = [batch.rows[row] for row in part]
        if len(part) < len(batch.rows):
            again = [sequences[row] for row in chosen]
            (batch,) = batches(again, sum(map(len, again)) * len(again), pad_id)
            chosen = [chosen[row] for row in batch.rows]
        total.merge(_one_batch(layerwise, batch, [texts[row].marks for row in chosen], groups))

    for batch in batches(sequences, max_tokens or token_budget(decoder), pad_id):
        in_halves(range(len(batch.rows)), functools.partial(add, batch=batch))
        progress(len(batch.rows))
    return total


@torch.no_grad()
def _one_batch(
    layerwise: Layerwise, batch: TokenBatch, marks: Sequence[Sequence[tuple[int, int]]], groups: Sequence[str]
) -> DecidedSum:
    found = DecidedSum(len(layerwise), groups)
    made = layerwise.begin(batch.ids_BT, batch.mask_BT)
    states: list[State] = [made.start()]
    for index in range(len(layerwise)):
        states.append(made.step(index, states[-1]))
    device = states[-1].hidden.device
    vocab = layerwise.decoder.model.get_input_embeddings().weight.shape[0]
    each = max(1, SLICE["cpu" if device.type == "cpu" else "cuda"] // vocab)
    every = torch.tensor([(row, at, group) for row, own in enumerate(marks) for at, group in own])
    for row_N, at_N, group_N in (part.unbind(1) for part in every.split(each)):
        found.mark(group_N)
        target_N = batch.ids_BT[row_N, at_N].to(device)
        final_NV = made.logits(states[-1], row_N, at_N - 1)
        if final_NV.isnan().any():
            raise Refused("the logits are not a number: the weights are broken or overflow in this dtype (try --dtype float32)")
        hit_N = final_NV.argmax(1) == target_N
        if not hit_N.any():
            continue
        target_N1, known_N = target_N[hit_N].unsqueeze(1), hit_N.cpu()
        row_N, at_N, group_N = row_N[known_N], at_N[known_N], group_N[known_N]
        before_N = row_N.to(device), (at_N - 1).to(device)  # once, not at each depth
        ranks = []
        for state in states[:-1]:
            lens_NV = made.logits(state, *before_N)
            ranks.append(1 + (lens_NV > lens_NV.gather(1, target_N1)).sum(1))
        found.update(torch.stack(ranks).cpu(), group_N)
    return found
