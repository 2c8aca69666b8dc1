"""The pass over a prompt that decides its path is the one that fills the KV cache: no prompt is read twice.

On a stack in which every layer stands twice, each with a cache slot of its own, a row's state goes through both, the first or
none of the two as its router says. What is then in the slots that ran is what the path's own stack would have put into its
cache, which takes them over with the logits.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from layerprune.model.config import vocab_size
from layerprune.model.decoder import Decoder, first_hidden, hidden_of, replaced_forwards
from layerprune.model.errors import Refused, model_errors
from layerprune.model.keep import OtherStack, logit_distance, logits_near
from layerprune.model.layerwise import Layerwise
from layerprune.route.paths import EXECUTE, REPEAT, SKIP, Counts
from layerprune.route.router import Windows

Chances = Callable[[int, torch.Tensor, Windows], torch.Tensor]
"""Probabilities (B, C) on the CPU, from a layer, the states (B, T, D) that enter it, and the rows' windows."""


@dataclass
class Filled:
    """A batch after its pass. chance_LBC: what the routers said; output: the model's, whose cache has two slots a layer."""

    chance_LBC: torch.Tensor
    output: Any
    cache_name: str

    @property
    def counts(self) -> list[Counts]:
        """The path that each row took, which may be empty."""
        return [tuple(row) for row in self.chance_LBC.argmax(dim=-1).T.tolist()]

    def part(self, rows: Sequence[int], counts: Counts) -> tuple[Any, list[Any]]:
        """Output and cache slots of some rows on one path, as the path's own stack would have left them."""
        slots = self.output[self.cache_name].layers
        slots = [slots[2 * layer + again] for layer, count in enumerate(counts) for again in range(count)]
        logits_BTV = self.output.logits
        if len(rows) < logits_BTV.shape[0]:
            slots = [copy.copy(slot) for slot in slots]
            row_B = torch.tensor(rows, device=logits_BTV.device)
            for slot in slots:
                slot.batch_select_indices(row_B.to(slot.keys.device))
            logits_BTV = logits_BTV[row_B]
        return type(self.output)(logits=logits_BTV), slots


class Prefill:
    """Deciding passes of one decoder that fill a cache. Raises Refused where the model does not lend itself to that."""

    def __init__(self, decoder: Decoder, stack: Callable[[Counts], OtherStack]) -> None:
        """stack: gives the stack of a path, for the proof."""
        layers = len(decoder)
        self._decoder = decoder
        # it is proven below, on a path: twice through every layer, states may leave the numbers
        self._double = OtherStack(decoder, tuple(layer for layer in range(layers) for _ in range(2)), proven=True)
        self._layerwise = Layerwise(decoder)
        accepted = inspect.signature(decoder.model.forward).parameters
        self._short = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self._positions = "position_ids" in accepted
        try:
            self._prove(stack)
        except model_errors() as error:
            raise Refused(f"the cache of this {type(decoder.model).__name__} cannot be filled while its path is decided") from error

    @torch.no_grad()
    def run(self, ids_BT: torch.Tensor, mask_BT: torch.Tensor | None, chances: Chances) -> Filled:
        """One pass over prompts that are padded on the left (mask_BT: 1 on real tokens, None without padding)."""
        from transformers.cache_utils import DynamicLayer

        found: list[torch.Tensor] = []
        device = self._decoder.device
        windows = Windows(torch.ones_like(ids_BT) if mask_BT is None else mask_BT)
        more = dict(self._short)
        if mask_BT is not None:
            mask_BT = mask_BT.to(device)
            if self._positions:
                more["position_ids"] = (mask_BT.cumsum(dim=1) - 1).clamp(min=0)

        def replacement(place: int) -> Callable[..., Any]:
            layer, again = divmod(place, 2)

            def forward(old: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
                hidden = first_hidden(args, kwargs)
                if not again:
                    if hidden.dim() != 3:
                        raise Refused("a state of several streams has no rows that could go different ways")
                    found.append(chances(layer, hidden, windows))
                count_B = found[layer].argmax(dim=-1)
                runs_B = count_B == REPEAT if again else count_B > SKIP
                if not bool(runs_B.any()):
                    return self._layerwise.as_output(hidden)
                made = hidden_of(old(*args, **kwargs))
                if not bool(runs_B.all()):
                    made = torch.where(runs_B.to(made.device)[:, None, None], made, hidden)
                return self._layerwise.as_output(made)

            return forward

        with (
            self._double.entered() as double,
            replaced_forwards((layer, replacement(place)) for place, layer in enumerate(double.layers)),
        ):
            output = double.model(input_ids=ids_BT.to(device), attention_mask=mask_BT, use_cache=True, return_dict=True, **more)
        name, cache = _cache_of(output)
        if len(cache.layers) != 2 * len(self._decoder) or not all(isinstance(slot, DynamicLayer) for slot in cache.layers):
            raise Refused("this cache is not made of keys and values alone")
        output.logits = output.logits[:, -1:]
        return Filled(torch.stack(found), output, name)

    def _prove(self, stack: Callable[[Counts], OtherStack]) -> None:
        """Raise Refused unless generation goes on from such a pass as it does from the path's own."""
        layers = len(self._decoder)
        counts = tuple(SKIP if layer == 1 < layers - 1 else REPEAT if layer == layers - 1 else EXECUTE for layer in range(layers))
        vocab = vocab_size(self._decoder.model.config)
        ids_BT = torch.randint(0, vocab, (1, 4), generator=torch.Generator().manual_seed(0)).to(self._decoder.device)
        planted_LC = torch.eye(3)[torch.tensor(counts)]
        filled = self.run(ids_BT, None, lambda layer, hidden, windows: planted_LC[layer][None])

        def logits(path: Decoder) -> torch.Tensor:
            made = path.model.generate(
                ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=3, min_new_tokens=3, do_sample=False, num_beams=1,
                use_cache=True, pad_token_id=0, return_dict_in_generate=True, output_logits=True,
            )  # fmt: skip
            return torch.cat(made.logits)

        with stack(counts).entered() as path:
            plain_NV = logits(path)
            with first_pass_done(path.model, *filled.part([0], counts)) as left_out:
                found_NV = logits(path)
        if left_out != [True]:
            raise Refused("this model does not generate with a cache of keys and values")
        if not logit_distance(plain_NV, found_NV) <= logits_near(self._decoder):
            raise Refused("a cache that was filled while a path was decided does not go on as the path's own")


@contextlib.contextmanager
def first_pass_done(model: Any, output: Any, slots: list[Any]) -> Iterator[list[bool]]:
    """Inside the block the model's next forward pass is not run: its output is the given one, its cache gets the slots.

    Where that pass is another one (other rows, as with beams, or another kind of cache) it is run after all. Yields a list
    that says afterwards whether it was left out.
    """
    from transformers import DynamicCache

    forward, own = model.forward, model.__dict__.get("forward")
    expected = (output.logits.shape[0], slots[0].get_seq_length())
    left_out: list[bool] = []

    def restore() -> None:
        if own is None:
            model.__dict__.pop("forward", None)
        else:
            model.__dict__["forward"] = own

    @functools.wraps(forward)  # generate looks at its parameters
    def done(*args: Any, **kwargs: Any) -> Any:
        restore()
        caches = [(name, value) for name, value in kwargs.items() if isinstance(value, DynamicCache)]
        alike = len(caches) == 1 and [type(slot) for slot in caches[0][1].layers] == [type(slot) for slot in slots]
        left_out.append(alike and tuple(getattr(kwargs.get("input_ids"), "shape", ())) == expected)
        if not left_out[0]:
            return forward(*args, **kwargs)
        name, cache = caches[0]
        cache.layers = slots
        output[name] = cache
        return output

    model.__dict__["forward"] = done
    try:
        yield left_out
    finally:
        restore()


def _cache_of(values: Any) -> tuple[str, Any]:
    """The name and the cache among a pass's results; newer transformers call it otherwise."""
    from transformers import DynamicCache

    found = [(name, value) for name, value in values.items() if isinstance(value, DynamicCache)]
    if len(found) != 1:
        raise Refused("this model does not generate with a dynamic cache")
    return found[0]
