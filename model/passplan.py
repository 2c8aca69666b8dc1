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
    """Of a streamed model: bytes of the weights outside the stack, of each layer in memory and as stored, and what any takes
    for a while when it comes; the numbers in a token's state, and the bytes of one. A batch keeps in memory what its layers
    are called with beside their states: bytes of each token (`beside`), and of each pair of tokens of a row (`pair`: masks)."""

    rest: int
    layers: tuple[int, ...]
    stored: tuple[int, ...]
    arriving: int
    width: int
    itemsize: int
    beside: int
    pair: int


@dataclass(frozen=True)
class PassPlan:
    """How a streamed computation is done, in bytes.

    hold: layers that stay in memory during a pass. groups: the batches (by number) of each pass over the checkpoint. read: from
    the weight files, over all passes. fixed: what is in memory whatever the batches are, of the GPU where there is one. here,
    host, file: what the largest group takes between layers on the device, in host memory and in a scratch file
    (on a CPU nothing lies `here`). rooms: what its states may take of the first two. traffic: bytes to and from the scratch file,
    over all passes. most: states of one token at once.
    """

    hold: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]
    read: int
    fixed: int
    here: int
    host: int
    file: int
    rooms: tuple[int, int]
    traffic: int
    most: int

    @property
    def states(self) -> int:
        """Bytes of the states of the largest group, wherever they lie."""
        return self.here + self.host + self.file

    def line(self) -> str:
        """The plan in one line, for people."""
        passes = "1 pass" if len(self.groups) == 1 else f"{len(self.groups)} passes"
        held = "" if not self.hold else f", layer {', '.join(map(str, self.hold))} held"
        places = ((self.here, "GPU memory"), (self.host, "host memory"), (self.file, "a scratch file"))
        where = [f"{size / 1e9:.2f} GB in {place}" for size, place in places if size] or ["none"]
        moved = f" ({self.traffic / 1e9:.2f} GB to and from it)" if self.file else ""
        return (
            f"layer by layer: {passes} over the checkpoint, {self.read / 1e9:.2f} GB read{held}; "
            f"states at once: {', '.join(where)}{moved}; beside {self.fixed / 1e9:.2f} GB of weights and working memory"
        )


def plan_passes(
    sizes: Sizes,
    tree: CutTree,
    shapes: Sequence[Shape],
    *,
    memory: int | None,
    ram: int,
    working: int,
    scratch: int = 0,
) -> PassPlan:
    """Group batches so that a pass fits: their states on the device, then in host memory, then in a scratch file.

    memory: bytes of the GPU that may be used, None on a CPU. ram: of the host's memory. working: bytes that computing one
    batch takes beside its states (activations, logits). scratch: of disk; it is used where it saves reading more of the
    checkpoint again than goes to and from it. Raises Refused when the largest batch does not fit.
    """
    layers = used_layers(tree)
    last = max(layers)
    ends = sum(node.layer == last for node in nodes_of(tree))
    hold = (last,) if ends > 1 and last > 0 else ()
    most = stored_states(tree, hold)
    weights = sizes.rest + sum(sizes.layers[i] for i in hold) + 2 * max(sizes.layers[i] for i in layers)
    each = sum(sizes.stored[i] for i in layers)
    # what is no state stays where a batch is computed
    stays = [rows * tokens * (sizes.beside + tokens * sizes.pair) for rows, tokens in shapes]
    need = [stay + rows * tokens * sizes.itemsize * most * sizes.width for stay, (rows, tokens) in zip(stays, shapes, strict=True)]
    largest = max(need, default=0)
    if memory is None:
        fixed = weights + sizes.arriving + working + PROCESS_BYTES
        here, host = 0, ram - fixed
    else:
        fixed = weights + sizes.arriving + working
        # what arrives goes through the host
        here, host = memory - fixed, ram - PROCESS_BYTES - 2 * max(sizes.stored[i] for i in layers)
    # a state lies in one place as a whole
    odd = max((rows * tokens * sizes.width * sizes.itemsize for rows, tokens in shapes), default=0) if here and host else 0
    room = max(0, here) + max(0, host) - odd if min(here, host) > 0 else max(here, host)
    short = here < 0 or host < 0
    own_room = max(0, host if memory is None else here)
    cramped = max(stays, default=0) > own_room
    if not need or short or cramped or largest > room + scratch:
        option, given, spare = "--ram", ram, host
        if memory is not None and (here < 0 or host >= 0 and (cramped or largest > room and here > host)):
            option, given, spare = "--memory", memory, here
        # beside what is fixed: what never leaves, and the states for which there is no other place
        most_states = largest - scratch
        if memory is None:
            wanted = max(max(stays, default=0), most_states)
        elif option == "--memory":
            wanted = max(max(stays, default=0), most_states + odd - max(0, host))
        else:
            wanted = max(0, most_states + odd - max(0, here))
        least = given - spare + wanted
        raise Refused(
            f"{option} {given / 2**30:.2f}GiB is too little for this model layer by layer: use at least "
            f"{math.ceil(least / 2**30 * 100) / 100:.2f}GiB, fewer depths or a smaller --length"
        )
    moved = _traffic(tree, hold)

    def made(limit: int) -> PassPlan:
        groups: list[list[int]] = [[]]
        used = staying = 0
        for number, (size, stay) in enumerate(zip(need, stays, strict=True)):
            if groups[-1] and (used + size > limit or staying + stay > own_room):
                groups.append([])
                used = staying = 0
            groups[-1].append(number)
            used += size
            staying += stay
        taken = max(sum(stays[i] for i in group) for group in groups)
        sums = [sum(need[i] for i in group) for group in groups]
        beyond = sum(max(0, size - room) for size in sums)
        at = max(sums)
        own = (min(at, max(0, here)), min(max(0, at - max(0, here)), max(0, host)))
        return PassPlan(
            hold, tuple(map(tuple, groups)), each * len(groups), fixed, *own, at - sum(own) if at > room else 0,
            (0, own_room - taken) if memory is None else (own_room - taken, max(0, host)), beyond * moved // most, most,
        )  # fmt: skip

    plans = [made(limit) for limit in dict.fromkeys((room, room + scratch)) if limit >= largest]
    return min(plans, key=lambda plan: plan.read + plan.traffic)


def _traffic(tree: CutTree, hold: Sequence[int]) -> int:
    """How often a state of a batch is put away or fetched, in a pass in which all of them are."""
    ends = [tree.roots, *(node.children for node in nodes_of(tree) if node.layer not in hold)]
    wanted = [later(children, hold) for children in ends]
    return sum(count > 0 for count in wanted) + sum(wanted)


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
