"""Integrated gradients: which tokens' states, at which depth, an answer's probability comes from (arXiv 2512.14064, probe 5).

The output x^(l+1) of layer l is moved on a straight line from a baseline b to what it is; the gradient of the answer's
probability along that line, times x - b, adds up to the change of the probability from b to x. How well it does so is the
completeness, which is checked.

Shapes: R points of the path at once, T tokens, F features of a token's state, A answer tokens, L layers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from layerprune.depth.erasure import check_answer
from layerprune.depth.skip import check_followed, layer_form, undisturbed
from layerprune.model.decoder import Decoder, first_hidden, forward_logits, hidden_of, replaced_forwards, states_BTD, tuple_length
from layerprune.model.errors import Refused, UsageError
from layerprune.model.layerwise import Layerwise
from layerprune.model.tail import frozen

BASELINES = ("tokens", "features", "zero")
TARGETS = ("sum", "mean-log")
RULES = ("midpoint", "left", "adaptive")


@dataclass(frozen=True)
class Attribution:
    """Integrated gradients of an answer's probability with respect to the outputs of L layers at T tokens.

    map_LT: float64 (L, T), in units of the target (probability, or nats); the last token's are 0, since nothing of the answer
    comes after it. whole: f(x), the target of the undisturbed model. change_L: f(x) - f(baseline) at every layer.
    error_L: the sum of a row of the map less its change: what the rule and its steps left out. complete_L: whether |error| is
    at most `tolerance` times the larger of |f(x)| and |f(baseline)|. points_L: points of the path whose gradients were taken.
    applications: layers run forwards, one layer on one row
    each; naive: those of the same passes through the whole model.
    """

    map_LT: torch.Tensor
    whole: float
    change_L: torch.Tensor
    error_L: torch.Tensor
    complete_L: torch.Tensor
    tolerance: float
    points_L: torch.Tensor
    applications: int
    naive: int


def integrated_gradients(
    decoder: Decoder,
    ids: Sequence[int],
    answer: int,
    *,
    baseline: str = "tokens",
    target: str = "sum",
    rule: str = "midpoint",
    steps: int = 256,
    block: int = 16,
    tolerance: float = 0.01,
    most: int = 2048,
    only_complete: bool = False,
    progress: Callable[[int], None] = lambda layers: None,
) -> Attribution:
    """Integrated gradients (Sundararajan et al., arXiv 1703.01365) of every layer's output, for one prompt and its answer.

    ids: T tokens, of which the last `answer` (A) are the gold answer; the logits at -(A+1) .. -2 predict it.
    baseline: `tokens`, the mean of the layer's output over the T tokens, one vector for all of them; `features`, each token's
    mean over its features, as the paper's code has it by a slip; `zero`.
    target: `sum` of the A gold tokens' probabilities, in [0, A], the paper's; `mean-log`, their mean log-probability in nats.
    rule: `midpoint` of each of the `steps` pieces of the path, whose error falls with the square of their number; `left`, the
    paper's code, whose error falls with their number. block: points of the path in memory at once, a row of a batch each.
    `adaptive`: midpoints of `steps` pieces to begin with; a piece must add up to the change of the target between its own two
    ends, and the worst ones are halved until what all of them miss, without regard to sign, is within the tolerance, or
    `most` points of a layer are taken. A path on which a state comes near 0, where a norm turns it round, needs that.
    Parameters get no gradients, and are as before in the end. progress is told of each layer done.
    Raises UsageError for names and counts that are not allowed; Refused for a model that cannot be followed layer by layer,
    and, as soon as a layer is done, for gradients that are not numbers and, with `only_complete`, for a sum that misses the
    change by more than the tolerance.
    """
    for name, value, allowed in (("baseline", baseline, BASELINES), ("target", target, TARGETS), ("rule", rule, RULES)):
        if value not in allowed:
            raise UsageError(f"the {name} {value!r} is none of {', '.join(allowed)}")
    if steps < 1 or block < 1:
        raise UsageError(f"{steps} steps in blocks of {block}: both must be at least 1")
    check_answer(decoder, ids, answer)
    check_followed(decoder)
    layers, width = len(decoder), len(ids)
    ids_1T = torch.tensor([list(ids)])
    batch = Layerwise(decoder).begin(ids_1T)
    states = undisturbed(batch, layers)
    run = _Rest(decoder, ids_1T, answer, target, bool(states[0].shared))
    map_LT = torch.zeros(layers, width, dtype=torch.float64)
    ends_L2 = torch.zeros(layers, 2, dtype=torch.float64)
    points_L = torch.zeros(layers, dtype=torch.int64)
    passes_L = torch.zeros(layers, dtype=torch.int64)
    with frozen(decoder.model):
        for layer in range(layers):
            like = states[layer + 1].hidden
            x_TF = states_BTD(like, 1, width)[0].float()
            path = _Path(run, layer, like, _baseline(x_TF, baseline), x_TF, block)
            if rule == "adaptive":
                map_LT[layer], ends_L2[layer] = _in_pieces(path, steps, most, tolerance)
            else:
                r_S = (torch.arange(steps, dtype=torch.float64) + (0.5 if rule == "midpoint" else 0.0)) / steps
                map_LT[layer] = path.gradients(r_S)[0].sum(dim=0) / steps
                ends_L2[layer] = path.values(torch.tensor([0.0, 1.0], dtype=torch.float64))
            points_L[layer], passes_L[layer] = path.points, path.passes
            if not (map_LT[layer].isfinite().all() and ends_L2[layer].isfinite().all()):
                raise Refused(
                    f"the gradients at the output of layer {layer} are not numbers: the weights are broken or overflow in this "
                    "dtype (try --dtype float32)"
                )
            if only_complete:
                _must_add_up(layer, map_LT[layer], ends_L2[layer], tolerance, path.points)
            progress(1)
    change_L = ends_L2[:, 1] - ends_L2[:, 0]
    error_L = map_LT.sum(dim=1) - change_L
    complete_L = error_L.abs() <= tolerance * ends_L2.abs().amax(dim=1)
    later_L = torch.arange(layers - 1, -1, -1)  # layers that a pass runs after the one whose output is set
    before_L = layers - later_L if run.real_before else torch.zeros_like(later_L)
    forwards = layers + int((passes_L * (later_L + before_L)).sum())
    whole = float(ends_L2[-1, 1])
    naive = layers + int(passes_L.sum()) * layers
    return Attribution(map_LT, whole, change_L, error_L, complete_L, tolerance, points_L, forwards, naive)


def _must_add_up(layer: int, map_T: torch.Tensor, ends_2: torch.Tensor, tolerance: float, points: int) -> None:
    change, allowed = float(ends_2[1] - ends_2[0]), tolerance * float(ends_2.abs().max())
    missed = abs(float(map_T.sum()) - change)
    if missed > allowed:
        raise Refused(
            f"the integrated gradients of layer {layer} do not add up: with {points} points their sum misses the change of the "
            f"answer's probability, {change:.3g}, by {missed:.2g}, more than the {allowed:.2g} ({100 * tolerance:g} %) that is let "
            "pass; try a --prompt whose answer the model knows, or --dtype float32 (a mixture of experts, which chooses anew "
            "along the path, may never add up)"
        )


class _Path:
    """The target along the straight line from a baseline to what a layer gave. points, passes: gradients and passes taken."""

    def __init__(
        self, run: Callable[..., torch.Tensor], layer: int, like: torch.Tensor, b_TF: torch.Tensor, x_TF: torch.Tensor, block: int
    ) -> None:
        self._run, self._layer, self._like, self.block = run, layer, like, block
        self.b_TF, self.x_TF = b_TF, x_TF
        self.points = self.passes = 0

    def run(self, path_RTF: torch.Tensor) -> torch.Tensor:
        return self._run(self._layer, path_RTF, self._like)

    def at(self, r_R: torch.Tensor) -> torch.Tensor:
        return torch.lerp(self.b_TF, self.x_TF, r_R.to(self.x_TF)[:, None, None])

    @torch.no_grad()
    def values(self, r_S: torch.Tensor) -> torch.Tensor:
        """The target (S,), float64, at S points r in [0, 1]."""
        self.passes += len(r_S)
        return torch.cat([self.run(self.at(r_R)).double().cpu() for r_R in r_S.split(self.block)])

    def gradients(self, r_S: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """d target / d r by token (S, T), and the target (S,), both float64 on the CPU."""
        self.passes, self.points = self.passes + len(r_S), self.points + len(r_S)
        along_TF = (self.x_TF - self.b_TF).double()
        slopes, values = [], []
        for r_R in r_S.split(self.block):
            path_RTF = self.at(r_R).requires_grad_()
            with torch.enable_grad():
                f_R = self.run(path_RTF)
                (grad_RTF,) = torch.autograd.grad(f_R.sum(), path_RTF)
            slopes.append((grad_RTF.double() * along_TF).sum(dim=2).cpu())
            values.append(f_R.detach().double().cpu())
        return torch.cat(slopes), torch.cat(values)


def _in_pieces(path: _Path, steps: int, most: int, tolerance: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The integral by token (T,) and the target at both ends (2,), the pieces of the path halved where they do not add up."""
    low_P = torch.arange(steps, dtype=torch.float64) / steps
    size_P = torch.full_like(low_P, 1 / steps)
    f_E = path.values(torch.arange(steps + 1, dtype=torch.float64) / steps)
    ends_P2 = torch.stack([f_E[:-1], f_E[1:]], dim=1)
    slope_PT, f_P = path.gradients(low_P + size_P / 2)
    allowed = tolerance * f_E[[0, -1]].abs().max()
    while True:
        missed_P = (slope_PT.sum(dim=1) * size_P - (ends_P2[:, 1] - ends_P2[:, 0])).abs()
        order_P = missed_P.argsort(descending=True)
        # the fewest pieces without which the others are well within what is allowed
        left_P = missed_P.sum() - missed_P[order_P].cumsum(dim=0)
        count = min(int((left_P > allowed / 2).sum()) + 1, (most - path.points) // 2)
        if not missed_P.sum() > allowed or count < 1:
            return (slope_PT * size_P[:, None]).sum(dim=0), f_E[[0, -1]]
        worst, rest = order_P[:count], order_P[count:]
        half_N = size_P[worst] / 2
        lows = torch.cat([low_P[worst], low_P[worst] + half_N])
        ends = torch.cat([
            torch.stack([ends_P2[worst, 0], f_P[worst]], dim=1), torch.stack([f_P[worst], ends_P2[worst, 1]], dim=1)
        ])  # fmt: skip
        halves = torch.cat([half_N, half_N])
        slope_NT, f_N = path.gradients(lows + halves / 2)
        low_P, size_P = torch.cat([low_P[rest], lows]), torch.cat([size_P[rest], halves])
        ends_P2, f_P = torch.cat([ends_P2[rest], ends]), torch.cat([f_P[rest], f_N])
        slope_PT = torch.cat([slope_PT[rest], slope_NT])


def _baseline(x_TF: torch.Tensor, name: str) -> torch.Tensor:
    if name == "zero":
        return torch.zeros_like(x_TF)
    return x_TF.mean(dim=0 if name == "tokens" else 1, keepdim=True).expand_as(x_TF)


class _Rest:
    """The target as a function of a layer's output: what is before that layer hands on, what is after it runs.

    real_before: whether earlier layers run all the same, for what they leave in mappings that later layers read (Gemma-3n and
    Gemma-4 share keys and values so): these stay those of the undisturbed pass, no gradient flows through them.
    """

    def __init__(self, decoder: Decoder, ids_1T: torch.Tensor, answer: int, target: str, real_before: bool) -> None:
        self.decoder, self.ids_1T, self.answer, self.log = decoder, ids_1T, answer, target == "mean-log"
        self.real_before = real_before
        self._length = tuple_length(decoder)
        # logits of the answer only, where the model can do so
        names = inspect.signature(decoder.model.forward).parameters
        self._only: dict[str, Any] = {"logits_to_keep": answer + 1} if "logits_to_keep" in names else {}

    def __call__(self, layer: int, path_RTF: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """f (R,) in float32 for R states of the output of one layer; `like` is one in the layer's own form and dtype."""
        hidden = layer_form(path_RTF.to(like.dtype), like)

        def handing_on(state: torch.Tensor | None) -> Callable[..., Any]:
            def forward(old: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
                output = first_hidden(args, kwargs)
                if self.real_before:
                    with torch.no_grad():
                        output = hidden_of(old(*args, **kwargs))
                output = output if state is None else state
                return output if self._length is None else (output, *[None] * (self._length - 1))

            return forward

        before = ((self.decoder.layers[i], handing_on(hidden if i == layer else None)) for i in range(layer + 1))
        with replaced_forwards(before):
            ids_RT = self.ids_1T.expand(len(path_RTF), -1)
            logits = forward_logits(self.decoder, ids_RT, **self._only)[:, -(self.answer + 1) : -1].float()
        gold_RA1 = self.ids_1T[:, -self.answer :, None].expand(len(path_RTF), -1, -1).to(logits.device)
        logp_RA = logits.log_softmax(dim=-1).gather(2, gold_RA1)[..., 0]
        return logp_RA.mean(dim=1) if self.log else logp_RA.exp().sum(dim=1)
