"""A live model that really has only the layers that run, so that it generates with its KV cache.

A virtual cut skips layers, and a skipped layer leaves its cache slot empty; a layer that runs twice would write twice into
one slot. Generating is then possible only without a cache. Here the stack is replaced by one of the layers that run, the
very same modules (the second run of a layer is a shell around the same weights), and every index, count and list that
follows from the config is what transformers makes of the changed config. No family is known by name: the model is built
twice without weights, from its own config and from the changed one, and what differs is what changes.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from layerprune.model.cuts import Kept, check_kept, describe_dropped
from layerprune.model.decoder import Decoder, forward_logits, virtual_cut
from layerprune.model.errors import Refused, UsageError, model_errors, one_line
from layerprune.model.layerwise import Layerwise
from layerprune.model.likeness import prove_config
from layerprune.model.surgery import cut_config

_PROMPT, _NEW = 4, 4
# Shares of the logits' spread by which rounding may move them; a cache that is wrong moves them by tenths.
_NEAR, _NEAR_HALF = 0.01, 0.1
_ABSENT = object()
# what torch keeps in every module, and how weights that are loaded were stored
_NOT_COMPARED = {*vars(nn.Module()), "quantization_config"}

Change = tuple[dict[str, Any], str, Any]
"""The attributes of one module or config, a name among them, and its value in the cut model (_ABSENT: none)."""


@contextlib.contextmanager
def kept_model(decoder: Decoder, kept: Kept) -> Iterator[Decoder]:
    """Inside the block the live model has only the layers in `kept`, as if their checkpoint had been written and loaded.

    No weight is copied. The model passes, caches and generates like any other; its config says len(kept) layers. Yields
    the view of the cut stack, on which virtual cuts work too. On entry it is proven, on 8 tokens, that the
    logits are those of `virtual_cut` (bit for bit in float32 on the CPU, else within the dtype's tolerance), and that
    generating with the cache gives the logits of a pass without it: about 8 short forward passes.

    The model must be in eval mode, and is restored in the end. Raises UsageError for a `kept` that selects no layers in
    order, and Refused for what a cut config cannot say, and where the proof fails.
    """
    check_kept(kept, len(decoder))
    with OtherStack(decoder, kept).entered() as cut:
        yield cut


class OtherStack:
    """A stack of a live model's own layers in another order, to be entered as often as wanted; found and proven once.

    order: original 0-based indices, none smaller than the one before; a layer that stands there twice runs twice, with a
    cache slot for each. What `kept_model` says of its model and its proof is true here too; a repeated layer is
    proven against the layerwise pass. Between uses the model must stay as it was when this was made.
    """

    def __init__(self, decoder: Decoder, order: Kept, proven: bool = False) -> None:
        """proven: the caller sees to the proof. Raises UsageError for an order that is none, and Refused for what a config
        cannot say of it."""
        if not order or any(b < a for a, b in zip(order, order[1:], strict=False)) or order[0] < 0 or order[-1] >= len(decoder):
            raise UsageError(f"layers {order} are no order of 0..{len(decoder) - 1}, each of which may come more than once")
        self._decoder, self._order, self._proven = decoder, order, proven
        self._changes: list[Change] = []
        if order != tuple(range(len(decoder))):
            again = [new > 0 and order[new - 1] == old for new, old in enumerate(order)]
            self._stack = nn.ModuleList(
                _shell(decoder.layers[old]) if second else decoder.layers[old] for old, second in zip(order, again, strict=True)
            )
            self._stack.training = decoder.layers.training
            self._changes = _changes(decoder, order, self._stack)

    @contextlib.contextmanager
    def entered(self) -> Iterator[Decoder]:
        """Inside the block the live model has this stack. Raises Refused where the proof, on the first entry, fails."""
        if not self._changes:
            yield self._decoder
            return
        if not self._proven:
            vocabulary = int(self._decoder.model.get_input_embeddings().weight.shape[0])
            ids_BT = torch.randint(0, vocabulary, (1, _PROMPT + _NEW), generator=torch.Generator().manual_seed(0))
            expected_BTV = _expected(self._decoder, self._order, ids_BT)
        undo: list[Change] = []
        try:
            for attributes, name, value in self._changes:
                undo.append((attributes, name, attributes.get(name, _ABSENT)))
                _put(attributes, name, value)
            cut = Decoder(self._decoder.model, self._decoder.path, self._stack)
            if not self._proven:
                _prove(cut, ids_BT, expected_BTV)
                self._proven = True
            yield cut
        finally:
            for attributes, name, value in reversed(undo):
                _put(attributes, name, value)


def _shell(layer: nn.Module) -> nn.Module:
    """A layer like the given one, around the same weights, buffers and configs, with plain attributes of its own."""
    from transformers import PreTrainedConfig

    kept: dict[int, Any] = {}
    for module in layer.modules():
        if "forward" in vars(module):
            raise Refused(
                "a layer whose weights are brought in by hooks (device_map, offloading) cannot run twice with a cache: load the "
                "model on one device"
            )
        held = (*module._parameters.values(), *module._buffers.values(), *vars(module).values())
        kept |= {id(value): value for value in held if isinstance(value, torch.Tensor | PreTrainedConfig)}
    return copy.deepcopy(layer, kept)


def _put(attributes: dict[str, Any], name: str, value: Any) -> None:
    # past __setattr__: a config checks every single entry against the others, a module registers
    if value is _ABSENT:
        attributes.pop(name, None)
    else:
        attributes[name] = value


def _changes(decoder: Decoder, kept: Kept, stack: nn.ModuleList) -> list[Change]:
    """What makes the live model the cut one. Raises Refused where the cut config cannot say what stays."""
    config = decoder.model.config
    renamed = {
        f"{decoder.path}.{old}.{name}": f"{decoder.path}.{new}.{name}"
        for new, old in enumerate(kept)
        for name, _ in decoder.layers[old].named_parameters()
    }
    raw = config.to_dict()
    new_raw = cut_config(raw, config, kept, 0, renamed)  # 0: a live model has no layers for multi-token prediction
    try:
        whole = _blueprint(decoder, raw)
    except model_errors() as error:
        raise Refused(f"this {config.model_type} cannot be built from its own config: {one_line(error)}") from error
    try:
        cut = _blueprint(decoder, new_raw)
    except model_errors() as error:
        raise Refused(f"transformers cannot read what this cut would be: {one_line(error)}") from error
    prove_config(whole, cut, kept)
    found: dict[tuple[int, str], Change] = {}
    for name, live, before, after in _alike(decoder, whole, cut, kept, stack):
        for change in _differences(name, live, before, after):
            earlier = found.setdefault((id(change[0]), change[1]), change)
            if _text(earlier[2]) != _text(change[2]):
                raise Refused(
                    f"{name} of this {config.model_type} is shared between layers, and its {change[1]} would have to be both "
                    f"{earlier[2]} and {change[2]}; choose another block"
                )
    changes = [*found.values(), *_config_changes(decoder.model, whole.model.config, cut.model.config)]
    for module in decoder.model.modules():
        changes += [(module._modules, name, stack) for name, child in module._modules.items() if child is decoder.layers]
    return changes


def _blueprint(decoder: Decoder, raw: dict[str, Any]) -> Decoder:
    """The model that a config makes, without memory for its weights (and without quantisation)."""
    from transformers.initialization import no_init_weights

    with torch.device("meta"), no_init_weights():
        model = type(decoder.model)._from_config(type(decoder.model.config).from_dict(raw))
    layers = model.get_submodule(decoder.path)
    assert isinstance(layers, nn.ModuleList)
    return Decoder(model, decoder.path, layers)


def _alike(decoder: Decoder, whole: Decoder, cut: Decoder, kept: Kept, stack: nn.ModuleList) -> Iterator[tuple[str, Any, Any, Any]]:
    """(name, live module, the whole blueprint's, the cut blueprint's) of all modules that stay."""
    live, before = (dict(d.model.named_modules(remove_duplicate=False)) for d in (decoder, whole))
    stacked = dict(stack.named_modules(remove_duplicate=False))
    inside = f"{cut.path}."
    for name, after in cut.model.named_modules(remove_duplicate=False):
        old_name, found = name, live.get(name)
        if name.startswith(inside):
            index, dot, rest = name.removeprefix(inside).partition(".")
            old_name = f"{inside}{kept[int(index)]}{dot}{rest}"
            found = stacked.get(f"{index}{dot}{rest}")
        if old_name not in before:
            raise Refused(f"the cut would give this {decoder.model.config.model_type} a module that it does not have: {name}")
        yield old_name, found, before[old_name], after


def _differences(name: str, live: Any, before: Any, after: Any) -> Iterator[Change]:
    """The plain attributes in which two blueprints of a module or config differ, as changes of the live one."""
    had, has = vars(before), vars(after)
    for key in dict.fromkeys([*had, *has]):
        old, new = had.get(key, _ABSENT), has.get(key, _ABSENT)
        if key in _NOT_COMPARED or _text(old) == _text(new):
            continue
        if live is None or _text(vars(live).get(key, _ABSENT)) != _text(old):
            raise Refused(f"{name}.{key} would have to become {new}, but it is not {old} as the model's config has it")
        yield vars(live), key, new


def _config_changes(model: Any, before: Any, after: Any) -> list[Change]:
    """The changes of the model's config, of its parts, and of the copies of them that modules hold."""
    from transformers import PreTrainedConfig

    changes: list[Change] = []
    own: set[int] = set()

    def change(name: str, live: Any, old: Any, new: Any) -> None:
        own.add(id(live))
        changes.extend(_differences(name, live, old, new))
        for key, part in vars(live).items():
            if isinstance(part, PreTrainedConfig) and id(part) not in own and hasattr(old, key) and hasattr(new, key):
                change(f"{name}.{key}", part, getattr(old, key), getattr(new, key))

    change("config", model.config, before, after)
    was = {(key, _text(attributes[key])): new for attributes, key, new in changes if key in attributes}
    for module in model.modules():
        for copied in vars(module).values():
            # a copy keeps what it has of its own, such as the rotary base of one kind of layers
            if isinstance(copied, PreTrainedConfig) and id(copied) not in own:
                own.add(id(copied))
                new = ((key, was.get((key, _text(value)), _ABSENT)) for key, value in vars(copied).items())
                changes += [(vars(copied), key, value) for key, value in new if value is not _ABSENT]
    return changes


def _text(value: Any) -> str:
    """A plain value as it can be compared; of anything else only the class. A tuple counts as a list."""
    return json.dumps(value, default=lambda v: "" if v is _ABSENT else type(v).__qualname__, skipkeys=True)


@torch.no_grad()
def _expected(decoder: Decoder, kept: Kept, ids_BT: torch.Tensor) -> torch.Tensor:
    try:
        if len(set(kept)) < len(kept):
            return _layer_by_layer(decoder, kept, ids_BT)
        with virtual_cut(decoder, kept):
            return forward_logits(decoder, ids_BT)
    except model_errors() as error:
        raise Refused(
            f"this model does not run without layers {describe_dropped(kept, len(decoder))}: its layers pass on more than "
            f"their states ({type(error).__name__}: {one_line(error)}); choose another block"
        ) from error


def _layer_by_layer(decoder: Decoder, order: Kept, ids_BT: torch.Tensor) -> torch.Tensor:
    batch = Layerwise(decoder).begin(ids_BT)
    state = batch.start()
    for layer in order:
        state = batch.step(layer, state)
    tokens = ids_BT.shape[1]
    return batch.logits(state, torch.zeros(tokens, dtype=torch.long), torch.arange(tokens))[None]


@torch.no_grad()
def _prove(cut: Decoder, ids_BT: torch.Tensor, expected_BTV: torch.Tensor) -> None:
    """Raise Refused unless the cut model's logits are the expected ones, and its cache changes nothing."""
    model = cut.model
    try:
        found_BTV = forward_logits(cut, ids_BT)
        prompt_BT = ids_BT[:, :_PROMPT].to(cut.device)
        made = model.generate(
            prompt_BT, attention_mask=torch.ones_like(prompt_BT), max_new_tokens=_NEW, min_new_tokens=_NEW, do_sample=False,
            num_beams=1, num_return_sequences=1, use_cache=True, pad_token_id=0, return_dict_in_generate=True,
            output_logits=True,
        )  # fmt: skip
        plain_NV = forward_logits(cut, made.sequences[:, :-1])[0, _PROMPT - 1 :]
    except model_errors() as error:
        raise Refused(
            f"transformers cannot generate with a cache from what this cut would be ({type(error).__name__}: "
            f"{one_line(error)}); choose another block"
        ) from error
    if not expected_BTV.isfinite().all():
        raise Refused("the model's logits are not numbers, so the cut cannot be proven: its weights or this dtype overflow")
    exact = model.dtype == torch.float32 and found_BTV.device.type == "cpu"
    near = logits_near(cut)
    if not (torch.equal(expected_BTV, found_BTV) if exact else logit_distance(expected_BTV, found_BTV) <= near):
        raise Refused(
            f"the cut model's logits are not those of the model with these layers skipped (they differ by "
            f"{logit_distance(expected_BTV, found_BTV):.3g} of their size); it depends on layer positions in a way that its config "
            "does not show"
        )
    cached_NV = torch.cat(made.logits)
    if not logit_distance(plain_NV, cached_NV) <= near:
        raise Refused(
            f"the cut model's logits with a KV cache are not those without one (they differ by "
            f"{logit_distance(plain_NV, cached_NV):.3g} of their size): choose another block"
        )


def logits_near(decoder: Decoder) -> float:
    """How far, as `logit_distance` has it, rounding may move logits in the model's dtype."""
    return _NEAR if decoder.model.dtype == torch.float32 else _NEAR_HALF


def logit_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """How far logits lie from each other, as a share of their spread: 0 for equal ones, about 1.4 for unrelated ones."""
    a, b = a.double(), b.to(a.device).double()
    return float((a - b).norm() / (a - a.mean(dim=-1, keepdim=True)).norm())
