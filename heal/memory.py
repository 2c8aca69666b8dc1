"""A healing's plan of what it keeps in memory, and what a student makes of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from layerprune.heal.linear import four_bit_linears
from layerprune.heal.student import Student
from layerprune.model.errors import Refused
from layerprune.model.passplan import PROCESS_BYTES

GIB = 1 << 30
CPU_SLACK = 1.25
"""Bytes that a process holds for a byte of tensors in a step on the CPU."""
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


@dataclass(frozen=True)
class Saved:
    """Bytes of a step on the CPU. kept: what a sequence leaves for the backward pass; again: with all trained layers computed
    again; fixed: what is there besides, whatever the number of sequences."""

    kept: int
    again: int
    fixed: int

    def need(self, sequences: int, recomputed: int, trained: int) -> int:
        """Of a step with the first `recomputed` of the trained layers computed again."""
        each = (self.kept - self.again) / max(1, trained)
        # a layer that goes back has its slopes beside what it kept, or keeps what it computes again
        layers = self.kept - recomputed * each + each * (1 + bool(recomputed))
        return int(CPU_SLACK * (self.fixed + sequences * layers))


def plan_on_cpu(
    student: Student,
    sizes: Sequence[int],
    most: int,
    room: int,
    saved: Saved | None = None,
    held: int = 0,
    ram: int | None = None,
    processes: int = 1,
) -> Memory:
    """On a CPU: few sequences at once, activations kept, and weights decoded where half of the free memory holds them.

    room: bytes of RAM that may still be taken. saved: where given, the plan keeps within `room`; what does not fit then is
    given up in this order: decoded weights, sequences at once, activations. held: bytes that are taken already, for the estimate.
    ram: what the user gave for all `processes` of this machine, for the refusal.
    Raises Refused where nothing fits.
    """
    layers, trained = len(student.decoder), len(trained_layers(student))
    extra = sum(p.decoded_bytes for layer in student.decoder.layers for p in four_bit_linears(layer))
    fitting = sorted([size for size in sizes if size <= most] or [min(sizes)], reverse=True)
    if saved is None:
        return Memory(fitting[0], 0, layers if extra < room // 2 else 0)
    ways = [(size, 0) for size in fitting] + [(fitting[-1], recomputed) for recomputed in range(1, trained + 1)]
    least = saved.need(*ways[0], trained)
    for size, recomputed in ways:
        need = saved.need(size, recomputed, trained)
        least = min(need, least)
        if need <= room:
            decoded = layers if need + extra <= room else 0
            return Memory(size, recomputed, decoded, estimate=held + need + (extra if decoded else 0))
    smaller = "use a smaller --length or a smaller --lora-rank"
    if ram is None or ram // processes >= held + least:
        raise Refused(
            f"healing does not fit in the {room / GIB:.2f} GiB of host memory that are free: a step takes {least / GIB:.2f} GiB "
            f"beside the model: {smaller}, or make room"
        )
    raise Refused(
        f"{_too_little(ram, held, processes)}, a step {_up(least).removesuffix('GiB')} GiB more: give at least "
        f"{_up(processes * (held + least))}, or {smaller}"
    )


def refuse_ram(ram: int | None, numbers: int, processes: int = 1) -> None:
    """Refuse, before anything is loaded, host memory that a process and a model of so many `numbers` in NF4 do not fit in."""
    held = PROCESS_BYTES + numbers // 2
    if ram is not None and ram // processes < held:
        raise Refused(f"{_too_little(ram, held, processes)} alone, and a step more: give more than {_up(processes * held)}")


def _too_little(ram: int, held: int, processes: int) -> str:
    shared = f", shared by {processes} processes" if processes > 1 else ""
    given = math.floor(100 * ram / GIB) / 100  # what is needed is rounded up
    return f"healing does not fit in --ram {given:.2f}GiB{shared}: the process and the model take {held / GIB:.2f} GiB"


def _up(size: int) -> str:
    """An amount that `--ram` takes, rounded up."""
    return f"{math.ceil(100 * size / GIB) / 100:.2f}GiB"


def context_bytes(device: torch.device) -> int:
    """Bytes of the device that this process takes for other than tensors; more than `MOST_CONTEXT` are another process's."""
    free, total = torch.cuda.mem_get_info(device)
    return min(MOST_CONTEXT, max(0, total - free - torch.cuda.memory_reserved(device)))
