"""A model whose layers are routed by the prompt: one decision a prompt, then generation with the KV cache.

The published code decides anew in every decode step, for all rows as for the first, and lets a repeated layer write twice
into one cache slot. Here each row of a batch has its own path, chosen once; rows with the same path generate together, on a
stack in which a repeated layer has two slots and a skipped one none (`layerprune.model.keep.OtherStack`).
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from layerprune.model.data import batches
from layerprune.model.decoder import Decoder, states_BTD
from layerprune.model.errors import Refused, UsageError, model_errors
from layerprune.model.keep import OtherStack
from layerprune.model.layerwise import Batch, Layerwise, State
from layerprune.model.memory import in_halves
from layerprune.route.execute import check_routable, step_along
from layerprune.route.paths import ACTIONS, REPEAT, SKIP, Counts, check_counts, executed
from layerprune.route.prefill import Filled, Prefill, first_pass_done
from layerprune.route.router import Routers, Windows, choose, parse_dial, turn_dial

_MOST_STACKS = 256
_DECIDED_TOKENS = 8192
Made = TypeVar("Made")
Work = Callable[[Decoder, Sequence[int]], Sequence[Made]]
"""What generates from rows of one path: it gets the stack of that path, and gives one result a row."""

Prompt = Sequence[int]
"""Token ids of one prompt, without padding."""


@dataclass(frozen=True)
class Generated:
    """New tokens of one prompt, the end-of-text token among them where it came, and the path of every pass.

    path_length(counts) are the layers of one pass; for a whole generation it is to be multiplied by the passes.
    """

    tokens: tuple[int, ...]
    counts: Counts


class RoutedModel:
    """A live decoder with routers. The model is as it was between calls; stacks are found and proven once a path.

    dial: a number from -1 to 1, `router` (-0.5, the routers' own choice) or `execute` (0.5), see `turn_dial`. The decoder
    must be in eval mode. Raises UsageError for routers of another number of layers and for a dial that is none, Refused for
    a model whose layers cannot be routed.
    """

    def __init__(self, decoder: Decoder, routers: Routers, dial: str | float = "router") -> None:
        if routers.layers != len(decoder):
            raise UsageError(f"routers of {routers.layers} layers do not fit a model of {len(decoder)} layers")
        self.decoder, self.dial = decoder, parse_dial(dial)
        check_routable(decoder)
        self.routers = routers.to(decoder.device)
        self._layerwise = Layerwise(decoder)
        self._stacks: OrderedDict[Counts, OtherStack] = OrderedDict()
        self.built_seconds = 0.0
        """Spent on finding and proving stacks, once a path, in `generate`."""
        self._prefill: Prefill | None = None
        self._looked = False

    @torch.no_grad()
    def decide(self, prompts: Sequence[Prompt]) -> list[Counts]:
        """The path of each prompt, from one layerwise pass along these paths. A dial of 0.5 or more needs no pass.

        A row is decided by its own tokens; a batch changes it by rounding alone. Raises UsageError for a prompt without a
        token, Refused where a layer needs what a skipped one would have handed on.
        """
        if not all(map(len, prompts)):
            raise UsageError("a prompt without a token cannot be routed")
        if self.dial >= 0.5:
            constant = choose(turn_dial(torch.zeros(len(self.decoder), len(ACTIONS)), self.dial))
            return [constant] * len(prompts)
        found: list[Counts] = [()] * len(prompts)

        def part(rows: Sequence[int]) -> None:
            for batch in batches([prompts[row] for row in rows], _DECIDED_TOKENS):
                for place, counts in zip(batch.rows, self._decide_batch(batch.ids_BT, batch.mask_BT), strict=True):
                    found[rows[place]] = counts

        in_halves(range(len(prompts)), part)
        return found

    def _decide_batch(self, ids_BT: torch.Tensor, mask_BT: torch.Tensor | None) -> list[Counts]:
        rows, tokens = ids_BT.shape
        batch = self._layerwise.begin(ids_BT, mask_BT)
        state = batch.start()
        if rows > 1 and (state.shared or state.hidden.dim() != 3):  # what rows share cannot go different ways
            lengths = [tokens] * rows if mask_BT is None else mask_BT.sum(dim=1).tolist()
            return [self._decide_batch(ids_BT[row : row + 1, :length], None)[0] for row, length in enumerate(lengths)]
        windows = Windows(torch.ones_like(ids_BT) if mask_BT is None else mask_BT)
        chances = []
        for layer in range(len(self.decoder)):
            chances.append(self._chances(layer, states_BTD(state.hidden, rows, tokens), windows))
            state = _advance(batch, layer, state, chances[-1].argmax(dim=-1))
        return [choose(chance_LC) for chance_LC in torch.stack(chances, dim=1)]

    def _chances(self, layer: int, hidden_BTD: torch.Tensor, windows: Windows) -> torch.Tensor:
        """Probabilities (B, C) of a layer's actions after the dial, on the CPU."""
        device = self.routers.up_LHD.device
        pooled_BWD = windows.pool(hidden_BTD).to(device)
        return turn_dial(self.routers.one_layer(layer, pooled_BWD, windows.real_BW.to(device)), self.dial).cpu()

    @torch.no_grad()
    def generate(self, prompts: Sequence[Prompt], max_new_tokens: int, **options: Any) -> list[Generated]:
        """Greedy continuations of the prompts, in their order, by transformers' own `generate` with its cache.

        options go to `generate` (`eos_token_id`, `min_new_tokens`, ...). Rows of one path are padded on the left. Where the
        model lends itself to it (`layerprune.route.prefill`), the pass that decides is also the one that fills the cache.
        Raises what `decide` raises, and Refused for a path whose stack the model's config cannot say.
        """
        if not all(map(len, prompts)):
            raise UsageError("a prompt without a token cannot be routed")
        found: list[Generated | None] = [None] * len(prompts)

        def part(rows: Sequence[int]) -> None:
            ids_BT, mask_BT = _left_padded([prompts[row] for row in rows])

            def work(routed: Decoder, members: Sequence[int]) -> list[tuple[int, ...]]:
                return _continue(routed, ids_BT[members], mask_BT[members], max_new_tokens, options)

            for row, (tokens, counts) in zip(rows, self.by_path(ids_BT, mask_BT, work), strict=True):
                found[row] = Generated(tokens, counts)

        for batch in batches(prompts, _DECIDED_TOKENS):
            in_halves(batch.rows, part)
        return [made for made in found if made is not None]

    @property
    def one_pass(self) -> bool:
        """Whether `generate` decides in the pass that fills the cache; known once it has been called."""
        return self._prefill is not None

    @torch.no_grad()
    def by_path(
        self, ids_BT: torch.Tensor, mask_BT: torch.Tensor, work: Work[Made], once: bool = True
    ) -> list[tuple[Made, Counts]]:
        """Let `work` generate from the rows of each path; what it made of each row, and its path.

        ids_BT: prompts padded on the left; mask_BT: 1 on real tokens. `work(routed, rows)` is called once a path, with the stack
        of that path entered, and must generate from these rows of ids_BT and mask_BT, as wide as they are, before it lets the
        model do anything else: the model's first pass may be done already. Raises what `generate` raises.
        """
        filled = self._filled(ids_BT, mask_BT)
        if filled is None:
            decided = self.decide([ids_T[mask_T.bool()].tolist() for ids_T, mask_T in zip(ids_BT, mask_BT, strict=True)])
        else:
            decided = [choose(chance_LC) for chance_LC in filled.chance_LBC.transpose(0, 1)]
        groups: dict[tuple[Counts, bool], list[int]] = {}
        for row, counts in enumerate(decided):
            groups.setdefault((counts, filled is not None and filled.counts[row] == counts), []).append(row)
        found: dict[int, Made] = {}
        for (counts, known), rows in groups.items():
            started = time.perf_counter()
            new = counts not in self._stacks
            with self.stack(counts).entered() as routed:
                if new:
                    self.built_seconds += time.perf_counter() - started
                first = first_pass_done(routed.model, *filled.part(rows, counts)) if filled and known else nullcontext()
                with first:
                    found |= zip(rows, work(routed, rows), strict=True)
        return [(found[row], counts) for row, counts in enumerate(decided)]

    def _filled(self, ids_BT: torch.Tensor, mask_BT: torch.Tensor) -> Filled | None:
        """The pass that decides and fills the cache; None where that is not to be had."""
        settings = self.decoder.model.generation_config
        if self.dial >= 0.5 or settings.cache_implementation or settings.prefill_chunk_size:  # it would be thrown away
            return None
        left_to_others: tuple[type[Exception], ...] = (Refused, *model_errors())
        try:
            if not self._looked:
                self._looked, started = True, time.perf_counter()
                self._prefill = Prefill(self.decoder, self.stack)
                self.built_seconds += time.perf_counter() - started
            if self._prefill is None:
                return None
            return self._prefill.run(ids_BT, None if bool(mask_BT.all()) else mask_BT, self._chances)
        except torch.cuda.OutOfMemoryError:
            raise
        except left_to_others:  # a decision layer by layer says what is wrong, or does without the cache
            return None

    def stack(self, counts: Counts) -> OtherStack:
        """The stack of a path, kept for the next time; of more than 256 the one not used for longest goes."""
        check_counts(counts, len(self.decoder))
        if counts not in self._stacks:
            self._stacks[counts] = OtherStack(self.decoder, executed(counts))
            if len(self._stacks) > _MOST_STACKS:
                self._stacks.popitem(last=False)
        self._stacks.move_to_end(counts)
        return self._stacks[counts]


def _advance(batch: Batch, layer: int, state: State, count_B: torch.Tensor) -> State:
    """The state after a layer that each row skips, executes or repeats; rows do not see each other."""
    most = int(count_B.max())
    if most == SKIP:
        return state
    told = tuple(count_B.tolist())
    if len(told) == 1:
        for _ in range(most):
            state = step_along(batch, layer, state, told)
        return state
    count_B11 = count_B.to(state.hidden.device)[:, None, None]
    once = step_along(batch, layer, state, told)
    hidden = torch.where(count_B11 > SKIP, once.hidden, state.hidden)
    if most == REPEAT:
        hidden = torch.where(count_B11 == REPEAT, step_along(batch, layer, once, told).hidden, hidden)
    return State(hidden, state.shared)


def _left_padded(prompts: Sequence[Prompt]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask (B, T)."""
    width = max(map(len, prompts))
    ids_BT = torch.zeros((len(prompts), width), dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    for row, prompt in enumerate(prompts):
        ids_BT[row, width - len(prompt) :] = torch.tensor(prompt)
        mask_BT[row, width - len(prompt) :] = 1
    return ids_BT, mask_BT


def _continue(
    routed: Decoder, ids_BT: torch.Tensor, mask_BT: torch.Tensor, max_new_tokens: int, options: dict[str, Any]
) -> list[tuple[int, ...]]:
    """The new tokens of each row, those that fill it up after its end left out."""
    model = routed.model
    made_BT = model.generate(
        ids_BT.to(routed.device), attention_mask=mask_BT.to(routed.device), max_new_tokens=max_new_tokens, do_sample=False,
        num_beams=1, use_cache=True, pad_token_id=0, **options,
    )  # fmt: skip
    ends = options.get("eos_token_id", model.generation_config.eos_token_id)
    ends = set() if ends is None else {ends} if isinstance(ends, int) else set(ends)
    found = []
    for new in made_BT[:, ids_BT.shape[1] :].tolist():
        end = next((place + 1 for place, token in enumerate(new) if token in ends), len(new))
        found.append(tuple(new[:end]))
    return found
