"""Many virtual cuts of a model whose layers come one at a time: all batches and all branches pass a layer while it is in.

`layerprune.model.tree` takes one batch through all layers; here one layer takes all batches. What is given up for that is
memory: between two layers the states of all batches lie somewhere, and of all branches that have parted. So the
batches are taken in groups that the memory holds, and each group is one pass over the checkpoint.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from layerprune.model.decoder import Decoder, forward_logits, replaced_forwards, virtual_cut
from layerprune.model.errors import Refused, model_errors, one_line
from layerprune.model.layerwise import Batch, Layerwise, State
from layerprune.model.stream import StreamedModel
from layerprune.model.tree import CutTree, Node

Shape = tuple[int, int]
"""Rows and tokens of a batch."""

PROCESS_BYTES = 700 << 20
"""What Python, torch and transformers take of the host's memory themselves."""


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
    streamed: StreamedModel, tree: CutTree, shapes: Sequence[Shape], *, memory: int | None, ram: int, working: int
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
    sizes = [streamed.layer_bytes(i) for i in layers]
    weights = streamed.rest_bytes + sum(streamed.layer_bytes(i) for i in hold) + 2 * max(sizes)
    arriving = max(streamed.stored_bytes(i) for i in layers)
    on_gpu = streamed.device.type == "cuda"
    width = _width(streamed.decoder)
    size = streamed.decoder.model.dtype.itemsize

    def of(shape: Shape) -> int:
        rows, tokens = shape
        return rows * tokens * size * (most * width + tokens)  # and a mask, where rows are padded

    needs = [of(shape) for shape in shapes]
    whole = sum(needs)
    if on_gpu:
        assert memory is not None
        fixed = weights + arriving + working
        host = PROCESS_BYTES + 2 * arriving
        spare_here, spare_there = memory - fixed, ram - host
        place = "cuda" if whole <= spare_here or spare_here >= spare_there else "cpu"
        spare = spare_here if place == "cuda" else spare_there
        option, given = ("--memory", memory) if spare_here < 0 or place == "cuda" else ("--ram", ram)
        if spare_here < 0:
            spare = spare_here
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
    each = sum(streamed.stored_bytes(i) for i in layers)
    largest = max(sum(needs[i] for i in group) for group in groups)
    return PassPlan(hold, tuple(map(tuple, groups)), place, each * len(groups), fixed, largest, most)


def working_bytes(decoder: Decoder, tokens: int) -> int:
    """What one layer takes for a batch beside its input and output: a rough upper bound from the widest weight."""
    widest = max(max(p.shape) for p in decoder.layers[0].parameters() if p.dim() > 1)
    hidden = _width(decoder)
    vectors = 4 * hidden + 3 * min(widest, 8 * hidden)
    return tokens * vectors * decoder.model.dtype.itemsize


def used_layers(tree: CutTree) -> list[int]:
    """The layers that a pass brings in, in order: those of the tree, and the first, which shows what layers return."""
    return sorted({node.layer for node in nodes_of(tree)} | {0})


def nodes_of(tree: CutTree) -> list[Node]:
    """All nodes, parents before their children."""
    found, waiting = [], list(tree.roots)
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
    later = {id(node): _later(node.children, hold) for node in nodes_of(tree)}
    start = _later(tree.roots, hold)
    waiting[0] = start
    most = 1
    for layer in sorted({node.layer for node in nodes_of(tree)}):
        for node in nodes_of(tree):
            if node.layer != layer or layer in hold:
                continue
            most = max(most, sum(left > 0 for left in waiting.values()) + 1)
            parent = parents.get(id(node))
            waiting[0 if parent is None else id(parent)] -= 1
            waiting[id(node)] = later[id(node)]
    return most + 1


def _later(children: Sequence[Node], hold: Sequence[int]) -> int:
    return sum(child.layer not in hold for child in children)


def _width(decoder: Decoder) -> int:
    config = decoder.model.config.get_text_config()
    return int(getattr(config, "hidden_size", 0) or decoder.model.get_input_embeddings().weight.shape[-1])


Seen = Callable[[int, Batch, Node | None, State], None]


def layer_major(
    streamed: StreamedModel,
    tree: CutTree,
    batches: Sequence[tuple[torch.Tensor, torch.Tensor | None]],
    plan: PassPlan,
    see: Seen,
    *,
    broken: Callable[[tuple[int, ...], str], None] | None = None,
    done: Callable[[Sequence[int]], None] = lambda group: None,
    progress: Callable[[int], None] = lambda layers: None,
) -> None:
    """Run batches (ids, mask) through the tree, layer by layer, a pass for each group of the plan.

    see(number, batch, node, state) gets the output of every node of every batch, and first x^(0) with None for a node.
    broken: told which branches cannot be run, and why; without it Refused is raised then. done: told the
    batches of each group when its pass is over. progress: told of each layer. The states that `see` gets are equal to those
    of `CutTree.walk`, to the bit, at equal shapes.
    """
    layers = used_layers(tree)
    at: dict[int, list[tuple[Node, Node | None]]] = {layer: [] for layer in layers}
    for root in tree.roots:
        at[root.layer].append((root, None))
    for node in nodes_of(tree):
        for child in node.children:
            at[child.layer].append((child, node))
    place = streamed.device if plan.place != "cpu" else torch.device("cpu")
    gone: set[int] = set()
    checked = False
    for group in plan.groups:
        walk = _Walk(streamed, plan.hold, place, see, broken, gone)
        with contextlib.closing(streamed.layers(layers, plan.hold)) as stream:
            for layer in stream:
                if walk.layerwise is None:
                    walk.layerwise = Layerwise(streamed.decoder)  # it looks at what the first layer returns
                    if not checked:
                        prove_stack(walk.layerwise, tree)
                        checked = True
                    for number in group:
                        walk.begin(number, *batches[number], tree.roots)
                if layer not in plan.hold:
                    for number in group:
                        for node, parent in at[layer]:
                            walk.wake(number, node, parent)
                progress(1)
        done(group)


class _Walk:
    """One pass: the states that wait, by node and batch, with how many layers still want them."""

    def __init__(
        self, streamed: StreamedModel, hold: Sequence[int], place: torch.device, see: Seen,
        broken: Callable[[tuple[int, ...], str], None] | None, gone: set[int],
    ) -> None:  # fmt: skip
        self.streamed, self.hold, self.place, self.see, self.broken, self.gone = streamed, hold, place, see, broken, gone
        self.layerwise: Layerwise | None = None
        self.batches: dict[int, Batch] = {}
        self.waiting: dict[tuple[int, int], tuple[State, int]] = {}

    def begin(self, number: int, ids_BT: torch.Tensor, mask_BT: torch.Tensor | None, roots: Sequence[Node]) -> None:
        assert self.layerwise is not None
        batch = self.batches[number] = self.layerwise.begin(ids_BT, mask_BT)
        state = batch.start()
        batch.forget_start()
        self.see(number, batch, None, state)
        self._part(number, 0, roots, state)

    def wake(self, number: int, node: Node, parent: Node | None) -> None:
        key = (0 if parent is None else id(parent), number)
        if id(node) in self.gone or key not in self.waiting:
            return
        state, left = self.waiting.pop(key)
        if left > 1:
            self.waiting[key] = (state, left - 1)
        if state.hidden.device != self.streamed.device:
            state = State(state.hidden.to(self.streamed.device), state.shared)
        self._run(number, node, state)

    def _run(self, number: int, node: Node, state: State) -> None:
        batch = self.batches[number]
        try:
            state = batch.step(node.layer, state.fork())
        except torch.cuda.OutOfMemoryError:
            raise
        except model_errors() as error:
            if self.broken is None:
                kind = type(self.streamed.decoder.model).__name__
                raise Refused(
                    f"this {kind} cannot be run layer by layer: layer {node.layer} needs more than a state ({one_line(error)}); "
                    "load it whole"
                ) from error
            below = nodes_below(node)
            self.gone.update(id(one) for one in below)
            self.broken(tuple(end for one in below for end in one.branches), one_line(error))
            return
        self.see(number, batch, node, state)
        self._part(number, id(node), node.children, state)

    def _part(self, number: int, key: int, children: Sequence[Node], state: State) -> None:
        for child in children:
            if child.layer in self.hold and id(child) not in self.gone:
                self._run(number, child, state)
        later = _later(children, self.hold)
        if later:
            self.waiting[key, number] = (State(state.hidden.to(self.place), state.shared), later)


def nodes_below(node: Node) -> list[Node]:
    """A node and all that follow on it."""
    found, waiting = [], [node]
    while waiting:
        one = waiting.pop()
        found.append(one)
        waiting += one.children
    return found


@torch.no_grad()
def prove_stack(layerwise: Layerwise, tree: CutTree) -> None:
    """Refuse a model that does more between its layers than hand a state on, or that ends otherwise than the layerwise pass.

    Nothing but the skeleton is needed: each layer is stood in for by a fixed function of its input, unlike the others', and
    the model's own pass with a few of the branches cut virtually must give the logits of the layerwise pass, to the bit.
    """
    decoder = layerwise.decoder
    vocabulary = decoder.model.get_input_embeddings().weight.shape[0]
    ids_BT = (torch.arange(1, 17).view(2, 8) % vocabulary).to(decoder.device)
    row_N, position_N = torch.arange(2).repeat_interleave(8), torch.arange(8).repeat(2)

    def stand_in(index: int) -> Callable[..., object]:
        def forward(old: Callable[..., object], *args: object, **kwargs: object) -> object:
            hidden = args[0] if args else kwargs["hidden_states"]
            assert isinstance(hidden, torch.Tensor)
            return layerwise.as_output(hidden + torch.sin(hidden * (1 + index / len(layerwise))))

        return forward

    branches = sorted(set(tree.branches), key=len, reverse=True)
    few = [*branches[:1], *branches[len(branches) // 2 :][:1], *branches[-1:]]
    with replaced_forwards((layer, stand_in(i)) for i, layer in enumerate(decoder.layers)):
        batch = layerwise.begin(ids_BT)
        for kept in dict.fromkeys(few):
            with virtual_cut(decoder, kept):
                expected = forward_logits(decoder, ids_BT).flatten(0, 1)
            state = batch.start()
            for layer in kept:
                state = batch.step(layer, state.fork())
            if not torch.equal(batch.logits(state, row_N, position_N), expected):
                raise Refused(
                    f"this {type(decoder.model).__name__} does more between its layers than hand a state on: it cannot be run "
                    "layer by layer; load it whole"
                )
