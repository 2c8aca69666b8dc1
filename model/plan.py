"""The plan of a cut: every stored tensor name mapped to its new name or to nothing, from the names alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from layerprune.model.cuts import Kept, check_kept
from layerprune.model.errors import Refused
from layerprune.model.tensors import StoredTensor

# Buffers that older checkpoints store in every layer and that every model computes itself.
_STRAY = re.compile(r"(attn|attention)\.(bias|masked_bias|causal_mask)$|rotary_emb\.inv_freq$")
# What a layer for multi-token prediction has and no decoder layer has: it joins the next token to the last state.
_MTP = re.compile(r"(^|\.)eh_proj\.")
_NUMBERED = re.compile(r"^((?:[^.\d][^.]*\.)*?)(\d+)\.(.+)$")
_OTHER = ("vision", "visual", "image", "audio", "speech", "encoder", "video")


@dataclass(frozen=True)
class CutPlan:
    """`renamed` maps source names to new names in source order; `dropped` lists the names that go.

    `extra` counts the layers for multi-token prediction that were stored after the last layer and go too.
    """

    prefix: str
    renamed: dict[str, str]
    dropped: tuple[str, ...]
    extra: int = 0


def split_name(name: str) -> tuple[str, int, str] | None:
    """`model.layers.7.mlp.up_proj.weight` as (`model.layers.`, 7, `mlp.up_proj.weight`); None without a number."""
    match = _NUMBERED.match(name)
    return None if match is None else (match[1], int(match[2]), match[3])


def in_other_part(prefix: str) -> bool:
    """Whether a name's prefix lies in a part for another modality, or in an encoder."""
    return any(word in prefix.lower() for word in _OTHER)


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
    text = [p for p in whole if not in_other_part(p)] or whole
    if not text:
        best = max(indices.items(), key=lambda item: len(item[1]), default=None)
        seen = f"the longest numbered series is {best[0]}N with {len(best[1])}" if best else "no tensor name is numbered"
        raise Refused(f"the weights contradict the config: it has {layers} layers, but {seen}")
    return max(text, key=lambda p: counts[p])


def extra_layers(names: Iterable[str], prefix: str, layers: int) -> int:
    """How many layers for multi-token prediction are stored right after the last decoder layer."""
    parts = [p for p in map(split_name, names) if p is not None and p[0] == prefix and p[1] >= layers]
    marked = {index for _, index, rest in parts if _MTP.search(rest)}
    count = 0
    while layers + count in marked:
        count += 1
    return count


def unwelcome(left_over: Iterable[str], layers: int) -> list[str]:
    """Of the names that a loader left over, those that say that config and weights disagree.

    The others are harmless: layers for multi-token prediction, and buffers that models compute themselves.
    """
    parts = {name: split_name(name) for name in left_over}
    mtp = {p[:2] for p in parts.values() if p is not None and p[1] >= layers and _MTP.search(p[2])}
    return [n for n, p in parts.items() if p is None or not (p[:2] in mtp or _STRAY.search(p[2]))]


def is_stray_buffer(rest: str, tensor: StoredTensor) -> bool:
    """Whether a layer's tensor is a constant that older checkpoints store: a causal mask, its fill value, frequencies."""
    if not _STRAY.search(rest):
        return False
    if rest.endswith("inv_freq"):
        return len(tensor.shape) == 1
    mask = len(tensor.shape) == 4 and tensor.shape[:2] == (1, 1) and tensor.shape[2] == tensor.shape[3]
    return mask or tensor.numel == 1


def by_layer(stored: Mapping[str, StoredTensor], layers: int) -> tuple[list[dict[str, StoredTensor]], dict[str, StoredTensor]]:
    """The stored tensors of each layer, and those outside the stack; constants that models compute themselves, and layers after
    the last, belong to neither. Raises Refused as `find_stack`."""
    prefix = find_stack(stored, layers)
    groups: list[dict[str, StoredTensor]] = [{} for _ in range(layers)]
    rest: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        parts = split_name(name)
        if parts is None or parts[0] != prefix:
            rest[name] = tensor
        elif parts[1] < layers and not is_stray_buffer(parts[2], tensor):
            groups[parts[1]][name] = tensor
    return groups, rest


def least_left(stored: Mapping[str, StoredTensor], layers: int, dropped: int) -> int:
    """Numbers that the stored tensors of a cut hold at least, whichever `dropped` layers in a row go. Raises Refused as
    `find_stack`."""
    groups, rest = by_layer(stored, layers)
    each = [sum(tensor.numel for tensor in group.values()) for group in groups]
    most = max(sum(each[start : start + dropped]) for start in range(layers - dropped + 1))
    return sum(tensor.numel for tensor in rest.values()) + sum(each) - most


def plan_cut(stored: Mapping[str, StoredTensor], layers: int, kept: Kept) -> CutPlan:
    """Map every stored name to its name after the cut.

    Besides the layers that are cut, two things go. Layers for multi-token prediction under the same prefix: a loader
    knows them by the index that the whole model gives them, and they were trained on its last state. And buffers
    that models compute themselves. Raises Refused when other layers are stored after the last.
    """
    check_kept(kept, layers)
    prefix = find_stack(stored, layers)
    extra = extra_layers(stored, prefix, layers)
    held = {parts[1] for parts in map(split_name, stored) if parts and parts[0] == prefix}
    if max(held) >= layers + extra:
        raise Refused(
            f"the weights contradict the config: it has {layers} layers, but {prefix}{max(held)} is stored; "
            "loading it would silently leave weights out"
        )
    new_index = {old: new for new, old in enumerate(kept)}
    renamed: dict[str, str] = {}
    dropped: list[str] = []
    for name, tensor in stored.items():
        parts = split_name(name)
        if parts is None or parts[0] != prefix:
            renamed[name] = name
        elif parts[1] in new_index and not is_stray_buffer(parts[2], tensor):
            renamed[name] = f"{prefix}{new_index[parts[1]]}.{parts[2]}"
        else:
            dropped.append(name)
    return CutPlan(prefix, renamed, tuple(dropped), extra)
