"""A model in training: its layers kept or computed again, its loss in slices, its teacher beside it.

The model's own code runs the layers and decides their arguments; only the layers' `forward` is shadowed, as everywhere in this
house, so nothing here knows a model family.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from layerprune.heal.fused import IGNORED, next_token_loss
from layerprune.heal.linear import LoraLinear, lora_linears
from layerprune.model.cuts import Kept
from layerprune.model.decoder import Decoder, Stop, first_hidden, hidden_of, replaced_forwards, tuple_length

Out = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Teaching:
    """Distillation: the model runs whole and without adapters as the teacher, and only the `kept` layers as the student.

    weight: of KL(teacher || student) beside the next-token loss. shared: layers at the start that both have in common and
    that no adapter changes; they run once.
    """

    kept: Kept
    weight: float
    shared: int = 0


class Student:
    """The training forward of a decoder with adapters, between `installed` and its end.

    recomputed: layers whose activations are not kept, but computed again in the backward pass. compiled: layers that run
    through torch.compile. Both may be changed at any time.
    """

    def __init__(self, decoder: Decoder, teaching: Teaching | None = None, extra: Mapping[str, int] | None = None) -> None:
        self.decoder, self.teaching, self.extra = decoder, teaching, dict(extra or {})
        self.recomputed: frozenset[int] = frozenset()
        self.compiled = False
        self.whole = False
        """Whether the model's own full logits are taken: for models whose end cannot be run on a slice of states."""
        self.record: dict[int, tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] | None = None
        """Where set, layers are not run: each one's function and arguments are noted."""
        self.kept = teaching.kept if teaching else tuple(range(len(decoder)))
        self._length = tuple_length(decoder)
        self._vocab = decoder.model.get_input_embeddings().weight.shape[0]
        self._own = list(decoder.layers)
        self._adapters: list[LoraLinear] = lora_linears(decoder.model)
        self._drops_out = any(
            isinstance(m, torch.nn.Dropout) and m.p > 0 and "lora_" not in name for name, m in decoder.model.named_modules()
        )
        """Whether the model has a dropout of its own, beside the adapters'; its teacher is without."""
        self._fast: dict[int, Callable[..., Any]] = {}
        self._injected: torch.Tensor | None = None
        self._skipped: frozenset[int] = frozenset()
        self._enter: tuple[int, torch.Tensor] | None = None
        self._leave = self.kept[-1]
        self._watched: int | None = None
        self._seen: torch.Tensor | None = None
        self._final: torch.Tensor | None = None

    @contextlib.contextmanager
    def installed(self, wrapper: Any = None) -> Iterator[None]:
        """Run the layers as planned; `wrapper` (peft's model around the decoder's) returns what `loss` does. Undone in the end."""

        def forward(this: Any, **inputs: Any) -> Out:
            return self.loss(**inputs)

        try:
            with replaced_forwards((layer, self._layer(i)) for i, layer in enumerate(self._own)):
                if wrapper is not None:
                    # bound, as accelerate takes it apart and binds it again
                    wrapper.__dict__["forward"] = types.MethodType(forward, wrapper)
                yield
        finally:
            if wrapper is not None:
                wrapper.__dict__.pop("forward", None)

    def loss(self, input_ids: torch.Tensor, labels: torch.Tensor, num_items_in_batch: Any = None, **inputs: Any) -> Out:
        """Loss of a batch: nats summed, over `num_items_in_batch` or else over the positions that predict something.

        input_ids, labels: (batch, tokens). Returns "loss" and "nats", the next-token part without a gradient.
        """
        if self.whole:
            nats = self._whole_nats(input_ids, labels, inputs)
            return {"loss": nats / _count(labels, num_items_in_batch), "nats": nats.detach()}
        teacher = None
        with contextlib.ExitStack() as stack:
            if self.teaching is not None:
                with torch.no_grad():
                    teacher, seen = self._teach(input_ids, inputs)
                stack.enter_context(self._as_student(seen))
            hidden = self.states(input_ids, inputs)
        weight = self.teaching.weight if self.teaching else 0.0
        total, nats = next_token_loss(hidden, labels, self.finish, self._vocab, teacher, weight)
        return {"loss": total / _count(labels, num_items_in_batch), "nats": nats}

    @torch.no_grad()
    def nats(self, input_ids: torch.Tensor, labels: torch.Tensor, **inputs: Any) -> torch.Tensor:
        """Summed next-token loss of the student alone; without a gradient."""
        with contextlib.ExitStack() as stack:
            if self.teaching is not None:
                stack.enter_context(self._as_student(None))
            if self.whole:
                return self._whole_nats(input_ids, labels, inputs)
            hidden = self.states(input_ids, inputs)
        return next_token_loss(hidden, labels, self.finish, self._vocab)[1]

    def _whole_nats(self, input_ids: torch.Tensor, labels: torch.Tensor, inputs: Mapping[str, Any]) -> torch.Tensor:
        self._leave = -1
        try:
            logits_BTV = self.decoder.model(input_ids=input_ids, use_cache=False, **self._more(input_ids), **inputs).logits
        finally:
            self._leave = self.kept[-1]
        rows_NV, labels_N = logits_BTV[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return torch.nn.functional.cross_entropy(rows_NV.float(), labels_N, reduction="sum", ignore_index=IGNORED)

    def _more(self, ids_BT: torch.Tensor) -> dict[str, torch.Tensor]:
        return {key: torch.full_like(ids_BT, value) for key, value in self.extra.items()}

    def states(self, input_ids: torch.Tensor, inputs: Mapping[str, Any]) -> torch.Tensor:
        """x^(L) of the last layer that runs, before the final norm."""
        with contextlib.suppress(Stop):
            self.decoder.model(input_ids=input_ids, use_cache=False, **self._more(input_ids), **inputs)
        final, self._final = self._final, None
        assert final is not None, "every decoder reaches its last layer"
        return final

    def finish(self, hidden: torch.Tensor, rows: int, tokens: int) -> torch.Tensor:
        """Logits (rows, tokens, vocabulary) of a slice of x^(L): the model's end, with its layers handing `hidden` on."""
        ids_BT = torch.zeros((rows, tokens), dtype=torch.long, device=self.decoder.device)  # thrown away
        self._injected = hidden
        try:
            return self.decoder.model(input_ids=ids_BT, use_cache=False, **self._more(ids_BT)).logits
        finally:
            self._injected = None

    def _teach(self, input_ids: torch.Tensor, inputs: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The teacher's x^(L), and the state that the student goes on from."""
        assert self.teaching is not None
        shared, model = self.teaching.shared, self.decoder.model
        training = model.training
        self._leave, self._watched = len(self._own) - 1, shared - 1 if shared else None
        for adapter in self._adapters:
            adapter.active = False
        if self._drops_out:
            model.eval()
        try:
            return self.states(input_ids, inputs), self._seen
        finally:
            if self._drops_out:
                model.train(training)
            self._leave, self._watched, self._seen = self.kept[-1], None, None
            for adapter in self._adapters:
                adapter.active = True

    @contextlib.contextmanager
    def _as_student(self, seen: torch.Tensor | None) -> Iterator[None]:
        """Only the kept layers run; from `seen` on, where the start is shared."""
        assert self.teaching is not None
        gone = set(range(len(self._own))) - set(self.kept)
        if seen is not None:
            gone |= set(range(self.teaching.shared))
            first = next(i for i in self.kept if i >= self.teaching.shared)
            self._enter = first, seen
        self._skipped = frozenset(gone)
        try:
            yield
        finally:
            self._skipped, self._enter = frozenset(), None

    def _layer(self, index: int) -> Callable[..., Any]:
        def forward(old: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if self._injected is not None:
                return self._output(self._injected if index == 0 else first_hidden(args, kwargs))
            if index in self._skipped:
                return self._output(first_hidden(args, kwargs))
            if self._enter is not None and self._enter[0] == index:
                args, kwargs = with_hidden(args, kwargs, self._enter[1])
            if self.record is not None:
                self.record[index] = (old, args, kwargs)
                output = self._output(first_hidden(args, kwargs))
            else:
                output = self.run(index, old, *args, **kwargs)
            if index == self._watched:
                self._seen = hidden_of(output)
            if index == self._leave:
                self._final = hidden_of(output)
                raise Stop
            return output

        return forward

    def run(self, index: int, old: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """One layer as it was planned."""
        if self.compiled:
            if index not in self._fast:
                # one compilation serves all layers of a kind; packed, decoded, first and evaluated ones differ
                torch._dynamo.config.recompile_limit = 64
                self._fast[index] = torch.compile(old, dynamic=False)
            old = self._fast[index]
        if index in self.recomputed and torch.is_grad_enabled():
            return checkpoint(old, *args, use_reentrant=False, **kwargs)
        return old(*args, **kwargs)

    def _output(self, hidden: torch.Tensor) -> Any:
        return hidden if self._length is None else (hidden, *[None] * (self._length - 1))


@contextlib.contextmanager
def still(model: Any) -> Iterator[None]:
    """Without dropout."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _count(labels_BT: torch.Tensor, given: Any) -> Any:
    return given if given is not None else (labels_BT[:, 1:] != IGNORED).sum()


def with_hidden(args: tuple[Any, ...], kwargs: Mapping[str, Any], hidden: torch.Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A layer's arguments with another hidden state."""
    return ((hidden, *args[1:]), dict(kwargs)) if args else ((), {**kwargs, "hidden_states": hidden})
