"""The least-squares fit of bridges on the states of the uncut model."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from layerprune.heal.gaps import Gap, Projection, find_projection
from layerprune.heal.targets import Target
from layerprune.model.data import TokenBatch, batches
from layerprune.model.decoder import Decoder, Stop, first_hidden, forward_logits, hidden_of, replaced_forwards
from layerprune.model.errors import Refused
from layerprune.model.ridge import Choice, Moments, choose_ridge

STRENGTHS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Ridge strengths that are tried: lambda as a multiple of the mean square of a feature, summed over tokens."""


@dataclass(frozen=True)
class Bridge:
    """A gap's projection and what was fitted for it.

    target: the projection's place in the cut model, and its module in the uncut one.
    choice.map_DK: T - I (D x D) for the form `map`, W' - W (D x in) for `projection`; None changes nothing.
    energy: sum |x^(b)|^2 over the held-out tokens, to which errors are relative.
    """

    gap: Gap
    target: Target
    scale: float
    form: str
    choice: Choice
    energy: float


def fit_bridges(
    decoder: Decoder,
    gaps: Sequence[Gap],
    fit: Sequence[Sequence[int]],
    held: Sequence[Sequence[int]],
    form: str = "map",
    *,
    progress: Callable[[int], None] = lambda rows: None,
) -> list[Bridge]:
    """Fit a bridge for every gap of a live, uncut decoder, each on the decoder's own states.

    fit, held: token ids of the documents that are fitted, and of those that the ridge strength is chosen on. Each
    document passes through the layers before the last gap's end, once. Raises Refused (see `find_projection`), and
    where a state is not a number.
    """
    projections = [find_projection(decoder, gap.after) for gap in gaps]
    sums = []
    for sequences in (fit, held):
        moments, energies = [Moments() for _ in gaps], [0.0 for _ in gaps]
        for batch in batches(sequences, 4096 if decoder.device.type == "cpu" else 8192):
            for i, (features_NK, after_ND, before_ND) in _states(decoder, gaps, projections, form, batch):
                moments[i].update(features_NK * projections[i].scale, before_ND.double() - after_ND.double())
                energies[i] += before_ND.double().square().sum().item()
            progress(len(batch.rows))
        if not all(torch.isfinite(torch.tensor([m.energy, m.gram_KK.sum().item()])).all() for m in moments):
            raise Refused("the states of the uncut model are not a number: its weights are broken or overflow in this dtype")
        sums.append(moments)
    choices = [choose_ridge(on, off, STRENGTHS) for on, off in zip(*sums, strict=True)]
    return [
        Bridge(
            gap, Target(f"{decoder.path}.{gap.place}.{found.inside}", gap.place, found.inside, found.module), found.scale, form,
            choice, energy,
        )
        for gap, found, choice, energy in zip(gaps, projections, choices, energies, strict=True)
    ]  # fmt: skip


@torch.no_grad()
def _states(
    decoder: Decoder, gaps: Sequence[Gap], projections: Sequence[Projection], form: str, batch: TokenBatch
) -> Iterator[tuple[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]:
    """For each gap (number i): its features, x^(after+1) and x^(before) at the batch's real tokens, (N, K or D)."""
    real = slice(None) if batch.mask_BT is None else batch.mask_BT.flatten().bool()
    features: dict[int, torch.Tensor] = {}
    after: dict[int, torch.Tensor] = {}
    before: dict[int, torch.Tensor] = {}

    def rows(states: torch.Tensor) -> torch.Tensor:
        where = real if isinstance(real, slice) else real.to(states.device)
        # some layers add to these tensors in place afterwards (Falcon), and a slice would be a view
        return states.reshape(-1, states.shape[-1])[where].clone()

    def hook(i: int) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            features[i] = rows(output if form == "map" else args[0])

        return see

    def watcher(layer: int) -> Callable[..., Any]:
        def forward(old: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            for i, gap in enumerate(gaps):
                if gap.before == layer:
                    before[i] = rows(first_hidden(args, kwargs))
            if layer == gaps[-1].before:
                raise Stop
            output = old(*args, **kwargs)
            for i, gap in enumerate(gaps):
                if gap.after == layer:
                    after[i] = rows(hidden_of(output))
            return output

        return forward

    watched = sorted({layer for gap in gaps for layer in (gap.after, gap.before)})
    handles = [p.module.register_forward_hook(hook(i)) for i, p in enumerate(projections)]
    try:
        with replaced_forwards((decoder.layers[i], watcher(i)) for i in watched), contextlib.suppress(Stop):
            forward_logits(decoder, batch.ids_BT, batch.mask_BT)
    finally:
        for handle in handles:
            handle.remove()
    for i in range(len(gaps)):
        device = features[i].device
        yield i, (features[i], after[i].to(device), before[i].to(device))


def split_documents(sequences: Sequence[list[int]], seed: int) -> tuple[list[list[int]], list[list[int]]]:
    """(documents to fit, documents held out): a tenth of them, at least one, drawn by `seed`. Refused for fewer than 2."""
    if len(sequences) < 2:
        raise Refused(f"a bridge needs at least 2 documents, one of them held out, and the data has {len(sequences)}")
    out = set(random.Random(seed).sample(range(len(sequences)), max(1, round(len(sequences) / 10))))
    return [s for i, s in enumerate(sequences) if i not in out], [s for i, s in enumerate(sequences) if i in out]
