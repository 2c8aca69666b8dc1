"""Proof that every layer that stays is built like the layer it came from."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from layerprune.model.config import text_config
from layerprune.model.cuts import Kept
from layerprune.model.errors import Refused
from layerprune.model.surgery import is_per_layer


def prove_config(source: Any, result: Any, kept: Kept) -> None:
    """Compare a decoder of the source with one of the cut config (both may be on the meta device).

    source, result: `Decoder`s. Every kept layer must have the modules, parameter and buffer shapes and plain
    attributes of the layer it came from (its own index aside), every per-layer list of the config must be the
    source's cut, and nothing outside the stack may change its shape. Raises Refused with the first difference.
    """
    kind = source.model.config.model_type
    before, after = text_config(source.model.config).to_dict(), text_config(result.model.config).to_dict()
    layers = len(source)
    if len(result) != len(kept):
        raise Refused(f"the cut config makes {len(result)} layers instead of {len(kept)}")
    for name, shape in _outside(source).items():
        found = _outside(result).get(name)
        if found != shape:
            raise Refused(
                f"{name} of this {kind} holds something for every layer ({shape} would have to become {found}): cutting its "
                "layers means cutting inside tensors, which is not supported"
            )
    for new, old in enumerate(kept):
        difference = _difference(source.layers[old], result.layers[new], (old, new, layers, kept))
        if difference:
            raise Refused(
                f"this {kind} config cannot say what the cut needs: old layer {old} would become layer {new} with another "
                f"{difference}; choose another block"
            )
    for key, value in before.items():
        if isinstance(value, list) and len(value) == layers and is_per_layer(key, value) and key != "kv_source_layers":
            cut = [value[i] for i in kept]
            if key in after and after[key] != cut:
                raise Refused(f"the config entry {key} cannot be cut: {after[key]} is not {cut}")


def _outside(decoder: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters that are not in the stack."""
    return {n: tuple(p.shape) for n, p in decoder.model.named_parameters() if not n.startswith(decoder.path + ".")}


Move = tuple[int, int, int, Kept]
"""Old index, new index, layers of the source, layers that stay."""
_OWN_INDEX = re.compile(r"(self_)?(layer_?(idx|id|index|number)|block_idx)")
# Gemma-4's last layer of a type offers its keys to layers that reuse them. Those that stay take them from the layer that
# they always took them from (surgery refuses to cut that one), so an offer that is new or gone has no taker.
_OFFERS = {"store_full_length_kv"}


def _difference(old: Any, new: Any, move: Move) -> str | None:
    """The first thing in which two layers differ, other than their index; None when they are alike."""
    old_modules, new_modules = dict(old.named_modules()), dict(new.named_modules())
    if old_modules.keys() != new_modules.keys():
        return f"set of modules ({min(old_modules.keys() ^ new_modules.keys())})"
    for name, a in old_modules.items():
        b = new_modules[name]
        where = f" of {name}" if name else ""
        if type(a) is not type(b):
            return f"module class{where}: {type(a).__name__} became {type(b).__name__}"
        for what in ("named_parameters", "named_buffers"):
            here, there = _shapes(getattr(a, what)), _shapes(getattr(b, what))
            for key in sorted(here.keys() | there.keys()):
                if here.get(key) != there.get(key):
                    return f"shape of {key}{where} ({here.get(key)} became {there.get(key)})"
        for key, value in vars(a).items():
            if key.startswith("_") or key in _OFFERS:
                continue
            was, now = _plain(value), _plain(vars(b).get(key))
            if was != now and not _moved(key, was, now, move):
                return f"{key}{where} ({was} became {now})"
    return None


def _shapes(named: Callable[..., Any]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in named(recurse=False)}


def _plain(value: Any) -> Any:
    """What of an attribute can be compared: plain values as they are, functions by name, else the class."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if value == value else "nan"
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    return getattr(value, "__qualname__", type(value).__qualname__)


def _moved(key: str, was: Any, now: Any, move: Move) -> bool:
    """Whether an attribute differs only as an index must: a layer's own, another layer's, or a cut list."""
    old, new, layers, kept = move
    if isinstance(was, list) and isinstance(now, list) and len(was) == layers:
        return now == [was[i] for i in kept]
    if type(was) is not int or type(now) is not int:
        return False
    if _OWN_INDEX.fullmatch(key):
        # a layer with two attention parts may number them 2i and 2i+1 (LongCat)
        return any(was - step * old == now - step * new for step in (1, 2))
    return "layer" in key and was in kept and now == kept.index(was)
