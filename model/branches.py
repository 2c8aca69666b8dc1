"""Log-probabilities of single tokens under many virtual cuts of one live model, from one pass over a batch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from layerprune.model.config import vocab_size
from layerprune.model.cuts import Kept
from layerprune.model.decoder import Decoder, forward_logits, virtual_cut, width_of
from layerprune.model.errors import Refused
from layerprune.model.layerwise import Batch, Layerwise, State
from layerprune.model.tree import CutTree, exact_branches

Answer = tuple[torch.Tensor, torch.Tensor | None]
"""Log-probabilities (N,) of one branch, and whether each token is the most probable one, where that was asked."""


@dataclass(frozen=True)
class Asked:
    """N tokens whose log-probability is asked, each at a position of a row; the same position may be asked for several.

    row_P, position_P: the P places. place_N, token_N: place and token of each question, by ascending place.
    back_N: where each question in the caller's order stands in that order.
    """

    row_P: torch.Tensor
    position_P: torch.Tensor
    place_N: torch.Tensor
    token_N: torch.Tensor
    back_N: torch.Tensor

    @classmethod
    def make(cls, row_N: torch.Tensor, position_N: torch.Tensor, token_N: torch.Tensor, tokens: int) -> Asked:
        """From the questions in the caller's order; position p is the logits after token p. tokens: the batch's width."""
        places, place_N = torch.unique(row_N * tokens + position_N, return_inverse=True)
        place_N, order = torch.sort(place_N, stable=True)
        return cls(places // tokens, places % tokens, place_N, token_N[order], torch.argsort(order))

    def to(self, device: torch.device) -> Asked:
        return Asked(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


class Branches:
    """One live decoder under many `kept` tuples.

    kept: those that the model can run; broken: the others, with the reason; a branch whose logits are not numbers joins them
    when that shows. shared: whether layers that branches have in common are run once (`layerprune.model.tree`); False where
    this model does more between its layers than can be followed: then every branch is a pass of its own. logit_bytes: what the
    logits of a slice of positions, and the copy that their log-softmax takes where it needs one, may occupy. applications
    counts the layers run, one layer on one batch each. Raises Refused for a whole model that does not run.

    absent: the layers have no weights yet, so nothing can be tried: all branches are taken for right and shared until a pass
    shows otherwise.
    """

    def __init__(self, decoder: Decoder, kept: Iterable[Kept], logit_bytes: int, absent: bool = False) -> None:
        self.decoder, self._vocab, self._logit_bytes = decoder, vocab_size(decoder.model.config), logit_bytes
        every = tuple(dict.fromkeys(kept))
        self.shared, self.broken = (True, {}) if absent else exact_branches(decoder, every, self._vocab)
        whole = tuple(range(len(decoder)))
        if whole in self.broken:
            raise Refused(f"this model does not run here, with all of its layers: {self.broken[whole]}")
        self.kept = tuple(k for k in every if k not in self.broken)
        self._layerwise = Layerwise(decoder) if self.shared and not absent else None
        self._trees: dict[tuple[Kept, ...], CutTree] = {}
        self.applications = 0

    def tree(self, kept: Sequence[Kept]) -> CutTree:
        key = tuple(kept)
        if key not in self._trees:
            self._trees[key] = CutTree(key, len(self.decoder))
        return self._trees[key]

    def state_bytes(self, kept: Sequence[Kept]) -> int:
        """What the hidden states of one token take when these branches are walked."""
        # the batch keeps its own first state, whose layers may need it again
        return (self.tree(kept).alive + 1 if self.shared else 1) * width_of(self.decoder) * self.decoder.model.dtype.itemsize

    @torch.no_grad()
    def score(
        self,
        kept: Sequence[Kept],
        ids_BT: torch.Tensor,
        mask_BT: torch.Tensor | None,
        asked: Asked,
        dtype: torch.dtype | None = None,
        greedy: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log-probabilities (branches, N) in nats, on the CPU, in the order of the questions; with `greedy`, also whether
        each token is the most probable one.

        ids_BT is padded on the right; without a mask that is right too, since causal attention never looks there.
        dtype: of the log-softmax, by default that of the logits. Where a cut gives what is not a number it goes to `broken`,
        and its values are NaN; Refused where the whole model does.
        """
        found: list[Answer | None] = [None] * len(kept)
        for ends, answer in self._each(kept, ids_BT, mask_BT, asked, dtype, greedy):
            for end in ends:
                found[end] = answer
        return self.gather(kept, found, asked, greedy)

    def gather(
        self, kept: Sequence[Kept], found: Sequence[Answer | None], asked: Asked, greedy: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The answers of all branches as `score` returns them, from those of each; None stands for a branch that broke."""
        back_N = asked.back_N.cpu()
        if None in found:
            absent = (torch.full((len(back_N),), torch.nan), torch.zeros(len(back_N), dtype=torch.bool) if greedy else None)
            found = [
                absent if answer is None else (answer[0].cpu(), None if answer[1] is None else answer[1].cpu()) for answer in found
            ]
        value_AN = torch.stack([answer[0] for answer in found if answer is not None]).cpu()[:, back_N]
        for number in value_AN.isnan().any(dim=1).nonzero()[:, 0].tolist():
            why = "the model's logits are not numbers: its weights or this dtype overflow (try --dtype float32)"
            if len(kept[number]) == len(self.decoder):
                raise Refused(why)
            self.broken.setdefault(kept[number], why)
            value_AN[number] = torch.nan
        if not greedy:
            return value_AN, None
        flags = [answer[1] for answer in found if answer is not None and answer[1] is not None]
        return value_AN, torch.stack(flags).cpu()[:, back_N]

    def read(self, batch: Batch, state: State, asked: Asked, dtype: torch.dtype | None, greedy: bool = False) -> Answer:
        """The answers of one branch, from its x^(L); in the order of `asked`, on the state's device."""
        slices = self._slices(asked, dtype == torch.float32 and not greedy)
        return self._read(functools.partial(batch.logits, state), asked.to(state.hidden.device), slices, dtype, greedy)

    def _each(
        self,
        kept: Sequence[Kept],
        ids_BT: torch.Tensor,
        mask_BT: torch.Tensor | None,
        asked: Asked,
        dtype: torch.dtype | None,
        greedy: bool,
    ) -> list[tuple[tuple[int, ...], Answer]]:
        found = []
        # found on the CPU: a GPU that is asked anything in between stands still
        slices = self._slices(asked, dtype == torch.float32 and not greedy)
        places: dict[torch.device, Asked] = {}

        def at(device: torch.device) -> Asked:
            if device not in places:
                places[device] = asked.to(device)
            return places[device]

        if self._layerwise is not None:
            tree, batch = self.tree(kept), self._layerwise.begin(ids_BT, mask_BT)
            self.applications += tree.applications

            def see(ends: tuple[int, ...], state: State) -> None:
                read = functools.partial(batch.logits, state)
                found.append((ends, self._read(read, at(state.hidden.device), slices, dtype, greedy)))

            tree.walk(batch, see)
            return found
        for number, one in enumerate(kept):
            with virtual_cut(self.decoder, one):
                logits_BTV = forward_logits(self.decoder, ids_BT, mask_BT)
            self.applications += len(one)
            read = functools.partial(_at, logits_BTV)
            found.append(((number,), self._read(read, at(logits_BTV.device), slices, dtype, greedy)))
        return found

    def _read(
        self,
        logits: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        asked: Asked,
        slices: Sequence[tuple[slice, slice]],
        dtype: torch.dtype | None,
        greedy: bool,
    ) -> Answer:
        """Answer the questions of one branch, in slices of places and the questions about them."""
        values, flags = [], []
        for part, ask in slices:
            logits_PV = logits(asked.row_P[part], asked.position_P[part])
            place_N = (asked.place_N[ask] - part.start).to(logits_PV.device)
            value_N, greedy_N = _log_probabilities(logits_PV, place_N, asked.token_N[ask].to(logits_PV.device), dtype, greedy)
            values.append(value_N)
            if greedy_N is not None:
                flags.append(greedy_N)
        return torch.cat(values), torch.cat(flags) if greedy else None

    def _slices(self, asked: Asked, fusable: bool) -> list[tuple[slice, slice]]:
        """The places whose logits are computed at once, with the questions about them.

        On a CPU a large tensor is fresh memory each time, which costs more than computing it where the model is narrow: there a
        slice is what the allocator reuses (up to 32 MiB), unless the head's own weights would then be read too often. On a GPU
        one slice is best, since a model's forward pass waits for the device once.
        """
        size = self.decoder.model.dtype.itemsize
        head = self.decoder.device
        fused = fusable and head.type == "cuda" and _fused(self.decoder.model.dtype, head) is not _differences
        step = max(1, self._logit_bytes // (self._vocab * (size if fused else size + 4)))
        if self.decoder.device.type == "cpu":
            width = self.decoder.model.get_input_embeddings().weight.shape[-1]
            step = min(step, max((32 << 20) // (4 * self._vocab), width // 4, 1))
        places = len(asked.row_P)
        step = -(-places // -(-places // step))  # slices of one size
        edges = [*range(0, places, step), places]
        ends = torch.searchsorted(asked.place_N, torch.tensor(edges)).tolist()
        return [(slice(edges[i], edges[i + 1]), slice(ends[i], ends[i + 1])) for i in range(len(edges) - 1)]


def _log_probabilities(
    logits_PV: torch.Tensor, place_N: torch.Tensor, token_N: torch.Tensor, dtype: torch.dtype | None, greedy: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-softmax in `dtype` at (place, token); on a CPU a few places at a time, so that it stays in the cache."""
    if logits_PV.device.type == "cuda" and dtype == torch.float32 and not greedy:
        return _fused(logits_PV.dtype, logits_PV.device)(logits_PV, place_N, token_N), None
    step = len(logits_PV) if logits_PV.device.type != "cpu" else max(1, (2 << 20) // (4 * logits_PV.shape[1]))
    value_N = torch.empty(len(token_N), dtype=dtype or logits_PV.dtype, device=logits_PV.device)
    best_P = torch.empty(len(logits_PV), dtype=torch.long, device=logits_PV.device)
    starts = range(0, len(logits_PV), step)
    # place_N ascends: each chunk of places answers one run of questions
    ends = [len(place_N)] if len(starts) == 1 else torch.searchsorted(place_N, torch.tensor([*starts[1:], len(logits_PV)])).tolist()
    begin = 0
    for start, end in zip(starts, ends, strict=True):
        logp_CV = F.log_softmax(logits_PV[start : start + step], dim=-1, dtype=dtype)
        value_N[begin:end] = logp_CV[place_N[begin:end] - start, token_N[begin:end]]
        if greedy:
            best_P[start : start + step] = logp_CV.argmax(dim=-1)
        begin = end
    return value_N, best_P[place_N] == token_N if greedy else None


def _differences(logits_PV: torch.Tensor, place_N: torch.Tensor, token_N: torch.Tensor) -> torch.Tensor:
    """log p of each question, float32."""
    return logits_PV[place_N, token_N].float() - torch.logsumexp(logits_PV.float(), dim=-1)[place_N]


@functools.cache
def _fused(dtype: torch.dtype, device: torch.device) -> Callable[..., torch.Tensor]:
    """`_differences` as one kernel, which reads the logits and writes nothing of their size; in plain steps where nothing
    can be compiled."""
    try:
        compiled = torch.compile(_differences, dynamic=True)
        some = torch.zeros(1, dtype=torch.long, device=device)
        compiled(torch.zeros((3, 5), device=device, dtype=dtype), some, some)
        return compiled
    except Exception:  # no compiler, no Triton: whatever the reason, the plain steps are right
        return _differences


def _at(logits_BTV: torch.Tensor, row_P: torch.Tensor, position_P: torch.Tensor) -> torch.Tensor:
    return logits_BTV[row_P, position_P]


def padded(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Token ids (rows, longest row), zeros on the right."""
    ids_BT = torch.zeros((len(rows), max(map(len, rows))), dtype=torch.long)
    for b, ids in enumerate(rows):
        ids_BT[b, : len(ids)] = torch.tensor(ids)
    return ids_BT
