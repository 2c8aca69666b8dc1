"""How much each layer adds to the residual stream, and whether it writes along it or against it (arXiv 2512.14064, P1)."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch

from layerprune.depth.fused import fused
from layerprune.depth.parts import Caught, find_parts, unexplained
from layerprune.model.data import TokenBatch, batches
from layerprune.model.decoder import Decoder, Stop, first_hidden, forward_logits, hidden_of, replaced_forwards, states_BTD
from layerprune.model.errors import Refused
from layerprune.model.memory import in_halves

VALUES = ("cos_att", "cos_mlp", "cos_layer", "rc_att", "rc_mlp", "rc_layer")
PARTS = [[0], [1], [3], [4]]
"""Places in VALUES of those of attention and MLP."""
_LEAST = 1e-6
"""Denominators are at least this (papers' code)."""


class ResidualSum:
    """Accumulates, over all real tokens, each layer's six values; the mean is taken once, at the end.

    With h the input of layer l, a and m what attention and MLP add, and u = x^(l+1) - x^(l): cosines of a with h, of m with the
    stream that the MLP reads (h + a; h where both read the same), of u with h, in [-1, 1]; and relative contributions
    |a| / |h|, |m| / |h + a|, |u| / |h|. Near 0 a cosine says that new features are written, below 0 that the stream is
    erased, above 0 that it is amplified. Beside them the sums of squares that `unexplained` takes.
    """

    def __init__(self, layers: int) -> None:
        self.total_6L = torch.zeros(len(VALUES), layers, dtype=torch.float64)
        self.squares_3L = torch.zeros(3, layers, dtype=torch.float64)
        self.tokens_L = torch.zeros(layers, dtype=torch.float64)

    def update(self, layer: int, sums_9: torch.Tensor, tokens: int) -> None:
        sums_9 = sums_9.double().cpu()
        self.total_6L[:, layer] += sums_9[:6]
        self.squares_3L[:, layer] += sums_9[6:]
        self.tokens_L[layer] += tokens

    def merge(self, other: ResidualSum) -> None:
        self.total_6L += other.total_6L
        self.squares_3L += other.squares_3L
        self.tokens_L += other.tokens_L

    def result(self) -> dict[str, list[float | None]]:
        """Each value's mean over tokens, by layer; None for parts of a layer that has none."""
        mean_6L = self.total_6L / self.tokens_L
        return {name: [None if v != v else v for v in mean_6L[i].tolist()] for i, name in enumerate(VALUES)}


def residual_probe(
    decoder: Decoder,
    sequences: list[list[int]],
    *,
    max_tokens: int | None = None,
    pad_id: int = 0,
    padding_side: str = "right",
    progress: Callable[[int], None] = lambda rows: None,
) -> ResidualSum:
    """One forward pass without the head over tokenised documents; every real token of each counts.

    Layers whose update is not the sum of two sub-modules' outputs give their own values alone. Raises Refused for a state
    that is not finite, and where one document does not fit.
    """
    total = ResidualSum(len(decoder))
    caught = Caught(decoder, find_parts(decoder))
    sure = False
    if max_tokens is None:
        max_tokens = 2048 if decoder.device.type == "cpu" else 16384

    def add(part: Any, batch: TokenBatch) -> None:
        if len(part) < len(batch.rows):
            again = [sequences[batch.rows[row]] for row in part]
            (batch,) = batches(again, sum(map(len, again)) * len(again), pad_id, padding_side)
        nonlocal sure
        found = _one_batch(decoder, batch, caught)
        before = list(caught.parts)
        if not sure and (bad := set(_without(found, caught, decoder))):
            # not all layers of a kind are alike: each is tried for itself
            own = find_parts(decoder, every=True)
            caught.parts = [own[i] if i in bad else parts for i, parts in enumerate(before)]
            found = _one_batch(decoder, batch, caught)
        sure = True
        total.merge(found)

    for batch in batches(sequences, max_tokens, pad_id, padding_side):
        in_halves(range(len(batch.rows)), functools.partial(add, batch=batch))
        progress(len(batch.rows))
    total.total_6L[PARTS, _without(total, caught, decoder)] = float("nan")
    if not torch.isfinite(total.total_6L[VALUES.index("rc_layer")]).all():
        raise Refused("the activations are not a number: the weights are broken or overflow in this dtype (try --dtype float32)")
    return total


def _without(found: ResidualSum, caught: Caught, decoder: Decoder) -> list[int]:
    """Layers whose parts were not there, or do not sum to their update."""
    missing = [layer for layer, parts in enumerate(caught.parts) if parts is None]
    return sorted({*missing, *unexplained(found.squares_3L, decoder.model.dtype)})


@torch.no_grad()
def _one_batch(decoder: Decoder, batch: TokenBatch, caught: Caught) -> ResidualSum:
    rows, tokens = batch.ids_BT.shape
    real = rows * tokens if batch.mask_BT is None else int(batch.mask_BT.sum())
    waiting: list[tuple[int, torch.Tensor]] = []
    masks: dict[torch.device, torch.Tensor | None] = {}

    def mask_on(device: torch.device) -> torch.Tensor | None:
        if device not in masks:
            masks[device] = None if batch.mask_BT is None else batch.mask_BT.to(device).reshape(-1, 1).float()
        return masks[device]

    def watcher(index: int) -> Callable[..., Any]:
        def forward(old: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            x = first_hidden(args, kwargs)
            # a layer may change its input in place; parts are looked for where there is one stream only
            output = old(*args, **kwargs)
            y = hidden_of(output)
            x_BTD, y_BTD = states_BTD(x, rows, tokens), states_BTD(y, rows, tokens)
            parts = caught.take(index, x_BTD)
            run: Callable[..., torch.Tensor] = _layer_alone
            if parts is not None:
                run = _layer_parallel if caught.parts[index].parallel else _layer_sequential  # type: ignore[union-attr]
            flat = [state_BTD.flatten(0, 1) for state_BTD in (x_BTD, y_BTD, *(parts or ()))]
            waiting.append((index, fused(run, x_BTD.device.type)(*flat, mask_on(x_BTD.device))))
            if index == len(decoder) - 1:
                raise Stop
            return output

        return forward

    found = ResidualSum(len(decoder))
    layers = ((layer, watcher(i)) for i, layer in enumerate(decoder.layers))
    with caught.hooked(), replaced_forwards(layers), contextlib.suppress(Stop):
        forward_logits(decoder, batch.ids_BT, batch.mask_BT)
    for index, sums in waiting:  # the device is waited for once a batch
        found.update(index, sums, real)
    return found


def _sums(pairs: list[tuple[torch.Tensor, torch.Tensor]], mask_N1: torch.Tensor | None) -> torch.Tensor:
    """For (added, stream) pairs: the sums over real tokens of their cosines, then of their relative sizes."""
    cosines, sizes = [], []
    for added, stream in pairs:
        a, h = added.float(), stream.float()
        dot, aa, hh = (a * h).sum(-1, keepdim=True), (a * a).sum(-1, keepdim=True), (h * h).sum(-1, keepdim=True)
        cosine = dot / (aa.sqrt() * hh.sqrt()).clamp(min=1e-20)
        size = aa.sqrt() / hh.sqrt().clamp(min=_LEAST)
        if mask_N1 is not None:
            cosine, size = cosine * mask_N1, size * mask_N1
        cosines.append(cosine.sum())
        sizes.append(size.sum())
    return torch.stack(cosines + sizes)


def _squares(x: torch.Tensor, y: torch.Tensor, a: torch.Tensor, m: torch.Tensor, mask_N1: torch.Tensor | None) -> torch.Tensor:
    """Sums over real tokens of |u - a - m|^2, 1 and |u|^2, with u = y - x, in units of the larger of |x| and |y|."""
    kind = torch.promote_types(x.dtype, torch.float32)
    start, end = x.to(kind), y.to(kind)
    update = end - start
    error, at, to, size = ((v * v).sum(-1, keepdim=True) for v in (update - (a.to(kind) + m.to(kind)), start, end, update))
    unit = torch.maximum(at, to).clamp(min=1e-30)
    both = (error / unit, torch.ones_like(unit), size / unit)
    return torch.stack([(v if mask_N1 is None else v * mask_N1).sum().float() for v in both])


def _layer_sequential(
    x: torch.Tensor, y: torch.Tensor, a: torch.Tensor, m: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    sums = _sums([(a, x), (m, x.float() + a.float()), (y.float() - x.float(), x)], mask)
    return torch.cat([sums, _squares(x, y, a, m, mask)])


def _layer_parallel(x: torch.Tensor, y: torch.Tensor, a: torch.Tensor, m: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    sums = _sums([(a, x), (m, x), (y.float() - x.float(), x)], mask)
    return torch.cat([sums, _squares(x, y, a, m, mask)])


def _layer_alone(x: torch.Tensor, y: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    cosine, size = _sums([(y.float() - x.float(), x)], mask)
    nan, none = torch.full_like(cosine, float("nan")), torch.zeros_like(cosine)
    return torch.stack([nan, nan, cosine, nan, nan, size, none, none, none])
