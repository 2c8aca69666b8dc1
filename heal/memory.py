"""A healing's plan of what it keeps in memory, and what a student makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from layerprune.heal.linear import four_bit_linears
from layerprune.heal.student import Student
from layerprune.model.memory import available_memory

GIB = 1 << 30
MOST_CONTEXT = 3 * GIB // 2
"""Bytes that CUDA and its libraries take of a device beside the tensors, at most."""


@dataclass(frozen=True)
class Memory:
    """A plan: sequences in memory at once; of the trained layers, how many (the first ones) are computed again in the
    backward pass; of all layers, how many keep decoded weights; whether layers are compiled.

    estimate: bytes of the peak, the device's context included; seconds: of one step. None where nothing was measured.
    """

    micro_batch: int
    recomputed: int = 0
    decoded: int = 0
    compiled: bool = False
    estimate: int | None = None
    seconds: float | None = None

    def record(self) -> dict[str, Any]:
        return asdict(self)


def trained_layers(student: Student) -> list[int]:
    """Layers that the backward pass goes through: from the first one with an adapter on."""
    decoder = student.decoder
    with_adapter = [i for i in student.kept if any(p.requires_grad for p in decoder.layers[i].parameters())]
    return [i for i in student.kept if with_adapter and i >= with_adapter[0]]


def apply_plan(student: Student, plan: Memory, trained: Sequence[int], order: Sequence[int]) -> None:
    """Set a student up as planned; weights that are decoded once stay so."""
    student.compiled = plan.compiled
    student.recomputed = frozenset(trained[: plan.recomputed])
    for index in order[: plan.decoded]:
        for part in four_bit_linears(student.decoder.layers[index]):
            part.decode()


def plan_on_cpu(student: Student, sizes: Sequence[int], most: int) -> Memory:
    """On a CPU: few sequences at once, activations kept, and weights decoded where half of the free memory holds them."""
    layers = len(student.decoder)
    extra = sum(p.decoded_bytes for layer in student.decoder.layers for p in four_bit_linears(layer))
    decoded = layers if extra < available_memory() // 2 else 0
    return Memory(max([size for size in sizes if size <= most] or [min(sizes)]), 0, decoded)


def context_bytes(device: torch.device) -> int:
    """Bytes of the device that this process takes for other than tensors; more than `MOST_CONTEXT` are another process's."""
    free, total = torch.cuda.mem_get_info(device)
    return min(MOST_CONTEXT, max(0, total - free - torch.cuda.memory_reserved(device)))
