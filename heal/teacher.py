"""The unpruned model that a cut checkpoint came from, and the proof that the two belong together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from layerprune.model.config import layer_count, load_config
from layerprune.model.cuts import Kept, check_kept
from layerprune.model.errors import LayerpruneError, Refused, UsageError, one_line
from layerprune.model.files import read_json
from layerprune.model.plan import CutPlan, plan_cut
from layerprune.model.source import ModelSource, find_model
from layerprune.model.tensors import StoredTensor, read_checkpoint
from layerprune.model.verify import prove_bytes

TRAINED = ("healing", "bridge")
"""Entries of layerprune.json that say that weights were changed after the cut."""


@dataclass(frozen=True)
class Teacher:
    """An unpruned model, and which of its `layers` layers the cut checkpoint kept (0-based, in order)."""

    source: ModelSource
    kept: Kept
    layers: int


@dataclass(frozen=True)
class _Origin:
    """A model that layerprune.json names: the cut's source, or the source of a cut before it."""

    kept: Kept
    layers: int
    names: tuple[str, ...]
    revision: str | None


def seam(kept: Kept) -> int:
    """Index, in the cut model, of the first layer after the first cut: the least j with kept[j] != j.

    0 where the cut begins with the first layer; len(kept) where nothing was cut, or only layers at the end.
    """
    return next((new for new, old in enumerate(kept) if new != old), len(kept))


def kept_layers(source: ModelSource) -> Kept:
    """The layers that stayed of the model before the first cut, or of the last one that was trained in between."""
    return _origins(source)[-1].kept


def recorded_cut(source: ModelSource) -> Kept | None:
    """The layers that were kept, by the checkpoint's own record; None where it is no cut."""
    path = source.folder / "layerprune.json"
    record = read_json(path) if path.exists() else {}
    return kept_layers(source) if isinstance(record, Mapping) and "kept" in record else None


def find_teacher(source: ModelSource, given: str | None = None, trust_remote_code: bool = False) -> Teacher:
    """The model that the checkpoint `source` was cut from: the one `given` (recipe, Hub id or folder), else its record's.

    Of a cut of a cut, the model before the first cut is taken (after the last training in between, if there was
    any); `given` may be any of them, its number of layers tells which. Only configs and safetensors headers are
    read: the checkpoint must have exactly the tensors that the cut of the teacher has, by name and shape. That
    their bytes are the same is for `prove_pair`.
    Raises UsageError where `source` has no record of a cut, and where the teacher is not found or has another number
    of layers; Refused where the tensors differ.
    """
    origins = _origins(source)
    count = layer_count(load_config(source.folder, trust_remote_code))
    if count != len(origins[0].kept):
        raise Refused(
            f"layerprune.json of {source.name} says that {len(origins[0].kept)} layers were kept, its config has {count}: the "
            "record belongs to another checkpoint"
        )
    if given is None:
        origin = origins[-1]
        found = _find(source, origin)
        layers = layer_count(load_config(found.folder, trust_remote_code))
        if layers != origin.layers:
            raise UsageError(
                f"{source.name} was cut from {found.name} when that had {origin.layers} layers, now it has {layers}: give the "
                "original with --teacher"
            )
    else:
        try:
            found = find_model(given)
        except LayerpruneError as error:
            raise type(error)(str(error).replace("--model", "--teacher")) from None
        layers = layer_count(load_config(found.folder, trust_remote_code))
        fitting = [origin for origin in origins if origin.layers == layers]
        if not fitting:
            wanted = " or ".join(str(origin.layers) for origin in origins)
            raise UsageError(f"--teacher {given} has {layers} layers, and {source.name} was cut from a model of {wanted}")
        origin = fitting[0]
    teacher = Teacher(found, origin.kept, layers)
    _same_shapes(source, teacher)
    return teacher


def prove_pair(source: ModelSource, teacher: Teacher, progress: Callable[[int], None] = lambda nbytes: None) -> CutPlan:
    """Prove that every tensor of the cut checkpoint `source` is the teacher's, byte for byte; returns the cut's plan.

    Both are read once, in pieces of a few MiB. Raises Refused for a checkpoint that was trained after it was cut
    (healed or bridged), and for one whose weights are not the teacher's.
    """
    record = read_json(source.folder / "layerprune.json")
    done = next((what for what in TRAINED if what in record), None)
    if done is not None:
        raise Refused(
            f"{source.name} was trained after it was cut (layerprune.json has a {done!r} entry), so it no longer shares its "
            "weights with its teacher: give the cut checkpoint from before that"
        )
    stored = read_checkpoint(teacher.source.folder)
    plan = plan_cut(stored, teacher.layers, teacher.kept)
    try:
        prove_bytes(stored, source.folder, plan.renamed, progress)
    except Refused as refusal:
        raise Refused(
            f"{source.name} and {teacher.source.name} share no weights ({_detail(refusal)}): the cut was trained afterwards, "
            "or --teacher is not the model that it was cut from"
        ) from refusal
    return plan


def _detail(refusal: Refused) -> str:
    return str(refusal).removeprefix("the written checkpoint is wrong: ")


def _origins(source: ModelSource) -> list[_Origin]:
    """Where the checkpoint came from, nearest first; a training in between ends the line."""
    path = source.folder / "layerprune.json"
    record: Any = read_json(path) if path.exists() else {}
    if not isinstance(record, Mapping) or "kept" not in record:
        raise UsageError(
            f"{source.name} is no cut: it has no layerprune.json with the layers that were kept; give a checkpoint that "
            "`layerprune prune` wrote"
        )
    origins: list[_Origin] = []
    kept: Kept | None = None
    while isinstance(record, Mapping) and "kept" in record and not (origins and any(key in record for key in TRAINED)):
        try:
            layers, own = int(record["layers"]), tuple(int(i) for i in record["kept"])
            check_kept(own, layers)
            kept = own if kept is None else tuple(own[i] for i in kept)
            before = record.get("previous")
            # of a cut of a cut, the Hub id is that of the model before both
            names = (record["source"], None if before else record.get("hub_id"))
            revision = record.get("revision")
        except (KeyError, TypeError, ValueError, IndexError, UsageError):
            raise Refused(f"{path} is not a record of a cut that layerprune wrote: prune the model again") from None
        origins.append(_Origin(kept, layers, tuple(name for name in names if name), revision))
        record = before
    return origins


def _find(source: ModelSource, origin: _Origin) -> ModelSource:
    why = "its record names no source"
    for name in dict.fromkeys(origin.names):
        try:
            return find_model(name, origin.revision)
        except LayerpruneError as error:
            why = one_line(error).removeprefix("--model ")
    named = " or ".join(origin.names) or "a model"
    raise UsageError(f"{source.name} was cut from {named}, which is not to be found ({why}): give it with --teacher")


def _same_shapes(source: ModelSource, teacher: Teacher) -> None:
    before = read_checkpoint(teacher.source.folder)
    renamed = plan_cut(before, teacher.layers, teacher.kept).renamed
    after = read_checkpoint(source.folder)
    expected: dict[str, StoredTensor] = {new: before[old] for old, new in renamed.items()}
    for name in sorted(set(expected) | set(after)):
        a, b = expected.get(name), after.get(name)
        if a is None or b is None or a.shape != b.shape:
            shapes = [f"the shape {t.shape}" if t else "no such tensor" for t in (b, a)]
            raise Refused(
                f"{source.name} is not cut from {teacher.source.name}: for {name} it has {shapes[0]}, a cut of that model "
                f"{shapes[1]}; give the right model with --teacher"
            )
