"""The ranking of a model that is larger than memory: one pass over its checkpoint, or a few."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from layerprune.model.budget import Budget
from layerprune.model.data import batches
from layerprune.model.decoder import states_BTD
from layerprune.model.files import free_disk
from layerprune.model.layermajor import layer_major, sizes_of, working_bytes
from layerprune.model.layerwise import Batch, State
from layerprune.model.passfile import PassFile, read_tensors, write_tensors
from layerprune.model.passplan import PassPlan, plan_passes
from layerprune.model.progress import progress_bar
from layerprune.model.stream import StreamedModel
from layerprune.model.tree import CutTree, Node
from layerprune.prune.rank import DistanceSum, at_positions, last_positions, must_be_numbers


def rank_streamed(
    streamed: StreamedModel,
    sequences: list[list[int]],
    budget: Budget,
    *,
    max_tokens: int | None = None,
    pad_id: int = 0,
    say: Callable[[str], None] = lambda line: None,
    progress: bool = False,
    keep: Path | None = None,
) -> tuple[list[list[float]], PassPlan]:
    """Distances of all blocks, as `rank_decoder` gives them for the whole model (to the bit, on the CPU, at equal batches).

    Of each document only the states of its last token are kept, (L+1) x D numbers. say: told the plan before it starts. keep: a
    folder for what a call that is killed leaves (the states of its pass, and what whole passes found), with which the next
    call goes on; the caller removes it. Raises Refused as `rank_decoder`, and where the budget is too small.
    """
    decoder = streamed.decoder
    layers = len(decoder)
    if max_tokens is None:
        max_tokens = 16384 if streamed.device.type != "cpu" else 2048
    made = batches(sequences, max_tokens, pad_id)
    tree = CutTree([tuple(range(layers))], layers)
    shapes = [(batch.ids_BT.shape[0], batch.ids_BT.shape[1]) for batch in made]
    working = working_bytes(decoder, max((rows * tokens for rows, tokens in shapes), default=0))
    plan = plan_passes(
        sizes_of(streamed), tree, shapes, memory=budget.memory, ram=budget.ram, working=working, scratch=free_disk(keep)
    )
    say(plan.line())
    total = DistanceSum(layers)
    picked: dict[int, list[Any]] = {}

    def see(number: int, batch: Batch, node: Node | None, state: State) -> None:
        rows, width = shapes[number]
        last_B = last_positions(rows, width, made[number].mask_BT)
        states = states_BTD(state.hidden, rows, width)
        picked.setdefault(number, []).append(at_positions(states, last_B, width, type(decoder.model).__name__).cpu())

    def take(group: Sequence[int]) -> dict[str, torch.Tensor]:
        return {f"{place}/{depth}": t for place, n in enumerate(group) for depth, t in enumerate(picked.get(n, ()))}

    def put(group: Sequence[int], found: dict[str, torch.Tensor]) -> None:
        for place, depth in sorted((int(a), int(b)) for a, b in (name.split("/") for name in found)):
            picked.setdefault(group[place], [])[depth:] = [found[f"{place}/{depth}"]]

    inputs = [(batch.ids_BT, batch.mask_BT) for batch in made]
    file = None if keep is None else PassFile(keep / "rank.safetensors", streamed.identity(), take, put, say)
    with progress_bar(layers * len(plan.groups), "rank", "layer", progress) as bar:
        for group in plan.groups:
            digest = hashlib.blake2b(streamed.identity().encode(), digest_size=16)
            for number in group:
                digest.update(repr((inputs[number][0].tolist(), shapes[number])).encode())
            whole = None if keep is None else keep / f"rank-{digest.hexdigest()}.safetensors"
            before = None if whole is None else read_tensors(whole)
            if before is not None and len(before[1]) == len(group) * (layers + 1):
                put(group, before[1])
                bar.update(layers)
                continue
            layer_major(streamed, tree, inputs, replace(plan, groups=(group,)), see, progress=bar.update, keep=file, scratch=keep)
            if whole is not None and len(plan.groups) > 1:
                with contextlib.suppress(OSError):  # then this pass is done again after a kill
                    write_tensors(whole, take(group), {})
    for number in range(len(made)):
        states_BLD = torch.stack(picked[number], dim=1)
        must_be_numbers(states_BLD)
        total.update(states_BLD)
    return total.distances(), plan
