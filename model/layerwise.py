"""The layerwise pass: a model's layers called one by one, in any order, on any hidden state.

Nothing here knows a model family. One run of the model with every layer replaced by a recorder shows what it hands each
layer (masks that differ by layer type, rotary embeddings, position ids); each real layer is then called with its own
recorded arguments, and the end of the model (final norm, head, scaling, soft-capping) is run with layers that return the
state given. Where a model does more between its layers, `Layerwise` gives other logits than the model itself: compare
before relying on it, as `layerprune.model.tree.exact_branches` does.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch

from layerprune.model.decoder import (
    Decoder,
    Stop,
    first_hidden,
    forward_logits,
    hidden_of,
    replaced_forwards,
    tuple_length,
    width_of,
)
from layerprune.model.errors import model_errors

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class State:
    """A hidden state on its way through the layers, (batch, tokens, features) or with a dimension of streams more.

    shared: the branch's own copies of mappings through which layers hand each other something beside the state (keys and
    values that later layers share, for instance), by the identity of the model's mapping.
    """

    hidden: torch.Tensor
    shared: dict[int, Any]

    def fork(self) -> State:
        """The same state for another branch, which must not see what this one writes into the mappings."""
        return State(self.hidden, {key: copy.copy(value) for key, value in self.shared.items()}) if self.shared else self


class Layerwise:
    """The layers of one decoder, to be called one by one. Without gradients and without a KV cache."""

    def __init__(self, decoder: Decoder, length: int | None | str = "look") -> None:
        """length: how many values the layers return (None: a bare tensor), where that is known; by default the first is run."""
        self.decoder = decoder
        self.length = tuple_length(decoder) if isinstance(length, str) else length

    def __len__(self) -> int:
        return len(self.decoder)

    @torch.no_grad()
    def begin(self, ids_BT: torch.Tensor, mask_BT: torch.Tensor | None = None) -> Batch:
        """Record what the model hands its layers for these tokens; padding is on the right, mask_BT 1 on real tokens."""
        calls: list[Call] = []
        last = len(self) - 1

        def recorder(index: int) -> Callable[..., Any]:
            def forward(old: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
                calls.append((args, kwargs))
                if index == last:
                    raise Stop
                return self.as_output(first_hidden(args, kwargs))

            return forward

        layers = ((layer, recorder(i)) for i, layer in enumerate(self.decoder.layers))
        with replaced_forwards(layers), contextlib.suppress(Stop):
            forward_logits(self.decoder, ids_BT, mask_BT)
        return Batch(self, calls, ids_BT.shape[0], ids_BT.shape[1])

    def as_output(self, hidden: torch.Tensor) -> Any:
        """A hidden state in the form in which this model's layers return it."""
        return hidden if self.length is None else (hidden, *[None] * (self.length - 1))

    @torch.no_grad()
    def finish(self, hidden: torch.Tensor, rows: int, tokens: int) -> torch.Tensor:
        """Logits (rows, tokens, vocabulary) of x^(L), a state of that many rows and tokens before the final norm."""

        def first(old: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return self.as_output(hidden)

        def other(old: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return self.as_output(first_hidden(args, kwargs))

        ids_BT = torch.zeros((rows, tokens), dtype=torch.long, device=self.decoder.device)  # thrown away
        with replaced_forwards((layer, other if i else first) for i, layer in enumerate(self.decoder.layers)):
            return forward_logits(self.decoder, ids_BT)


def token_bytes(decoder: Decoder) -> tuple[int, int, int]:
    """What a batch holds between two layers: the numbers in a token's state (several streams count together), the bytes of a
    token that its layers are called with beside it, and those of each pair of tokens of a row (masks).

    One short row with padding is recorded, for which no layer needs its weights.
    """
    tokens = 13
    ids_BT, mask_BT = torch.ones((1, tokens), dtype=torch.long), torch.ones((1, tokens), dtype=torch.long)
    mask_BT[0, -1] = 0
    for length in (None, 1, 2):  # what layers return is not known before one of them has run
        try:
            batch = Layerwise(decoder, length).begin(ids_BT, mask_BT)
        except model_errors():
            continue
        hidden = batch.start().hidden
        batch.forget_start()
        beside = pair = 0
        for held in batch.held():
            if held.shape[-2:] == (tokens, tokens):
                pair += held.untyped_storage().nbytes()
            else:
                beside += held.untyped_storage().nbytes()
        return hidden.numel() // tokens, -(-beside // tokens), -(-pair // tokens**2)
    return width_of(decoder), 0, decoder.model.dtype.itemsize


class Batch:
    """One batch of tokens in a layerwise pass."""

    def __init__(self, owner: Layerwise, calls: list[Call], rows: int, tokens: int) -> None:
        self._owner, self._calls, self.rows, self.tokens = owner, calls, rows, tokens
        self._layers = list(owner.decoder.layers)

    def start(self) -> State:
        """x^(0), the input of the first layer."""
        # not only dicts: newer transformers' Gemma-3n and Gemma-4 share keys and values in a UserDict
        values = [v for args, kwargs in self._calls for v in (*args, *kwargs.values())]
        shared = {id(v): copy.copy(v) for v in values if isinstance(v, MutableMapping)}
        return State(first_hidden(*self._calls[0]), shared)

    def forget_start(self) -> None:
        """Let go of x^(0), which every recorded call holds; `step` has its own state, `start` is over."""
        self._calls = [
            ((None, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": None}) for args, kwargs in self._calls
        ]

    def held(self) -> list[torch.Tensor]:
        """The tensors that the recorded calls keep, one of those that share their memory."""
        found: dict[int, torch.Tensor] = {}
        waiting: list[Any] = list(self._calls)
        while waiting:
            value = waiting.pop()
            if isinstance(value, torch.Tensor):
                found.setdefault(value.untyped_storage().data_ptr(), value)
            elif isinstance(value, Mapping):
                waiting += value.values()
            elif isinstance(value, list | tuple):
                waiting += value
        return list(found.values())

    @torch.no_grad()
    def step(self, layer: int, state: State) -> State:
        """The state after one layer (original, 0-based index)."""
        args, kwargs = self._calls[layer]
        if args:
            args = (state.hidden, *args[1:])
        else:
            kwargs = {**kwargs, "hidden_states": state.hidden}
        if state.shared:
            args = tuple(state.shared.get(id(value), value) for value in args)
            kwargs = {key: state.shared.get(id(value), value) for key, value in kwargs.items()}
        return State(hidden_of(self._layers[layer](*args, **kwargs)), state.shared)

    def logits(self, state: State, row_N: torch.Tensor, position_N: torch.Tensor) -> torch.Tensor:
        """Logits (N, vocabulary) at N positions of x^(L); the final norm and the head see these positions only.

        They are handed over as rows no longer than the batch's, since a model's position embeddings end somewhere.
        """
        hidden = state.hidden
        streams = hidden.dim() == 4 and hidden.shape[1:3] == (self.rows, self.tokens)
        row_N, position_N = row_N.to(hidden.device), position_N.to(hidden.device)
        count = len(row_N)
        rows = -(-count // self.tokens)
        width = -(-count // rows)
        if rows * width > count:  # at most rows - 1 positions are computed in vain
            spare = torch.zeros(rows * width - count, dtype=torch.long, device=hidden.device)
            row_N, position_N = torch.cat([row_N, spare]), torch.cat([position_N, spare])
        picked = hidden[:, row_N, position_N] if streams else hidden[row_N, position_N]
        shape = (picked.shape[0], rows, width, *picked.shape[2:]) if streams else (rows, width, *picked.shape[1:])
        return self._owner.finish(picked.reshape(shape), rows, width).flatten(0, 1)[:count]
