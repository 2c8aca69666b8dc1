"""Which linear layers are the MLP's: found by how modules behave in a pass, not by family names."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from layerprune.model.config import text_config
from layerprune.model.decoder import Decoder, forward_logits, hidden_of, replaced_forwards
from layerprune.model.errors import Refused, UsageError, one_line
from layerprune.model.nf4 import is_linear, linear_shape

GROUPS = ("mlp", "attention")
"""Words for all linear layers of a kind."""
_PROBE_TOKENS = 12
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Target:
    """A linear layer that LoRA trains: `name` in the model, `layer` its index, `inside` its name in that layer."""

    name: str
    layer: int
    inside: str
    module: Any

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) features."""
        return linear_shape(self.module)


def choose_targets(decoder: Decoder, wanted: Sequence[str] = ()) -> list[Target]:
    """The linear layers that healing trains, in order.

    wanted: names as recipes give them. One without a dot (`up_proj`) means the MLP's layer of that name; one with
    dots (`mlp.c_proj`, `self_attn.q_proj`) any linear layer of a decoder layer whose name ends so. `mlp` and
    `attention` (or whatever mixes tokens in its place) mean all of their linear layers. Without names all of the MLP's
    are taken (see `mlp_linears`).
    Raises Refused where none is found or experts are fused, UsageError for a name that no layer has.
    """
    every = [
        Target(f"{decoder.path}.{i}.{inside}", i, inside, module)
        for i, layer in enumerate(decoder.layers)
        for inside, module in layer.named_modules()
        if is_linear(module)
    ]
    words = [name for name in wanted if name in GROUPS]
    named = [name for name in wanted if name not in GROUPS]
    mlp: set[str] = set()
    if not wanted or "mlp" in words or any("." not in name for name in named):
        mlp = set(mlp_linears(decoder, bool(named)))
    if not wanted:
        return [target for target in every if target.name in mlp]
    mixers = set(mixer_linears(decoder)) if "attention" in words else set()
    chosen = []
    for target in every:
        leaf = target.inside.rpartition(".")[2]
        one = any(_ends(target.inside, name) if "." in name else leaf == name and target.name in mlp for name in named)
        if one or ("mlp" in words and target.name in mlp) or target.name in mixers:
            chosen.append(target)
    for name in named:
        if not any(_ends(target.inside, name) for target in chosen):
            known = sorted({target.inside for target in every if target.name in mlp} or {t.inside for t in every})
            elsewhere = sorted({target.inside for target in every if _ends(target.inside, name)})
            hint = f" ({', '.join(elsewhere)} is elsewhere: write it out, or take `attention`)" if elsewhere else ""
            others = sorted({t.inside for t in every if t.name in set(mixer_linears(decoder))} - set(known))
            more = f"; attention, or what mixes tokens in its place, has {', '.join(others)}" if others and not elsewhere else ""
            raise UsageError(f"the target {name!r} is no linear layer of this model's MLP; it has {', '.join(known)}{hint}{more}")
    if "attention" in words and not mixers:
        raise Refused(f"no linear layers of attention were found in this {type(decoder.model).__name__}: give other targets")
    return chosen


def _ends(inside: str, name: str) -> bool:
    return inside == name or inside.endswith("." + name)


def target_pattern(decoder: Decoder, targets: Sequence[Target]) -> str:
    """A regular expression for peft's `target_modules` (matched against whole names) that hits only `targets`."""
    inside = sorted({target.inside for target in targets})
    pattern = rf"{re.escape(decoder.path)}\.\d+\.(?:{'|'.join(map(re.escape, inside))})"
    wanted = {target.name for target in targets}
    hit = {name for name, module in decoder.model.named_modules() if is_linear(module) and re.fullmatch(pattern, name)}
    # layers of different kinds may use one name for different things: then every name is written out
    return pattern if hit == wanted else "|".join(map(re.escape, sorted(wanted)))


def refuse_fused_experts(decoder: Decoder) -> None:
    """Refuse, from names and shapes alone (the model may be on the meta device), experts that are one 3-D parameter."""
    config = text_config(decoder.model.config).to_dict()
    counts = {value for key, value in config.items() if "expert" in key and isinstance(value, int) and value > 1}
    for index, layer in enumerate(decoder.layers):
        for name, parameter in layer.named_parameters():
            if parameter.dim() >= 3 and parameter.shape[0] in counts:
                raise Refused(_fused(f"{decoder.path}.{index}.{name}", parameter.shape))


def _fused(name: str, shape: Sequence[int]) -> str:
    return (
        f"this mixture of experts cannot be healed: {name} holds {shape[0]} experts in one parameter {tuple(shape)}, which "
        "4-bit quantisation leaves as it is and LoRA with dropout cannot wrap; evaluate the cut as it is (run --no-heal)"
    )


def mlp_linears(decoder: Decoder, named: bool = False) -> list[str]:
    """Full names of the linear layers of every layer's MLP.

    A part of a layer is position-wise when what it gives for a token does not depend on other tokens; attention and
    state-space mixers are not. Of a layer's position-wise parts the one with most weights in linear layers is the
    MLP (linear layers that hang on the layer itself count as one part), less linears that are an eighth as wide
    as the MLP's input or narrower (routers, gates). `named`: experts that are fused are passed over, not refused.
    Raises Refused where no layer has such a part, and for experts that are no linear layers.
    """
    wise = _position_wise(decoder)
    found: list[str] = []
    for index, layer in enumerate(decoder.layers):
        parts: dict[str, list[tuple[str, Any]]] = {}
        for part in wise[index]:
            module = layer.get_submodule(part)
            inner = [(f"{part}.{n}" if n else part, m) for n, m in module.named_modules() if is_linear(m)]
            parts.setdefault("" if is_linear(module) else part, []).extend(inner)
            if not named:
                _refuse_bare_matrices(f"{decoder.path}.{index}.{part}", module, inner)
        best = max(parts.values(), key=lambda part: sum(_size(m) for _, m in part), default=[])
        hidden = max((min(linear_shape(m)) for _, m in best), default=0)
        found += [f"{decoder.path}.{index}.{name}" for name, m in best if min(linear_shape(m)) > hidden // 8]
    if not found:
        raise Refused(
            f"no MLP with linear layers was found in the {len(decoder)} layers of this {type(decoder.model).__name__}: "
            "there is nothing that healing could train (from Python, `targets` names other linear layers)"
        )
    return found


def mixer_linears(decoder: Decoder) -> list[str]:
    """Full names of the linear layers of every layer's parts that are not position-wise: attention, state-space mixers.

    Less those that are an eighth as wide as the widest one's narrower side, or narrower (gates).
    """
    wise = _position_wise(decoder)
    found: list[str] = []
    for index, layer in enumerate(decoder.layers):
        inner = [
            (name, module)
            for name, module in layer.named_modules()
            if is_linear(module) and not any(name == part or name.startswith(part + ".") for part in wise[index])
        ]
        hidden = max((min(linear_shape(m)) for _, m in inner), default=0)
        found += [f"{decoder.path}.{index}.{name}" for name, m in inner if min(linear_shape(m)) > hidden // 8]
    return found


def _size(module: Any) -> int:
    out, width = linear_shape(module)
    return out * width


def _refuse_bare_matrices(path: str, part: nn.Module, linears: Sequence[tuple[str, Any]]) -> None:
    largest = max((_size(m) for _, m in linears), default=0)
    for name, module in part.named_modules():
        if is_linear(module) or isinstance(module, _CONVOLUTIONS):
            continue
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.dim() >= 2 and min(parameter.shape) > 1 and parameter.numel() > largest:
                raise Refused(_fused(".".join(filter(None, (path, name, own))), parameter.shape))


def _position_wise(decoder: Decoder) -> list[list[str]]:
    """For each layer the names of its position-wise parts that hold linear layers."""
    # a part that is never called (a plain container) is opened, and its children are looked at in another pass
    pending = [_parts(layer, "") for layer in decoder.layers]
    wise: list[list[str]] = [[] for _ in decoder.layers]
    while any(pending):
        verdicts: list[dict[str, bool]] = [{} for _ in decoder.layers]
        watched = []
        for index, layer in enumerate(decoder.layers):
            for part in pending[index]:
                module = layer.get_submodule(part)
                if is_linear(module):
                    verdicts[index][part] = True
                else:
                    watched.append((module, _watch(verdicts[index], part)))
        with _no_dropout(decoder.model), replaced_forwards(watched):
            probe_forward(decoder)
        opened: list[list[str]] = []
        for index, layer in enumerate(decoder.layers):
            wise[index] += [part for part in pending[index] if verdicts[index].get(part)]
            closed = [part for part in pending[index] if part not in verdicts[index]]
            opened.append([child for part in closed for child in _parts(layer.get_submodule(part), part + ".")])
        pending = opened
    return wise


@contextlib.contextmanager
def _no_dropout(model: nn.Module) -> Iterator[None]:
    """Everything in eval mode but the linear layers: in eval mode on some CPUs 4-bit ones repack their weights for good."""
    before = {module: module.training for module in model.modules()}
    try:
        for module in before:
            module.training = is_linear(module)
        yield
    finally:
        for module, training in before.items():
            module.training = training


def _parts(module: nn.Module, prefix: str) -> list[str]:
    return [prefix + n for n, child in module.named_children() if any(is_linear(m) for m in child.modules())]


def _watch(verdicts: dict[str, bool], part: str) -> Callable[..., Any]:
    """Call the part twice, the second time with another first token, and see whether later tokens' results change."""

    def forward(old: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = old(*args, **kwargs)
        if part in verdicts:
            return output
        changed = _change_first_token(args, kwargs)
        if changed is None:
            verdicts[part] = False
            return output
        other = old(*changed[0], **changed[1])
        before, after = (_rows(hidden_of(o)) for o in (output, other))
        verdicts[part] = before is not None and after is not None and _same(before, after)
        return output

    return forward


def _change_first_token(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]] | None:
    """The arguments with another first row in the first floating tensor (..., tokens, features), or None."""
    new_args, new_kwargs = list(args), dict(kwargs)
    for place, key in [*((new_args, i) for i in range(len(new_args))), *((new_kwargs, k) for k in new_kwargs)]:
        value = place[key]  # type: ignore[index, call-overload]
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() >= 2 and value.shape[-2] > 1:
            value = value.clone()
            value[..., 0, :] = value[..., 0, :].flip(-1) * -1.5 + 0.5
            place[key] = value  # type: ignore[index, call-overload]
            return new_args, new_kwargs
    return None


def _rows(output: Any) -> torch.Tensor | None:
    return output if isinstance(output, torch.Tensor) and output.dim() >= 2 and output.shape[-2] > 1 else None


def _same(before: torch.Tensor, after: torch.Tensor) -> bool:
    a, b = before[..., 1:, :].float(), after[..., 1:, :].float()
    scale = a.abs().max().item()
    return (a - b).abs().max().item() <= 1e-3 * scale


@torch.no_grad()
def probe_forward(decoder: Decoder) -> dict[str, Any]:
    """One pass over a few random tokens; returns what else the model must be given in training.

    That is `token_type_ids` of zeros for models that refuse to train without (they read images, too).
    """
    vocab = decoder.model.get_input_embeddings().weight.shape[0]
    ids_BT = torch.randint(0, vocab, (1, _PROBE_TOKENS), generator=torch.Generator().manual_seed(0))
    try:
        forward_logits(decoder, ids_BT)
        return {}
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:
        kind = type(decoder.model).__name__
        raise Refused(f"this {kind} cannot be healed: it does not run with 4-bit linear layers ({one_line(error)})") from error
    except ValueError as error:
        key = next((k for k in ("mm_token_type_ids", "token_type_ids") if k in str(error)), None)
        if key is None:
            raise
    extra = {key: torch.zeros_like(ids_BT)}
    forward_logits(decoder, ids_BT, **{key: value.to(decoder.device) for key, value in extra.items()})
    return {key: 0}
