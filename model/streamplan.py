"""The plan of ranking and sweeping a model by its sizes alone: passes over the checkpoint, bytes, hours. Nothing is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from layerprune.model.cuts import Kept, last_block
from layerprune.model.estimate import Device, document_tokens, mlp_width
from layerprune.model.passplan import PassPlan, Sizes, plan_passes
from layerprune.model.recipes import Shape
from layerprune.model.tree import CutTree

LOGIT_BYTES = 1 << 30
CPU_LOGIT_BYTES = 256 << 20
"""What logits take at once in evaluation, on a GPU and on a CPU."""


@dataclass(frozen=True)
class StreamCost:
    """A streamed step: its plan, operations, and hours: those of the slower of reading and computing, since both go on at once."""

    name: str
    plan: PassPlan
    flops: float
    read_hours: float
    compute_hours: float

    @property
    def hours(self) -> float:
        return max(self.read_hours, self.compute_hours)


def sizes_of_shape(shape: Shape, weight_bytes: float, stored_bytes: float) -> Sizes:
    """Layers of equal size; where a shape does not say how large one is, all but an untied embedding and head is layers."""
    layer = shape.layer_parameters or max(0, shape.parameters - 2 * shape.vocab * shape.hidden) // shape.layers
    rest = shape.parameters - shape.layers * layer
    return Sizes(
        rest=int(rest * weight_bytes),
        layers=(int(layer * weight_bytes),) * shape.layers,
        stored=(int(layer * stored_bytes),) * shape.layers,
        arriving=int(layer * stored_bytes),
        width=shape.hidden,
        itemsize=2 if weight_bytes <= 2 else 4,
        beside=0,
        pair=2 if weight_bytes <= 2 else 4,
    )


def plan_streaming(
    shape: Shape, kept: Sequence[Kept], device: Device, *, name: str, data: str, samples: int, length: int | None,
    memory: int | None, ram: int, disk_rate: float, heads: bool, scratch: int = 0, stored_bytes: float = 2.0, active: float = 1.0,
) -> StreamCost:  # fmt: skip
    """What one streamed step over `samples` documents will take.

    disk_rate: bytes a second, of the checkpoint's disk and of the scratch file's, whose size is at most `scratch`. heads:
    whether logits are computed at the end of each branch. active: the share of a layer's parameters that a token uses (a
    mixture of experts). Documents count as `layerprune.model.estimate` counts them; one longer than its mean stands for
    several. Raises Refused where a batch does not fit.
    """
    sizes = sizes_of_shape(shape, device.weight_bytes, stored_bytes)
    tree = CutTree(kept, shape.layers)
    tokens = document_tokens(data, samples, length)
    width = min(length or 2048, max(1, tokens // samples))
    rows = max(1, device.batch_tokens // width)
    count = -(-samples // rows)
    working = rows * width * (4 * shape.hidden + 3 * min(mlp_width(shape), 8 * shape.hidden)) * sizes.itemsize
    working += (LOGIT_BYTES if memory is not None else CPU_LOGIT_BYTES) if heads else 0
    plan = plan_passes(sizes, tree, [(rows, width)] * count, memory=memory, ram=ram, working=working, scratch=scratch)
    layer = sizes.layers[0] / device.weight_bytes * active
    flops = 2.0 * tokens * (layer * tree.applications + (shape.vocab * shape.hidden * tree.heads if heads else 0))
    read = (plan.read + plan.traffic + sizes.rest / device.weight_bytes * stored_bytes) / disk_rate
    return StreamCost(name, plan, flops, read / 3600, flops / device.forward_rate / 3600)


def rank_branches(layers: int) -> list[Kept]:
    """What a ranking runs: the whole model."""
    return [tuple(range(layers))]


def last_branches(layers: int) -> list[Kept]:
    """What a sweep by the last-n heuristic runs: the whole model and every n."""
    return [tuple(range(layers)), *(last_block(n, layers).kept(layers) for n in range(1, layers))]
