"""Multiple choice in two stages: first the options are found, then one of them is chosen (arXiv 2510.18871, section on options)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from layerprune.depth.lens import token_budget
from layerprune.model.data import TokenBatch, batches
from layerprune.model.decoder import Decoder
from layerprune.model.errors import Refused
from layerprune.model.layerwise import Layerwise
from layerprune.model.memory import in_halves


@dataclass(frozen=True)
class Item:
    """One question: the context's token ids, the token that stands for each option, and which one is right (0-based)."""

    context: tuple[int, ...]
    options: tuple[int, ...]
    gold: int | None


class ChoicesSum:
    """Accumulates over items, by tap l = 0..L (x^(l), L: the model itself), at the context's last token:

    listed: share of items whose options all rank among the 2n first of the vocabulary, n being their number; mass: probability
    of all options together; rank: natural logarithm of the options' geometric mean rank; chosen: share of items whose best
    option is the one that the model ends with; right: share whose best option is the gold one (of items that have one).
    """

    names = ("listed", "mass", "rank", "chosen", "right")

    def __init__(self, layers: int) -> None:
        self.total_5L = torch.zeros(len(self.names), layers + 1, dtype=torch.float64)
        self.items = self.answered = 0

    def update(self, sums_5L: torch.Tensor, items: int, answered: int) -> None:
        self.total_5L += sums_5L.double().cpu()
        self.items += items
        self.answered += answered

    def merge(self, other: ChoicesSum) -> None:
        self.update(other.total_5L, other.items, other.answered)

    def result(self) -> dict[str, Any]:
        """Each value by tap, the last one being the model's own; rank as a mean of ranks again; right is None without gold."""
        mean_5L = self.total_5L / self.items
        found: dict[str, Any] = {name: mean_5L[i].tolist() for i, name in enumerate(self.names)}
        found["rank"] = mean_5L[2].exp().tolist()
        found["right"] = (self.total_5L[4] / self.answered).tolist() if self.answered else None
        return {**found, "items": self.items}


def choices_probe(
    decoder: Decoder,
    items: Sequence[Item],
    *,
    max_tokens: int | None = None,
    pad_id: int = 0,
    progress: Callable[[int], None] = lambda rows: None,
) -> ChoicesSum:
    """The logit lens on the options of multiple-choice items. The decoder must be one that the layerwise pass serves exactly.

    Raises Refused without items, for an item with fewer than two options or with options of one token, and for logits that are
    no numbers.
    """
    if not items:
        raise Refused("there is no multiple-choice item whose options are single tokens: nothing can be probed")
    for item in items:
        if len(set(item.options)) < max(2, len(item.options)):
            raise Refused("an item has fewer than two options, or two that begin with the same token: they cannot be told apart")
    layerwise = Layerwise(decoder)
    total = ChoicesSum(len(decoder))
    contexts = [list(item.context) for item in items]

    def add(part: Any, batch: TokenBatch) -> None:
        rows = [batch.rows[row] for row in part]
        if len(part) < len(batch.rows):
            again = [contexts[row] for row in rows]
            (batch,) = batches(again, sum(map(len, again)) * len(again), pad_id)
            rows = [rows[row] for row in batch.rows]
        total.merge(_one_batch(layerwise, batch, [items[row] for row in rows]))

    for batch in batches(contexts, max_tokens or token_budget(decoder), pad_id):
        in_halves(range(len(batch.rows)), functools.partial(add, batch=batch))
        progress(len(batch.rows))
    if not torch.isfinite(total.total_5L).all():
        raise Refused("the logits are not a number: the weights are broken or overflow in this dtype (try --dtype float32)")
    return total


@torch.no_grad()
def _one_batch(layerwise: Layerwise, batch: TokenBatch, items: Sequence[Item]) -> ChoicesSum:
    made = layerwise.begin(batch.ids_BT, batch.mask_BT)
    row_B = torch.arange(len(items))
    last_B = torch.tensor([len(item.context) - 1 for item in items])
    wide = max(len(item.options) for item in items)
    # items with fewer options repeat their first one, and leave it out again below
    options_BO = torch.tensor([[*item.options, *[item.options[0]] * (wide - len(item.options))] for item in items])
    real_BO = torch.tensor([[i < len(item.options) for i in range(wide)] for item in items])
    count_B = real_BO.sum(1)
    taps: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    state = made.start()
    for index in range(len(layerwise) + 1):
        taps.append(_one_tap(made.logits(state, row_B, last_B), options_BO))
        if index < len(layerwise):
            state = made.step(index, state)
    best_LB = torch.stack([own_BO.cpu().masked_fill(~real_BO, -torch.inf).argmax(1) for own_BO, _, _ in taps])
    gold_B = torch.tensor([-1 if item.gold is None else item.gold for item in items])
    sums = []
    for tap, (_, share_BO, rank_BO) in enumerate(taps):
        rank, share = rank_BO.cpu().double(), share_BO.cpu().double()
        sums.append(torch.stack([
            ((rank <= 2 * count_B.unsqueeze(1)) | ~real_BO).all(1).sum(),
            (share * real_BO).sum(),
            ((rank.log() * real_BO).sum(1) / count_B).sum(),
            (best_LB[tap] == best_LB[-1]).sum(),
            (best_LB[tap] == gold_B).sum(),
        ]))  # fmt: skip
    found = ChoicesSum(len(layerwise))
    found.update(torch.stack(sums, dim=1), len(items), int((gold_B >= 0).sum()))
    return found


def _one_tap(logits_BV: torch.Tensor, options_BO: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, probabilities and ranks (1 is first) of the options."""
    logits_BV = logits_BV.float()
    options_BO = options_BO.to(logits_BV.device)
    own_BO = logits_BV.gather(1, options_BO)
    rank_BO = torch.stack([1 + (logits_BV > own_BO[:, o : o + 1]).sum(1) for o in range(own_BO.shape[1])], dim=1)
    return own_BO, (own_BO - torch.logsumexp(logits_BV, 1, keepdim=True)).exp(), rank_BO
