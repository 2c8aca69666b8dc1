"""What attention and MLP add to the residual stream, found by what a layer computes, without a line per family.

A layer's update x^(l+1) - x^(l) is, in most architectures, s (p + q): what two of its sub-modules give, one after the
other, times a scale. Which two is found by trying on a few tokens; a layer in which no two of them sum to its update has no
parts here. Layers of the same modules are expected to have the same parts, so one of each kind is tried; whoever uses that looks
at what `unexplained` says of every layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from layerprune.model.decoder import Decoder, Stop, first_hidden, forward_logits, hidden_of, replaced_forwards

_PROBE = (2, 12)


@dataclass(frozen=True)
class Parts:
    """Names (inside the layer) of the sub-modules whose outputs are added, in the order of their calls.

    scale: s of x^(l+1) = x^(l) + s (p + q). added: whether the second one's output has the stream in it already (BLOOM).
    parallel: whether both read x^(l); else the second reads x^(l) + s p.
    """

    first: str
    second: str
    scale: float
    added: bool
    parallel: bool
    changed: bool
    """Whether an output is written over after its module returned it (Falcon adds into one)."""


@dataclass
class _Call:
    name: str
    norm: bool
    given: list[torch.Tensor]
    output: torch.Tensor
    alive: torch.Tensor
    """The output itself, of which `output` is a copy."""


def find_parts(decoder: Decoder, every: bool = False) -> list[Parts | None]:
    """The parts of every layer, None for one whose update is not the sum of two sub-modules' outputs.

    every: try every layer, not the first one of each kind; one that shows none, since it adds less than rounding does, is taken
    to be like the others.
    """
    found: list[Parts | None] = [None] * len(decoder)
    kinds = [_kind(layer) for layer in decoder.layers]
    tried = [i for i, kind in enumerate(kinds) if every or kind not in kinds[:i]]

    def watcher(index: int) -> Callable[..., Any]:
        def forward(old: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            x = first_hidden(args, kwargs).detach().clone()
            with _calls(decoder.layers[index], x.shape) as calls:
                output = old(*args, **kwargs)
            y = hidden_of(output)
            if x.dim() == 3 and y.shape == x.shape:
                found[index] = _two_that_sum(x, y, calls)
            if index == tried[-1]:
                raise Stop
            return output

        return forward

    vocab = decoder.model.get_input_embeddings().weight.shape[0]
    ids_BT = torch.randint(0, vocab, _PROBE, generator=torch.Generator().manual_seed(0))
    watched = [(decoder.layers[i], watcher(i)) for i in tried]
    with torch.no_grad(), replaced_forwards(watched), contextlib.suppress(Stop):
        forward_logits(decoder, ids_BT)
    first = {kind: parts for kind, parts in reversed(list(zip(kinds, found, strict=True))) if parts is not None}
    return [parts or first.get(kind) for kind, parts in zip(kinds, found, strict=True)]


def _kind(layer: nn.Module) -> Any:
    """What layers of the same code have in common: their modules' names and classes, and the numbers that they are set up with.

    What parts there are is looked at in every layer, and what reads what is not: layers whose code is not transformers' own may
    differ by no more than their number, so each of them is of its own kind.
    """
    replaced = "forward" in vars(layer) and not hasattr(layer, "_hf_hook")  # accelerate's hooks leave a layer what it was
    if replaced or not type(layer).__module__.startswith("transformers."):
        return layer
    numbers = [(key, value) for key, value in vars(layer).items() if isinstance(value, int | float | str) and "idx" not in key]
    return repr((sorted(numbers), [(name, type(module).__qualname__) for name, module in layer.named_modules()]))


def unexplained(squares_3L: torch.Tensor, dtype: torch.dtype) -> list[int]:
    """Layers whose parts do not sum to their update: by the sums over tokens of |difference|^2, of 1, and of |update|^2, the sizes
    in units of each token's state (the larger of x^(l) and x^(l+1))."""
    errors_L, tokens_L, updates_L = squares_3L
    most_L = _most(tokens_L.sqrt(), updates_L.sqrt(), dtype)
    return [layer for layer, bad in enumerate((errors_L.sqrt() > most_L).tolist()) if bad]


def _most(states: Any, update: Any, dtype: torch.dtype) -> Any:
    """How far rounding in `dtype` takes the sum of two parts from an update: two additions, each rounded; the scale of the stream
    is what rounding follows. All in units of each token's state: else one massive token hides what all others say."""
    return 3 * float(torch.finfo(dtype).eps) * states + 1e-5 * update


@contextlib.contextmanager
def _calls(layer: nn.Module, shape: torch.Size) -> Iterator[list[_Call]]:
    """The calls of a layer's sub-modules whose outputs have a state's shape, in order of their ends."""
    calls: list[_Call] = []

    def hook(name: str) -> Callable[..., None]:
        def seen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            result = hidden_of(output)
            if isinstance(result, torch.Tensor) and result.numel() == shape.numel() and result.shape[-1] == shape[-1]:
                values = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor) and v.numel() == shape.numel()]
                norm = "norm" in type(module).__name__.lower()
                calls.append(
                    _Call(
                        name,
                        norm,
                        [v.detach().reshape(shape) for v in values],
                        result.detach().reshape(shape).clone(),
                        result.detach().reshape(shape),
                    )
                )

        return seen

    handles = [m.register_forward_hook(hook(n), with_kwargs=True) for n, m in layer.named_modules() if n and n.count(".") < 2]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _two_that_sum(x: torch.Tensor, y: torch.Tensor, calls: list[_Call]) -> Parts | None:
    """The two calls whose outputs sum to y - x, within the rounding of y's dtype."""
    unit_BT1 = torch.maximum(x.double().norm(dim=-1, keepdim=True), y.double().norm(dim=-1, keepdim=True)).clamp(min=1e-300)
    wide = x.double() / unit_BT1
    update = y.double() / unit_BT1 - wide
    most = _most(unit_BT1.numel() ** 0.5, float(update.norm()), y.dtype)
    outputs = [call.output.double() / unit_BT1 for call in calls]
    best: tuple[float, Parts] | None = None
    for i, j, added in _candidates(wide, update, calls, outputs, most):
        first, second = calls[i], calls[j]
        p = outputs[i]
        q = outputs[j] - (wide + p if added else 0)
        both = p + q
        size = float((both * both).sum())
        if size == 0:
            continue
        scale = 1.0 if added else float((both * update).sum()) / size
        if not added and float((update - both).norm()) <= most:
            scale = 1.0  # which the fit gives but for rounding
        if abs(scale) * min(float(p.norm()), float(q.norm())) <= most:
            continue  # what is lost in rounding anyway proves nothing
        error = float((update - scale * both).norm())
        if error > most or (best is not None and error >= best[0]):
            continue
        middle = wide + scale * p
        apart = float((middle - wide).norm())
        later = [g for call in calls[i + 1 : j + 1] for g in call.given]
        near = 0.01 * apart + float(torch.finfo(y.dtype).eps) * float(middle.norm())  # it was rounded when it was read
        sequential = False
        for g in (one.double() / unit_BT1 for one in later):
            off = float((g - middle).norm())
            sequential = sequential or (off < near and 2 * off < float((g - wide).norm()))
        # a module that returns the stream proves nothing of what came before it, unless that is seen to be read
        if sequential or not added:
            changed = any(not torch.equal(call.output, call.alive) for call in (first, second))
            best = error, Parts(first.name, second.name, scale, added, not sequential, changed)
    return None if best is None else best[1]


def _candidates(
    wide: torch.Tensor, update: torch.Tensor, calls: list[_Call], outputs: list[torch.Tensor], most: float
) -> list[tuple[int, int, bool]]:
    """Pairs (i, j, added) whose sum may be the update within `most`: told from all dot products at once, since each number
    that is asked of a GPU is waited for. Dot products lose half of the digits where vectors cancel, hence the allowance."""
    if not calls:
        return []
    both = torch.stack([one.flatten() for one in (wide, update, *outputs)])
    dots = (both @ both.T).tolist()
    names = [call.name for call in calls]
    found = []
    for j in range(len(calls)):
        for i in range(j):
            # a module called twice (a shared dropout) cannot be told apart afterwards
            if names.count(names[i]) > 1 or names.count(names[j]) > 1 or _inside(names[i], names[j]):
                continue
            for added in (False,) if calls[j].norm else (False, True):
                # what the two add: second - x where the stream is in its output already, else first + second
                a, b, sign = (j + 2, 0, -1) if added else (i + 2, j + 2, 1)
                size = dots[a][a] + 2 * sign * dots[a][b] + dots[b][b]
                along = dots[a][1] + sign * dots[b][1]
                scale = 1.0 if added else along / size if size > 0 else 0.0
                error = max(0.0, dots[1][1] - 2 * scale * along + scale * scale * size) ** 0.5
                unsure = 1e-6 * (dots[0][0] + dots[1][1] + dots[a][a] + dots[b][b]) ** 0.5 * max(1.0, abs(scale))
                if error <= most + unsure:
                    found.append((i, j, added))
    return found


def _inside(a: str, b: str) -> bool:
    return a.startswith(b + ".") or b.startswith(a + ".")


class Caught:
    """Outputs of the two parts of every layer, caught while a pass runs; `take` gives (p, q) and forgets them."""

    def __init__(self, decoder: Decoder, parts: list[Parts | None]) -> None:
        self.decoder, self.parts = decoder, parts
        self._held: dict[tuple[int, int], torch.Tensor] = {}

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        """Catch inside the block."""
        handles = []
        for index, found in enumerate(self.parts):
            if found is not None:
                for place, name in enumerate((found.first, found.second)):
                    module = self.decoder.layers[index].get_submodule(name)
                    handles.append(module.register_forward_hook(self._keep(index, place)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._held.clear()

    def _keep(self, index: int, place: int) -> Callable[..., None]:
        def seen(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            result, found = hidden_of(output), self.parts[index]
            self._held[index, place] = result.clone() if found is not None and found.changed else result

        return seen

    def take(self, index: int, x_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What attention and MLP of a layer added to x_BTD, its input; None for a layer without parts, and where they were not
        called, which makes it one without."""
        found = self.parts[index]
        if found is None or not {(index, 0), (index, 1)} <= self._held.keys():
            self.parts[index] = None
            return None
        p, q = (self._held.pop((index, place)).reshape(x_BTD.shape) for place in (0, 1))
        if found.added:
            q = q - (x_BTD + p)
        return (p, q) if found.scale == 1.0 else (found.scale * p, found.scale * q)
