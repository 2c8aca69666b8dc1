"""Losses under many virtual cuts of a model that is larger than memory: its layers come one at a time, once for all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from layerprune.eval.answers import Answers, sample_key
from layerprune.eval.memory import logit_budget, state_budget, token_budget
from layerprune.eval.sweep import losses_of, questions, summed_nats
from layerprune.model.branches import Answer, Asked, Branches
from layerprune.model.budget import Budget
from layerprune.model.cuts import Kept, describe_dropped
from layerprune.model.data import batches
from layerprune.model.errors import Refused
from layerprune.model.layermajor import layer_major, plan_passes, used_layers, working_bytes
from layerprune.model.layerwise import Batch, State
from layerprune.model.progress import progress_bar
from layerprune.model.stream import StreamedModel
from layerprune.model.tree import Node

Say = Callable[[str], None]


def sweep_streamed(
    streamed: StreamedModel,
    kept: Iterable[Kept],
    sequences: Sequence[Sequence[int]],
    budget: Budget,
    *,
    answers: Answers | None = None,
    progress: bool = False,
    say: Say = lambda line: None,
) -> dict[Kept, dict[str, Any] | None]:
    """The loss under each `kept`, as `sweep_live` gives it for the whole model (to the bit on the CPU, at equal batches).

    say: told the plan (passes over the checkpoint, bytes, memory) before it starts. answers: as in `sweep_live`; a group of
    documents that a pass answered is kept there, so that a killed call goes on with the next group. None stands for a cut
    that this model cannot run (which is said). Raises Refused where the budget is too small, and for a whole model that
    does not run.
    """
    wanted = tuple(dict.fromkeys(kept))
    store = Answers() if answers is None else answers
    branches = Branches(streamed.decoder, wanted, logit_budget(streamed.device.type), absent=True)
    try:
        keys = [sample_key("loss", ids) for ids in sequences]
        for some, missing in store.missing(branches.kept, keys).items():
            _pass(streamed, branches, some, sequences, keys, missing, budget, store, progress, say)
    finally:
        store.save()
    layers = len(streamed)
    for one, reason in branches.broken.items():
        say(f"left out: without layers {describe_dropped(one, layers)} this model does not run ({reason})")
    losses = losses_of(branches, sequences, store)
    return {one: {"loss": losses[one], "tasks": None} if one in losses else None for one in wanted}


def _pass(
    streamed: StreamedModel, branches: Branches, kept: tuple[Kept, ...], sequences: Sequence[Sequence[int]],
    keys: Sequence[bytes], missing: Sequence[int], budget: Budget, store: Answers, progress: bool, say: Say,
) -> None:  # fmt: skip
    """Answer the missing documents of some branches."""
    kind = streamed.device.type
    most = min(token_budget(kind), max(1, state_budget(kind) // branches.state_bytes(kept)))
    made = batches([sequences[i] for i in missing], most)
    tree = branches.tree(kept)
    shapes = [(batch.ids_BT.shape[0], batch.ids_BT.shape[1]) for batch in made]
    working = working_bytes(streamed.decoder, max(rows * tokens for rows, tokens in shapes)) + logit_budget(kind)
    plan = plan_passes(streamed, tree, shapes, memory=budget.memory, ram=budget.ram, working=working)
    say(plan.line())
    asked: dict[int, Asked] = {}
    found: dict[int, list[Answer | None]] = {}

    def see(number: int, batch: Batch, node: Node | None, state: State) -> None:
        if node is None:
            asked[number] = questions(_rows(number), shapes[number][1])
            found[number] = [None] * len(kept)
        elif node.branches:
            value_N, _ = branches.read(batch, state, asked[number], torch.float32)
            for end in node.branches:
                found[number][end] = (value_N.cpu(), None)

    def _rows(number: int) -> list[Sequence[int]]:
        return [sequences[missing[row]] for row in made[number].rows]

    def broken(ends: tuple[int, ...], reason: str) -> None:
        for end in ends:
            if len(kept[end]) == len(streamed):
                raise Refused(f"this model does not run here, with all of its layers: {reason}")
            branches.broken.setdefault(kept[end], reason)

    def keep(group: Sequence[int]) -> None:
        for number in group:
            value_AN, _ = branches.gather(kept, found.pop(number), asked.pop(number))
            store.add(kept, [keys[missing[row]] for row in made[number].rows], summed_nats(value_AN, _rows(number)))
        store.save()

    steps = len(plan.groups) * len(used_layers(tree))
    with progress_bar(steps, f"loss, {len(kept)} depths", "layer", progress) as bar:
        layer_major(streamed, tree, [(b.ids_BT, b.mask_BT) for b in made], plan, see, broken=broken, done=keep, progress=bar.update)
