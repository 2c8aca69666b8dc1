"""The plan of a cut: every stored tensor name mapped to its new name or to nothing, from the names alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from layerprune.model.cuts import Kept, check_kept
from layerprune.model.errors import Refused
from layerprune.model.tensors import StoredTensor

_NUMBERED = re.compile(r"^((?:[^.\d][^.]*\.)*?)(\d+)\.(.+)$")
_OTHER = ("vision", "visual", "image", "audio", "speech", "encoder", "video")


@dataclass(frozen=True)
class CutPlan:
    """`renamed` maps source names to new names in source order; `dropped` lists the names that go."""

    prefix: str
    renamed: dict[str, str]
    dropped: tuple[str, ...]


def split_name(name: str) -> tuple[str, int, str] | None:
    """`model.layers.7.mlp.up_proj.weight` as (`model.layers.`, 7, `mlp.up_proj.weight`); None without a number."""
    match = _NUMBERED.match(name)
    return None if match is None else (match[1], int(match[2]), match[3])


def find_stack(names: Iterable[str], layers: int) -> str:
    """The prefix under which the decoder's layers are stored, such as `model.layers.` or `h.`.

    It is the prefix that holds all indices 0..layers-1; parts of other modalities come last, then the one
    with most tensors wins. Raises Refused where none holds them.
    """
    indices: dict[str, set[int]] = {}
    counts: dict[str, int] = {}
    for name in names:
        parts = split_name(name)
        if parts is not None:
            indices.setdefault(parts[0], set()).add(parts[1])
            counts[parts[0]] = counts.get(parts[0], 0) + 1
    whole = [p for p, held in indices.items() if set(range(layers)) <= held]
    text = [p for p in whole if not any(word in p.lower() for word in _OTHER)] or whole
    if not text:
        best = max(indices.items(), key=lambda item: len(item[1]), default=None)
        seen = f"the longest numbered series is {best[0]}N with {len(best[1])}" if best else "no tensor name is numbered"
        raise Refused(f"the weights contradict the config: it has {layers} layers, but {seen}")
    return max(text, key=lambda p: counts[p])


def plan_cut(stored: Mapping[str, StoredTensor], layers: int, kept: Kept, extra: int = 0) -> CutPlan:
    """Map every stored name to its name after the cut.

    extra: layers stored after the last under the same prefix (multi-token prediction); they move up with it.
    Raises Refused when the stored layers are more than `layers + extra`.
    """
    check_kept(kept, layers)
    prefix = find_stack(stored, layers)
    held = {parts[1] for parts in map(split_name, stored) if parts and parts[0] == prefix}
    if max(held) >= layers + extra:
        raise Refused(
            f"the weights contradict the config: it has {layers} layers, but {prefix}{max(held)} is stored; "
            "loading it would silently leave weights out"
        )
    new_index = {old: new for new, old in enumerate(kept)}
    new_index |= {old: old - layers + len(kept) for old in range(layers, layers + extra)}
    renamed: dict[str, str] = {}
    dropped: list[str] = []
    for name in stored:
        parts = split_name(name)
        if parts is None or parts[0] != prefix:
            renamed[name] = name
        elif parts[1] in new_index:
            renamed[name] = f"{prefix}{new_index[parts[1]]}.{parts[2]}"
        else:
            dropped.append(name)
    return CutPlan(prefix, renamed, tuple(dropped))
