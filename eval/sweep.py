"""Measure many virtual cuts of one live model together: normalised loss, and lm-eval tasks, from one pass over the data."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from layerprune.eval.answers import Answers, sample_key
from layerprune.eval.harness import LiveModel, Request
from layerprune.eval.memory import logit_budget, state_budget, token_budget
from layerprune.eval.tasks import TaskSet, ask_harness, built_once, quiet, summarise
from layerprune.model.branches import Asked, Branches, padded
from layerprune.model.config import vocab_size
from layerprune.model.cuts import Kept, describe_dropped
from layerprune.model.data import batches
from layerprune.model.decoder import view_decoder, virtual_cut
from layerprune.model.errors import Refused
from layerprune.model.keep import kept_model
from layerprune.model.loss import LossSum
from layerprune.model.memory import in_halves
from layerprune.model.progress import progress_bar

Say = Callable[[str], None]


def sweep_live(
    model: Any,
    tokenizer: Any,
    kept: Iterable[Kept],
    *,
    tasks: TaskSet | None = None,
    sequences: Sequence[Sequence[int]] | None = None,
    answers: Answers | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = False,
    say: Say = lambda line: None,
) -> dict[Kept, dict[str, Any] | None]:
    """Loss (on `sequences`, where given) and tasks (where given) under each `kept`, as `evaluate_live` gives for one model.

    All log-likelihoods come from one pass over the data (`layerprune.model.tree`); text is generated one cut after another,
    by the model with these layers alone and its KV cache. answers: what is found there is not computed again, and what is
    computed is kept there, sample by sample. Memory: a batch holds a bounded number of tokens, of which the tree needs at
    most log2(branches) + 2 hidden states at once; the head is run on slices of the scored positions; a batch that
    does not fit on a GPU is halved. Tasks have their `correct` and `items` (see `score_tasks`). None stands for a cut that
    this model cannot run (which is said).
    """
    wanted = tuple(dict.fromkeys(kept))
    store = Answers() if answers is None else answers
    decoder = view_decoder(model)
    branches = Branches(decoder, wanted, logit_budget(decoder.device.type))
    for one, reason in branches.broken.items():
        say(f"left out: without layers {describe_dropped(one, len(decoder))} this model does not run ({reason})")
    if not branches.shared:
        say("this model does more between its layers than can be followed: every depth is a pass of its own")
    told = set(branches.broken)
    losses: dict[Kept, dict[str, Any]] = {}
    scores: dict[Kept, Mapping[str, Any]] = {}
    try:
        if sequences is not None:
            losses = sweep_losses(branches, sequences, store, progress)
        if tasks is not None:
            with quiet():
                lm = BranchedModel(branches, tokenizer, store, batch_size, progress, say)
            scores = dict(sweep_tasks(lm, tasks, limit, seed))
    finally:
        store.save()
    for one in set(branches.broken) - told:
        say(f"left out: without layers {describe_dropped(one, len(decoder))} {branches.broken[one]}")
    return by_cut(wanted, branches, losses, scores)


def by_cut(
    wanted: Sequence[Kept], branches: Branches, losses: Mapping[Kept, Any], scores: Mapping[Kept, Any]
) -> dict[Kept, dict[str, Any] | None]:
    """What was measured of each cut; None for one that this model cannot run."""
    found: dict[Kept, dict[str, Any] | None] = dict.fromkeys(wanted)
    for one in branches.kept:
        if one not in branches.broken:
            found[one] = {"loss": losses.get(one), "tasks": scores.get(one)}
    return found


def sweep_losses(
    branches: Branches, sequences: Sequence[Sequence[int]], store: Answers, progress: bool = False
) -> dict[Kept, dict[str, Any]]:
    """Of each branch: the loss over all predicted tokens, as `measure_loss` gives it."""
    keys = [sample_key("loss", ids) for ids in sequences]
    device = branches.decoder.device.type
    for kept, missing in store.missing(branches.kept, keys).items():
        most = min(token_budget(device), max(1, state_budget(device) // branches.state_bytes(kept)))
        chosen = [sequences[i] for i in missing]
        with progress_bar(len(chosen), f"loss, {len(kept)} depths", "doc", progress) as bar:

            def add(rows: Sequence[int], kept: tuple[Kept, ...] = kept, at: list[int] = missing) -> None:
                part = [sequences[at[row]] for row in rows]
                (batch,) = batches(part, len(part) * max(map(len, part)))
                order = [at[rows[b]] for b in batch.rows]
                nats_AB = _nats(branches, kept, batch, [sequences[i] for i in order])
                store.add(kept, [keys[i] for i in order], nats_AB)

            for batch in batches(chosen, most):
                in_halves(batch.rows, add)
                bar.update(len(batch.rows))
    return losses_of(branches, sequences, store)


def losses_of(branches: Branches, sequences: Sequence[Sequence[int]], store: Answers) -> dict[Kept, dict[str, Any]]:
    """The losses of all branches that run, from the answers that are kept."""
    keys = [sample_key("loss", ids) for ids in sequences]
    tokens = sum(len(ids) - 1 for ids in sequences)
    vocab = vocab_size(branches.decoder.model.config)
    found = {}
    for one in branches.kept:
        if one in branches.broken:
            continue
        found[one] = LossSum(sum(store.values(one, keys).tolist()), tokens).summary(vocab, len(sequences))
    return found


def _nats(branches: Branches, kept: Sequence[Kept], batch: Any, sequences: Sequence[Sequence[int]]) -> np.ndarray:
    """Summed nats (branches, rows) over every token of a row but its first."""
    asked = questions(sequences, batch.ids_BT.shape[1])
    value_AN, _ = branches.score(kept, batch.ids_BT, batch.mask_BT, asked, dtype=torch.float32)
    return summed_nats(value_AN, sequences)


def questions(sequences: Sequence[Sequence[int]], width: int) -> Asked:
    """Every token but the first of each row of a batch that is `width` tokens wide."""
    counts = [len(ids) - 1 for ids in sequences]
    row_N = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    position_N = torch.cat([torch.arange(count) for count in counts])
    token_N = torch.cat([torch.tensor(ids[1:], dtype=torch.long) for ids in sequences])
    return Asked.make(row_N, position_N, token_N, width)


def summed_nats(value_AN: torch.Tensor, sequences: Sequence[Sequence[int]]) -> np.ndarray:
    """Nats (branches, rows) from the log-probabilities of `questions`; summed in float64, row by row."""
    counts = [len(ids) - 1 for ids in sequences]
    return np.stack([-part.double().sum(dim=1).numpy() for part in value_AN.split(counts, dim=1)], axis=1)


class BranchedModel(LiveModel):
    """lm-eval's model over one live decoder under many cuts; it answers as `branch`, one of them.

    The first question is answered for all branches, from one pass over its requests, and the answers are kept: the other
    branches find theirs. Contexts, tokens, truncation and metrics are lm-eval's own, as in `LiveModel`.
    """

    def __init__(
        self, branches: Branches, tokenizer: Any, store: Answers, batch_size: int | None, progress: bool, say: Say
    ) -> None:
        super().__init__(branches.decoder.model, tokenizer, batch_size, progress)
        self.branches, self.store, self.say = branches, store, say
        self.branch = branches.kept[0]
        self._known: dict[tuple[str, str], tuple[bytes, bool]] = {}
        """Of each question: the key of its answer, and whether its prompt was cut."""

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        asked = [request.args for request in requests]
        if not all(question in self._known for question in asked):
            return super().loglikelihood(requests, disable_tqdm)
        self.truncated += sum(self._known[question][1] for question in asked)  # nothing is tokenised again
        return self._answers([self._known[question][0] for question in asked])

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        rows, keys = [], []
        for request in requests:
            before = self.truncated
            rows.append(self._row(request))
            keys.append(sample_key("loglikelihood", rows[-1], request[2]))
            if request[0] is not None:
                self._known[request[0]] = (keys[-1], self.truncated > before)
        for kept, missing in self.store.missing([k for k in self.branches.kept if k not in self.branches.broken], keys).items():
            self.tokens = min(self.tokens, max(1, state_budget(self.device.type) // self.branches.state_bytes(kept)))
            self._answer(kept, [requests[i] for i in missing], [rows[i] for i in missing], [keys[i] for i in missing])
        return self._answers(keys)

    def _answers(self, keys: list[bytes]) -> list[tuple[float, bool]]:
        values, flags = self.store.values(self.branch, keys), self.store.flags(self.branch, keys)
        return list(zip(values.tolist(), flags.tolist(), strict=True))

    def _answer(self, kept: Sequence[Kept], requests: list[Request], rows: list[tuple[int, ...]], keys: list[bytes]) -> None:
        def score(batch: Sequence[tuple[int, ...]], asked: list[tuple[int, int]]) -> None:
            ids_BT, places = self._places(batch, asked, requests)
            value_AN, greedy_AN = self.branches.score(kept, ids_BT, None, places, greedy=True)
            self._keep(kept, asked, requests, keys, value_AN, greedy_AN)

        self._in_batches(requests, rows, score)

    def _places(
        self, batch: Sequence[tuple[int, ...]], asked: list[tuple[int, int]], requests: list[Request]
    ) -> tuple[torch.Tensor, Asked]:
        """A batch's token ids, and what is asked of it: the last len(continuation) positions of a row foretell it."""
        at = [
            (row, len(batch[row]) - len(requests[i][2]) + k, token) for row, i in asked for k, token in enumerate(requests[i][2])
        ]
        row_N, position_N, token_N = torch.tensor(at).T
        ids_BT = padded(batch)
        return ids_BT, Asked.make(row_N, position_N, token_N, ids_BT.shape[1])

    def _keep(
        self, kept: Sequence[Kept], asked: list[tuple[int, int]], requests: list[Request], keys: list[bytes],
        value_AN: torch.Tensor, greedy_AN: torch.Tensor | None,
    ) -> None:  # fmt: skip
        """Sum up the answers about each continuation and keep them."""
        assert greedy_AN is not None
        lengths = torch.tensor([len(requests[i][2]) for _, i in asked])
        value_AR = _sums(value_AN, lengths)
        exact_AR = _sums((~greedy_AN).int(), lengths) == 0
        self.store.add(kept, [keys[i] for _, i in asked], value_AR.double().numpy(), exact_AR.numpy())

    def _rows_that_fit(self, order: list[tuple[int, ...]], start: int, need: dict[tuple[int, ...], int]) -> int:
        return max(1, min(self.rows, self.tokens // len(order[start]), len(order) - start))

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        seen: dict[tuple[str, str], int] = {}
        keys = []
        for request in requests:
            context, settings = request.args[0], repr(request.args[1])
            turn = seen[context, settings] = seen.get((context, settings), -1) + 1  # a sampled text differs each time
            keys.append(sample_key("text", context, settings, str(turn)))
        missing = [i for i, key in enumerate(keys) if self.store.text(self.branch, key) is None]
        if missing:
            self.say(f"generating without layers {describe_dropped(self.branch, len(self.branches.decoder))}")
            self._generate([(requests[i], keys[i]) for i in missing])
        return [self.store.text(self.branch, key) or "" for key in keys]

    def _generate(self, missing: list[tuple[Any, bytes]]) -> None:
        """Generate, a few batches of similar length at a time, and keep each text."""
        missing = sorted(missing, key=lambda pair: -len(pair[0].args[0]))
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(kept_model(self.branches.decoder, self.branch))
            except Refused as refusal:
                self.say(f"  without a KV cache, which is slow: {refusal}")
                stack.enter_context(virtual_cut(self.branches.decoder, self.branch))
            step = 4 * int(self.batch_size_per_gpu)
            for part in (missing[i : i + step] for i in range(0, len(missing), step)):
                texts = super().generate_until([request for request, _ in part])
                for (_, key), text in zip(part, texts, strict=True):
                    self.store.add_text(self.branch, key, text)


def _sums(value_AN: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Sums (branches, requests) over runs of N of the given lengths, in the dtype of the values, as lm-eval sums them."""
    if int(lengths.max()) == 1:
        return value_AN
    ends = lengths.cumsum(0)
    index_RK = (ends - lengths)[:, None] + torch.arange(int(lengths.max()))
    inside_RK = index_RK < ends[:, None]
    picked_ARK = value_AN[:, index_RK.clamp(max=value_AN.shape[1] - 1)]
    return torch.where(inside_RK, picked_ARK, 0).sum(dim=-1).to(value_AN.dtype)


def sweep_tasks(lm: BranchedModel, tasks: TaskSet, limit: int | None, seed: int) -> Iterator[tuple[Kept, Mapping[str, Any]]]:
    """Score each branch by lm-eval, whose requests are built once."""
    branches = lm.branches
    training = branches.decoder.model.training
    try:
        with built_once(tasks), progress_bar(len(branches.kept), "depths", "depth", lm.progress) as bar:
            for one in branches.kept:
                if one in branches.broken:
                    continue
                lm.branch, lm.truncated = one, 0
                found = ask_harness(lm, tasks, limit, seed)
                yield one, summarise(tasks, found, lm.truncated, samples=True)
                lm.progress = False  # what is left is answered already
                bar.update(1)
    finally:
        branches.decoder.model.train(training)
