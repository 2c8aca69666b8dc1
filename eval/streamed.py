"""Losses and tasks under many virtual cuts of a model that is larger than memory: its layers come once for all of them."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from layerprune.eval.answers import Answers, sample_key
from layerprune.eval.harness import Request
from layerprune.eval.memory import logit_budget, state_budget, token_budget
from layerprune.eval.sweep import BranchedModel, by_cut, losses_of, questions, summed_nats, sweep_tasks
from layerprune.eval.tasks import TaskSet, quiet
from layerprune.model.branches import Answer, Asked, Branches
from layerprune.model.budget import Budget
from layerprune.model.cuts import Kept, describe_dropped
from layerprune.model.data import TokenBatch, batches
from layerprune.model.decoder import width_of
from layerprune.model.errors import Refused
from layerprune.model.files import free_disk
from layerprune.model.layermajor import layer_major, sizes_of, working_bytes
from layerprune.model.layerwise import Batch, State
from layerprune.model.passfile import PassFile
from layerprune.model.passplan import PassPlan, Shape, plan_passes, used_layers
from layerprune.model.progress import progress_bar
from layerprune.model.stream import StreamedModel
from layerprune.model.tree import Node

Say = Callable[[str], None]
_GENERATES = (
    "a task here generates text, token by token, for which the model must be in memory as a whole: leave that task out, or give "
    "more --memory or --ram"
)


def sweep_streamed(
    streamed: StreamedModel,
    tokenizer: Any,
    kept: Iterable[Kept],
    budget: Budget,
    *,
    tasks: TaskSet | None = None,
    sequences: Sequence[Sequence[int]] | None = None,
    answers: Answers | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = False,
    say: Say = lambda line: None,
    keep: Path | None = None,
) -> dict[Kept, dict[str, Any] | None]:
    """`sweep_live` for a model whose layers come from its files: the same numbers (to the bit on the CPU, at equal batches).

    The loss takes one series of passes over the checkpoint, the log-likelihoods of all tasks another; `say` is told of each
    plan (passes, bytes, memory) before it starts. What a pass answered is kept in `answers`, so that a killed call goes on
    with the next pass; with `keep`, a folder for the states of a pass under way, at the layer where it stopped. Tasks that
    generate text are refused: for them the model must be loaded whole. None stands for a cut that this model cannot run
    (which is said). Raises Refused where the budget is too small, and for a whole model that does not run.
    """
    _refuse_generation(tasks)
    wanted = tuple(dict.fromkeys(kept))
    store = Answers() if answers is None else answers
    branches = Branches(streamed.decoder, wanted, logit_budget(streamed.device.type), absent=True)
    stream = Stream(streamed, branches, budget, progress, say, keep)
    losses: dict[Kept, dict[str, Any]] = {}
    scores: dict[Kept, Mapping[str, Any]] = {}
    try:
        if sequences is not None:
            losses = _losses(stream, sequences, store)
        if tasks is not None:
            with quiet():
                lm = StreamedTasks(stream, tokenizer, store, batch_size)
            scores = dict(sweep_tasks(lm, tasks, limit, seed))
    finally:
        store.save()
    for one, reason in branches.broken.items():
        say(f"left out: without layers {describe_dropped(one, len(streamed))} this model does not run ({reason})")
    return by_cut(wanted, branches, losses, scores)


def check_sweep(
    streamed: StreamedModel,
    tokenizer: Any,
    kept: Iterable[Kept],
    budget: Budget,
    *,
    unknown: int = 0,
    tasks: TaskSet | None = None,
    sequences: Sequence[Sequence[int]] | None = None,
    answers: Answers | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    keep: Path | None = None,
) -> None:
    """Raise the Refused with which `sweep_streamed` would begin; nothing is computed.

    unknown: how many cuts there will be beside `kept` (which holds the whole model), of blocks that are not chosen yet. What is
    asked for then is what any choice of them needs at least.
    """
    _refuse_generation(tasks)
    branches = Branches(streamed.decoder, dict.fromkeys(kept), logit_budget(streamed.device.type), absent=True)
    stream = Stream(streamed, branches, budget, False, lambda line: None, keep, unknown)
    store = Answers() if answers is None else answers
    if sequences is not None:
        keys = [sample_key("loss", ids) for ids in sequences]
        for group, missing in store.missing(branches.kept, keys).items():
            made = _loss_batches(branches, group, [sequences[i] for i in missing])
            stream.check(group, [_shape(batch.ids_BT) for batch in made], token_budget(streamed.device.type))
    if tasks is not None:
        with quiet(), contextlib.suppress(_Planned):
            for _ in sweep_tasks(_PlannedTasks(stream, tokenizer, store, batch_size), tasks, limit, seed):
                pass


def _refuse_generation(tasks: TaskSet | None) -> None:
    if tasks is not None and any(getattr(task, "OUTPUT_TYPE", "") == "generate_until" for task in tasks.tasks.values()):
        raise Refused(_GENERATES)


def kept_answers(keep: Path | None, streamed: StreamedModel) -> Answers:
    """The answers that a killed call left in its folder, those of this very model, dtype and device."""
    if keep is None:
        return Answers()
    return Answers(keep / hashlib.blake2b(streamed.identity().encode(), digest_size=8).hexdigest())


@dataclass(frozen=True)
class Stream:
    """The branches of one streamed model, asked in series of passes that the budget allows.

    unknown: branches beside these that are not known yet; such a stream only checks.
    """

    streamed: StreamedModel
    branches: Branches
    budget: Budget
    progress: bool
    say: Say
    keep: Path | None = None
    unknown: int = 0

    def plan(self, kept: Sequence[Kept], shapes: Sequence[Shape]) -> PassPlan:
        """The passes in which these branches are asked about batches of these shapes. Raises Refused where they do not fit."""
        working = working_bytes(self.streamed.decoder, max(rows * tokens for rows, tokens in shapes))
        return plan_passes(
            sizes_of(self.streamed),
            self.branches.tree(kept),
            shapes,
            memory=self.budget.memory,
            ram=self.budget.ram,
            working=working + logit_budget(self.streamed.device.type),
            scratch=free_disk(self.keep),
        )

    def check(self, kept: Sequence[Kept], shapes: Sequence[Shape], most: int) -> None:
        """Refuse what does not fit, whatever the unknown branches are: they never need less than the others alone, but a tree
        that holds more states has smaller batches. most: tokens of a batch where no states are short of memory."""
        if self.unknown:
            if tuple(range(len(self.streamed))) not in kept:
                return  # the whole model is answered; of other trees nothing is certain
            decoder = self.streamed.decoder
            states = math.floor(math.log2(len(kept) + self.unknown)) + 3  # of a token, at most: see CutTree, and its first
            if states * width_of(decoder) * decoder.model.dtype.itemsize * most > state_budget(self.streamed.device.type):
                shapes = [(1, max(tokens for _, tokens in shapes))]
        self.plan(kept, shapes)

    def answer(
        self,
        kept: tuple[Kept, ...],
        batches: Sequence[tuple[torch.Tensor, torch.Tensor | None]],
        asked: Callable[[int], Asked],
        take: Callable[[int, torch.Tensor, torch.Tensor | None], None],
        *,
        what: str,
        key: str,
        dtype: torch.dtype | None = None,
        greedy: bool = False,
        done: Callable[[], None] = lambda: None,
    ) -> None:
        """Run (ids, mask) batches; `take` gets each batch's number and what `Branches.score` returns for it.

        asked: the questions about a batch. what: is told to people, and names the file in `keep`; key: tells these questions from
        others about the same batches. done: called after each pass. Numbers come batch by batch, when a pass is over.
        """
        streamed, branches = self.streamed, self.branches
        tree = branches.tree(kept)
        plan = self.plan(kept, [_shape(ids_BT) for ids_BT, _ in batches])
        self.say(f"{what}: {plan.line()}")
        questions_of: dict[int, Asked] = {}
        found: dict[int, list[Answer | None]] = {}

        def open_batch(number: int) -> None:
            if number not in questions_of:
                questions_of[number] = asked(number)
                found[number] = [None] * len(kept)

        def see(number: int, batch: Batch, node: Node | None, state: State) -> None:
            open_batch(number)
            if node is not None and node.branches:
                value_N, greedy_N = branches.read(batch, state, questions_of[number], dtype, greedy)
                answer = (value_N.cpu(), None if greedy_N is None else greedy_N.cpu())
                for end in node.branches:
                    found[number][end] = answer

        def broken(ends: tuple[int, ...], reason: str) -> None:
            for end in ends:
                if len(kept[end]) == len(streamed):
                    raise Refused(f"this model does not run here, with all of its layers: {reason}")
                branches.broken.setdefault(kept[end], reason)

        def over(group: Sequence[int]) -> None:
            for number in group:
                open_batch(number)
                take(number, *branches.gather(kept, found.pop(number), questions_of.pop(number), greedy))
            done()

        def taken(group: Sequence[int]) -> dict[str, torch.Tensor]:
            some = {
                f"{place}/{end}": answer
                for place, number in enumerate(group)
                for end, answer in enumerate(found.get(number, ()))
                if answer is not None
            }
            values = {f"value/{name}": answer[0] for name, answer in some.items()}
            return values | {f"flag/{name}": answer[1] for name, answer in some.items() if answer[1] is not None}

        def put(group: Sequence[int], before: dict[str, torch.Tensor]) -> None:
            for name, value in before.items():
                sort, place, end = name.split("/")
                if sort == "value":
                    number = group[int(place)]
                    open_batch(number)
                    found[number][int(end)] = (value, before.get(f"flag/{place}/{end}"))

        file = None
        if self.keep is not None:
            file = PassFile(self.keep / f"{what}.safetensors", f"{what} {streamed.identity()} {key}", taken, put, self.say)
        branches.applications += tree.applications * len(batches)
        steps = len(plan.groups) * len(used_layers(tree))
        with progress_bar(steps, f"{what}, {len(kept)} depths", "layer", self.progress) as bar:
            layer_major(
                streamed, tree, batches, plan, see, broken=broken, done=over, progress=bar.update, keep=file, scratch=self.keep
            )


def _losses(stream: Stream, sequences: Sequence[Sequence[int]], store: Answers) -> dict[Kept, dict[str, Any]]:
    branches = stream.branches
    keys = [sample_key("loss", ids) for ids in sequences]
    for kept, missing in store.missing(branches.kept, keys).items():
        made = _loss_batches(branches, kept, [sequences[i] for i in missing])
        rows = [[missing[row] for row in batch.rows] for batch in made]

        def asked(number: int, rows: list[list[int]] = rows, made: Any = made) -> Asked:
            return questions([sequences[i] for i in rows[number]], made[number].ids_BT.shape[1])

        def take(number: int, value_AN: torch.Tensor, _: Any, rows: list[list[int]] = rows, kept: tuple[Kept, ...] = kept) -> None:
            own = [sequences[i] for i in rows[number]]
            store.add(kept, [keys[i] for i in rows[number]], summed_nats(value_AN, own))

        ids = [(batch.ids_BT, batch.mask_BT) for batch in made]
        stream.answer(kept, ids, asked, take, what="loss", key="", dtype=torch.float32, done=store.save)
    return losses_of(branches, sequences, store)


def _loss_batches(branches: Branches, kept: Sequence[Kept], sequences: Sequence[Sequence[int]]) -> list[TokenBatch]:
    kind = branches.decoder.device.type
    return batches(sequences, min(token_budget(kind), max(1, state_budget(kind) // branches.state_bytes(kept))))


def _shape(ids_BT: torch.Tensor) -> Shape:
    return ids_BT.shape[0], ids_BT.shape[1]


class StreamedTasks(BranchedModel):
    """`BranchedModel` whose log-likelihoods come from passes over the checkpoint, all requests together."""

    def __init__(self, stream: Stream, tokenizer: Any, store: Answers, batch_size: int | None) -> None:
        super().__init__(stream.branches, tokenizer, store, batch_size, stream.progress, stream.say)
        self.stream = stream

    def _answer(self, kept: Sequence[Kept], requests: list[Request], rows: list[tuple[int, ...]], keys: list[bytes]) -> None:
        made: list[tuple[Sequence[tuple[int, ...]], list[tuple[int, int]]]] = []
        progress, self.progress = self.progress, False  # its bar would count batches that are only put together
        try:
            self._in_batches(requests, rows, lambda batch, asked: made.append((batch, asked)))
        finally:
            self.progress = progress
        placed = [self._places(batch, asked, requests) for batch, asked in made]

        def take(number: int, value_AN: torch.Tensor, greedy_AN: torch.Tensor | None) -> None:
            self._keep(kept, made[number][1], requests, keys, value_AN, greedy_AN)

        self.stream.answer(
            tuple(kept), [(ids_BT, None) for ids_BT, _ in placed], lambda number: placed[number][1], take,
            what="tasks", key=hashlib.blake2b(b"".join(keys), digest_size=16).hexdigest(), greedy=True, done=self.store.save,
        )  # fmt: skip

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        raise Refused(_GENERATES)


class _Planned(Exception):
    """All requests have been put into batches, and these fit."""


class _PlannedTasks(StreamedTasks):
    """Builds the requests, and checks the plan of the passes that would answer them."""

    def __init__(self, stream: Stream, tokenizer: Any, store: Answers, batch_size: int | None) -> None:
        super().__init__(stream, tokenizer, store, batch_size)
        self._most = self.tokens

    def _answer(self, kept: Sequence[Kept], requests: list[Request], rows: list[tuple[int, ...]], keys: list[bytes]) -> None:
        shapes: list[Shape] = []
        self._in_batches(requests, rows, lambda batch, asked: shapes.append((len(batch), max(map(len, batch)))))
        self.stream.check(tuple(kept), shapes, self._most)

    def _answers(self, keys: list[bytes]) -> list[tuple[float, bool]]:
        raise _Planned
