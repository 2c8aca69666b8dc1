"""How many passes over its checkpoint a streamed computation takes, and what it needs: arithmetic, without torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from layerprune.model.errors import Refused
from layerprune.model.tree import CutTree, Node

Shape = tuple[int, int]
"""Rows and tokens of a batch."""

PROCESS_BYTES = 700 << 20
"""What Python, torch and transformers take of the host's memory themselves."""


@dataclass(frozen=True)
class Sizes:
    """Of a streamed model: bytes of the weights outside the stack, of each layer in memory and as stored; the numbers in
    a token's state, and the bytes of one."""

    rest: int
    layers: tuple[int, ...]
    stored: tuple[int, ...]
    width: int
    itemsize: int


@dataclass(frozen=True)
class PassPlan:
    """How a streamed computation is done, in bytes.

    hold: layers that stay in memory during a pass. groups: the batches (by number) of each pass over the checkpoint. place:
    where states lie between layers, `cpu` or the device. read: from the files, over all passes. fixed: what is in memory
    whatever the batches are; states: what the states of the largest group take. most: states of one token at once.
    """

    hold: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]
    place: str
    read: int
    fixed: int
    states: int
    most: int

    def line(self) -> str:
        """The plan in one line, for people."""
        passes = "1 pass" if len(self.groups) == 1 else f"{len(self.groups)} passes"
        held = "" if not self.hold else f", layer {', '.join(map(str, self.hold))} held"
        return (
            f"layer by layer: {passes} over the checkpoint, {self.read / 1e9:.2f} GB read{held}; "
            f"{self.states / 1e9:.2f} GB of states at once in {'host' if self.place == 'cpu' else 'GPU'} memory, beside "
            f"{self.fixed / 1e9:.2f} GB of weights and working memory"
        )


def plan_passes(
    sizes: Sizes, tree: CutTree, shapes: Sequence[Shape], *, memory: int | None, ram: int, working: int
) -> PassPlan:
    """Group batches so that a pass fits in memory.

    memory: bytes of the GPU that may be used, None on a CPU. ram: of the host's memory. working: bytes that computing one
    batch takes beside its states (activations, logits). Raises Refused when the largest batch does not fit.
    """
    layers = used_layers(tree)
    last = max(layers)
    ends = sum(node.layer == last for node in nodes_of(tree))
    hold = (last,) if ends > 1 and last > 0 else ()
    most = stored_states(tree, hold)
    weights = sizes.rest + sum(sizes.layers[i] for i in hold) + 2 * max(sizes.layers[i] for i in layers)
    arriving = max(sizes.stored[i] for i in layers)

    def of(shape: Shape) -> int:
        rows, tokens = shape
        return rows * tokens * sizes.itemsize * (most * sizes.width + tokens)  # and a mask, where rows are padded

    needs = [of(shape) for shape in shapes]
    whole = sum(needs)
    if memory is not None:
        fixed = weights + arriving + working
        host = PROCESS_BYTES + 2 * arriving
        spare_here, spare_there = memory - fixed, ram - host
        place = "cuda" if whole <= spare_here or spare_here >= spare_there else "cpu"
        spare = spare_here if place == "cuda" else spare_there
        option, given = ("--memory", memory) if spare_here < 0 or place == "cuda" else ("--ram", ram)
        if spare_here < 0:
            spare = spare_here
        elif spare_there < 0:  # what arrives goes through the host
            spare, option, given = spare_there, "--ram", ram
    else:
        fixed = weights + arriving + working + PROCESS_BYTES
        place, spare, option, given = "cpu", ram - fixed, "--ram", ram
    if not needs or max(needs) > spare:
        least = given - spare + max(needs, default=0)
        raise Refused(
            f"{option} {given / 2**30:.2f}GiB is too little for this model layer by layer: use at least "
            f"{math.ceil(least / 2**30 * 100) / 100:.2f}GiB, fewer depths or a smaller --length"
        )
    groups: list[list[int]] = [[]]
    used = 0
    for number, need in enumerate(needs):
        if groups[-1] and used + need > spare:
            groups.append([])
            used = 0
        groups[-1].append(number)
        used += need
    each = sum(sizes.stored[i] for i in layers)
    largest = max(sum(needs[i] for i in group) for group in groups)
    return PassPlan(hold, tuple(map(tuple, groups)), place, each * len(groups), fixed, largest, most)


def used_layers(tree: CutTree) -> list[int]:
    """The layers that a pass brings in, in order: those of the tree, and the first, which shows what layers return."""
    return sorted({node.layer for node in nodes_of(tree)} | {0})


def nodes_of(tree: CutTree) -> list[Node]:
    """All nodes, parents before their children."""
    return nodes_below(tree.roots)


def nodes_below(nodes: Sequence[Node]) -> list[Node]:
    """These nodes and all that follow on them, parents before their children."""
    found, waiting = [], list(nodes)
    while waiting:
        node = waiting.pop()
        found.append(node)
        waiting += node.children
    return found


def stored_states(tree: CutTree, hold: Sequence[int] = ()) -> int:
    """The most states of one batch that exist at once when the tree is walked layer by layer: those waiting for a
    later layer, the one at work and its result."""
    waiting: dict[int, int] = {}
    parents: dict[int, Node] = {id(child): node for node in nodes_of(tree) for child in node.children}
    wanted = {id(node): later(node.children, hold) for node in nodes_of(tree)}
    start = later(tree.roots, hold)
    waiting[0] = start
    most = 1
    for layer in sorted({node.layer for node in nodes_of(tree)}):
        for node in nodes_of(tree):
            if node.layer != layer or layer in hold:
                continue
            most = max(most, sum(left > 0 for left in waiting.values()) + 1)
            parent = parents.get(id(node))
            waiting[0 if parent is None else id(parent)] -= 1
            waiting[id(node)] = wanted[id(node)]
    return most + 1


def later(children: Sequence[Node], hold: Sequence[int]) -> int:
    return sum(child.layer not in hold for child in children)
