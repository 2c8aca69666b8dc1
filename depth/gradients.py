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
RULES = ("midpoint", "left")


@dataclass(frozen=True)
class Attribution:
    """Integrated gradients of an answer's probability with respect to the outputs of L layers at T tokens.

    map_LT: float64 (L, T), in units of the target (probability, or nats); the last token's are 0, since nothing of the answer
    comes after it. whole: f(x), the target of the undisturbed model. change_L: f(x) - f(baseline) at every layer.
    error_L: the sum of a row of the map less its change: what the rule and its steps left out. complete_L: whether |error| is
    at most `tolerance` times the larger of |f(x)| and |f(baseline)|. applications: layers run forwards, one layer on one row
    each; naive: those of the same passes through the whole model.
    """

    map_LT: torch.Tensor
    whole: float
    change_L: torch.Tensor
    error_L: torch.Tensor
    complete_L: torch.Tensor
    tolerance: float
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
    only: Sequence[int] | None = None,
    progress: Callable[[int], None] = lambda layers: None,
) -> Attribution:
    """Integrated gradients (Sundararajan et al., arXiv 1703.01365) of every layer's output, for one prompt and its answer.

    ids: T tokens, of which the last `answer` (A) are the gold answer; the logits at -(A+1) .. -2 predict it.
    baseline: `tokens`, the mean of the layer's output over the T tokens, one vector for all of them; `features`, each token's
    mean over its features, as the paper's code has it by a slip; `zero`.
    target: `sum` of the A gold tokens' probabilities, in [0, A], the paper's; `mean-log`, their mean log-probability in nats.
    rule: `midpoint` of each of the `steps` pieces of the path, whose error falls with the square of their number; `left`, the
    paper's code, whose error falls with their number. block: points of the path in memory at once, a row of a batch each.
    only: the layers whose output is taken; the rows of others are 0 and count as complete. None for all.
    Parameters get no gradients, and are as before in the end. progress is told of each layer done.
    Raises UsageError for names and counts that are not allowed; Refused for a model that cannot be followed layer by layer,
    and for gradients that are not numbers.
    """
    for name, value, allowed in (("baseline", baseline, BASELINES), ("target", target, TARGETS), ("rule", rule, RULES)):
        if value not in allowed:
            raise UsageError(f"the {name} {value!r} is none of {', '.join(allowed)}")
    if steps < 1 or block < 1:
        raise UsageError(f"{steps} steps in blocks of {block}: both must be at least 1")
    taken = list(range(len(decoder))) if only is None else sorted(set(only))
    if not taken or taken[0] < 0 or taken[-1] >= len(decoder):
        raise UsageError(f"layers {taken} are none or not all of 0..{len(decoder) - 1}")
    check_answer(decoder, ids, answer)
    check_followed(decoder)
    layers, width = len(decoder), len(ids)
    ids_1T = torch.tensor([list(ids)])
    batch = Layerwise(decoder).begin(ids_1T)
    states = undisturbed(batch, layers)
    run = _Rest(decoder, ids_1T, answer, target, bool(states[0].shared))
    r_S = (torch.arange(steps, dtype=torch.float64) + (0.5 if rule == "midpoint" else 0.0)) / steps
    map_LT = torch.zeros(layers, width, dtype=torch.float64)
    ends_L2 = torch.zeros(layers, 2, dtype=torch.float64)
    with frozen(decoder.model):
        for layer in taken:
            like = states[layer + 1].hidden
            x_TF = states_BTD(like, 1, width)[0].float()
            b_TF = _baseline(x_TF, baseline)
            with torch.no_grad():
                ends_L2[layer] = run(layer, torch.stack([b_TF, x_TF]), like).double().cpu()
            total_TF = torch.zeros_like(x_TF, dtype=torch.float64)
            for r_R in r_S.split(block):
                path_RTF = torch.lerp(b_TF, x_TF, r_R.to(x_TF)[:, None, None]).requires_grad_()
                with torch.enable_grad():
                    (grad_RTF,) = torch.autograd.grad(run(layer, path_RTF, like).sum(), path_RTF)
                total_TF += grad_RTF.double().sum(dim=0)
            map_LT[layer] = (total_TF * (x_TF - b_TF)).sum(dim=1).cpu() / steps
            progress(1)
    if not (map_LT.isfinite().all() and ends_L2.isfinite().all()):
        bad = int((~map_LT.isfinite().all(dim=1) | ~ends_L2.isfinite().all(dim=1)).nonzero()[0])
        raise Refused(
            f"the gradients at the output of layer {bad} are not numbers: the weights are broken or overflow in this dtype "
            "(try --dtype float32)"
        )
    change_L = ends_L2[:, 1] - ends_L2[:, 0]
    error_L = map_LT.sum(dim=1) - change_L
    complete_L = error_L.abs() <= tolerance * ends_L2.abs().amax(dim=1)
    passes = (steps + 2) * len(taken)
    later = sum(layers - 1 - layer for layer in taken)
    before = sum(layer + 1 for layer in taken) if run.real_before else 0
    forwards = layers + (steps + 2) * (later + before)
    whole = float(ends_L2[taken[-1], 1])
    return Attribution(map_LT, whole, change_L, error_L, complete_L, tolerance, forwards, layers + passes * layers)


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
