"""Whether a path answers an item: the reward of the search, 0 or 1."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from layerprune.model.branches import padded
from layerprune.model.errors import Refused
from layerprune.model.layerwise import Layerwise, State
from layerprune.route.execute import PathCache
from layerprune.route.items import Item
from layerprune.route.paths import Counts

GoesOn = Callable[[tuple[int, ...], int], bool]
"""Whether a token goes on with the word that an answer ends with."""


class PathReward:
    """The reward of one item's paths, 1.0 where the path answers it.

    Options: the gold one has a higher log-likelihood (in nats, summed over its tokens) than every other. An answer: greedy
    generation along the path gives it token for token, and not as the beginning of a longer word. Both take one pass over
    prompt and answer: greedy generation gives an answer exactly if each of its tokens is the most probable after the prompt
    and those before it. A path that the model cannot run answers nothing, nor does one whose logits are not numbers.

    paths: the cache of states that the item's paths share, which counts layer applications; limit: its bytes. The decoder
    must be one that the layerwise pass serves exactly (`check_routable`).
    """

    def __init__(self, layerwise: Layerwise, item: Item, goes_on: GoesOn, limit: int = 1 << 30) -> None:
        self._item, self._goes_on = item, goes_on
        # padding is on the right, where causal attention never looks: no mask is needed
        self._batch = layerwise.begin(padded([item.prompt + ending for ending in item.endings]))
        self.paths = PathCache(layerwise, self._batch, limit)
        last = 0 if item.gold is None else 1  # what follows an option is not looked at
        first = len(item.prompt) - 1
        at = [(row, first + i) for row, ending in enumerate(item.endings) for i in range(len(ending) + 1 - last)]
        self._row_N, self._position_N = torch.tensor(at).T

    @torch.no_grad()
    def __call__(self, counts: Counts) -> float:
        try:
            state = self.paths.run(counts)
        except Refused:
            return 0.0
        return float(self._wins(state) if self._item.gold is not None else self._answers(state))

    def _wins(self, state: State) -> bool:
        logp_NV = self._logits(state).log_softmax(dim=-1)
        token_N = torch.tensor([token for ending in self._item.endings for token in ending])
        values = logp_NV.gather(1, token_N[:, None])[:, 0].split([len(ending) for ending in self._item.endings])
        total_E = [float(value.sum()) for value in values]
        gold = total_E.pop(self._item.gold or 0)
        return all(gold > other for other in total_E)

    def _answers(self, state: State) -> bool:
        (answer,) = self._item.endings
        logits_NV = self._logits(state)
        *given, after = logits_NV.argmax(dim=-1).tolist()
        return tuple(given) == answer and not self._goes_on(answer, after) and not bool(logits_NV.isnan().any())

    def _logits(self, state: State) -> torch.Tensor:
        return self._batch.logits(state, self._row_N, self._position_N).float().cpu()


def goes_on_with(tokenizer: Any) -> GoesOn:
    """Whether a token adds a letter or digit straight to a text, in this tokenizer's own decoding."""

    @functools.cache
    def goes_on(answer: tuple[int, ...], token: int) -> bool:
        before = tokenizer.decode(list(answer), skip_special_tokens=True)
        after = tokenizer.decode([*answer, token], skip_special_tokens=True)
        return bool(before) and before[-1].isalnum() and after[len(before) : len(before) + 1].isalnum()

    return goes_on
