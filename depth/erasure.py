"""Residual erasure: until which layer a token's state matters to an answer (arXiv 2512.14064, probe 4, after Csordas et al.).

The state of one token at one depth is replaced by the mean state of that depth; how far that moves the probabilities of the
answer says whether anything at that place was still needed.

Shapes: B batch, T tokens, F features of a token's state, A answer tokens, V vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from layerprune.depth.skip import LOGIT_BYTES, check_followed, distributions, layer_form, undisturbed
from layerprune.model.config import vocab_size
from layerprune.model.data import batches, check_token_id
from layerprune.model.decoder import Decoder, states_BTD, walk_states
from layerprune.model.errors import Refused, UsageError
from layerprune.model.layerwise import Batch, Layerwise, State


class StateMean:
    """Accumulates the mean state of every depth over real tokens: float64 sums and counts, in constant memory, in any order."""

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.sums: list[torch.Tensor | None] = [None] * (layers + 1)
        self.counts = [0] * (layers + 1)

    def update(self, depth: int, states_NF: torch.Tensor) -> None:
        """Add the states of N tokens at one depth, 0 (the embedding) to L (before the final norm)."""
        self._add(depth, states_NF.double().sum(dim=0).cpu(), len(states_NF))

    def merge(self, other: StateMean) -> None:
        for depth, (total, count) in enumerate(zip(other.sums, other.counts, strict=True)):
            if total is not None:
                self._add(depth, total, count)

    def _add(self, depth: int, total_F: torch.Tensor, count: int) -> None:
        before = self.sums[depth]
        self.sums[depth] = total_F if before is None else before + total_F
        self.counts[depth] += count

    def result(self) -> torch.Tensor:
        """float64 (L+1, F), row 0 the embedding. Refused where a depth has no states, or its mean is not finite."""
        mean = [total / count for total, count in zip(self.sums, self.counts, strict=True) if total is not None]
        if len(mean) != self.layers + 1:
            raise Refused(f"{len(mean)} of {self.layers + 1} depths have states: this model does not run all of its layers on text")
        for depth, mean_F in enumerate(mean):
            if not mean_F.isfinite().all():
                where = "the embedding" if depth == 0 else f"layer {depth - 1}"
                raise Refused(
                    f"the activations after {where} are not numbers: the weights are broken or overflow in this dtype "
                    "(try --dtype float32)"
                )
        return torch.stack(mean)


def mean_states(
    decoder: Decoder,
    sequences: Sequence[Sequence[int]],
    *,
    max_tokens: int | None = None,
    pad_id: int = 0,
    progress: Callable[[int], None] = lambda documents: None,
) -> StateMean:
    """The mean state of every depth over all real tokens of tokenised documents, the baseline of `erase`.

    One forward pass without the head; max_tokens: tokens of a batch, padding included. progress is told the documents done.
    The paper's code takes ten fixed prompts instead: their last tokens, rare ones and all, then weigh heavily.
    """
    if not sequences or not all(map(len, sequences)):
        raise UsageError("the mean state needs documents of at least one token")
    check_token_id(max(map(max, sequences)), vocab_size(decoder.model.config))
    if max_tokens is None:
        max_tokens = 16384 if decoder.device.type != "cpu" else 2048
    total = StateMean(len(decoder))
    for batch in batches(sequences, max_tokens, pad_id):
        mask_BT = (torch.ones_like(batch.ids_BT) if batch.mask_BT is None else batch.mask_BT).bool()

        def see(depth: int, x_BTF: torch.Tensor, real_BT: torch.Tensor = mask_BT) -> None:
            total.update(depth, x_BTF[real_BT.to(x_BTF.device)])

        walk_states(decoder, batch.ids_BT, batch.mask_BT, see)
        progress(len(batch.rows))
    return total


@dataclass(frozen=True)
class Erasure:
    """What erasing the state of each token at each depth does to the probabilities of an answer.

    max_LT, mean_LT: float64 (L+1, T), over the A positions that predict the answer's tokens, of |p - p'|, the L2 distance of
    two next-token distributions, in [0, sqrt(2)]: 0 where nothing at that place was needed any more. Row l erases x^(l), the
    input of layer l (row L the state before the final norm); the last column is 0, since nothing of the answer comes after
    the last token. max is the paper's. applications: layers run, one layer on one row of the prompt's length each; naive: those
    of a whole forward pass for every place, and one undisturbed.
    """

    max_LT: torch.Tensor
    mean_LT: torch.Tensor
    applications: int
    naive: int


@torch.no_grad()
def erase(
    decoder: Decoder,
    ids: Sequence[int],
    answer: int,
    baseline_LF: torch.Tensor,
    *,
    max_tokens: int | None = None,
    progress: Callable[[int], None] = lambda depths: None,
) -> Erasure:
    """Set x^(l)[t] to the baseline of depth l, for every l and t of one prompt, and run the rest of the model.

    ids: T tokens of the prompt and its answer, which is the last `answer` tokens (A); the logits at -(A+1) .. -2 predict it.
    baseline_LF: (L+1, F), as `mean_states(...).result()` gives it. max_tokens: tokens of a batch, whose rows erase one
    position each; the undisturbed states of one batch are held. progress is told of each depth done.
    Raises UsageError for an answer that leaves no token before it and for a baseline of another shape; Refused for a model
    that cannot be followed layer by layer, and for probabilities that are not numbers.
    """
    layers, width = len(decoder), len(ids) - 1
    check_answer(decoder, ids, answer)
    check_followed(decoder)
    if max_tokens is None:
        max_tokens = 16384 if decoder.device.type != "cpu" else 2048
    # chunks of one size, as the recorded calls have; nothing before the last token can see it, so it is left out
    chunks = -(-width // min(width, max(1, max_tokens // width)))
    rows = -(-width // chunks)
    batch = Layerwise(decoder).begin(torch.tensor([list(ids[:-1])]).expand(rows, width))
    states = undisturbed(batch, layers)
    features = states_BTD(states[0].hidden, rows, width).shape[-1]
    if tuple(baseline_LF.shape) != (layers + 1, features):
        raise UsageError(f"the baseline is {tuple(baseline_LF.shape)}: this model needs {(layers + 1, features)}")
    answer_A = torch.arange(width - answer, width)
    vocab = vocab_size(decoder.model.config)
    # rows whose answers' logits there is room for at once; the undisturbed rows are all alike, so those of one slice do
    slice_rows = min(rows, max(1, LOGIT_BYTES // (4 * answer * vocab)))
    p_nAV = _answers(batch, states[-1], 0, slice_rows, answer_A, vocab)
    largest, mean = torch.zeros(2, layers + 1, width + 1, dtype=torch.float64)
    for depth in range(layers + 1):
        for start in range(0, width, rows):
            position_B = torch.arange(start, start + rows).clamp(max=width - 1)  # the last rows repeat where the prompt ends
            state = _erased(batch, states[depth], position_B, baseline_LF[depth])
            for layer in range(depth, layers):
                state = batch.step(layer, state)
            moved_BA = _moved(batch, state, answer_A, p_nAV)
            here = slice(start, min(start + rows, width))
            largest[depth, here] = moved_BA.amax(dim=1)[: here.stop - start]
            mean[depth, here] = moved_BA.mean(dim=1)[: here.stop - start]
        progress(1)
    if not mean.isfinite().all():
        raise Refused("the probabilities of the answer are not numbers: the weights are broken or overflow in this dtype")
    applications = rows * (layers + chunks * layers * (layers + 1) // 2)
    return Erasure(largest, mean, applications, layers * (1 + width * (layers + 1)))


def check_answer(decoder: Decoder, ids: Sequence[int], answer: int) -> None:
    """Refuse an answer that is not the end of its prompt, and ids that this model has no embedding for."""
    if not 1 <= answer < len(ids):
        raise UsageError(f"an answer of {answer} tokens in a prompt of {len(ids)}: it must be 1 to {len(ids) - 1}")
    check_token_id(max(ids), vocab_size(decoder.model.config))


def _erased(batch: Batch, state: State, position_B: torch.Tensor, baseline_F: torch.Tensor) -> State:
    """The state with one token a row replaced."""
    flat = states_BTD(state.hidden, batch.rows, batch.tokens).clone()
    flat[torch.arange(batch.rows), position_B] = baseline_F.to(flat.device, flat.dtype)
    return State(layer_form(flat, state.hidden), state.fork().shared)


def _answers(batch: Batch, state: State, start: int, count: int, answer_A: torch.Tensor, vocab: int) -> torch.Tensor:
    """The distributions (n, A, V) that predict the answer, of n rows of x^(L)."""
    row_N = torch.arange(start, start + count).repeat_interleave(len(answer_A))
    return torch.cat(list(distributions(batch, state, row_N, answer_A.repeat(count), vocab))).unflatten(0, (count, -1))


def _moved(batch: Batch, state: State, answer_A: torch.Tensor, p_nAV: torch.Tensor) -> torch.Tensor:
    """|p - p'| (B, A), float64 on the CPU.

    Every slice is of one shape, that of p, since another would change rounding: what is 0 shall be so; the last may overlap.
    """
    count, _, vocab = p_nAV.shape
    moved_BA = torch.zeros(batch.rows, len(answer_A), dtype=torch.float64)
    for start in range(0, batch.rows, count):
        start = min(start, batch.rows - count)
        q_nAV = _answers(batch, state, start, count, answer_A, vocab)
        moved_BA[start : start + count] = (q_nAV - p_nAV).norm(dim=-1).cpu()
    return moved_BA
