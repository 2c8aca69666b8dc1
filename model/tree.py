"""Many virtual cuts in one pass: branches that begin with the same layers share them.

A pruned model is a `kept` tuple; a set of them is a tree whose nodes are layer applications with one history. Each node is
run once, and the head once a leaf. The whole last-n curve of L layers takes 2 L - 1 applications instead of L (L + 1) / 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from layerprune.model.cuts import Kept, check_kept
from layerprune.model.errors import Refused, model_errors, one_line

if TYPE_CHECKING:  # a tree is planned without torch
    import torch

    from layerprune.model.decoder import Decoder
    from layerprune.model.layerwise import Batch, State


@dataclass
class Node:
    """One layer application; `children` follow on its output."""

    layer: int
    children: list[Node] = field(default_factory=list)
    branches: tuple[int, ...] = ()
    """Those that end here."""


class CutTree:
    """The tree of some `kept` tuples over a stack of L layers.

    branches: the tuples, in the order given. roots: the first layers. applications: layer applications of one pass. alone:
    those of running every branch by itself. alive: hidden states that exist at once, at most: the walk leaves the child that
    needs most for the end, so that its parent's state is gone by then, and B branches need no more than log2(B) + 2.
    Raises UsageError for a tuple that is no increasing selection of the layers.
    """

    def __init__(self, branches: Iterable[Kept], layers: int) -> None:
        self.branches = tuple(branches)
        self.roots: list[Node] = []
        nodes: dict[Kept, Node] = {}
        for number, kept in enumerate(self.branches):
            check_kept(kept, layers)
            siblings = self.roots
            for end in range(1, len(kept) + 1):
                node = nodes.get(kept[:end])
                if node is None:
                    node = nodes[kept[:end]] = Node(kept[end - 1])
                    siblings.append(node)
                siblings = node.children
            nodes[kept].branches += (number,)
        self.applications = len(nodes)
        self.alone = sum(map(len, self.branches))
        self.heads = sum(bool(node.branches) for node in nodes.values())
        need: dict[int, int] = {}
        for prefix in sorted(nodes, key=len, reverse=True):  # children before their parents
            need[id(nodes[prefix])] = _arrange(nodes[prefix].children, need)
        self.alive = _arrange(self.roots, need) + 1  # and the output of the layer that is at work

    def walk(self, batch: Batch, see: Callable[[tuple[int, ...], State], None]) -> None:
        """Run a batch through the tree; `see` gets x^(L) of each leaf, and the numbers of the branches that end there."""
        start = batch.start()
        waiting = [(node, start) for node in reversed(self.roots)]
        del start
        while waiting:
            node, state = waiting.pop()
            # whoever shares the parent's state, or reads it after this, gets mappings of its own
            state = batch.step(node.layer, state.fork())
            if node.branches:
                see(node.branches, state)
            waiting += [(child, state) for child in reversed(node.children)]


def _arrange(children: list[Node], need: dict[int, int]) -> int:
    """Order children by the states that their subtrees need, the largest last; returns what all of them need."""
    children.sort(key=lambda child: need[id(child)])
    if not children:
        return 1
    *before, last = (need[id(child)] for child in children)
    return max([last, *(n + 1 for n in before)])


def exact_branches(decoder: Decoder, branches: Sequence[Kept], vocab: int) -> tuple[bool, dict[Kept, str]]:
    """Whether the tree gives what the model itself gives with each branch cut virtually, on a few tokens.

    Returns also the branches that this model cannot run at all, with the reason. Equality is to the bit on the CPU, and
    to the rounding of the dtype on a GPU, whose kernels may add in another order.
    """
    import torch

    from layerprune.model.decoder import forward_logits, virtual_cut
    from layerprune.model.layerwise import Layerwise

    ids_BT = torch.arange(1, 17).view(2, 8) % vocab
    row_N, position_N = torch.arange(2).repeat_interleave(8), torch.arange(8).repeat(2)
    expected, broken = {}, {}
    for kept in dict.fromkeys(branches):
        try:
            with torch.no_grad(), virtual_cut(decoder, kept):
                expected[kept] = forward_logits(decoder, ids_BT).flatten(0, 1).cpu()
        except torch.cuda.OutOfMemoryError:
            raise
        except model_errors() as error:
            broken[kept] = one_line(error)
    tree = CutTree(expected, len(decoder))
    right: list[bool] = []

    def see(ends: tuple[int, ...], state: State) -> None:
        logits_NV = batch.logits(state, row_N, position_N)
        right.append(all(_equal(logits_NV, expected[tree.branches[end]]) for end in ends))

    try:
        batch = Layerwise(decoder).begin(ids_BT)
        tree.walk(batch, see)
    except torch.cuda.OutOfMemoryError:
        raise
    except model_errors():
        return False, broken
    return all(right), broken


def must_run_layer_by_layer(decoder: Decoder, else_what: str) -> None:
    """Refuse a model whose layers, called one by one, do not give what it gives itself (`exact_branches` of the whole model).

    else_what: what cannot be done then, such as `its layers cannot be routed`.
    """
    from layerprune.model.config import vocab_size

    kind, whole = type(decoder.model).__name__, tuple(range(len(decoder)))
    exact, broken = exact_branches(decoder, [whole], vocab_size(decoder.model.config))
    if broken:
        raise Refused(f"this {kind} does not run here: {broken[whole]}")
    if not exact:
        raise Refused(f"this {kind} does more between its layers than hand states on: {else_what}")


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """To the bit on a CPU; else to a share of the logits' spread that rounding explains. NaN equals NaN."""
    import torch

    if a.device.type == "cpu":
        return torch.equal(a, b) or bool((a.isnan() == b.isnan()).all() and torch.equal(a.nan_to_num(), b.nan_to_num()))
    share = 1e-4 if a.dtype == torch.float32 else 2e-2
    a, b = a.cpu().double().nan_to_num(), b.double().nan_to_num()
    return bool((a - b).norm() <= share * (b - b.mean(dim=-1, keepdim=True)).norm())
