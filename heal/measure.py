"""What a training step costs: on a GPU the bytes and seconds of one layer of each kind, on a CPU the bytes of a sequence."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from layerprune.heal.fused import SLICE_ELEMENTS, next_token_loss
from layerprune.heal.linear import FourBitLinear, four_bit_linears
from layerprune.heal.memory import Saved, trained_layers
from layerprune.heal.student import Student, with_hidden
from layerprune.model.decoder import first_hidden, hidden_of


@dataclass(frozen=True)
class Layer:
    """One layer at one micro-batch: bytes that it leaves behind for the backward pass, the most that the backward pass takes
    beside them, seconds forward and back; `kept` with its activations kept, `again` with them computed again."""

    kept: int
    again: int
    kept_back: int
    again_back: int
    kept_seconds: float
    again_seconds: float
    forward_seconds: float

    def scaled(self, factor: float) -> Layer:
        return Layer(*(type(v)(v * factor) for v in (getattr(self, key) for key in self.__dataclass_fields__)))


@dataclass(frozen=True)
class Measured:
    """A micro-batch's costs. layers: of each layer by index; head: bytes and seconds of the loss; inputs: bytes of what the
    model hands its layers, state: bytes of one hidden state."""

    micro_batch: int
    layers: dict[int, Layer]
    head: int
    head_seconds: float
    inputs: int
    state: int

    def scaled(self, micro_batch: int) -> Measured:
        factor = micro_batch / self.micro_batch
        layers = {i: layer.scaled(factor) for i, layer in self.layers.items()}
        # the loss takes its slices one after another, whatever the number of rows
        head = self.head + round(self.state * (factor - 1))
        return Measured(
            micro_batch, layers, head, self.head_seconds * factor, round(self.inputs * factor), round(self.state * factor)
        )


class Meter:
    """Measures the layers and the loss of one student on one GPU."""

    def __init__(self, student: Student, length: int, positions_T: torch.Tensor | None) -> None:
        """positions_T: as documents restart them, None where they do not."""
        self.student, self.length, self.positions_T = student, length, positions_T
        self.device = student.decoder.device
        self.trained = trained_layers(student)

    def measure(self, size: int) -> Measured:
        student = self.student
        before = torch.cuda.memory_allocated(self.device)
        with autocast(self.device):
            calls, labels_BT = self._calls(size)
            inputs = torch.cuda.memory_allocated(self.device) - before
            kinds: dict[Any, Layer] = {}
            layers: dict[int, Layer] = {}
            for index in sorted(calls):
                kind = (_kind(student.decoder.layers[index]), index in self.trained)
                if kind not in kinds:
                    kinds[kind] = self._measure_layer(index, *calls[index])
                layers[index] = kinds[kind]
            hidden = first_hidden(*calls[max(calls)][1:]).detach()
            head, head_seconds = self._measure_head(hidden, labels_BT)
        return Measured(size, layers, head, head_seconds, inputs, hidden.numel() * hidden.element_size())

    def _calls(self, size: int) -> tuple[dict[int, Any], torch.Tensor]:
        """What the model hands each of its layers for random tokens."""
        student, vocab = self.student, self.student.decoder.model.get_input_embeddings().weight.shape[0]
        ids_BT = torch.randint(0, vocab, (size, self.length), device=self.device)
        student.record = {}
        try:
            with torch.no_grad():
                student.states(ids_BT, self.inputs(size))
            return student.record, ids_BT
        finally:
            student.record = None

    def inputs(self, size: int) -> dict[str, torch.Tensor]:
        """What a batch has beside its token ids."""
        if self.positions_T is None:
            return {}
        return {"position_ids": self.positions_T.to(self.device).expand(size, -1)}

    def _measure_layer(self, index: int, old: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Layer:
        student, trained = self.student, index in self.trained
        # the first trained layer may do without a gradient of its input; the others cannot, and they are most
        hidden = first_hidden(args, kwargs).detach().clone().requires_grad_(trained)
        args, kwargs = with_hidden(args, kwargs, hidden)
        run = functools.partial(student.run, index, old, *args, **kwargs)
        found: dict[bool, tuple[int, int, float]] = {}
        before = student.recomputed
        try:
            for again in (False, True) if trained else ():
                student.recomputed = frozenset([index] if again else [])
                self._there_and_back(run, hidden)  # warm, compiled
                behind, back = self._there_and_back(run, hidden)
                seconds = _timed(lambda: self._there_and_back(run, hidden), self.device)
                found[again] = behind, back, seconds
            student.recomputed = frozenset()
            with torch.no_grad():
                run()
                forward = _timed(run, self.device)
        finally:
            student.recomputed = before
        if not trained:
            return Layer(0, 0, 0, 0, forward, forward, forward)
        (kept, kept_back, kept_s), (again_, again_back, again_s) = found[False], found[True]
        return Layer(kept, again_, kept_back, again_back, kept_s, max(again_s, kept_s), forward)

    def _there_and_back(self, run: Callable[[], Any], hidden: torch.Tensor) -> tuple[int, int]:
        before = torch.cuda.memory_allocated(self.device)
        output = hidden_of(run())
        behind = torch.cuda.memory_allocated(self.device) - before
        slope = torch.empty_like(output)
        between = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        output.backward(slope)
        back = torch.cuda.max_memory_allocated(self.device) - between
        hidden.grad = None
        return behind, back

    def _measure_head(self, hidden: torch.Tensor, labels_BT: torch.Tensor) -> tuple[int, float]:
        student = self.student
        teaching = student.teaching

        def head() -> None:
            state = hidden.clone().requires_grad_(True)
            vocab = student.decoder.model.get_input_embeddings().weight.shape[0]
            weight = teaching.weight if teaching else 0.0
            next_token_loss(state, labels_BT, student.finish, vocab, hidden if teaching else None, weight)[0].backward()

        head()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        head()
        peak = torch.cuda.max_memory_allocated(self.device) - before
        return peak, _timed(head, self.device)

    def decode_seconds(self, weights: Sequence[Sequence[FourBitLinear]]) -> float:
        """Seconds in which one layer's weights are decoded, the mean over layers."""
        counted = [parts for parts in weights if parts]
        if not counted:
            return 0.0

        def decode() -> None:
            for part in counted[len(counted) // 2]:
                part.decoded_weight()

        decode()
        return _timed(decode, self.device)


def saved_on_cpu(student: Student, length: int, positions_T: torch.Tensor | None, compute: torch.dtype) -> Saved:
    """What a step of sequences of `length` tokens takes on a CPU, counted in one forward pass of random tokens."""
    decoder = student.decoder
    model: Any = decoder.model
    vocab = model.get_input_embeddings().weight.shape[0]
    ids_BT = torch.randint(0, vocab, (1, length))
    inputs = {} if positions_T is None else {"position_ids": positions_T.expand(1, -1)}
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    parts = [part for layer in decoder.layers for part in four_bit_linears(layer)]
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    counted, before = [], student.recomputed
    trained = trained_layers(student)
    try:
        for again in ([], trained):
            student.recomputed = frozenset(again)
            seen.clear()
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast(
                "cpu", torch.bfloat16, enabled=compute == torch.bfloat16
            ):  # fmt: skip
                hidden = student.states(ids_BT, inputs)
            counted.append(sum(seen.values()))
            state = hidden.numel() * hidden.element_size()
            del hidden
    finally:
        student.recomputed = before
    adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # gradients and Adam's two moments; the loss's slices in float32, a few at a time; a layer's widest weight, decoded
    head = 6 * 4 * min(SLICE_ELEMENTS["cpu"], length * vocab)
    fixed = 12 * adapters + head + 2 * max((part.decoded_bytes for part in parts), default=0)
    # a layer that is computed again holds on to its input; x^(L) and its gradient are there in any case
    return Saved(counted[0] + 2 * state, counted[1] + (len(trained) + 2) * state, fixed)


def _kind(layer: torch.nn.Module) -> Any:
    """What makes two layers cost the same: class, shapes of weights, kinds of attention."""
    shapes = tuple(
        (type(m).__name__, tuple(tuple(p.shape) for p in m.parameters(recurse=False)), getattr(m, "out_features", 0))
        for m in layer.modules()
    )
    return shapes, getattr(layer, "attention_type", None), getattr(layer, "layer_type", None)


def autocast(device: torch.device) -> Any:
    return torch.autocast(device.type, torch.bfloat16)


def _timed(work: Callable[[], Any], device: torch.device, times: int = 3) -> float:
    """Seconds of one call, the least of a few."""
    found = []
    for _ in range(times):
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        work()
        torch.cuda.synchronize(device)
        found.append(time.perf_counter() - started)
    return min(found)
