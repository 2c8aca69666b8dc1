"""Many virtual cuts of a model whose layers come one at a time: all batches and all branches pass a layer while it is in.

`layerprune.model.tree` takes one batch through all layers; here one layer takes all batches. What is given up for that is
memory: between two layers the states of all batches lie somewhere, and of all branches that have parted. So the
batches are taken in groups that the memory holds, and each group is one pass over the checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from layerprune.model.decoder import Decoder, forward_logits, replaced_forwards, virtual_cut, width_of
from layerprune.model.errors import Refused, model_errors, one_line
from layerprune.model.layerwise import Batch, Layerwise, State, token_bytes
from layerprune.model.passfile import Brought, PassFile
from layerprune.model.passplan import PassPlan, Sizes, later, nodes_below, nodes_of, used_layers
from layerprune.model.shelf import Shelf, Waiting
from layerprune.model.stream import StreamedModel
from layerprune.model.tree import CutTree, Node


def sizes_of(streamed: StreamedModel) -> Sizes:
    """What `plan_passes` needs to know."""
    layers = range(len(streamed))
    width, beside, pair = token_bytes(streamed.decoder)
    return Sizes(
        rest=streamed.rest_bytes,
        layers=tuple(map(streamed.layer_bytes, layers)),
        stored=tuple(map(streamed.stored_bytes, layers)),
        arriving=max(map(streamed.arriving_bytes, layers)),
        width=width,
        itemsize=streamed.decoder.model.dtype.itemsize,
        beside=beside,
        pair=pair,
    )


def working_bytes(decoder: Decoder, tokens: int) -> int:
    """What one layer takes for a batch beside its input and output: a rough upper bound from the widest weight."""
    widest = max(max(p.shape) for p in decoder.layers[0].parameters() if p.dim() > 1)
    hidden = width_of(decoder)
    vectors = 4 * hidden + 3 * min(widest, 8 * hidden)
    return tokens * vectors * decoder.model.dtype.itemsize


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
    keep: PassFile | None = None,
    scratch: Path | None = None,
) -> None:
    """Run batches (ids, mask) through the tree, layer by layer, a pass for each group of the plan.

    see(number, batch, node, state) gets the output of every node of every batch, and first x^(0) with None for a node.
    broken: told which branches cannot be run, and why; without it Refused is raised then. done: told the
    batches of each group when its pass is over. progress: told of each layer. The states that `see` gets are equal to those
    of `CutTree.walk`, to the bit, at equal shapes. keep: where a pass that is killed leaves its states; the next call for the
    same goes on with the layer after them, and `see` is not told again of what it was told before. scratch: a folder for the
    states that the plan puts into a file.
    """
    layers = used_layers(tree)
    at: dict[int, list[tuple[Node, Node | None]]] = {layer: [] for layer in layers}
    for root in tree.roots:
        at[root.layer].append((root, None))
    for node in nodes_of(tree):
        for child in node.children:
            at[child.layer].append((child, node))
    gone: set[int] = set()
    checked = False
    for group in plan.groups:
        shelf = Shelf(streamed.device, *plan.rooms, scratch if plan.file else None)
        walk = _Walk(streamed, plan.hold, shelf, see, broken, gone)
        identity = _identity(tree, plan, [batches[number] for number in group])
        before = None if keep is None else keep.load(identity, group)
        if before is not None and not walk.can_restore(tree, group, before[2]):
            before = None
        ahead = layers
        if before is not None:
            ahead = [layer for layer in layers if layer > before[0]]
            progress(len(layers) - len(ahead))
        with contextlib.closing(shelf), contextlib.closing(streamed.layers(ahead, plan.hold)) as stream:
            for layer in stream:
                if walk.layerwise is None:
                    # it looks at what the first layer returns
                    walk.layerwise = Layerwise(streamed.decoder) if before is None else Layerwise(streamed.decoder, before[1])
                    if not checked:
                        prove_stack(walk.layerwise, tree)
                        checked = True
                    for number in group:
                        walk.begin(number, *batches[number], tree.roots, again=before is not None)
                    if before is not None:
                        walk.restore(tree, group, before[2])
                if layer not in plan.hold:
                    for number in group:
                        for node, parent in at[layer]:
                            walk.wake(number, node, parent)
                progress(1)
                if keep is not None and layer != layers[-1] and keep.due():
                    states = walk.states(tree, group)
                    if states is not None:
                        keep.save(identity, group, layer, walk.layerwise.length, states)
        done(group)
        if keep is not None:
            keep.remove()


def _identity(tree: CutTree, plan: PassPlan, batches: Sequence[tuple[torch.Tensor, torch.Tensor | None]]) -> str:
    """What a group's pass computes."""
    digest = hashlib.blake2b(repr((tree.branches, plan.hold)).encode(), digest_size=16)
    for pair in batches:
        for tensor in pair:
            shape = None if tensor is None else tuple(tensor.shape)
            digest.update(repr(shape).encode() + (b"" if tensor is None else tensor.long().cpu().numpy().tobytes()))
    return digest.hexdigest()


def _names(tree: CutTree) -> dict[int, str]:
    """The layers run up to each node, by its identity; 0 stands for the beginning."""
    found = {0: "start"}
    waiting = [(root, "") for root in tree.roots]
    while waiting:
        node, before = waiting.pop()
        found[id(node)] = f"{before}{node.layer}."
        waiting += [(child, found[id(node)]) for child in node.children]
    return found


class _Walk:
    """One pass: the states that wait, by node and batch, with how many layers still want them."""

    def __init__(
        self, streamed: StreamedModel, hold: Sequence[int], shelf: Shelf, see: Seen,
        broken: Callable[[tuple[int, ...], str], None] | None, gone: set[int],
    ) -> None:  # fmt: skip
        self.streamed, self.hold, self.shelf, self.see, self.broken, self.gone = streamed, hold, shelf, see, broken, gone
        self.layerwise: Layerwise | None = None
        self.batches: dict[int, Batch] = {}
        self.waiting: dict[tuple[int, int], tuple[Waiting, dict[int, Any], int]] = {}

    def begin(self, number: int, ids_BT: torch.Tensor, mask_BT: torch.Tensor | None, roots: Sequence[Node], again: bool) -> None:
        """Record what the model hands its layers; with `again` the states come from a file."""
        assert self.layerwise is not None
        batch = self.batches[number] = self.layerwise.begin(ids_BT, mask_BT)
        state = batch.start()
        batch.forget_start()
        if again:
            return
        self.see(number, batch, None, state)
        self._part(number, 0, roots, state)

    def states(self, tree: CutTree, group: Sequence[int]) -> dict[str, Brought] | None:
        """The states that wait, by the layers behind them, their batch's position, and how many layers want them; None where they
        cannot be told: layers of this model hand on more, or a branch broke."""
        if self.gone or any(shared for _, shared, _ in self.waiting.values()):
            return None
        names = _names(tree)
        return {
            f"{names[key]}/{group.index(number)}/{left}": Brought(w.dtype, w.shape, w.nbytes, partial(self.shelf.host_copy, w))
            for (key, number), (w, _, left) in self.waiting.items()
        }

    def can_restore(self, tree: CutTree, group: Sequence[int], states: Mapping[str, Brought]) -> bool:
        """Whether these are states of this tree, and the same ones of every batch."""
        known = set(_names(tree).values())
        by_batch: dict[str, set[str]] = {}
        for told in states:
            name, position, left = told.split("/")
            by_batch.setdefault(position, set()).add(f"{name}/{left}")
            if name not in known:
                return False
        return set(by_batch) == {str(p) for p in range(len(group))} and len({frozenset(own) for own in by_batch.values()}) == 1

    def restore(self, tree: CutTree, group: Sequence[int], states: Mapping[str, Brought]) -> None:
        keys = {name: key for key, name in _names(tree).items()}
        for told, brought in states.items():
            name, position, left = told.split("/")
            state = brought.bring().to(self.streamed.device)
            self.waiting[keys[name], group[int(position)]] = (self.shelf.put(state), {}, int(left))

    def wake(self, number: int, node: Node, parent: Node | None) -> None:
        key = (0 if parent is None else id(parent), number)
        if id(node) in self.gone or key not in self.waiting:
            return
        waiting, shared, left = self.waiting.pop(key)
        if left > 1:
            self.waiting[key] = (waiting, shared, left - 1)
        self._run(number, node, State(self.shelf.get(waiting, last=left == 1), shared))

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
            below = nodes_below([node])
            self.gone.update(id(one) for one in below)
            self.broken(tuple(end for one in below for end in one.branches), one_line(error))
            return
        self.see(number, batch, node, state)
        self._part(number, id(node), node.children, state)

    def _part(self, number: int, key: int, children: Sequence[Node], state: State) -> None:
        for child in children:
            if child.layer in self.hold and id(child) not in self.gone:
                self._run(number, child, state)
        wanted = later(children, self.hold)
        if wanted:
            self.waiting[key, number] = (self.shelf.put(state.hidden), state.shared, wanted)


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
