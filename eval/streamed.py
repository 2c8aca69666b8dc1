"""Losses and tasks under many virtual cuts of a model that is larger than memory: its layers come once for all of them."""

from __future__ import annotations

import hashlib
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
from layerprune.model.data import batches
from layerprune.model.errors import Refused
from layerprune.model.files import free_disk
from layerprune.model.layermajor import layer_major, sizes_of, working_bytes
from layerprune.model.layerwise import Batch, State
from layerprune.model.passfile import PassFile
from layerprune.model.passplan import plan_passes, used_layers
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
    if tasks is not None and any(getattr(task, "OUTPUT_TYPE", "") == "generate_until" for task in tasks.tasks.values()):
        raise Refused(_GENERATES)
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


def kept_answers(keep: Path | None, streamed: StreamedModel) -> Answers:
    """The answers that a killed call left in its folder, those of this very model, dtype and device."""
    if keep is None:
        return Answers()
    return Answers(keep / hashlib.blake2b(streamed.identity().encode(), digest_size=8).hexdigest())


@dataclass(frozen=True)
class Stream:
    """The branches of one streamed model, asked in series of passes that the budget allows."""

    streamed: StreamedModel
    branches: Branches
    budget: Budget
    progress: bool
    say: Say
    keep: Path | None = None

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
        shapes = [(ids_BT.shape[0], ids_BT.shape[1]) for ids_BT, _ in batches]
        working = working_bytes(streamed.decoder, max(rows * tokens for rows, tokens in shapes))
        working += logit_budget(streamed.device.type)
        plan = plan_passes(
            sizes_of(streamed),
            tree,
            shapes,
            memory=self.budget.memory,
            ram=self.budget.ram,
            working=working,
            scratch=free_disk(self.keep),
        )
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
    branches, kind = stream.branches, stream.streamed.device.type
    keys = [sample_key("loss", ids) for ids in sequences]
    for kept, missing in store.missing(branches.kept, keys).items():
        most = min(token_budget(kind), max(1, state_budget(kind) // branches.state_bytes(kept)))
        made = batches([sequences[i] for i in missing], most)
        rows = [[missing[row] for row in batch.rows] for batch in made]

        def asked(number: int, rows: list[list[int]] = rows, made: Any = made) -> Asked:
            return questions([sequences[i] for i in rows[number]], made[number].ids_BT.shape[1])

        def take(number: int, value_AN: torch.Tensor, _: Any, rows: list[list[int]] = rows, kept: tuple[Kept, ...] = kept) -> None:
            own = [sequences[i] for i in rows[number]]
            store.add(kept, [keys[i] for i in rows[number]], summed_nats(value_AN, own))

        ids = [(batch.ids_BT, batch.mask_BT) for batch in made]
        stream.answer(kept, ids, asked, take, what="loss", key="", dtype=torch.float32, done=store.save)
    return losses_of(branches, sequences, store)


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
