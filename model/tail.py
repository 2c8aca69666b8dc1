"""The end of a model on any hidden state, with a gradient by the state.

As `layerprune.model.layerwise.Layerwise.finish`, which takes none: the model runs with layers that hand the given state on,
so that its final norm, head, scaling and soft-capping are its own, and nothing here knows a model family.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from layerprune.model.decoder import Decoder, first_hidden, forward_logits, replaced_forwards, tuple_length


class Tail:
    """The model's own end: final norm, head, logit scaling, soft-capping."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        with frozen(decoder.model):
            self._length = tuple_length(decoder)

    def __call__(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Logits (B, T, V) of states (B, T, D) before the final norm, in the model's dtype.

        Each position is computed by itself, so any positions may be put side by side; T is at most the model's context, B is
        free. Gradients reach `hidden_BTD` and no parameter of the model, which is left as it was, whatever happens inside.
        """

        def first(old: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return self._output(hidden_BTD)

        def other(old: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return self._output(first_hidden(args, kwargs))

        ids_BT = torch.zeros(hidden_BTD.shape[:2], dtype=torch.long, device=self.decoder.device)  # thrown away
        layers = ((layer, other if i else first) for i, layer in enumerate(self.decoder.layers))
        with frozen(self.decoder.model), replaced_forwards(layers):
            return forward_logits(self.decoder, ids_BT)

    def _output(self, hidden: torch.Tensor) -> Any:
        return hidden if self._length is None else (hidden, *[None] * (self._length - 1))


@contextlib.contextmanager
def frozen(model: Any) -> Iterator[None]:
    """Inside, no parameter takes a gradient and nothing is dropped out; both are put back in the end."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    training = [module for module in model.modules() if module.training]
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        for module in training:
            module.training = False
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True
