"""Layer skipping: what one layer means to the later ones and to the output (arXiv 2512.14064, probe 3, after Csordas et al.).

Layer s is skipped where its output is replaced by its input; it runs all the same, since some tokens are never skipped. Let
x^(l) be the input of layer l and D_l = x^(l+1) - x^(l) its contribution; a prime marks the pass with the skip.
- effect on a later layer l > s, at one token: |D_l - D_l'| / max(|D_l|, 1e-6), L2 norms: 0 nothing, 1 as much as all of D_l;
- effect on the output, at one token: |p - p'| of the two next-token distributions, L2, in [0, sqrt(2)].

Shapes: B batch, T tokens, F features of a token's state, N measured tokens, V vocabulary, S = L layers (skipped, observed).
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from layerprune.model.config import vocab_size
from layerprune.model.data import TokenBatch, batches, check_token_id
from layerprune.model.decoder import Decoder, states_BTD
from layerprune.model.errors import Refused, UsageError
from layerprune.model.layerwise import Batch, Layerwise, State
from layerprune.model.memory import in_halves
from layerprune.model.tree import must_run_layer_by_layer

VARIANTS = ("all", "future")
AGGREGATES = ("mean", "max")
POSITIONS = 4
"""Positions t of a document at which `future` is measured, at most."""
LOGIT_BYTES = 1 << 28
"""What the float32 logits of a slice of positions may occupy."""


@dataclass(frozen=True)
class SkipEffects:
    """What skipping each of L layers did, by one aggregate (`mean` or `max`) over measured tokens, positions and documents.

    contribution_SL: float64 (L skipped, L observed), effect on the contributions of later layers, 0 and above; NaN where
    observed <= skipped: earlier layers cannot see a skip, and a skipped layer's own contribution is gone by definition.
    output_S: float64 (L,), effect on the output, in [0, sqrt(2)]. score: `depth_score` of it. tokens: measured tokens, each
    once for every position. positions: pairs of a document and a position. applications: layers run, one layer on one
    document each; naive: those of running the whole model once undisturbed and once for every skip.
    """

    aggregate: str
    contribution_SL: torch.Tensor
    output_S: torch.Tensor
    score: float
    documents: int
    positions: int
    tokens: int
    applications: int
    naive: int


class SkipSum:
    """Accumulates the effects of skipping over documents: sums, counts and maxima, in constant memory and in any order."""

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.effect_sum_SL = torch.zeros(layers, layers, dtype=torch.float64)
        self.effect_max_SL = torch.zeros(layers, layers, dtype=torch.float64)
        self.output_sum_S = torch.zeros(layers, dtype=torch.float64)
        self.output_max_S = torch.zeros(layers, dtype=torch.float64)
        self.count_S = torch.zeros(layers, dtype=torch.int64)
        self.documents = self.positions = self.applications = self.naive = 0

    def update(self, skipped: int, effect_LN: torch.Tensor, output_N: torch.Tensor) -> None:
        """Add N >= 1 tokens: effects on the layers skipped+1 .. L-1 (L-1-skipped, N), and on the output (N,).

        Raises Refused for values that are not finite.
        """
        effect_LN, output_N = effect_LN.double().cpu(), output_N.double().cpu()
        if not (effect_LN.isfinite().all() and output_N.isfinite().all()):
            raise Refused(
                f"with layer {skipped} skipped the activations are not numbers: the weights are broken or overflow in this dtype "
                "(try --dtype float32)"
            )
        later = slice(skipped + 1, self.layers)
        self.effect_sum_SL[skipped, later] += effect_LN.sum(dim=1)
        self.effect_max_SL[skipped, later] = self.effect_max_SL[skipped, later].maximum(effect_LN.amax(dim=1))
        self.output_sum_S[skipped] += output_N.sum()
        self.output_max_S[skipped] = self.output_max_S[skipped].maximum(output_N.amax())
        self.count_S[skipped] += output_N.shape[0]

    def merge(self, other: SkipSum) -> None:
        self.effect_sum_SL += other.effect_sum_SL
        self.effect_max_SL = self.effect_max_SL.maximum(other.effect_max_SL)
        self.output_sum_S += other.output_sum_S
        self.output_max_S = self.output_max_S.maximum(other.output_max_S)
        self.count_S += other.count_S
        self.documents += other.documents
        self.positions += other.positions
        self.applications += other.applications
        self.naive += other.naive

    def result(self, aggregate: str = "mean") -> SkipEffects:
        """`mean` over all measured tokens, each with the same weight; `max`, as the paper's code has it, is the largest value
        at any token, which grows with the amount of data. UsageError for any other name."""
        if aggregate not in AGGREGATES:
            raise UsageError(f"the aggregate {aggregate!r} is none of {', '.join(AGGREGATES)}")
        mean = aggregate == "mean"
        effect_SL = self.effect_sum_SL / self.count_S[:, None] if mean else self.effect_max_SL.clone()
        effect_SL[torch.ones_like(effect_SL, dtype=torch.bool).tril()] = math.nan
        output_S = self.output_sum_S / self.count_S if mean else self.output_max_S.clone()
        return SkipEffects(
            aggregate, effect_SL, output_S, depth_score(output_S), self.documents, self.positions,
            int(self.count_S.max()) if self.layers else 0, self.applications, self.naive,
        )  # fmt: skip


def depth_score(effect_L: torch.Tensor) -> float:
    """Where effects of layers lie on average, sum l e_l / sum e_l with l from 0 (Csordas et al.): in [0, L-1], NaN if all are 0."""
    effect_L = effect_L.double()
    return float((torch.arange(len(effect_L)) * effect_L).sum() / effect_L.sum())


def skip_effects(
    decoder: Decoder,
    sequences: Sequence[Sequence[int]],
    *,
    variant: str = "all",
    seed: int = 123,
    max_tokens: int | None = None,
    pad_id: int = 0,
    progress: Callable[[int], None] = lambda documents: None,
) -> SkipSum:
    """Skip every layer of a live decoder in turn over tokenised documents; `.result("mean")` and `.result("max")` tell.

    variant: `all` skips at every token but the first and measures all tokens (the local variant of Csordas et al.); `future`
    skips at tokens 1 .. t-1 and measures tokens t and later, at the positions t of `future_positions` (probe 3 as the paper
    runs it). Documents that are too short are left out: under 2 tokens for `all`, under 13 for `future`.
    max_tokens: tokens of a batch, padding included, which bounds the memory: two states of all L layers and one float32
    distribution a token. The pass with layer s skipped begins at the stored x^(s+1), so that about half of the layers are run.
    A batch that runs out of GPU memory is halved. progress is told the documents done.
    Raises UsageError for a variant of another name; Refused for a model that cannot be followed layer by layer, for documents
    that are all too short, and for activations that are not finite.
    """
    if variant not in VARIANTS:
        raise UsageError(f"the variant {variant!r} is none of {', '.join(VARIANTS)}")
    least = 2 if variant == "all" else 13
    kept = [list(ids) for ids in sequences if len(ids) >= least]
    if not kept:
        raise Refused(f"all {len(sequences)} documents are shorter than {least} tokens: skipping cannot be measured on them")
    check_token_id(max(map(max, kept)), vocab_size(decoder.model.config))
    check_followed(decoder)
    if max_tokens is None:
        max_tokens = 16384 if decoder.device.type != "cpu" else 2048
    total = SkipSum(len(decoder))

    def add(part: Sequence[int], batch: TokenBatch) -> None:
        again = [kept[batch.rows[row]] for row in part]
        if len(part) < len(batch.rows):
            (batch,) = batches(again, sum(map(len, again)) * len(again), pad_id)
            again = [again[row] for row in batch.rows]
        total.merge(_batch_effects(decoder, batch, again, variant, seed))

    for batch in batches(kept, max_tokens, pad_id):
        in_halves(range(len(batch.rows)), functools.partial(add, batch=batch))
        progress(len(batch.rows))
    return total


def future_positions(ids: Sequence[int], seed: int = 123) -> list[int]:
    """Up to 4 positions of range(8, T - 4, 8), shuffled by the seed and the document's own tokens.

    So a document is measured at the same positions whatever it is batched with, and documents of one length at different ones.
    """
    positions = list(range(8, len(ids) - 4, 8))
    random.Random(f"{seed}:{list(ids)}").shuffle(positions)
    return positions[:POSITIONS]


@torch.no_grad()
def _batch_effects(
    decoder: Decoder, tokens: TokenBatch, documents: Sequence[Sequence[int]], variant: str, seed: int
) -> SkipSum:
    """The effects over one batch, whose undisturbed states live as long as this call; documents in the order of its rows."""
    layers, (rows, width) = len(decoder), tokens.ids_BT.shape
    total = SkipSum(layers)
    batch = Layerwise(decoder).begin(tokens.ids_BT, tokens.mask_BT)
    states = undisturbed(batch, layers)
    at_T = torch.arange(width)
    real_BT = at_T < torch.tensor([[len(ids)] for ids in documents])
    if variant == "all":
        sweeps = [((at_T > 0).expand(rows, width), real_BT)]
        total.positions = rows
    else:
        chosen = [future_positions(ids, seed) for ids in documents]
        total.positions = sum(map(len, chosen))
        sweeps = []
        for k in range(max(map(len, chosen))):
            t_B1 = torch.tensor([[places[k] if k < len(places) else width] for places in chosen])
            sweeps.append(((at_T > 0) & (at_T < t_B1), real_BT & (at_T >= t_B1)))
    for skip_BT, measure_BT in sweeps:
        _sweep(decoder, batch, states, skip_BT, measure_BT, total)
    total.documents = rows
    total.applications = rows * (layers + len(sweeps) * layers * (layers - 1) // 2)
    total.naive = rows * layers + total.positions * layers * layers
    return total


def _sweep(
    decoder: Decoder, batch: Batch, states: list[State], skip_BT: torch.Tensor, measure_BT: torch.Tensor, total: SkipSum
) -> None:
    """Skip each layer in turn at the tokens of one mask, and measure at those of another."""
    layers, vocab = len(decoder), vocab_size(decoder.model.config)
    row_N, position_N = measure_BT.nonzero(as_tuple=True)

    def measured(state: State) -> torch.Tensor:
        """(N, F) in float32 at the measured tokens, all on one device."""
        flat = states_BTD(state.hidden, batch.rows, batch.tokens)
        return flat[row_N.to(flat.device), position_N.to(flat.device)].to(decoder.device, torch.float32)

    picked = [measured(state) for state in states]
    added_LNF = [after - before for before, after in zip(picked, picked[1:], strict=False)]
    del picked
    size_LN = [added.norm(dim=-1).clamp(min=1e-6) for added in added_LNF]
    p_NV = torch.cat(list(distributions(batch, states[-1], row_N, position_N, vocab)))
    for s in range(layers):
        state = _skipped(batch, states[s], states[s + 1], skip_BT)
        before, effects = measured(state), []
        for layer in range(s + 1, layers):
            state = batch.step(layer, state)
            after = measured(state)
            effects.append((added_LNF[layer] - (after - before)).norm(dim=-1) / size_LN[layer])
            before = after
        effect_LN = torch.stack(effects) if effects else torch.zeros(0, len(row_N))
        changed, at = [], 0
        for q_nV in distributions(batch, state, row_N, position_N, vocab):
            changed.append((p_NV[at : at + len(q_nV)] - q_nV).norm(dim=-1))
            at += len(q_nV)
        total.update(s, effect_LN, torch.cat(changed))


def _skipped(batch: Batch, before: State, after: State, skip_BT: torch.Tensor) -> State:
    """The state after a layer whose output is replaced by its input at the tokens of the mask."""
    x = states_BTD(before.hidden, batch.rows, batch.tokens)
    y = states_BTD(after.hidden, batch.rows, batch.tokens)
    mixed = torch.where(skip_BT[..., None].to(y.device), x.to(y.device), y)
    return State(layer_form(mixed, after.hidden), after.fork().shared)


def undisturbed(batch: Batch, layers: int) -> list[State]:
    """x^(0) .. x^(L) of a batch, each with the mappings through which layers share as they were at that depth."""
    states = [batch.start()]
    for layer in range(layers):
        states.append(batch.step(layer, states[-1].fork()))
    return states


def layer_form(flat_BTF: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The inverse of `states_BTD`: states (B, T, F) as layers hand them on; `like` is a state of this model, of any B.

    Only Gemma-3n's differ: (streams, batch, tokens, features)."""
    if like.dim() == 3:
        return flat_BTF
    split = flat_BTF.unflatten(2, (-1, like.shape[-1]))
    return split.permute(2, 0, 1, 3) if like.shape[2] == flat_BTF.shape[1] else split


def distributions(
    batch: Batch, state: State, row_N: torch.Tensor, position_N: torch.Tensor, vocab: int
) -> Iterator[torch.Tensor]:
    """Next-token distributions, float32 (n, V), at N positions of x^(L), in slices of bounded size and in order."""
    step = max(1, LOGIT_BYTES // (4 * vocab))
    for at in range(0, len(row_N), step):
        yield batch.logits(state, row_N[at : at + step], position_N[at : at + step]).float().softmax(dim=-1)


@torch.no_grad()
def check_followed(decoder: Decoder) -> None:
    """Refuse a model whose layers, called one by one, do not give to the bit (on a GPU: to rounding) what it gives itself.

    Compared on a few tokens: the whole model, and passes that begin in the middle, at a stored state, after a disturbed pass.
    """
    otherwise = "its depth cannot be probed"
    must_run_layer_by_layer(decoder, otherwise)
    vocab = vocab_size(decoder.model.config)
    if not _resumes(decoder, torch.arange(1, 17).view(2, 8) % vocab):
        raise Refused(f"this {type(decoder.model).__name__} does more between its layers than hand states on: {otherwise}")


def _resumes(decoder: Decoder, ids_BT: torch.Tensor) -> bool:
    layers = len(decoder)
    batch = Layerwise(decoder).begin(ids_BT)
    states = undisturbed(batch, layers)

    def end(state: State, layer: int) -> torch.Tensor:
        for later in range(layer, layers):
            state = batch.step(later, state)
        return state.hidden.double().nan_to_num()

    end(State(-states[0].hidden, states[0].fork().shared), 0)
    wanted = states[-1].hidden.double().nan_to_num()
    share = 1e-5 if states[-1].hidden.dtype == torch.float32 else 2e-2
    return all((end(states[at].fork(), at) - wanted).norm() <= share * wanted.norm() for at in {layers // 2, layers - 1})
