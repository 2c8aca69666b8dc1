"""Where a bridge goes: the cuts in the middle of a model, and the projection before each that can hold it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from layerprune.heal.targets import mlp_linears
from layerprune.model.cuts import Kept
from layerprune.model.decoder import Decoder, Stop, first_hidden, forward_logits, hidden_of, replaced_forwards
from layerprune.model.errors import Refused
from layerprune.model.nf4 import is_linear, linear_shape

_PROBE_TOKENS = 12


@dataclass(frozen=True)
class Gap:
    """One cut: original layers after+1 .. before-1 are gone; `place` is the index of layer `after` in the cut model."""

    place: int
    after: int
    before: int


@dataclass(frozen=True)
class Projection:
    """The linear layer, `inside` a decoder layer, whose output times `scale` is added to the residual stream as it is."""

    inside: str
    module: Any
    scale: float


def find_gaps(kept: Kept, layers: int) -> list[Gap]:
    """The cuts in the middle of a model. Raises Refused for layers cut at its start or end, and where nothing is cut."""
    if kept[0] != 0:
        raise Refused(
            f"layers 0:{kept[0]} are cut from the start: a bridge needs a layer before the cut to hold it; cut a block that "
            "leaves layer 0"
        )
    if kept[-1] != layers - 1:
        raise Refused(
            f"layers {kept[-1] + 1}:{layers} are cut from the end: a bridge needs a layer after the cut to lead to; cut a block "
            "that leaves the last layer"
        )
    gaps = [Gap(i, a, b) for i, (a, b) in enumerate(zip(kept, kept[1:], strict=False)) if b != a + 1]
    if not gaps:
        raise Refused(f"none of the {layers} layers is cut: there is nothing to bridge")
    return gaps


@torch.no_grad()
def find_projection(decoder: Decoder, layer: int) -> Projection:
    """The output projection of a layer's MLP, found by what it does: no family table.

    The layer is run on a few tokens; noise of the size of its states is added to one linear layer's output, and the
    layer's own output must change by that noise times one constant, at every token and feature. Of several such layers
    (parallel blocks have attention's, too) the MLP's is taken. Raises Refused where none is found: MLPs
    whose output is normalised or gated (Gemma-2, OLMo-2), fused experts, states in several streams, weights that are
    used elsewhere too, models that change states between layers.
    """
    owner = decoder.layers[layer]
    scales: dict[str, float] = {}
    after: list[torch.Tensor] = []
    plain: list[bool] = []

    def probe(old: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        base = hidden_of(old(*args, **kwargs)).clone()
        for name, module in owner.named_modules():
            if is_linear(module) and linear_shape(module)[0] == base.shape[-1]:
                scale = _passes_on(module, base, lambda: hidden_of(old(*args, **kwargs)))
                if scale is not None:
                    scales[name] = scale
        output = old(*args, **kwargs)
        after.append(hidden_of(output).clone())
        return output

    def next_one(old: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        found = first_hidden(args, kwargs)
        plain.append(found.shape == after[0].shape and torch.equal(found.to(after[0].device), after[0]))
        raise Stop

    vocab = decoder.model.get_input_embeddings().weight.shape[0]
    ids_BT = torch.randint(0, vocab, (2, _PROBE_TOKENS), generator=torch.Generator().manual_seed(0))
    shadows = [(owner, probe), (decoder.layers[layer + 1], next_one)]
    with replaced_forwards(shadows), contextlib.suppress(Stop):
        forward_logits(decoder, ids_BT)
    kind = type(decoder.model).__name__
    if plain != [True]:
        raise Refused(f"this {kind} changes states between its layers, so a bridge before layer {layer + 1} would not be exact")
    mlp = _mlp_of(decoder, owner) if scales else set()
    found = [name for name in scales if name in mlp and not _is_shared(decoder.model, owner.get_submodule(name))]
    if len(found) != 1:
        why = f"{' and '.join(found)} do" if found else "none of its MLP's linear layers does (norms, gates or experts follow them)"
        raise Refused(
            f"layer {layer} of this {kind} cannot hold a bridge: one linear layer of its MLP must add its output to the residual "
            f"stream as it is, and {why}; heal the cut instead"
        )
    return Projection(found[0], owner.get_submodule(found[0]), scales[found[0]])


def _passes_on(module: nn.Module, base: torch.Tensor, run: Callable[[], torch.Tensor]) -> float | None:
    """The constant s such that noise added to the module's output appears in the layer's output times s; else None."""
    noise: list[torch.Tensor] = []
    own: list[torch.Tensor] = []

    def add(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        drawn = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
        # the median: some tokens of trained models have states a thousand times as large as the others
        noise.append(drawn * base.abs().median())
        own.append(output.clone())
        return output + noise[-1]

    handle = module.register_forward_hook(add)
    try:
        changed = run()
    finally:
        handle.remove()
    if len(noise) != 1 or noise[0].numel() != base.numel():  # called twice, or for some tokens only
        return None
    added, own_output = (t.reshape(base.shape).to(base.device).double() for t in (noise[0], own[0]))
    moved = changed.double() - base.double()
    scale = ((moved * added).sum() / added.square().sum()).item()
    if not 1e-3 < abs(scale) < 1e3:  # not a number, too
        return None
    scale = 1.0 if abs(scale - 1) < 1e-3 else scale
    rounding = 8 * torch.finfo(base.dtype).eps
    allowed = rounding * (base.double().abs() + abs(scale) * (added.abs() + own_output.abs()))
    return scale if bool(((moved - scale * added).abs() <= allowed).all()) else None


def _mlp_of(decoder: Decoder, owner: nn.Module) -> set[str]:
    """Names, inside one layer, of its MLP's linear layers."""
    alone = Decoder(decoder.model, decoder.path, nn.ModuleList([owner]))
    try:
        return {name.removeprefix(f"{decoder.path}.0.") for name in mlp_linears(alone, named=True)}
    except Refused:
        return set()


def _is_shared(model: nn.Module, module: nn.Module) -> bool:
    return sum(p is module.weight for _, p in model.named_parameters(remove_duplicate=False)) != 1
